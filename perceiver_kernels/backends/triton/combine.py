"""Reductions over splits, in a fixed order, and the row products the backward needs.

``merge_states`` folds the softmax states of S splits (and the state of earlier chunks) into one:
lse = log sum_s exp(lse_s), z = sum_s exp(lse_s - lse) z_s. ``sum_splits`` adds partial gradients. Both read 4 B S R C bytes.
One program reduces BLOCK_C columns of one row over all splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.triton.describe import ceil_div, power_of_two
from perceiver_kernels.backends.triton.primitives import LN_2, LOG2_E

_LN_2 = tl.constexpr(LN_2)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _combine_kernel(
    part, lse_part, rho_part, z_state, lse_state, rho_state, z, lse, rho, R, C, S,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, MERGE: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)  # row of [B * R]
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    i_b, i_r = i_row // R, i_row % R
    m, safe, l, b_rho = 0.0, 0.0, 0.0, 0.0
    if MERGE:
        m = tl.load(lse_state + i_row) if HAS_STATE else -float("inf")
        for s in range(0, S, BLOCK_S):
            o_s = s + tl.arange(0, BLOCK_S)
            m = tl.maximum(m, tl.max(tl.load(lse_part + (i_b * S + o_s) * R + i_r, mask=o_s < S, other=-float("inf")), 0))
        safe = tl.where(m == -float("inf"), 0.0, m)
    acc = tl.zeros([BLOCK_C], tl.float32)
    if HAS_STATE:
        # lse is subtracted before it is scaled: the largest weight is 1, not 1 and the rounding of lse log2(e).
        weight = tl.exp2((tl.load(lse_state + i_row) - safe) * _LOG2_E) if MERGE else 1.0
        acc += weight * tl.load(z_state + i_row * C + o_c, mask=m_c, other=0.0).to(tl.float32)
        if MERGE:
            l += weight
            b_rho += weight * tl.load(rho_state + i_row)
    for s in range(0, S, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        o_part = (i_b * S + o_s) * R + i_r
        values = tl.load(part + o_part[:, None] * C + o_c[None, :], mask=(o_s < S)[:, None] & m_c[None, :], other=0.0)
        values = values.to(tl.float32)
        if MERGE:
            weights = tl.exp2((tl.load(lse_part + o_part, mask=o_s < S, other=-float("inf")) - safe) * _LOG2_E)
            l += tl.sum(weights, 0)
            b_rho += tl.sum(weights * tl.load(rho_part + o_part, mask=o_s < S, other=0.0), 0)
            values = values * weights[:, None]
        acc += tl.sum(values, 0)
    if MERGE:
        # A row that saw nothing has l = 0: its z and rho stay 0, its lse is -inf.
        inverse_l = 1.0 / tl.where(l == 0.0, 1.0, l)
        acc *= inverse_l
        if tl.program_id(1) == 0:
            tl.store(lse + i_row, m + tl.log2(l) * _LN_2)
            tl.store(rho + i_row, b_rho * inverse_l)
    tl.store(z + i_row * C + o_c, acc.to(z.dtype.element_ty), mask=m_c)


def _launch_combine(
    part: Tensor, lse_part: Tensor | None, rho_part: Tensor | None, state: tuple[Tensor, Tensor | None, Tensor | None] | None,
    out: Tensor, lse: Tensor | None, rho: Tensor | None,
) -> None:  # fmt: skip
    B, S, R, C = part.shape
    block_c = min(power_of_two(C), 256)
    block_s = min(power_of_two(S), 16)
    z_state, lse_state, rho_state = state or (part, lse_part, rho_part)
    _combine_kernel[(B * R, ceil_div(C, block_c))](
        part, lse_part, rho_part, z_state, lse_state, rho_state, out, lse, rho, R, C, S, BLOCK_S=block_s, BLOCK_C=block_c,
        MERGE=lse_part is not None, HAS_STATE=state is not None, num_warps=2,
    )  # fmt: skip


def merge_states(
    part: Tensor, lse_part: Tensor, rho_part: Tensor, state: tuple[Tensor, Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(z, lse, rho) of all splits: part [B, S, R, C], lse_part and rho_part [B, S, R], all fp32."""
    B, _, R, C = part.shape
    z = torch.empty(B, R, C, dtype=dtype, device=part.device)
    lse = torch.empty(B, R, dtype=torch.float32, device=part.device)
    rho = torch.empty_like(lse)
    _launch_combine(part, lse_part, rho_part, state, z, lse, rho)
    return z, lse, rho


def sum_splits(part: Tensor, out: Tensor, earlier: Tensor | None = None) -> None:
    """``out`` [B, R, C] = ``earlier`` (0 if None; it may be ``out``) + the sum over splits of part [B, S, R, C] fp32."""
    _launch_combine(part, None, None, None if earlier is None else (earlier, None, None), out, None, None)


@triton.jit
def _delta_kernel(
    dz, z, dlse, drho, rho, delta, R, C, stride_dz_b, stride_dz_r,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HAS_DLSE: tl.constexpr, HAS_DRHO: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(R, BLOCK_R)
    i_b = (tl.program_id(0) // row_blocks).to(tl.int64)
    o_rows = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_rows = o_rows < R
    mask = m_rows[:, None] & (o_c < C)[None, :]
    o_flat = i_b * R + o_rows
    b_dz = tl.load(dz + i_b * stride_dz_b + o_rows[:, None] * stride_dz_r + o_c[None, :], mask=mask, other=0.0)
    b_z = tl.load(z + o_flat[:, None] * C + o_c[None, :], mask=mask, other=0.0)
    b_delta = tl.sum(b_dz.to(tl.float32) * b_z.to(tl.float32), 1)
    if HAS_DRHO:
        b_delta += tl.load(drho + o_flat, mask=m_rows, other=0.0) * tl.load(rho + o_flat, mask=m_rows, other=0.0)
    if HAS_DLSE:
        b_delta -= tl.load(dlse + o_flat, mask=m_rows, other=0.0)
    tl.store(delta + o_flat, b_delta, mask=m_rows)


def row_products(dz: Tensor, z: Tensor, dlse: Tensor | None, drho: Tensor | None, rho: Tensor) -> Tensor:
    """delta = rowsum(dz z) + drho rho - dlse: fp32 [B, R]; all contiguous but dz, whose stride along C is 1."""
    B, R, C = z.shape
    delta = torch.empty(B, R, dtype=torch.float32, device=z.device)
    block_r = 4 if C <= 512 else 2
    _delta_kernel[(ceil_div(R, block_r) * B,)](
        dz, z, dlse, drho, rho, delta, R, C, dz.stride(0), dz.stride(1), BLOCK_R=block_r,
        BLOCK_C=power_of_two(C), HAS_DLSE=dlse is not None, HAS_DRHO=drho is not None, num_warps=4,
    )  # fmt: skip
    return delta
