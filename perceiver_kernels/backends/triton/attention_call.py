"""One call of attention as its launchers see it: plan, tensors, sizes and masks as the kernels take them."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perceiver_kernels.backends.triton.attention_steps import Hides
from perceiver_kernels.backends.triton.describe import contiguous, dropout_arguments
from perceiver_kernels.device import device_facts, float32_precision
from perceiver_kernels.layouts import can_describe, positive_scale, unit_stride
from perceiver_kernels.masks import Masks
from perceiver_kernels.plan import AttentionPlan, plan_attention
from perceiver_kernels.problem import AttentionProblem
from perceiver_kernels.tiles import AttentionTile, SmallTile

Tensors = tuple[Tensor, ...]


def _plan(query: Tensor, keys: Tensors, values: Tensors, masks: Masks, dropout_p: float) -> AttentionPlan:
    problem = AttentionProblem.of(query, keys, values, masks, dropout_p, enable_gqa=True)
    return plan_attention(problem, device_facts(query.device))


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


class Call:
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

    def entries(self, part: slice) -> Call:
        """The call of some of the batch's entries, under no mask but a key mask."""
        if part == slice(0, self.sizes[0]):
            return self
        found = copy.copy(self)
        found.query = self.query[part]
        found.keys, found.values = (tuple(t[part] for t in parts) for parts in (self.keys, self.values))
        found.sizes = (found.query.shape[0], *self.sizes[1:])
        found.masks = (None if self.masks[0] is None else self.masks[0][part], *self.masks[1:])
        return found

    @property
    def streams_keys_by_tma(self) -> bool:
        """Descriptors read what no mask hides, of one segment."""
        plain = not (self.hides.key_mask or self.hides.lengths) and len(self.keys) == 1
        return self.plan.tma and plain and all(map(can_describe, (*self.keys, *self.values)))

    @property
    def forward_tile(self) -> AttentionTile | None:
        """The plan's tile of the forward, or None where the wide kernels compute it.

        On an H100 the tile of heads past 192 gave wrong results where it read keys and values through pointers (200 and 7
        channels: values came back mixed with keys); other tiles, and this one through TMA, are right. The cause is not known.
        """
        tile = self.plan.forward
        if tile is not None and self.plan.tma and not self.streams_keys_by_tma and max(tile.columns) > 192:
            return None
        return tile

    def streams_queries_by_tma(self, *tensors: Tensor) -> bool:
        """Whether descriptors read the queries and ``tensors`` like them."""
        return self.plan.tma and not self.hides.query_mask and all(map(can_describe, (self.query, *tensors)))

    def options(self, tile: AttentionTile, tma: bool) -> dict[str, Any]:
        """What the kernels of one problem a program are compiled for."""
        shape = {"BLOCK_Q": tile.block_q, "BLOCK_KV": tile.block_kv, "STAGES": tile.num_stages, "TMA": tma}
        return shape | self._shared_options(tile)

    def small_options(self, tile: SmallTile) -> dict[str, Any]:
        """What the kernels of several problems a program are compiled for."""
        return {"PROBLEMS": tile.problems, "EACH_Q": tile.each_q, "EACH_KV": tile.each_kv} | self._shared_options(tile)

    def _shared_options(self, tile: AttentionTile | SmallTile) -> dict[str, Any]:
        return {
            "PIECES_QK": tile.pieces_qk, "PIECES_V": tile.pieces_v, "HIDES": self.hides, "DROPOUT": self.dropout_p > 0.0,
            "PRECISION": float32_precision(), "num_warps": tile.num_warps,
        }  # fmt: skip

    @property
    def common(self) -> tuple[Any, ...]:
        return self.masks, self.dropout, self.scale, self.causal_shift, self.sizes


def strides_of(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """Strides of batch, head and row of each tensor."""
    return tuple(tensor.stride()[:3] for tensor in tensors)


def with_parts(tensor: Tensor) -> tuple[int, ...]:
    """Strides of batch, head, part and row of a result that has no parts."""
    return (*tensor.stride()[:2], 0, tensor.stride(2))


def partials(heads: int, parts: int, length: int, width: int, H: int, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """fp32 [heads, parts, length, width], heads = B H, and its strides of batch, head, part and row."""
    part = torch.empty(heads, parts, length, width, dtype=torch.float32, device=device)
    return part, (H * part.stride(0), *part.stride()[:3])


class Saved(NamedTuple):
    """What a backward starts from, and delta [B, H, Lq], which its first kernel fills."""

    dout: Tensor
    dlse: Tensor | None
    out: Tensor
    lse: Tensor
    statistics: Tensor
    delta: Tensor
