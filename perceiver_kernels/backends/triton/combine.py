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
from perceiver_kernels.backends.triton.launch import launch
from perceiver_kernels.backends.triton.primitives import LN_2, LOG2_E

_LN_2 = tl.constexpr(LN_2)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _combine_kernel(
    part, lse_part, rho_part, z_state, lse_state, rho_state, z, lse, rho, R, C, S, H, stride_part, stride_z_b, stride_z_h,
    stride_z_r, stride_lse,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, MERGE: tl.constexpr, HAS_RHO: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(C, BLOCK_C)
    i_column = tl.program_id(0) % column_blocks
    i_row = (tl.program_id(0) // column_blocks).to(tl.int64)  # row of [B * R]
    o_c = i_column * BLOCK_C + tl.arange(0, BLOCK_C)
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
            if HAS_RHO:
                b_rho += weight * tl.load(rho_state + i_row)
    for s in range(0, S, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        o_part = (i_b * S + o_s) * R + i_r
        values = tl.load(part + o_part[:, None] * stride_part + o_c[None, :], mask=(o_s < S)[:, None] & m_c[None, :], other=0.0)
        values = values.to(tl.float32)
        if MERGE:
            weights = tl.exp2((tl.load(lse_part + o_part, mask=o_s < S, other=-float("inf")) - safe) * _LOG2_E)
            l += tl.sum(weights, 0)
            if HAS_RHO:
                b_rho += tl.sum(weights * tl.load(rho_part + o_part, mask=o_s < S, other=0.0), 0)
            values = values * weights[:, None]
        acc += tl.sum(values, 0)
    if MERGE:
        # A row that saw nothing has l = 0: its z and rho stay 0, its lse is -inf.
        inverse_l = 1.0 / tl.where(l == 0.0, 1.0, l)
        acc *= inverse_l
        if i_column == 0:
            tl.store(lse + i_b * stride_lse + i_r, m + tl.log2(l) * _LN_2)
            if HAS_RHO:
                tl.store(rho + i_row, b_rho * inverse_l)
    o_z = i_b // H * stride_z_b + i_b % H * stride_z_h + i_r * stride_z_r
    tl.store(z + o_z + o_c, acc.to(z.dtype.element_ty), mask=m_c)


def _launch_combine(
    part: Tensor, lse_part: Tensor | None, rho_part: Tensor | None, state: tuple[Tensor, Tensor | None, Tensor | None] | None,
    out: Tensor, lse: Tensor | None, rho: Tensor | None,
) -> None:  # fmt: skip
    B, S, R, C = part.shape
    block_c = min(power_of_two(C), 256)
    block_s = min(power_of_two(S), 16)
    z_state, lse_state, rho_state = state or (part, lse_part, rho_part)
    H, strides = (1, (out.stride(0), 0, out.stride(1))) if out.ndim == 3 else (out.shape[1], out.stride()[:3])
    launch(
        _combine_kernel, B * R * ceil_div(C, block_c),
        part, lse_part, rho_part, z_state, lse_state, rho_state, out, lse, rho, R, C, S, H, part.stride(2), *strides,
        0 if lse is None else lse.stride(-2), BLOCK_S=block_s,
        BLOCK_C=block_c, MERGE=lse_part is not None, HAS_RHO=rho is not None, HAS_STATE=state is not None, num_warps=2,
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


def merge_splits(
    part: Tensor, lse_part: Tensor, out: Tensor, lse: Tensor, earlier: tuple[Tensor, Tensor] | None = None
) -> None:
    """``out`` [B, H, L, d] and ``lse`` [B, H, L] of all splits and ``earlier``: part [B*H, S, L, d], lse_part [B*H, S, L].

    Parts are fp32, as is ``earlier``, a contiguous (out, lse); ``out`` has any strides but the last, ``lse`` equal pitches.
    """
    _launch_combine(part, lse_part, None, None if earlier is None else (*earlier, None), out, lse, None)


def sum_splits(part: Tensor, out: Tensor, earlier: Tensor | None = None) -> None:
    """``out`` = ``earlier`` (0 if None; it may be ``out``) + the sum over splits of part [B, S, R, C], fp32, rows of any pitch.

    ``out`` is [B, R, C], or [B', H, R, C] with B = B' H and any strides but the last.
    """
    _launch_combine(part, None, None, None if earlier is None else (earlier, None, None), out, None, None)


@triton.jit
def _delta_kernel(
    dz, z, dlse, drho, rho, delta, R, C, H, stride_dz_b, stride_dz_h, stride_dz_r, stride_z_b, stride_z_h, stride_z_r,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HAS_DLSE: tl.constexpr, HAS_DRHO: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(R, BLOCK_R)
    i_b = (tl.program_id(0) // row_blocks).to(tl.int64)
    o_rows = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_rows = o_rows < R
    mask = m_rows[:, None] & (o_c < C)[None, :]
    o_flat = i_b * R + o_rows
    p_dz = dz + i_b // H * stride_dz_b + i_b % H * stride_dz_h + o_rows[:, None] * stride_dz_r
    p_z = z + i_b // H * stride_z_b + i_b % H * stride_z_h + o_rows[:, None] * stride_z_r
    b_dz = tl.load(p_dz + o_c[None, :], mask=mask, other=0.0)
    b_z = tl.load(p_z + o_c[None, :], mask=mask, other=0.0)
    b_delta = tl.sum(b_dz.to(tl.float32) * b_z.to(tl.float32), 1)
    if HAS_DRHO:
        b_delta += tl.load(drho + o_flat, mask=m_rows, other=0.0) * tl.load(rho + o_flat, mask=m_rows, other=0.0)
    if HAS_DLSE:
        b_delta -= tl.load(dlse + o_flat, mask=m_rows, other=0.0)
    tl.store(delta + o_flat, b_delta, mask=m_rows)


def _launch_delta(
    dz: Tensor, z: Tensor, dlse: Tensor | None, drho: Tensor | None, rho: Tensor | None, delta: Tensor
) -> None:
    *batch, R, C = dz.shape
    H = batch[-1] if len(batch) == 2 else 1
    strides = [(t.stride(0), t.stride(1) if len(batch) == 2 else 0, t.stride(-2)) for t in (dz, z)]
    block_r = 4 if C <= 512 else 2
    launch(
        _delta_kernel, ceil_div(R, block_r) * batch[0] * H,
        dz, z, dlse, drho, rho, delta, R, C, H, *strides[0], *strides[1], BLOCK_R=block_r, BLOCK_C=power_of_two(C),
        HAS_DLSE=dlse is not None, HAS_DRHO=drho is not None, num_warps=4,
    )  # fmt: skip


def row_products(dz: Tensor, z: Tensor, dlse: Tensor | None, drho: Tensor | None, rho: Tensor) -> Tensor:
    """delta = rowsum(dz z) + drho rho - dlse: fp32 [B, R]; the last stride of dz and z is 1, the others are contiguous."""
    delta = torch.empty(z.shape[:2], dtype=torch.float32, device=z.device)
    _launch_delta(dz, z, dlse, drho, rho, delta)
    return delta


def head_products(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """delta = rowsum(dout out) - dlse: fp32 [B, H, L] from [B, H, L, d] of any strides but the last."""
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    _launch_delta(dout, out, dlse, None, None, delta)
    return delta
