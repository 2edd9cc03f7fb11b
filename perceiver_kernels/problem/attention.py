"""The problem of attention over separate keys and values, and the checks of its masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from perceiver_kernels.masks import Causal, Masks, check_starts
from perceiver_kernels.problem.base import Problem
from perceiver_kernels.problem.checks import (
    check_device,
    check_floating,
    check_is_tensor,
    check_key_visibility,
    check_like,
    check_probability,
    check_query_mask,
    check_rank,
    check_scale,
    check_shape,
    constant,
    is_positive,
    needs_gradient,
    shape_of,
)

MaskKind = Literal["none", "boolean", "additive", "learned"]


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """out = softmax(scale q k^T + mask) v: query [B, H, Lq, d_qk], key [B, H_kv, Lk, d_qk], value [B, H_kv, Lk, d_v].

    Lk counts the keys of both segments where there are two, Lk_first those of the first.
    """

    OP: ClassVar[str] = "attention"
    SIZES: ClassVar[tuple[str, ...]] = ("B", "H", "H_kv", "Lq", "Lk", "Lk_first")

    B: int
    H: int
    H_kv: int
    Lq: int
    Lk: int
    Lk_first: int
    d_qk: int
    d_v: int
    dtype: torch.dtype
    device_type: str
    attn_mask: MaskKind = "none"
    key_mask: bool = False
    lengths: bool = False
    query_mask: bool = False
    packed: bool = False
    causal: Causal = "none"
    segments: int = 1
    dropout: bool = False
    needs_lse: bool = False
    needs_grad: bool = False

    @classmethod
    def of(
        cls, query: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], masks: Masks, dropout_p: float = 0.0,
        scale: float | None = None, enable_gqa: bool = False, needs_lse: bool = False,
    ) -> AttentionProblem:  # fmt: skip
        """Check the tensors of one attention call; batches and heads of key and value may be broadcast (size 1)."""
        if len(keys) != len(values) or len(keys) not in (1, 2):
            raise ValueError(f"key and value must be tensors or pairs of segments alike, got {len(keys)} and {len(values)}")
        names = [("key", "value")] if len(keys) == 1 else [("key[0]", "value[0]"), ("key[1]", "value[1]")]
        check_is_tensor("query", query)
        check_floating("query", query)
        check_rank("query", query, "B, H, Lq, d_qk")
        B, H, Lq, d_qk = query.shape
        if not (H and d_qk):
            raise ValueError(f"query must be [B, H, Lq, d_qk] with H and d_qk at least 1, got {shape_of(query)}")
        for (key_name, value_name), key, value in zip(names, keys, values, strict=True):
            for name, tensor, axes in ((key_name, key, "B, H, Lk, d_qk"), (value_name, value, "B, H, Lk, d_v")):
                check_is_tensor(name, tensor)
                check_floating(name, tensor)
                check_rank(name, tensor, axes)
            key_B, H_kv, Lk, d_v = keys[0].shape[0], keys[0].shape[1], key.shape[2], values[0].shape[3]
            check_shape(key_name, key, "B, H, Lk, d_qk", (key_B, H_kv, Lk, d_qk))
            check_shape(value_name, value, "B, H, Lk, d_v", (key_B, H_kv, Lk, d_v))
            check_like(key_name, key, "query", query)
            check_like(value_name, value, "query", query)
        B = key_B if B == 1 else B
        if key_B not in (1, B) or query.shape[0] not in (1, B):
            raise ValueError(f"query and key must have one batch size (or 1), got {query.shape[0]} and {key_B}")
        if H_kv not in (1, H) and not (enable_gqa and H_kv and H % H_kv == 0):
            hint = "a divisor of the query heads" if enable_gqa else "the query heads or 1 (see enable_gqa)"
            raise ValueError(f"key must have {hint}, H={H}, got H={H_kv}")
        check_scale(scale)
        check_probability("dropout_p", dropout_p)
        Lk = sum(key.shape[2] for key in keys)
        _check_masks(masks, B, H, Lq, Lk, query, len(keys))
        return cls(
            B=B, H=H, H_kv=H_kv, Lq=Lq, Lk=Lk, Lk_first=keys[0].shape[2], d_qk=constant(d_qk), d_v=constant(d_v),
            dtype=query.dtype, device_type=query.device.type, attn_mask=_mask_kind(masks.attn_mask),
            key_mask=masks.key_mask is not None, lengths=masks.lengths is not None,
            query_mask=masks.query_mask is not None, packed=masks.packed, causal=masks.causal, segments=len(keys),
            dropout=is_positive(dropout_p), needs_lse=needs_lse,
            needs_grad=needs_gradient(query, *keys, *values, masks.attn_mask),
        )  # fmt: skip


def _mask_kind(attn_mask: Tensor | None) -> MaskKind:
    if attn_mask is None:
        return "none"
    if attn_mask.dtype == torch.bool:
        return "boolean"
    return "learned" if needs_gradient(attn_mask) else "additive"


def _check_masks(masks: Masks, B: int, H: int, Lq: int, Lk: int, query: Tensor, segments: int) -> None:
    if masks.attn_mask is not None and masks.causal != "none":
        raise ValueError("attn_mask excludes is_causal: fold them into one mask")
    check_key_visibility(masks.key_mask, masks.lengths, B, Lk, query.device)
    check_query_mask(masks.query_mask, "B, Lq", B, Lq, "query", query)
    if masks.attn_mask is not None:
        mask = masks.attn_mask
        check_is_tensor("attn_mask", mask)
        if mask.dtype not in (torch.bool, query.dtype, torch.float32):
            raise TypeError(f"attn_mask must be bool, float32 or query's dtype {query.dtype}, got {mask.dtype}")
        check_device("attn_mask", mask, "query", query)
        scores = (B, H, Lq, Lk)
        sizes = zip(mask.shape[::-1], scores[::-1], strict=False)
        if mask.ndim > 4 or any(size not in (1, full) for size, full in sizes):
            raise ValueError(f"attn_mask must broadcast to [B, H, Lq, Lk] = {scores}, got {shape_of(mask)}")
    _check_packing(masks, B, Lq, Lk, query, segments)


def _check_packing(masks: Masks, B: int, Lq: int, Lk: int, query: Tensor, segments: int) -> None:
    """Packed sequences: int32 starts that begin at 0, never decrease and end at the token count."""
    starts = {"cu_seqlens_q": masks.cu_seqlens_q, "cu_seqlens_k": masks.cu_seqlens_k}
    given = [name for name, value in starts.items() if value is not None]
    if not given:
        return
    if len(given) == 1:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be given together, got {given[0]} alone")
    if B != 1 or segments != 1:
        raise ValueError(f"packed sequences must lie in one batch entry and one segment, got B={B} and {segments} segments")
    for name in ("key_mask", "lengths", "query_mask", "attn_mask"):
        if getattr(masks, name) is not None:
            raise ValueError(f"{name} excludes cu_seqlens_q and cu_seqlens_k: leave hidden tokens out of the sequences")
    for name, value in starts.items():
        check_is_tensor(name, value)
        assert value is not None
        if value.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32 [sequences + 1], got {value.dtype}")
        if value.ndim != 1 or value.shape[0] < 1:
            raise ValueError(f"{name} must be [sequences + 1], got {shape_of(value)}")
        check_device(name, value, "query", query)
    sizes = [value.shape[0] for value in starts.values() if value is not None]
    if sizes[0] != sizes[1]:
        raise ValueError(f"cu_seqlens_k must have cu_seqlens_q's {sizes[0]} entries, got {sizes[1]}")
    check_starts(masks, Lq, Lk)
