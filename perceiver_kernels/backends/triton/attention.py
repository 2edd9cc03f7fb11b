"""attention on Triton: allocate, describe, launch, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends.triton import reasons_against_device_and_dtype
from perceiver_kernels.backends.triton.attention_kernels import (
    _attention_bwd_kernel,
    _attention_fwd_kernel,
)
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
from perceiver_kernels.plan import AttentionPlan, plan_attention
from perceiver_kernels.problem import AttentionProblem
from perceiver_kernels.tiles import AttentionTile, attention_tile

COMPOSITE = False

Tensors = tuple[Tensor, ...]


def reasons_against(problem: AttentionProblem) -> list[str]:
    """Sentences that say why these kernels cannot serve ``problem``."""
    reasons = reasons_against_device_and_dtype(problem.device_type, problem.dtype)
    if not reasons and attention_tile("backward", problem.d_qk, problem.d_v, problem.dtype.itemsize, H200) is None:
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


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of batch, head and row."""
    return tensor.stride()[:3]


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


class _Launch:
    """What the three kernels of one call are given alike."""

    def __init__(
        self, query: Tensor, keys: Tensors, values: Tensors, masks: Masks, scale: float, dropout_p: float,
        dropout_seed: Tensor | None, plan: AttentionPlan | None,
    ) -> None:  # fmt: skip
        self.plan = plan or _plan(query, keys, values, masks, dropout_p)
        self.query, self.scale = positive_scale(unit_stride(query), scale)
        self.keys, self.values = (tuple(unit_stride(part) for part in parts) for parts in (keys, values))
        self.B, self.H, self.Lq, self.d_qk = query.shape
        self.H_kv, self.d_v = keys[0].shape[1], values[0].shape[3]
        self.Lk, self.Lk_first = sum(key.shape[2] for key in keys), keys[0].shape[2]
        self.key_mask, self.lengths, self.query_mask = contiguous(masks.key_mask, masks.lengths, masks.query_mask)
        self.attn_mask, self.mask_strides = None, (0, 0, 0, 0)
        if masks.attn_mask is not None:
            full = masks.attn_mask.expand(self.B, self.H, self.Lq, self.Lk)
            self.attn_mask, self.mask_strides = full, full.stride()
        self.masks, self.packed = masks, masks.packed
        *self.tables, self.causal_shift = _windows(masks, self.Lq, self.Lk)
        self.dropout = dropout_arguments(dropout_p, dropout_seed, 0)[:3]
        self.dropout_p = dropout_p

    @property
    def windowed(self) -> bool:
        """Whether queries see less than all keys for other reasons than a mask's."""
        return self.packed or self.masks.causal != "none" or self.lengths is not None or self.query_mask is not None

    @property
    def mask_kind(self) -> str:
        if self.attn_mask is None:
            return "none"
        return "boolean" if self.attn_mask.dtype == torch.bool else "additive"

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.B, self.H, self.H // self.H_kv, self.Lq, self.Lk, self.Lk_first, self.d_qk, self.d_v

    def visibility(self) -> tuple[Any, ...]:
        return self.key_mask, self.lengths, self.query_mask, self.attn_mask, self.tables[0], self.tables[1]

    def key_strides(self) -> tuple[int, ...]:
        """Of keys and values of the first segment, then of the last."""
        return tuple(
            stride for part in (0, -1) for tensors in (self.keys, self.values) for stride in _strides(tensors[part])
        )

    def streams_keys_by_tma(self) -> bool:
        """Descriptors read what no mask hides, of one segment."""
        hidden = self.key_mask is not None or self.lengths is not None
        return self.plan.tma and len(self.keys) == 1 and not hidden and all(map(can_describe, (*self.keys, *self.values)))

    def key_arguments(self, tile: AttentionTile, tma: bool) -> tuple[Any, ...]:
        return (
            *row_arguments(self.keys[0], tile.block_kv, tile.pieces_qk, tma),
            *row_arguments(self.values[0], tile.block_kv, tile.pieces_v, tma), self.keys[-1], self.values[-1],
        )  # fmt: skip

    def options(self, tile: AttentionTile, tma: bool) -> dict[str, Any]:
        return {
            "PIECES_QK": tile.pieces_qk, "PIECES_V": tile.pieces_v, "BLOCK_Q": tile.block_q, "BLOCK_KV": tile.block_kv,
            "STAGES": tile.num_stages, "TMA": tma, "SEGMENTS": len(self.keys), "PACKED": self.packed,
            "CAUSAL": self.masks.causal != "none" and not self.packed, "HAS_LENGTHS": self.lengths is not None,
            "HAS_QUERY_MASK": self.query_mask is not None, "KEY_MASKED": self.key_mask is not None,
            "ATTN_MASK": self.mask_kind, "DROPOUT": self.dropout_p > 0.0, "PRECISION": float32_precision(),
            "num_warps": tile.num_warps,
        }  # fmt: skip


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
    call = _Launch(query, keys, values, masks, scale, dropout_p, dropout_seed, plan)
    tile, splits, tma = call.plan.forward, call.plan.forward_splits, call.streams_keys_by_tma()
    S = splits.total
    with torch.cuda.device_of(query):
        part, lse_part, strides = out, lse, (*out.stride()[:2], 0, out.stride(2))
        if S > 1:
            part = torch.empty(B * H, S, Lq, d_v, dtype=torch.float32, device=query.device)
            lse_part = torch.empty(B * H, S, Lq, dtype=torch.float32, device=query.device)
            strides = (H * part.stride(0), *part.stride()[:3])
        launch(
            _attention_fwd_kernel, ceil_div(Lq, tile.block_q) * S * H * B,
            call.query, *call.key_arguments(tile, tma), part, lse_part, statistics, *call.visibility(), *call.dropout,
            call.scale, call.causal_shift, *call.sizes, S, splits.first, splits.length, *_strides(call.query),
            *call.key_strides(), *strides, *call.mask_strides, **call.options(tile, tma),
        )  # fmt: skip
        if S > 1:
            merge_splits(part, lse_part, out, lse)
    return out, lse, statistics


def attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, statistics: Tensor, query: Tensor, keys: Tensors,
    values: Tensors, masks: Masks, *, scale: float, dropout_p: float, dropout_seed: Tensor | None,
    plan: AttentionPlan | None = None,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv], dk and dv over the keys of all segments: one kernel computes them all."""
    Lk = sum(key.shape[2] for key in keys)
    dq = empty_heads(query, *query.shape)
    dk, dv = (empty_heads(parts[0], *parts[0].shape[:2], Lk, parts[0].shape[3]) for parts in (keys, values))
    if out.numel() == 0 or Lk == 0:
        return [dq.zero_(), dk.zero_(), dv.zero_()]
    call = _Launch(query, keys, values, masks, scale, dropout_p, dropout_seed, plan)
    dout, out = unit_stride(dout), unit_stride(out)
    (dlse,) = contiguous(dlse)
    with torch.cuda.device_of(query):
        _launch_backward(call, dout, dlse, out, lse, statistics, dq, dk, dv)
        if scale <= 0.0:
            # positive_scale moved the sign, or the zero, into the queries.
            dq.neg_() if scale < 0.0 else dq.zero_()
    return [dq, dk, dv]


def _launch_backward(
    call: _Launch, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, statistics: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor,
) -> None:  # fmt: skip
    plan, tile, ranges, slices = call.plan, call.plan.backward, call.plan.ranges, call.plan.slices
    B, H, H_kv, Lq, Lk = call.B, call.H, call.H_kv, call.Lq, call.Lk
    wide: dict[str, Any] = {"dtype": torch.float32, "device": dq.device}
    one_block = ranges.total == 1 and Lk <= tile.block_kv
    direct = ranges.total == 1 and not call.windowed
    delta = None if one_block else head_products(dout, out, dlse)
    dq_sum = None
    if not (direct and one_block):
        dq_sum = torch.empty(B * H, ranges.total, Lq, call.d_qk, **wide)
        if call.windowed:
            dq_sum.zero_()
    parts, strides = (dk, dv), [(*t.stride()[:2], 0, t.stride(2)) for t in (dk, dv)]
    if slices > 1:
        parts = tuple(torch.empty(B * H_kv, slices, Lk, width, **wide) for width in (call.d_qk, call.d_v))
        strides = [(H_kv * part.stride(0), *part.stride()[:3]) for part in parts]
    tma = plan.tma and can_describe(call.query) and can_describe(dout) and call.query_mask is None
    launch(
        _attention_bwd_kernel, slices * ranges.total * H_kv * B,
        *row_arguments(call.query, tile.block_q, tile.pieces_qk, tma), *row_arguments(dout, tile.block_q, tile.pieces_v, tma),
        call.keys[0], call.values[0], call.keys[-1], call.values[-1], lse, statistics, delta, dlse, dq, dq_sum, *parts,
        *call.visibility(), *call.tables[2:], *call.dropout, call.scale, call.causal_shift, *call.sizes, slices,
        plan.queries_per_slice, ranges.total, ranges.first, ranges.length, *_strides(call.query), *_strides(dout),
        *call.key_strides(), *_strides(dq), *strides[0], *strides[1], *call.mask_strides, HAS_DLSE=dlse is not None,
        ONE_BLOCK=one_block, DIRECT=direct, **call.options(tile, tma),
    )  # fmt: skip
    if not direct:
        assert dq_sum is not None
        sum_splits(dq_sum, dq)
    if slices > 1:
        for part, gradient in zip(parts, (dk, dv), strict=True):
            sum_splits(part, gradient)
