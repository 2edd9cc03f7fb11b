"""`perceiver-kernels check`: every available backend against the specification on this machine, in seconds.

Each probe calls a public function three times with the same tensors: on the backend, and on the reference
backend in the same dtype and in fp64. A backend passes when its errors against fp64 are at most twice the
reference's in the same dtype, plus the rounding of the output. A probe that a backend refuses is shown with
the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.cli import bench, info, kernels, options
from perceiver_kernels.cli.console import Console
from perceiver_kernels.cli.gate import Verdict, verdict
from perceiver_kernels.cli.measure import attempt, release, seeded
from perceiver_kernels.cli.report import Report
from perceiver_kernels.dispatch import BACKENDS, backends

HELP = "quick self-test of every available backend against the reference; exit code 1 on failure"
B, H, N, M, CONTENT, AXES, BANDS = 2, 2, 19, 517, 3, 2, 11
"""Sizes that fit no tile: primes, and C = 3 + 2 * (2 * 11 + 1) = 49 channels."""


@dataclass(frozen=True)
class Probe:
    """One call to check: its name, the tensors it gives, and the call for a backend, dtype and device."""

    name: str
    outputs: Sequence[str]
    call: Callable[[str, torch.dtype, torch.device], Sequence[Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--backend", type=options.names_of("backend", BACKENDS), action=options.Merged, metavar="NAME,...",
        help="check these backends only (default: every available one)",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is a GPU")
    parser.add_argument(
        "--kernels", action="store_true",
        help="instead, print what the compiler made of each CUDA C++ kernel: registers, spills, shared memory, wgmma and TMA",
    )  # fmt: skip


def execute(arguments: argparse.Namespace, console: Console) -> int:
    """Run every probe on every backend; exit code 1 when one is wrong."""
    if arguments.kernels:
        with Report("check --kernels", arguments.json) as report:
            kernels.show(console, report)
        return 0
    arguments.dtype = None
    device, _ = bench.device_and_dtype(arguments)
    names = arguments.backend or _available()
    with bench.backend_scope(names), Report("check", arguments.json) as report:
        console.line(info.device_line(report.content["environment"]))
        info.show_backends(report.content["environment"]["backends"], console)
        failures = run(report, console, device, names)
    return 1 if failures else 0


def run(
    report: Report, console: Console, device: torch.device, names: Sequence[str] | None = None
) -> list[str]:
    """Run every probe on backends (None: all available), print the table and return what was wrong."""
    rows = list(_rows(names or _available(), device, report, console))
    console.heading("Errors against fp64 (relative L2, worst tensor of each call)")
    console.table(
        ["backend", "call", "dtype", "error", "reference's", "verdict"],
        [[row["backend"], row["call"], row["dtype"], *_errors(row), row["verdict"]] for row in rows],
        spare=["reference's"],
    )
    wrong = [row for row in rows if row["verdict"] == "WRONG"]
    refused = sum(row["verdict"].startswith("refused") for row in rows)
    passed = len(rows) - len(wrong) - refused
    console.line(f"{passed} passed, {refused} refused with a reason, {len(wrong)} wrong")
    failures = [f"{row['backend']} {row['call']} {row['dtype']}: {row['failure']}" for row in wrong]
    for failure in failures:
        console.warn(f"WRONG: {failure}")
    return failures


def _available() -> list[str]:
    return [name for name, (available, _) in backends().items() if available]


def _rows(
    names: Sequence[str], device: torch.device, report: Report, console: Console
) -> Iterator[dict[str, Any]]:
    dtypes = [torch.float32, torch.bfloat16]
    if device.type == "cuda":
        dtypes.append(torch.float16)
    with console.progress("check", len(dtypes) * len(PROBES) * len(names)) as progress:
        for dtype in dtypes:
            for probe in PROBES:
                oracle, eager = (probe.call("reference", kind, device) for kind in (torch.float64, dtype))
                for name in names:
                    progress.advance(f"{name} {probe.name}")
                    yield report.add(**_row(probe, name, dtype, device, eager, oracle))
    release()


def _row(
    probe: Probe,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    eager: Sequence[Tensor],
    oracle: Sequence[Tensor],
) -> dict[str, Any]:
    row: dict[str, Any] = {"backend": backend, "call": probe.name, "dtype": str(dtype).removeprefix("torch.")}
    results: list[Sequence[Tensor]] = []
    failure = attempt(lambda: results.append(probe.call(backend, dtype, device)))
    if failure is not None:
        # A refusal is the documented answer to what a backend lacks; anything else is a defect.
        refusal = failure.startswith("no backend can serve")
        reason = failure.partition(f"{backend}: ")[2] or failure
        return row | {"verdict": f"refused: {reason}" if refusal else "WRONG", "failure": failure}
    judged: Verdict = verdict(results[0], eager, oracle, list(probe.outputs))
    return row | {
        "errors": judged.errors, "eager_errors": judged.eager_errors,
        "verdict": "WRONG" if judged.failure else "ok", "failure": judged.failure,
    }  # fmt: skip


def _errors(row: dict[str, Any]) -> list[str]:
    if "errors" not in row:
        return ["-", "-"]
    worst = max(row["errors"], key=lambda name: row["errors"][name])
    return [f"{row['errors'][worst]:.1e}", f"{row['eager_errors'][worst]:.1e}"]


# ------ probes


def _randn(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """Random values rounded to bf16, so that every dtype of a probe starts from the same numbers."""
    return torch.randn(*shape, dtype=torch.float32).bfloat16().to(device, dtype)


def _pack(backend: str, dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
    with seeded(0):
        content = _randn(dtype, device, B, 22, 23, CONTENT).requires_grad_()
        packed = pk.pack_inputs(content, pk.FourierPositions(BANDS, (22.0, 23.0)), backend=backend)
        gradient = _randn(dtype, device, *packed.data.shape)
    return (packed.data.detach(), *torch.autograd.grad(packed.data, content, gradient))


def _attend(
    backend: str, dtype: torch.dtype, device: torch.device, *, lse: bool = False, **how: Any
) -> Sequence[Tensor]:
    with seeded(1):
        q = _randn(dtype, device, B, H * N, 49).requires_grad_()
        x = _randn(dtype, device, B, M, 49).requires_grad_()
        gradients = [_randn(dtype, device, B, H * N, 49), _randn(torch.float32, device, B, H * N)]
    how = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in how.items()}
    with seeded(2):
        given = pk.shared_kv_attention(q, x, scale=0.2, return_lse=lse, backend=backend, **how)
    outputs = given if lse else (given,)
    gradients = [gradient.to(out.dtype) for gradient, out in zip(gradients, outputs, strict=False)]
    return (*(out.detach() for out in outputs), *torch.autograd.grad(outputs, (q, x), gradients))


def _layer(backend: str, dtype: torch.dtype, device: torch.device, **how: Any) -> Sequence[Tensor]:
    with seeded(3):
        q = _randn(dtype, device, B, H, N, 24).requires_grad_()
        inputs = _randn(dtype, device, B, M, 49)
        weights = [(_randn(dtype, device, H * d, 49) * 49**-0.5).requires_grad_() for d in (24, 40)]
        norm = [_randn(dtype, device, 49).requires_grad_() for _ in range(2)]
        gradient = _randn(dtype, device, B, H, N, 40)
    out = pk.input_cross_attention(
        q, inputs, *weights, norm_weight=norm[0], norm_bias=norm[1], backend=backend, **how
    )
    return (out.detach(), *torch.autograd.grad(out, (q, *weights, *norm), gradient))


def _with(call: Callable[..., Sequence[Tensor]], **arguments: Any) -> Callable[..., Sequence[Tensor]]:
    return lambda backend, dtype, device: call(backend, dtype, device, **arguments)


_ATTENDED, _LAYERED = ("z", "dq", "dx"), ("out", "dq", "dw_k", "dw_v", "dnorm_weight", "dnorm_bias")
PROBES = (
    Probe("pack_inputs with Fourier positions", ("packed", "dcontent"), _pack),
    Probe("shared_kv_attention", _ATTENDED, _attend),
    Probe("... with its log-sum-exp", ("z", "lse", "dq", "dx"), _with(_attend, lse=True)),
    Probe(
        "... with lengths, one empty",
        _ATTENDED,
        _with(_attend, lengths=torch.tensor([300, 0], dtype=torch.int32)),
    ),
    Probe("... with a key mask", _ATTENDED, _with(_attend, key_mask=torch.arange(B * M).view(B, M) % 3 > 0)),
    Probe("... with dropout", _ATTENDED, _with(_attend, dropout_p=0.25)),
    Probe("input_cross_attention, absorbed", _LAYERED, _with(_layer, method="absorbed")),
    Probe("input_cross_attention, projected", _LAYERED, _with(_layer, method="projected")),
    Probe("input_cross_attention, chunked", _LAYERED, _with(_layer, chunk_size=200)),
)
