"""Roofline costs: FLOPs, device-memory bytes and the time they need at a device's measured ceilings.

The formulas are those stated in the headers of the kernel files, and those that benchmarks count with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from perceiver_kernels.device import DeviceFacts
from perceiver_kernels.problem import CrossAttentionProblem, PackProblem, pad_channels


@dataclass(frozen=True)
class Cost:
    """FLOPs (multiply and add counted separately) and bytes through device memory of one pass."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, device: DeviceFacts, dtype: torch.dtype) -> float:
        """The larger of arithmetic and memory time; fp32 products run at half the 16-bit rate (tf32) at best."""
        rate = device.matmul_flops * (1.0 if dtype.itemsize == 2 else 0.5)
        return max(self.flops / rate, self.bytes / device.memory_bandwidth)


def pack_cost(B: int, M: int, C: int, C_content: int, in_bytes: int, out_bytes: int) -> Cost:
    """One read of the content, one write of the packed rows and of rstd."""
    return Cost(8.0 * B * M * C, B * M * (C_content * in_bytes + pad_channels(C) * out_bytes + 4.0))


def problem_pack_cost(problem: PackProblem) -> Cost:
    """Cost of ``problem``'s pack."""
    return pack_cost(
        problem.B, problem.M, problem.C, problem.C_content, problem.content_dtype.itemsize, problem.dtype.itemsize
    )


def shared_kv_cost(B: int, R: int, M: int, C: int, itemsize: int, products: int = 2, reads: int = 1) -> Cost:
    """``products`` matrix products of R x M x C per batch entry (2 forward, 3 for dq', 4 for dx) over ``reads`` of x."""
    return Cost(2.0 * products * B * R * M * C, B * (reads * M + 3.0 * R) * C * itemsize)


def absorbed_cost(p: CrossAttentionProblem) -> Cost:
    """Pack, shared-KV attention and the latent-side products; with gradients the backward too."""
    R, itemsize = p.H * p.N, p.dtype.itemsize
    cost = Cost(0.0, 0.0) if p.packed else pack_cost(p.B, p.M, p.C, p.C, itemsize, itemsize)
    latent = Cost(2.0 * p.B * R * p.C * (p.d_qk + p.d_v), 0.0)
    cost = cost + shared_kv_cost(p.B, R, p.M, p.C, itemsize) + latent
    if p.needs_grad:
        cost = cost + (shared_kv_cost(p.B, R, p.M, p.C, itemsize, products=3) + latent + latent)
    if p.inputs_need_grad:
        cost = cost + (shared_kv_cost(p.B, R, p.M, p.C, itemsize, products=4, reads=3))
    return cost


def projected_cost(p: CrossAttentionProblem) -> Cost:
    """LayerNorm, key and value projections, attention with separate keys and values; with gradients the backward too."""
    width, itemsize = p.H * (p.d_qk + p.d_v), p.dtype.itemsize
    projection = Cost(2.0 * p.B * p.M * p.C * width, p.B * p.M * (p.C + width) * itemsize)
    scores = 2.0 * p.B * p.N * p.M
    cost = Cost(0.0, 2.0 * p.B * p.M * p.C * itemsize)
    cost = cost + (projection + Cost(scores * width, p.B * p.M * width * itemsize))
    if p.needs_grad:
        cost = cost + (projection + Cost(scores * p.H * (3 * p.d_qk + 2 * p.d_v), 3.0 * p.B * p.M * width * itemsize))
    if p.inputs_need_grad:
        cost = cost + (projection)
    return cost
