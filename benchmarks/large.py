"""A photograph of a hundred million pixels: bytes in host memory, read chunk by chunk, both ways."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.cli import gate, measure, photograph
from perceiver_kernels.cli.console import Console, format_bytes
from perceiver_kernels.cli.report import CommandError, Report
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.subject import CHUNKED
from perceiver_kernels.cli.textbook import Textbook
from perceiver_kernels.cli.workload import Workload, layer_pass
from perceiver_kernels.testing.cases import EncodeCase

BANDS = 64
CHUNK = 2**17
"""Tokens per chunk: 71 MB packed at C = 261, and so few chunks that the host's share of each disappears."""


def pixels(side: int) -> Tensor:
    """Return one square photograph of side x side pixels, uint8 [1, 3, side, side], in host memory."""
    try:
        _, picture = photograph.load(None)[0]
    except CommandError:
        # A machine without scikit-image measures too: noise has the same shape and costs the same.
        return torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    rows, columns = (torch.arange(side) * size // side for size in picture.shape[1:])
    return picture[:, rows][:, :, columns][None].contiguous()


def measure_photograph(
    report: Report, console: Console, device: torch.device, *, side: int, chunk: int = CHUNK
) -> list[str]:
    """Run the chunked layer over all pixels, judge it against fp64 and report time and memory.

    Args:
        report, console: where results go.
        device: of the layer; the pixels stay in host memory.
        side: of the photograph, in pixels.
        chunk: tokens per chunk.

    Returns:
        What was wrong, one sentence each.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    positions = pk.FourierPositions(BANDS, (side, side))
    inputs = pk.InputArray.image(pixels(side), positions, mean=photograph.MEAN, std=photograph.STD)
    C = 3 + positions.channels
    case = EncodeCase("hundred-million", B=1, M=side * side, C=C, N=512, D=1024, H=1, d_qk=C, d_v=C)
    # The workload makes weights and latents; its own random inputs stay small.
    work = Workload(case, device, dtype, inputs=torch.zeros(1, 1, C), chunk=chunk)
    failures = []
    for which in ("forward", "backward"):
        call = work.layer_call(which, work.chunked_layer, inputs)
        row = _measured(call, device) | {"pass": which, "M": inputs.length, "C": case.C, "chunk": chunk}
        verdict = _judge(work, which, inputs, dtype, call)
        report.add(
            kind="large", case=case.name, implementation=CHUNKED, errors=verdict.errors,
            eager_errors=verdict.eager_errors, failure=verdict.failure, **row,
        )  # fmt: skip
        worst = max(verdict.errors.values())
        console.line(
            f"{which}: {inputs.length:,} pixels x {case.C} channels in {row['seconds']:.2f} s, "
            f"extra peak memory {format_bytes(row['peak_extra_bytes'])}, largest relative error {worst:.2g}"
        )
        failures += [f"hundred-million {which}: {verdict.failure}"] if verdict.failure else []
    return failures


def _measured(call: measure.Call, device: torch.device) -> dict[str, Any]:
    """Memory and time, each of its own run, after one that compiles and allocates workspaces."""
    call()
    peak = measure.peak_extra_bytes(call, device)
    start = time.perf_counter()
    call()
    measure.synchronize()
    return {"seconds": time.perf_counter() - start, "peak_extra_bytes": peak}


def _judge(
    work: Workload, which: str, inputs: pk.InputArray, dtype: torch.dtype, call: measure.Call
) -> gate.Verdict:
    """The textbook streams over the same pixels, in fp64 and in the layer's dtype."""
    results = []
    for kind in (dtype, torch.float64):
        layer = Textbook(work.stock_layer(Peer("eager"), kind), kind)
        results.append(layer_pass(which, layer, work.latents.to(kind), inputs, work.gradient.to(kind))())
    return gate.verdict(call(), results[0], results[1], work.names(which))
