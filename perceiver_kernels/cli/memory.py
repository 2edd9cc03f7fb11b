"""`perceiver-kernels memory`: extra peak bytes of a cross-attention layer against the number of inputs.

The closed form for inputs packed whole is itemsize * C_padded + 16 bytes per token, forward and backward (no
gradient of the inputs), and nothing per token when chunked; the measured slope is printed beside it. Out of
memory is a data point.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from perceiver_kernels.cli import bench, info, measure, options, plot
from perceiver_kernels.cli.console import Console, format_bytes
from perceiver_kernels.cli.report import CommandError, Report, check_writable
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.subject import CHUNKED, OURS, shape_of
from perceiver_kernels.cli.workload import Workload, chunk_size, packed_bytes_per_token, widths_of
from perceiver_kernels.testing.cases import ENCODE, EncodeCase

HELP = "measure extra peak memory against the number of inputs: packed, chunked and stock"
PASSES = {"forward": "forward", "backward": "forward + backward"}
DEFAULT_PEERS = {"cuda": ("eager", "math", "efficient-pad8"), "cpu": ("eager", "flash")}
FUSED = ("cuda", "triton")
SIZES = tuple(2**power for power in range(10, 22, 2))
GPU_CASE = dataclasses.replace(ENCODE["imagenet"], B=1)
CPU_CASE = EncodeCase("small", B=1, M=4096, C=69, N=64, D=128, H=1, d_qk=69, d_v=69)
"""What is swept on a CPU unless a case is named: small enough that a million inputs take seconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--case", type=options.name_of("case", ENCODE), metavar="NAME",
        help="case whose sizes but M are used (default: "
        f"{GPU_CASE.name} with B={GPU_CASE.B} on a GPU, B={CPU_CASE.B}, {widths_of(CPU_CASE)} on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=_sizes, default=SIZES, metavar="M,...",
        help=f"numbers of inputs; 64K and 1M work (default: {','.join(map(str, SIZES))})",
    )  # fmt: skip
    parser.add_argument(
        "--max-inputs", type=options.count, metavar="M", help="leave out larger sizes (default: no limit)"
    )
    parser.add_argument(
        "--passes", type=options.names_of("pass", PASSES), default=list(PASSES), metavar="NAME,...",
        help=f"what to measure (default: {','.join(PASSES)})",
    )  # fmt: skip
    defaults = "; ".join(f"{','.join(peers)} on {device}" for device, peers in DEFAULT_PEERS.items())
    parser.add_argument(
        "--peers", type=options.peers, metavar="NAME,...",
        help=f"stock implementations (default: {defaults}; 'none' for none)",
    )  # fmt: skip
    parser.add_argument("--plot", type=options.path, metavar="PATH", help="also draw a PNG")
    bench.add_device_arguments(parser)


def execute(arguments: argparse.Namespace, console: Console) -> int:
    """Run the sweep; exit code 0 also where implementations ran out of memory."""
    device, dtype = bench.device_and_dtype(arguments)
    case = ENCODE[arguments.case] if arguments.case else GPU_CASE if device.type == "cuda" else CPU_CASE
    sizes = sizes_up_to(arguments.max_inputs, arguments.sizes)
    _check_fits(case, max(sizes), device, dtype)
    if arguments.plot:
        check_writable(Path(arguments.plot))
    names = DEFAULT_PEERS[device.type] if arguments.peers is None else arguments.peers
    with bench.backend_scope(arguments.backend), Report("memory", arguments.json) as report:
        report.set(memory_method=measure.MEMORY_METHOD[device.type])
        console.line(
            f"{info.device_line(report.content['environment'])}; {measure.MEMORY_METHOD[device.type]}"
        )
        sweep = Sweep(report, console, device, dtype)
        sweep.run(case, sizes, arguments.passes, [Peer.parse(name) for name in names])
        sweep.show()
        if arguments.plot:
            title = f"{case.name}: {widths_of(case)}"
            console.line(plot.save(Path(arguments.plot), memory=sweep.rows, title=title))
    return 0


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


class Sweep:
    """Measures memory against M into a report."""

    def __init__(self, report: Report, console: Console, device: torch.device, dtype: torch.dtype) -> None:
        self.report, self.console, self.device, self.dtype = report, console, device, dtype
        self.rows: list[dict[str, Any]] = []

    def run(self, case: Any, sizes: Sequence[int], passes: Sequence[str], peers: Sequence[Peer]) -> None:
        """Measure every implementation at every size; one that failed is not tried at larger sizes."""
        exhausted: dict[tuple[str, str], str] = {}
        with self.console.progress("memory", len(sizes) * len(passes) * (2 + len(peers))) as progress:
            # Several chunks at the two largest sizes, between which the slope is taken.
            chunk = min(chunk_size(case.B), max(min(sorted(sizes)[-2:]) // 4, 1))
            for size in sizes:
                work = Workload(dataclasses.replace(case, M=size), self.device, self.dtype, chunk=chunk)
                for which in passes:
                    for name, build in self._subjects(work, which, peers).items():
                        progress.advance(f"{size:,} inputs, {which}, {name}")
                        failure = exhausted.get((which, name)) or self._refusal(work, which, name)
                        row = self._measure(work, which, name, build, failure)
                        if row["failure"]:
                            exhausted[which, name] = row["failure"]
                del work
                measure.release()

    def _subjects(
        self, work: Workload, which: str, peers: Sequence[Peer]
    ) -> dict[str, Callable[[], measure.Call]]:
        stock = {peer.name: (lambda peer=peer: work.stock(which, peer)) for peer in peers}
        return {OURS: lambda: work.ours(which), CHUNKED: lambda: work.chunked(which), **stock}

    def _refusal(self, work: Workload, which: str, name: str) -> str | None:
        """On a CPU the system would kill the process: a need beyond free memory is not tried."""
        if self.device.type == "cuda":
            return None
        needed, free = (
            _least_need(work.case, which, name, self.dtype.itemsize),
            measure.free_bytes(self.device),
        )
        if free is None or needed < 0.8 * free:
            return None
        return f"out of memory: needs about {format_bytes(needed)}, {format_bytes(free)} are free"

    def _measure(
        self, work: Workload, which: str, name: str, build: Callable[[], measure.Call], failure: str | None
    ) -> dict[str, Any]:
        peak = None
        if failure is None:
            call = build()
            # The first call on a GPU compiles and allocates workspaces; on a CPU there is nothing to warm up.
            failure = measure.attempt(call) if self.device.type == "cuda" else None
            peaks: list[int] = []
            failure = failure or measure.attempt(
                lambda: peaks.append(measure.peak_extra_bytes(call, self.device))
            )
            peak = peaks[0] if peaks else None
            measure.release()
        case = work.case
        row = self.report.add(
            kind="memory", case=case.name, shape=shape_of(case), M=case.M, **{"pass": which},
            implementation=name, peak_extra_bytes=peak, failure=failure,
            backend=work.choice(which)[1] if name in (OURS, CHUNKED) else "stock",
            predicted_bytes=predicted_bytes(case, name, self.dtype.itemsize),
            dtype=str(self.dtype).removeprefix("torch."),
        )  # fmt: skip
        self.rows.append(row)
        return row

    def show(self) -> None:
        """Print peak against M for every pass, and slopes beside the closed form."""
        for which in dict.fromkeys(row["pass"] for row in self.rows):
            rows = [row for row in self.rows if row["pass"] == which]
            names = list(dict.fromkeys(row["implementation"] for row in rows))
            self.console.line(f"\nextra peak memory, {PASSES[which]}")
            cells = {(row["M"], row["implementation"]): row for row in rows}
            table = []
            for size in dict.fromkeys(row["M"] for row in rows):
                bound = cells[size, OURS]["predicted_bytes"]
                table.append(
                    [f"{size:,}", *(_cell(cells[size, name]) for name in names), format_bytes(bound)]
                )
            closed = "closed form (packed)"
            self.console.table(["inputs", *names, closed], table, spare=[closed, *reversed(names[2:])])
            self._show_failures(rows)
            for name in (OURS, CHUNKED):
                self.console.line(slope_sentence(rows, name))

    def _show_failures(self, rows: list[dict[str, Any]]) -> None:
        told = set()
        for row in rows:
            if row["failure"] and row["implementation"] not in told:
                told.add(row["implementation"])
                self.console.line(f"  {row['implementation']} at {row['M']:,} inputs: {row['failure']}")


def predicted_bytes(case: Any, name: str, itemsize: int) -> int | None:
    """Return the closed form of what grows with M, for our implementations; None for stock."""
    if name == CHUNKED:
        return 0
    return case.B * case.M * packed_bytes_per_token(case.C, itemsize) if name == OURS else None


def slope(rows: list[dict[str, Any]], name: str) -> float | None:
    """Return the measured extra bytes per input token between the two largest sizes."""
    points = [
        (row["shape"]["B"] * row["M"], row["peak_extra_bytes"])
        for row in rows
        if row["implementation"] == name
    ]
    points = [point for point in points if point[1] is not None][-2:]
    if len(points) < 2:
        return None
    (few, less), (many, more) = points
    return (more - less) / (many - few)


def slope_sentence(rows: list[dict[str, Any]], name: str) -> str:
    """Return the measured slope beside the closed form."""
    measured = slope(rows, name)
    if measured is None:
        return f"  {name}: fewer than two sizes, no slope"
    row = next(row for row in rows if row["implementation"] == name)
    bound = row["predicted_bytes"] / (row["shape"]["B"] * row["M"])
    holds = (
        "" if row["backend"] in FUSED else f" (that of the fused kernels; this is backend {row['backend']})"
    )
    return f"  {name}: {measured:.1f} extra bytes per input token, closed form {bound:.0f}{holds}"


def _least_need(case: Any, which: str, name: str, itemsize: int) -> int:
    """A lower bound of what an implementation allocates."""
    tokens = case.B * case.M
    if name == CHUNKED:
        return 0
    if name == OURS:
        return tokens * packed_bytes_per_token(case.C, itemsize)
    keys_and_values = tokens * (case.C + case.H * (case.d_qk + case.d_v)) * itemsize
    scores = case.H * case.N * tokens * itemsize if "eager" in name or "math" in name else 0
    return (keys_and_values + 2 * scores) * (2 if which == "backward" else 1)


def _cell(row: dict[str, Any]) -> str:
    if row["failure"]:
        return "out of memory" if row["failure"].startswith("out of memory") else "cannot"
    return format_bytes(row["peak_extra_bytes"])


def _sizes(text: str) -> list[int]:
    factors = {"K": 2**10, "M": 2**20}
    try:
        sizes = [
            int(part[:-1]) * factors[part[-1]] if part[-1] in factors else int(part)
            for part in text.upper().split(",")
        ]
    except (ValueError, IndexError):
        raise CommandError(f"must be numbers like 1024,64K,1M, got {text!r}") from None
    if min(sizes) < 1:
        raise CommandError(f"must be at least 1, got {text!r}")
    return sorted(set(sizes))
