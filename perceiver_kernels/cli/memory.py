"""`perceiver-kernels memory`: bytes of a cross-attention layer against the number of inputs, until it is out of memory.

Extra peak bytes, forward and forward + backward, and those that autograd keeps in between, of our layer, packed whole and
chunked, of stock PyTorch and of other libraries' layers; beside each of ours, and eager PyTorch, its closed form. Out of memory
is a data point, after which an implementation is not tried again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from perceiver_kernels.cli import bench, info, measure, options, originals, plot
from perceiver_kernels.cli.console import Console, format_bytes
from perceiver_kernels.cli.report import CommandError, Report, check_apart, unknown_name
from perceiver_kernels.cli.rerun import DTYPES
from perceiver_kernels.cli.saved import SAVED_METHOD
from perceiver_kernels.cli.snapshot import check_snapshot, snapshot
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.sweep import PASSES, Sweep
from perceiver_kernels.cli.workload import widths_of
from perceiver_kernels.testing.cases import ENCODE, EncodeCase

HELP = "measure extra peak memory, and what is kept for the backward, against the number of inputs: packed, chunked and stock"
DEFAULT_PEERS = {
    "cuda": ("eager", "math", "efficient", "efficient-pad8", "flash", "flash-pad8", "cudnn"),
    "cpu": ("eager", "math", "flash"),
}
SMALLEST = 2**10
FAKE = "fake"
LARGEST = {"cuda": 2**26, "cpu": 2**16, FAKE: 2**26}
"""Where sizes that nobody named end, if memory does not end before; on two free cores neither takes half a minute."""
FAKE_METHOD = "live storages of fake tensors; nothing was allocated, and scratch inside an operator is not in it"
GPU_CASE = ENCODE["imagenet-b1"]
CPU_CASE = EncodeCase("small", B=1, M=4096, C=69, N=64, D=128, H=1, d_qk=69, d_v=69)
"""What is measured on a CPU unless a case is named: small enough that a million inputs take seconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--case", type=options.name_of("case", ENCODE), metavar="NAME",
        help="case whose sizes but M are used (default: "
        f"{GPU_CASE.name} on a GPU and with fake tensors, B={CPU_CASE.B}, {widths_of(CPU_CASE)} on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=options.sizes, action=options.Merged, metavar="M,...",
        help=f"numbers of inputs; 64K, 1M and 1G work (default: by fours from {SMALLEST}, while they take half of the memory "
        f"at most, up to {LARGEST['cuda']} on a GPU and with fake tensors, {LARGEST['cpu']} on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--max-inputs", type=options.count, metavar="M", help="leave out larger sizes (default: no limit)"
    )
    parser.add_argument(
        "--passes", type=options.names_of("pass", PASSES), action=options.Merged, default=list(PASSES), metavar="NAME,...",
        help=f"what to measure (default: {','.join(PASSES)})",
    )  # fmt: skip
    defaults = "; ".join(f"{','.join(peers)} on {device}" for device, peers in DEFAULT_PEERS.items())
    parser.add_argument(
        "--peers", type=_peers, action=options.Merged, metavar="NAME,...",
        help=f"stock implementations, and the layers of {', '.join(originals.PACKAGES)} (default: {defaults}, and the layers "
        "of those that are installed; 'none' for none)",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=options.path, action=options.Once, metavar="PATH", help="also draw a PNG or SVG, as `plot` does"
    )
    parser.add_argument(
        "--snapshot", type=options.path, action=options.Once, metavar="PATH",
        help="also record a snapshot of PyTorch's CUDA allocator, of one forward + backward of ours, packed whole, at the "
        "largest size that ran; on a GPU alone. It opens in the viewer that PyTorch documents",
    )  # fmt: skip
    bench.add_device_arguments(parser)
    _add_fake(parser)


def _add_fake(parser: argparse.ArgumentParser) -> None:
    """Let --device take fake tensors too."""
    (device,) = (action for action in parser._actions if action.dest == "device")
    device.choices = [*(device.choices or ()), FAKE]
    device.help = (
        f"{device.help}, else {FAKE}; cpu: measured, of a small case. {FAKE}: nothing is allocated, so that no size is too "
        "large: storages of fake tensors are counted while they live. It stands for a GPU (its case and dtype, the operators "
        "of our fused kernels), "
        "but PyTorch's operators are those of a CPU (the gradient of an eager softmax takes one array of scores less there), "
        "and scratch inside an operator is not seen unless its fake allocates it: partial results of our splits, workspaces "
        "of libraries. Rows, table and plot say 'predicted'"
    )


def execute(arguments: argparse.Namespace, console: Console) -> int:
    """Run the sweep; exit code 0 also where implementations ran out of memory."""
    check_apart({"--json": arguments.json, "--plot": arguments.plot, "--snapshot": arguments.snapshot})
    predict = (arguments.device or (None if torch.cuda.is_available() else FAKE)) == FAKE
    device, dtype = _fake_device(arguments) if predict else bench.device_and_dtype(arguments)
    case = ENCODE[arguments.case] if arguments.case else GPU_CASE if predict or device.type == "cuda" else CPU_CASE
    sizes = arguments.sizes or default_sizes(case, device, dtype, predict=predict)
    sizes = sizes_up_to(arguments.max_inputs, sizes)
    if not predict:
        _check_fits(case, max(sizes), device, dtype)
    if arguments.snapshot:
        check_snapshot(Path(arguments.snapshot), device)
    if arguments.plot:
        plot.check_picture(Path(arguments.plot), sizes)
    with bench.backend_scope(arguments.backend), Report("memory", arguments.json) as report:
        sweep = Sweep(report, console, device, dtype, predict=predict)
        run(sweep, case, sizes, arguments.passes, arguments.peers)
        if arguments.plot:
            console.line(plot.draw(Path(arguments.plot), [report.content]))
        if arguments.snapshot:
            console.line(snapshot(Path(arguments.snapshot), case, sweep.rows, device, dtype))
    return 0


def run(
    sweep: Sweep, case: EncodeCase, sizes: Sequence[int], passes: Sequence[str] = tuple(PASSES),
    names: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Run and show a sweep, and say in its report what was counted.

    Args:
        sweep: where, and into which report.
        case: whose M is replaced.
        sizes: numbers of inputs.
        passes: of PASSES.
        names: of stock implementations and libraries; None for all that the device has.
    """
    device, report, predict = sweep.device, sweep.report, sweep.predict
    if names is None:
        names = [*DEFAULT_PEERS[device.type], *originals.installed()]
    method = FAKE_METHOD if predict else measure.MEMORY_METHOD[device.type]
    report.set(memory_method=method, saved_method=SAVED_METHOD, predicted=predict)
    where = "fake tensors, predicted" if predict else info.device_line(report.content["environment"])
    sweep.console.line(f"{where}; {method}")
    dtype = str(sweep.dtype).removeprefix("torch.")
    sweep.console.heading(f"{case.name}: B={case.B}, {widths_of(case)}, {dtype}")
    sweep.console.line(f"ours-chunked reads {sweep.chunk(case):,} inputs at a time")
    peers = [Peer.parse(name) for name in names if name not in originals.PACKAGES]
    libraries = [name for name in names if name in originals.PACKAGES]
    sweep.run(case, sizes, passes, peers, libraries)
    sweep.show()


def _fake_device(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    if arguments.backend is not None:
        names = ",".join(arguments.backend)
        raise CommandError(
            f"--backend must be left out with --device {FAKE}, the default without a GPU, where none runs, or be given with "
            f"--device cpu, got {names}"
        )
    return torch.device("cpu"), DTYPES[arguments.dtype or "bf16"]


def default_sizes(case: EncodeCase, device: torch.device, dtype: torch.dtype, *, predict: bool) -> list[int]:
    """Return the sizes of a sweep for which none were named."""
    sizes, free = [SMALLEST], None if predict else measure.free_bytes(device)
    largest = LARGEST[FAKE if predict else device.type]
    while sizes[-1] < largest and (free is None or case.B * 4 * sizes[-1] * case.C * dtype.itemsize < 0.5 * free):
        sizes.append(4 * sizes[-1])
    return sizes


def sizes_up_to(max_inputs: int | None, sizes: Sequence[int]) -> list[int]:
    """Return the sizes that --max-inputs leaves; CommandError where it leaves none."""
    left = [size for size in sizes if max_inputs is None or size <= max_inputs]
    if not left:
        raise CommandError(
            f"--max-inputs must be at least {min(sizes)}, the smallest size of the sweep, got {max_inputs}"
        )
    return left


def _check_fits(case: EncodeCase, size: int, device: torch.device, dtype: torch.dtype) -> None:
    """The inputs themselves must fit; what an implementation adds to them is what is measured."""
    needed, free = case.B * size * case.C * dtype.itemsize, measure.free_bytes(device)
    if free is not None and needed > 0.8 * free:
        raise CommandError(
            f"--sizes must fit into memory, got {size}: {format_bytes(needed)} of inputs, {format_bytes(free)} are free"
        )


def _peers(text: str) -> list[str]:
    """Read names of stock implementations and of libraries; 'none' is the empty list."""
    return [name if name in originals.PACKAGES else _stock(name) for name in options.names_or_none(text)]


def _stock(name: str) -> str:
    try:
        return Peer.parse(name).name
    except CommandError:
        known = [*dict.fromkeys(peer for peers in DEFAULT_PEERS.values() for peer in peers), *originals.PACKAGES]
        raise unknown_name("peer", name, known) from None
