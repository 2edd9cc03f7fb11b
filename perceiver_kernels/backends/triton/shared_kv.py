"""shared_kv_attention on Triton: allocate, describe, launch, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends.triton import reasons_against_device_and_dtype, wide_shared_kv
from perceiver_kernels.backends.triton.combine import merge_states, row_products, sum_splits
from perceiver_kernels.backends.triton.describe import (
    Statistics,
    Visibility,
    ceil_div,
    contiguous,
    dropout_arguments,
    row_arguments,
    stack_row_blocks,
)
from perceiver_kernels.backends.triton.launch import launch
from perceiver_kernels.backends.triton.primitives import LOG2_E
from perceiver_kernels.backends.triton.repetition import repeated
from perceiver_kernels.backends.triton.shared_kv_kernels import (
    _shared_kv_bwd_dq_kernel,
    _shared_kv_bwd_dx_kernel,
    _shared_kv_fwd_kernel,
)
from perceiver_kernels.device import device_facts, float32_precision
from perceiver_kernels.layouts import can_describe, positive_scale, unit_stride
from perceiver_kernels.plan import SharedKVPlan, plan_shared_kv
from perceiver_kernels.problem import SharedKVProblem
from perceiver_kernels.tiles import Tile

COMPOSITE = False


def reasons_against(problem: SharedKVProblem) -> list[str]:
    """Sentences that say why these kernels cannot serve ``problem``."""
    return reasons_against_device_and_dtype(problem.device_type, problem.dtype)


def _plan(q: Tensor, x: Tensor, dropout_p: float = 0.0) -> SharedKVPlan:
    B, R, C = q.shape
    problem = SharedKVProblem(
        B=B, R=R, M=x.shape[1], C=C, dtype=q.dtype, device_type=q.device.type, masked=False, dropout=dropout_p > 0.0,
        needs_lse=True, needs_grad=False,
    )  # fmt: skip
    return plan_shared_kv(problem, device_facts(q.device))


def _options(tile: Tile, tma: bool, dropout_p: float) -> dict[str, Any]:
    return {
        "PIECES": tile.pieces, "BLOCK_Q": tile.block_q, "BLOCK_KV": tile.block_kv, "STAGES": tile.num_stages, "TMA": tma,
        "DROPOUT": dropout_p > 0.0, "PRECISION": float32_precision(), "num_warps": tile.num_warps,
    }  # fmt: skip


def shared_kv_attention_forward(
    q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, *, scale: float, dropout_p: float,
    dropout_seed: Tensor | None, key_offset: int, state: tuple[Tensor, Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None, plan: SharedKVPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(z, lse, rho), continued from the ``state`` of earlier keys where one is given."""
    # Without dropout nothing depends on where the keys lie among all of them: chunks are calls alike.
    offset = key_offset if dropout_p > 0.0 else 0
    tensors = (q, x, key_mask, lengths, dropout_seed, *(state or (None, None, None)))
    return repeated(
        "shared_kv_attention_forward", (scale, dropout_p, offset, out_dtype, plan), tensors,
        lambda: _forward(q, x, key_mask, lengths, scale, dropout_p, dropout_seed, offset, state, out_dtype, plan),
    )  # fmt: skip


def _forward(
    q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, scale: float, dropout_p: float,
    dropout_seed: Tensor | None, key_offset: int, state: tuple[Tensor, Tensor, Tensor] | None, out_dtype: torch.dtype | None,
    plan: SharedKVPlan | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, R, C = q.shape
    M, dtype = x.shape[1], out_dtype or q.dtype
    if B * R == 0 or M == 0:
        return _empty_state(q, state, dtype)
    q, x = unit_stride(q), unit_stride(x)
    key_mask, lengths = contiguous(key_mask, lengths)
    state = None if state is None else contiguous(*state)
    plan = plan or _plan(q, x, dropout_p)
    if plan.forward is None:
        with torch.cuda.device_of(q):
            return wide_shared_kv.forward(
                q, x, (key_mask, lengths), scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed, key_offset=key_offset,
                state=state, dtype=dtype, plan=plan.wide, tma=plan.tma,
            )  # fmt: skip
    q, scale = positive_scale(q, scale)
    tile, S = plan.forward, plan.forward_splits
    tma = plan.tma and can_describe(x)
    single = S == 1 and state is None
    part = torch.empty(B, S, R, C, dtype=dtype if single else torch.float32, device=q.device)
    lse_part = torch.empty(B, S, R, dtype=torch.float32, device=q.device)
    rho_part = torch.empty_like(lse_part)
    with torch.cuda.device_of(q):
        launch(
            _shared_kv_fwd_kernel, ceil_div(R, tile.block_q) * S * B,
            q, *row_arguments(x, tile.block_kv, tile.pieces, tma), part, lse_part, rho_part, key_mask, lengths,
            *dropout_arguments(dropout_p, dropout_seed, key_offset), scale * LOG2_E, R, M, C, S,
            plan.forward_keys_per_split, q.stride(0), q.stride(1), x.stride(0), x.stride(1),
            MASKED=key_mask is not None, HAS_LENGTHS=lengths is not None, **_options(tile, tma, dropout_p),
        )  # fmt: skip
        if single:
            return part[:, 0], lse_part[:, 0], rho_part[:, 0]
        return merge_states(part, lse_part, rho_part, state, dtype)


def _empty_state(
    q: Tensor, state: tuple[Tensor, Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    if state is not None:
        return state[0].to(dtype, copy=True), state[1].clone(), state[2].clone()
    rows = q.shape[:2]
    lse = torch.full(rows, -torch.inf, dtype=torch.float32, device=q.device)
    return torch.zeros(q.shape, dtype=dtype, device=q.device), lse, torch.zeros_like(lse)


def shared_kv_attention_delta(
    dz: Tensor, z: Tensor, dlse: Tensor | None, drho: Tensor | None, rho: Tensor
) -> Tensor:
    """delta = dz.z + drho rho - dlse, fp32 [B, R]."""
    if z.numel() == 0:
        return torch.zeros(z.shape[:2], dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        return row_products(unit_stride(dz), *contiguous(z, dlse, drho, rho))


def shared_kv_attention_backward(
    dz: Tensor, delta: Tensor, drho: Tensor | None, q: Tensor, x: Tensor, lse: Tensor, key_mask: Tensor | None,
    lengths: Tensor | None, *, scale: float, dropout_p: float, dropout_seed: Tensor | None, key_offset: int,
    needs_dq: bool, needs_dx: bool, dq_sum: Tensor | None = None, plan: SharedKVPlan | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dq = scale ds x and dx = scale ds^T q + (d p)^T dz, ds = p (d (dz x^T + drho) - delta).

    dq is added to ``dq_sum`` (fp32 [B, R, C], contiguous) in place where one is given, and that tensor is returned for it.
    """
    offset = key_offset if dropout_p > 0.0 else 0
    tensors = (dz, delta, drho, q, x, lse, key_mask, lengths, dropout_seed, dq_sum)
    return repeated(
        "shared_kv_attention_backward", (scale, dropout_p, offset, needs_dq, needs_dx, plan), tensors,
        lambda: _backward(
            dz, delta, drho, q, x, lse, key_mask, lengths, scale, dropout_p, dropout_seed, offset, needs_dq, needs_dx, dq_sum,
            plan,
        ),
    )  # fmt: skip


def _backward(
    dz: Tensor, delta: Tensor, drho: Tensor | None, q: Tensor, x: Tensor, lse: Tensor, key_mask: Tensor | None,
    lengths: Tensor | None, scale: float, dropout_p: float, dropout_seed: Tensor | None, key_offset: int, needs_dq: bool,
    needs_dx: bool, dq_sum: Tensor | None, plan: SharedKVPlan | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    B, R, _ = q.shape
    if B * R == 0 or x.shape[1] == 0:
        dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if dq_sum is None else dq_sum
        return dq if needs_dq else None, torch.zeros_like(x) if needs_dx else None
    dz, q, x = unit_stride(dz), unit_stride(q), unit_stride(x)
    delta, drho, lse, key_mask, lengths = contiguous(delta, drho, lse, key_mask, lengths)
    plan = plan or _plan(q, x, dropout_p)
    dropout = dropout_arguments(dropout_p, dropout_seed, key_offset)
    statistics = (lse, delta, drho)
    wide_dq, wide_dx = needs_dq and plan.dq is None, needs_dx and plan.dx is None
    dq = dx = None
    with torch.cuda.device_of(q):
        if wide_dq or wide_dx:
            dq, dx = wide_shared_kv.backward(
                q, x, dz, statistics, (key_mask, lengths), scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed,
                key_offset=key_offset, needs_dq=wide_dq, needs_dx=wide_dx, dq_sum=dq_sum, plan=plan.wide, tma=plan.tma,
            )  # fmt: skip
        if needs_dq and not wide_dq:
            dq = _launch_dq(q, x, dz, statistics, (key_mask, lengths), dropout, dropout_p, scale, plan, dq_sum)
        if needs_dx and not wide_dx:
            dx = _launch_dx(q, x, dz, statistics, (key_mask, lengths), dropout, dropout_p, scale, plan)
    return dq, dx


def _launch_dq(
    q: Tensor, x: Tensor, dz: Tensor, statistics: Statistics, masks: Visibility, dropout: tuple[Any, ...],
    dropout_p: float, scale: float, plan: SharedKVPlan, dq_sum: Tensor | None,
) -> Tensor:  # fmt: skip
    B, R, C = q.shape
    tile, S = plan.dq, plan.dq_splits
    tma = plan.tma and can_describe(x)
    single = S == 1 and dq_sum is None
    part = torch.empty(B, S, R, C, dtype=q.dtype if single else torch.float32, device=q.device)
    launch(
        _shared_kv_bwd_dq_kernel, ceil_div(R, tile.block_q) * S * B,
        q, *row_arguments(x, tile.block_kv, tile.shared_pieces, tma), x if tile.tail else None, dz, *statistics, part, masks[1],
        *dropout, scale, R, x.shape[1], C, S, plan.dq_keys_per_split, q.stride(0), q.stride(1), x.stride(0), x.stride(1),
        dz.stride(0), dz.stride(1), TAIL=tile.tail, MASKED=masks[0] is not None, HAS_LENGTHS=masks[1] is not None,
        HAS_DRHO=statistics[2] is not None, **_options(tile, tma, dropout_p),
    )  # fmt: skip
    if single:
        return part[:, 0]
    dq = torch.empty(B, R, C, dtype=q.dtype, device=q.device) if dq_sum is None else dq_sum
    sum_splits(part, dq, dq_sum)
    return dq


def _launch_dx(
    q: Tensor, x: Tensor, dz: Tensor, statistics: Statistics, masks: Visibility, dropout: tuple[Any, ...],
    dropout_p: float, scale: float, plan: SharedKVPlan,
) -> Tensor:  # fmt: skip
    B, R, C = q.shape
    M, tile = x.shape[1], plan.dx
    rows = stack_row_blocks(q, dz, tile.block_q)
    tma = plan.tma and can_describe(rows) and can_describe(x)
    dx = torch.empty(B, M, C, dtype=x.dtype, device=x.device)
    launch(
        _shared_kv_bwd_dx_kernel, ceil_div(M, tile.block_kv) * B,
        *row_arguments(rows, 2 * tile.block_q, tile.pieces, tma), *row_arguments(x, tile.block_kv, tile.pieces, tma),
        *row_arguments(dx, tile.block_kv, tile.pieces, tma), *statistics, *masks, *dropout, scale, R, M, C, rows.stride(0),
        rows.stride(1), x.stride(0), x.stride(1), MASKED=masks[0] is not None, HAS_LENGTHS=masks[1] is not None,
        HAS_DRHO=statistics[2] is not None, **_options(tile, tma, dropout_p),
    )  # fmt: skip
    return dx
