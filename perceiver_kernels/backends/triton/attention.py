"""attention on Triton: allocate, describe, launch, reduce."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from perceiver_kernels.backends.triton import reasons_against_device_and_dtype
from perceiver_kernels.backends.triton.attention_kernels import (
    _attention_bwd_dkv_kernel,
    _attention_bwd_dq_kernel,
    _attention_fwd_kernel,
)
from perceiver_kernels.backends.triton.attention_resident_kernels import (
    _attention_decode_bwd_dq_kernel,
    _attention_decode_fwd_kernel,
    _attention_encode_bwd_kernel,
)
from perceiver_kernels.backends.triton.attention_steps import Hides
from perceiver_kernels.backends.triton.combine import head_products, merge_splits, sum_splits
from perceiver_kernels.backends.triton.describe import (
    can_describe,
    ceil_div,
    contiguous,
    dropout_arguments,
    positive_scale,
    row_arguments,
    unit_stride,
)
from perceiver_kernels.backends.triton.launch import launch
from perceiver_kernels.device import H200, device_facts, float32_precision
from perceiver_kernels.layouts import empty_heads
from perceiver_kernels.masks import Masks
from perceiver_kernels.plan import AttentionPlan, Resident, plan_attention
from perceiver_kernels.problem import AttentionProblem
from perceiver_kernels.tiles import AttentionTile, attention_tile

COMPOSITE = False

Tensors = tuple[Tensor, ...]


def reasons_against(problem: AttentionProblem) -> list[str]:
    """Sentences that say why these kernels cannot serve ``problem``."""
    reasons = reasons_against_device_and_dtype(problem.device_type, problem.dtype)
    if not reasons and attention_tile("dq", problem.d_qk, problem.d_v, 0, problem.dtype.itemsize, H200) is None:
        reasons.append(f"triton's attention takes heads of up to 256 channels, got {problem.d_qk} and {problem.d_v}")
    if problem.attn_mask == "learned":
        reasons.append("triton has no gradient of attn_mask")
    return reasons


def _plan(query: Tensor, keys: Tensors, values: Tensors, masks: Masks, dropout_p: float) -> AttentionPlan:
    problem = AttentionProblem.of(query, keys, values, masks, dropout_p, enable_gqa=True)
    plan = plan_attention(problem, device_facts(query.device))
    if plan is None:
        raise ValueError(f"heads of {problem.d_qk} and {problem.d_v} channels do not fit this device; use backend='sdpa'")
    return plan


def _windows(masks: Masks, Lq: int, Lk: int) -> tuple[Any, Any, Any, Any, int]:
    """(lo and hi of the keys that each query sees, lo and hi of the queries that see each key, causal shift).

    Packed sequences have tables, int32 [Lq] and [Lk], which hold what is causal too; else a shift is enough.
    """
    if not masks.packed:
        return None, None, None, None, Lk - Lq if masks.causal == "bottom_right" else 0
    starts_q, starts_k = masks.cu_seqlens_q, masks.cu_seqlens_k
    assert starts_q is not None and starts_k is not None
    i, j = (torch.arange(size, dtype=torch.int32, device=starts_q.device) for size in (Lq, Lk))
    of_i, of_j = (torch.searchsorted(c[1:], x, right=True) for c, x in ((starts_q, i), (starts_k, j)))
    lo, hi, row_lo, row_hi = starts_k[of_i], starts_k[of_i + 1], starts_q[of_j], starts_q[of_j + 1]
    if masks.causal != "none":
        # The first of its sequence's queries sees `first` keys; each one after it, one more.
        first = (hi - lo) - (starts_q[of_i + 1] - starts_q[of_i]) if masks.causal == "bottom_right" else 0
        hi = torch.minimum(hi, lo + (i - starts_q[of_i]) + 1 + first)
        shift = (starts_k[of_j + 1] - starts_k[of_j]) - (row_hi - row_lo) if masks.causal == "bottom_right" else 0
        row_lo = torch.maximum(row_lo, row_lo + (j - starts_k[of_j]) - shift)
    return *(table.to(torch.int32).contiguous() for table in (lo, hi, row_lo, row_hi)), 0


class _Call:
    """One call's tensors and sizes as its kernels take them."""

    def __init__(
        self, query: Tensor, keys: Tensors, values: Tensors, masks: Masks, scale: float, dropout_p: float,
        dropout_seed: Tensor | None, plan: AttentionPlan | None,
    ) -> None:  # fmt: skip
        if len(keys) > 1 and masks.attn_mask is not None and masks.attn_mask.dtype != torch.bool:
            # Segments are parts, whose states are merged by their lse alone; under an additive mask that says too little.
            keys, values = (torch.cat(keys, 2),), (torch.cat(values, 2),)
        self.plan = plan or _plan(query, keys, values, masks, dropout_p)
        self.query, self.scale = positive_scale(unit_stride(query), scale)
        self.keys, self.values = (tuple(unit_stride(part) for part in parts) for parts in (keys, values))
        B, H, Lq, d_qk = query.shape
        self.Lk, self.Lk_first = sum(key.shape[2] for key in keys), keys[0].shape[2]
        self.sizes = (B, H, H // keys[0].shape[1], Lq, self.Lk, d_qk, values[0].shape[3])
        key_mask, lengths, query_mask = contiguous(masks.key_mask, masks.lengths, masks.query_mask)
        attn_mask, self.stride_mask = None, (0, 0, 0, 0)
        if masks.attn_mask is not None:
            attn_mask = masks.attn_mask.expand(B, H, Lq, self.Lk)
            self.stride_mask = attn_mask.stride()
        *tables, self.causal_shift = _windows(masks, Lq, self.Lk)
        self.masks = (key_mask, lengths, query_mask, attn_mask, *tables[:2])
        self.key_windows = tuple(tables[2:])
        kind = "none" if attn_mask is None else "boolean" if attn_mask.dtype == torch.bool else "additive"
        self.hides = Hides(
            masks.packed, masks.causal != "none" and not masks.packed, lengths is not None, query_mask is not None,
            key_mask is not None, kind,
        )  # fmt: skip
        self.dropout = dropout_arguments(dropout_p, dropout_seed, 0)[:3]
        self.dropout_p = dropout_p

    @property
    def streams_keys_by_tma(self) -> bool:
        """Descriptors read what no mask hides, of one segment."""
        plain = not (self.hides.key_mask or self.hides.lengths) and len(self.keys) == 1
        return self.plan.tma and plain and all(map(can_describe, (*self.keys, *self.values)))

    def streams_queries_by_tma(self, *tensors: Tensor) -> bool:
        """Whether descriptors read the queries and ``tensors`` like them."""
        return self.plan.tma and not self.hides.query_mask and all(map(can_describe, (self.query, *tensors)))

    def options(self, tile: AttentionTile, tma: bool) -> dict[str, Any]:
        return {
            "PIECES_QK": tile.pieces_qk, "PIECES_V": tile.pieces_v, "BLOCK_Q": tile.block_q, "BLOCK_KV": tile.block_kv,
            "STAGES": tile.num_stages, "TMA": tma, "HIDES": self.hides, "DROPOUT": self.dropout_p > 0.0,
            "PRECISION": float32_precision(), "num_warps": tile.num_warps,
        }  # fmt: skip

    @property
    def common(self) -> tuple[Any, ...]:
        return self.masks, self.dropout, self.scale, self.causal_shift, self.sizes


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """Strides of batch, head and row of each tensor."""
    return tuple(tensor.stride()[:3] for tensor in tensors)


def _with_parts(tensor: Tensor) -> tuple[int, ...]:
    """Strides of batch, head, part and row of a result that has no parts."""
    return (*tensor.stride()[:2], 0, tensor.stride(2))


def _partials(heads: int, parts: int, length: int, width: int, H: int, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """fp32 [heads, parts, length, width], heads = B H, and its strides of batch, head, part and row."""
    part = torch.empty(heads, parts, length, width, dtype=torch.float32, device=device)
    return part, (H * part.stride(0), *part.stride()[:3])


def attention_forward(
    query: Tensor, keys: Tensors, values: Tensors, masks: Masks, *, scale: float, dropout_p: float,
    dropout_seed: Tensor | None, plan: AttentionPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, lse, statistics): statistics [2, B, H, Lq] are the row maximum and log l under an additive mask, else empty."""
    B, H, Lq, _ = query.shape
    d_v, additive = values[0].shape[3], masks.attn_mask is not None and masks.attn_mask.dtype != torch.bool
    out = empty_heads(query, B, H, Lq, d_v)
    lse = torch.empty(B, H, Lq, dtype=torch.float32, device=query.device)
    statistics = torch.empty((2, B, H, Lq) if additive else (0,), dtype=torch.float32, device=query.device)
    if out.numel() == 0 or sum(key.shape[2] for key in keys) == 0:
        return out.zero_(), lse.fill_(-torch.inf), statistics.zero_()
    call = _Call(query, keys, values, masks, scale, dropout_p, dropout_seed, plan)
    with torch.cuda.device_of(query):
        if call.plan.decode_forward is not None:
            _launch_decode_forward(call, call.plan.decode_forward, out, lse, statistics)
        else:
            _launch_forward(call, out, lse, statistics)
    return out, lse, statistics


def _launch_forward(call: _Call, out: Tensor, lse: Tensor, statistics: Tensor) -> None:
    B, H, _, Lq, _, _, d_v = call.sizes
    tile, splits, tma = call.plan.forward, call.plan.forward_splits, call.streams_keys_by_tma
    S = splits.total
    part, lse_part, strides = out, lse, _with_parts(out)
    if S > 1:
        part, strides = _partials(B * H, S, Lq, d_v, H, out.device)
        lse_part = torch.empty(B * H, S, Lq, dtype=torch.float32, device=out.device)
    launch(
        _attention_fwd_kernel, ceil_div(Lq, tile.block_q) * S * H * B, call.query,
        *row_arguments(call.keys[0], tile.block_kv, tile.pieces_qk, tma),
        *row_arguments(call.values[0], tile.block_kv, tile.pieces_v, tma), call.keys[-1], call.values[-1], part, lse_part,
        statistics, *call.common, (S, splits.first, splits.length, call.Lk_first),
        *_strides(call.query, call.keys[0], call.values[0], call.keys[-1], call.values[-1]), strides, call.stride_mask,
        SEGMENTS=len(call.keys), **call.options(tile, tma),
    )  # fmt: skip
    if S > 1:
        merge_splits(part, lse_part, out, lse)


def _launch_decode_forward(call: _Call, resident: Resident, out: Tensor, lse: Tensor, statistics: Tensor) -> None:
    B, H = call.sizes[:2]
    tile, parts, tma = resident.tile, resident.parts, call.streams_queries_by_tma()
    launch(
        _attention_decode_fwd_kernel, parts.total * H * B, *row_arguments(call.query, tile.block_q, tile.pieces_qk, tma),
        call.keys[0], call.values[0], out, lse, statistics, *call.common, (parts.total, parts.length),
        *_strides(call.query, call.keys[0], call.values[0], out), call.stride_mask,
        BLOCKS=ceil_div(call.Lk, tile.block_kv), **call.options(tile, tma),
    )  # fmt: skip


def attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, statistics: Tensor, query: Tensor, keys: Tensors,
    values: Tensors, masks: Masks, *, scale: float, dropout_p: float, dropout_seed: Tensor | None, needs_dq: bool = True,
    needs_dkv: bool = True, plan: AttentionPlan | None = None,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv], dk and dv over the keys of all segments; what is not needed may be empty."""
    Lk = sum(key.shape[2] for key in keys)
    dq = empty_heads(query, *query.shape)
    dk, dv = (
        empty_heads(parts[0], *parts[0].shape[:2], Lk, parts[0].shape[3]) if needs_dkv else query.new_empty(0)
        for parts in (keys, values)
    )
    if out.numel() == 0 or Lk == 0:
        return [dq.zero_(), dk.zero_(), dv.zero_()]
    call = _Call(query, keys, values, masks, scale, dropout_p, dropout_seed, plan)
    dout, out = unit_stride(dout), unit_stride(out)
    (dlse,) = contiguous(dlse)
    saved = _Saved(dout, dlse, out, lse, statistics, torch.empty_like(lse))
    with torch.cuda.device_of(query):
        if call.plan.encode_backward is not None and needs_dkv:
            _launch_encode_backward(call, call.plan.encode_backward, saved, dq, dk, dv)
        else:
            # The kernel of dq leaves delta for the one of dk and dv.
            if call.plan.decode_dq is not None:
                _launch_decode_dq(call, call.plan.decode_dq, saved, dq)
            else:
                _launch_dq(call, saved, dq)
            if needs_dkv:
                _launch_dkv(call, saved, dk, dv)
        if scale <= 0.0:
            # positive_scale moved the sign, or the zero, into the queries.
            dq.neg_() if scale < 0.0 else dq.zero_()
    return [dq if needs_dq else query.new_empty(0), dk, dv]


class _Saved(NamedTuple):
    """What a backward starts from, and delta [B, H, Lq], which its first kernel fills."""

    dout: Tensor
    dlse: Tensor | None
    out: Tensor
    lse: Tensor
    statistics: Tensor
    delta: Tensor


def _launch_dq(call: _Call, saved: _Saved, dq: Tensor) -> None:
    B, H, _, Lq, _, d_qk, _ = call.sizes
    tile, splits, tma = call.plan.dq, call.plan.dq_splits, call.streams_keys_by_tma
    S = splits.total
    part, strides = (dq, _with_parts(dq)) if S == 1 else _partials(B * H, S, Lq, d_qk, H, dq.device)
    launch(
        _attention_bwd_dq_kernel, ceil_div(Lq, tile.block_q) * S * H * B, call.query,
        *row_arguments(call.keys[0], tile.block_kv, tile.pieces_qk, tma),
        *row_arguments(call.values[0], tile.block_kv, tile.pieces_v, tma), call.keys[-1], call.values[-1], saved.out,
        saved.dout, saved.dlse, saved.lse, saved.statistics, saved.delta, part, *call.common,
        (S, splits.first, splits.length, call.Lk_first),
        *_strides(call.query, call.keys[0], call.values[0], call.keys[-1], call.values[-1], saved.out, saved.dout), strides,
        call.stride_mask, SEGMENTS=len(call.keys), HAS_DLSE=saved.dlse is not None, **call.options(tile, tma),
    )  # fmt: skip
    if S > 1:
        sum_splits(part, dq)


def _launch_decode_dq(call: _Call, resident: Resident, saved: _Saved, dq: Tensor) -> None:
    B, H = call.sizes[:2]
    tile, parts = resident.tile, resident.parts
    tma = call.streams_queries_by_tma(saved.out, saved.dout)
    q, out, dout = (
        row_arguments(tensor, tile.block_q, pieces, tma)
        for tensor, pieces in ((call.query, tile.pieces_qk), (saved.out, tile.pieces_v), (saved.dout, tile.pieces_v))
    )
    launch(
        _attention_decode_bwd_dq_kernel, parts.total * H * B, *q, call.keys[0], call.values[0], *out, *dout, saved.dlse,
        saved.lse, saved.statistics, saved.delta, dq, *call.common, (parts.total, parts.length),
        *_strides(call.query, call.keys[0], call.values[0], saved.out, saved.dout, dq), call.stride_mask,
        BLOCKS=ceil_div(call.Lk, tile.block_kv), HAS_DLSE=saved.dlse is not None, **call.options(tile, tma),
    )  # fmt: skip


def _launch_dkv(call: _Call, saved: _Saved, dk: Tensor, dv: Tensor) -> None:
    B, H, G, _, Lk, d_qk, d_v = call.sizes
    H_kv, tile, slices = H // G, call.plan.dkv, call.plan.dkv_slices
    tma = call.streams_queries_by_tma(saved.dout)
    parts, strides = (dk, dv), [_with_parts(dk), _with_parts(dv)]
    if slices.total > 1:
        made = [_partials(B * H_kv, slices.total, Lk, width, H_kv, dk.device) for width in (d_qk, d_v)]
        parts, strides = tuple(part for part, _ in made), [stride for _, stride in made]
    first_blocks = ceil_div(call.Lk_first, tile.block_kv)
    blocks = first_blocks + ceil_div(Lk - call.Lk_first, tile.block_kv)
    launch(
        _attention_bwd_dkv_kernel, blocks * slices.total * H_kv * B,
        *row_arguments(call.query, tile.block_q, tile.pieces_qk, tma),
        *row_arguments(saved.dout, tile.block_q, tile.pieces_v, tma), call.keys[0], call.values[0], call.keys[-1],
        call.values[-1], saved.lse, saved.statistics, saved.delta, *parts,
        call.masks, call.key_windows, *call.common[1:], (blocks, first_blocks, tile.block_kv, call.Lk_first),
        (slices.total, slices.length),
        *_strides(call.query, saved.dout, call.keys[0], call.values[0], call.keys[-1], call.values[-1]), *strides,
        call.stride_mask, SEGMENTS=len(call.keys), **call.options(tile, tma),
    )  # fmt: skip
    if slices.total > 1:
        for part, gradient in zip(parts, (dk, dv), strict=True):
            sum_splits(part, gradient)


def _launch_encode_backward(call: _Call, resident: Resident, saved: _Saved, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    B, H, _, Lq, _, d_qk, _ = call.sizes
    tile, parts, tma = resident.tile, resident.parts, call.streams_keys_by_tma
    delta = head_products(saved.dout, saved.out, saved.dlse)
    part, strides = (dq, _with_parts(dq)) if parts.total == 1 else _partials(B * H, parts.total, Lq, d_qk, H, dq.device)
    launch(
        _attention_encode_bwd_kernel, parts.total * H * B, call.query,
        *row_arguments(call.keys[0], tile.block_kv, tile.pieces_qk, tma),
        *row_arguments(call.values[0], tile.block_kv, tile.pieces_v, tma), saved.dout, saved.lse, saved.statistics, delta, part,
        dk, dv, *call.common, (parts.total, parts.length), *_strides(call.query, call.keys[0], call.values[0], saved.dout),
        strides, *_strides(dk, dv), call.stride_mask, **call.options(tile, tma),
    )  # fmt: skip
    if parts.total > 1:
        sum_splits(part, dq)
