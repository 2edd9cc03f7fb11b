"""Roofline costs: FLOPs, device-memory bytes and the time they need at a device's measured ceilings.

The formulas are those stated in the headers of the kernel files, and those that benchmarks count with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from perceiver_kernels.device import DeviceFacts
from perceiver_kernels.problem import (
    CrossAttentionProblem,
    OutputCrossAttentionProblem,
    PackProblem,
    RotaryProblem,
    pad_channels,
)


@dataclass(frozen=True)
class Cost:
    """FLOPs (multiply and add counted separately) and bytes through device memory of one pass."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.bytes * times)

    def seconds(self, device: DeviceFacts, dtype: torch.dtype) -> float:
        """The larger of arithmetic and memory time; fp32 products run at half the 16-bit rate (tf32) at best."""
        rate = device.matmul_flops * (1.0 if dtype.itemsize == 2 else 0.5)
        return max(self.flops / rate, self.bytes / device.memory_bandwidth)


def pack_cost(B: int, M: int, C: int, C_content: int, in_bytes: int, out_bytes: int) -> Cost:
    """One read of the content, one write of the packed rows and of rstd."""
    return Cost(8.0 * B * M * C, B * M * (C_content * in_bytes + pad_channels(C) * out_bytes + 4.0))


def problem_pack_cost(problem: PackProblem) -> Cost:
    """Cost of ``problem``'s pack."""
    p = problem
    return pack_cost(p.B, p.M, p.C + p.constants, p.C_content, p.content_dtype.itemsize, p.dtype.itemsize)


def rotary_cost(p: RotaryProblem) -> Cost:
    """One read and one write of x, one read of both tables; four products and two sums a pair."""
    tables = (p.B if p.batched else 1) * p.L * p.width * p.table_dtype.itemsize
    return Cost(3.0 * p.B * p.H * p.L * p.width, 2.0 * p.B * p.H * p.L * p.d * p.dtype.itemsize + tables)


def shared_kv_cost(B: int, R: int, M: int, C: int, itemsize: int, products: int = 2, reads: int = 1) -> Cost:
    """``products`` matrix products of R x M x C per batch entry (2 forward, 3 for dq', 4 for dx) over ``reads`` of x."""
    return Cost(2.0 * products * B * R * M * C, B * (reads * M + 3.0 * R) * C * itemsize)


def attention_cost(B: int, H: int, Lq: int, Lk: int, d_qk: int, d_v: int, itemsize: int) -> Cost:
    """Forward of attention over given keys and values."""
    return Cost(2.0 * B * H * Lq * Lk * (d_qk + d_v), 1.0 * B * H * (Lq + Lk) * (d_qk + d_v) * itemsize)


# Fractions of the dense-product rate that attention reaches on an H200 in bf16 (benchmarks/results): forward, backward to the
# queries, backward to the inputs. Torch's fused kernels stop at 256 channels a head; past them its forward runs at a sixth.
_ABSORBED_EFFICIENCY = {"narrow": (0.70, 0.62, 0.58), "wide": (0.45, 0.46, 0.60)}
_STOCK_EFFICIENCY = {"fused": (0.55, 0.42), "unfused": (0.15, 0.06)}
_PRODUCT_EFFICIENCY = 0.9
_WIDEST_FUSED = 336
_WIDEST_STOCK = 256


def _at(cost: Cost, efficiency: float) -> Cost:
    """The cost in dense-product FLOPs: what the work takes at the rate that ``efficiency`` says."""
    return Cost(cost.flops / efficiency, cost.bytes)


def absorbed_cost(p: CrossAttentionProblem, *, effective: bool = False) -> Cost:
    """Pack, shared-KV attention and the latent-side products; with gradients the backward too.

    ``effective`` counts FLOPs at the measured efficiency of each part, for comparison of times.
    """
    R, itemsize = p.H * p.N, p.dtype.itemsize
    wide = pad_channels(p.C) > _WIDEST_FUSED
    forward, dq, dx = _ABSORBED_EFFICIENCY["wide" if wide else "narrow"] if effective else (1.0, 1.0, 1.0)
    cost = Cost(0.0, 0.0) if p.packed else pack_cost(p.B, p.M, p.C, p.C, itemsize, itemsize)
    latent = Cost(2.0 * p.B * R * p.C * (p.d_qk + p.d_v), 0.0)
    cost = cost + _at(shared_kv_cost(p.B, R, p.M, p.C, itemsize), forward) + latent
    if p.needs_grad:
        cost = cost + _at(shared_kv_cost(p.B, R, p.M, p.C, itemsize, products=3), dq) + latent + latent
    if p.inputs_need_grad:
        cost = cost + _at(shared_kv_cost(p.B, R, p.M, p.C, itemsize, products=4, reads=3), dx)
    return cost


def projected_cost(p: CrossAttentionProblem, *, effective: bool = False) -> Cost:
    """LayerNorm, key and value projections, attention with separate keys and values; with gradients the backward too."""
    width, itemsize = p.H * (p.d_qk + p.d_v), p.dtype.itemsize
    fused = max(p.d_qk, p.d_v) <= _WIDEST_STOCK
    forward, backward = _STOCK_EFFICIENCY["fused" if fused else "unfused"] if effective else (1.0, 1.0)
    product = _PRODUCT_EFFICIENCY if effective else 1.0
    projection = _at(Cost(2.0 * p.B * p.M * p.C * width, p.B * p.M * (p.C + width) * itemsize), product)
    scores = 2.0 * p.B * p.N * p.M
    cost = Cost(0.0, 2.0 * p.B * p.M * p.C * itemsize) + projection
    cost = cost + _at(Cost(scores * width, p.B * p.M * width * itemsize), forward)
    if p.needs_grad:
        attention = Cost(scores * p.H * (3 * p.d_qk + 2 * p.d_v), 3.0 * p.B * p.M * width * itemsize)
        cost = cost + projection + _at(attention, backward)
    if p.inputs_need_grad:
        cost = cost + projection
    return cost


def _decode_cost(p: OutputCrossAttentionProblem, d_qk: int, d_v: int, needs_dq: bool, effective: bool) -> Cost:
    """Attention of the output queries with heads of these widths; with gradients the backward too."""
    wide = max(d_qk, d_v) > _WIDEST_STOCK
    efficiency = _ABSORBED_EFFICIENCY["wide"][:2] if wide else _STOCK_EFFICIENCY["fused"]
    forward, backward = efficiency if effective else (1.0, 1.0)
    itemsize = p.dtype.itemsize
    cost = _at(attention_cost(p.B, p.H, p.O, p.N, d_qk, d_v, itemsize), forward)
    if not (p.needs_grad or needs_dq):
        return cost
    products = d_qk * (1 + p.needs_grad + needs_dq) + d_v * (1 + p.needs_grad)
    rows = 1.0 * p.B * p.H * p.O
    return cost + _at(Cost(2.0 * rows * p.N * products, rows * (d_qk * (1 + needs_dq) + 2 * d_v) * itemsize), backward)


def _query_packing_cost(p: OutputCrossAttentionProblem, constants: int) -> Cost:
    itemsize = p.dtype.itemsize
    return Cost(0.0, 0.0) if p.packed else pack_cost(p.query_batch, p.O, p.C + constants, p.C, itemsize, itemsize)


def output_absorbed_cost(p: OutputCrossAttentionProblem, *, effective: bool = False) -> Cost:
    """Pack, attention of the normalised queries and the latent-side products; with gradients the backward too."""
    latent = Cost(2.0 * p.B * p.N * (p.d_qk * p.C + p.d_v * p.C_out), 0.0) * (3 if p.needs_grad else 1)
    attention = _decode_cost(p, p.channels, p.C_out, p.queries_need_grad, effective)
    return _query_packing_cost(p, p.bias_channels) + latent + attention


def output_projected_cost(p: OutputCrossAttentionProblem, *, effective: bool = False) -> Cost:
    """Pack, query projection, attention and output projection; with gradients the backward too."""
    trained = p.needs_grad or p.queries_need_grad
    d_qk, d_v, rows = p.H * p.d_qk, p.H * p.d_v, 1.0 * p.B * p.O
    shared, itemsize, product = 1.0 * p.query_batch * p.O, p.dtype.itemsize, _PRODUCT_EFFICIENCY if effective else 1.0
    query = _at(Cost(2.0 * shared * p.C * d_qk, shared * (p.C + d_qk) * itemsize), product)
    output = _at(Cost(2.0 * rows * d_v * p.C_out, rows * (d_v + p.C_out) * itemsize), product)
    query, output = query * (1 + p.needs_grad + p.queries_need_grad), output * (1 + p.needs_grad + trained)
    # W_q's gradient is one of the projected queries, even where their content wants none.
    return _query_packing_cost(p, 0) + query + _decode_cost(p, p.d_qk, p.d_v, trained, effective) + output
