"""torch's scaled_dot_product_attention, argument for argument, over this package's attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from perceiver_kernels.functional.attention import attention
from perceiver_kernels.problem import check_is_tensor, shape_of


def _leading_axes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """What all axes but the last two broadcast to; with ``enable_gqa`` the last of them are query's heads as they are."""
    tensors = {"query": query, "key": key, "value": value}
    least, axes = (3, "[..., H, L, d]") if enable_gqa else (2, "[..., L, d]")
    for name, tensor in tensors.items():
        check_is_tensor(name, tensor)
        if tensor.ndim < least:
            hint = " with enable_gqa" if enable_gqa else ""
            raise ValueError(f"{name} must be {axes}, {least} axes or more{hint}, got {shape_of(tensor)}")
    if query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return shape_of(query)[:-2]
    try:
        leading = torch.broadcast_shapes(*(tensor.shape[:-least] for tensor in tensors.values()))
    except RuntimeError:
        shapes = ", ".join(str(shape_of(tensor)) for tensor in tensors.values())
        hint = "" if enable_gqa else " (see enable_gqa)"
        raise ValueError(f"query, key and value must broadcast before their last {least} axes{hint}, got {shapes}") from None
    return (*leading, *query.shape[-least:-2])


def _flattened(tensor: Tensor, leading: Sequence[int], has_heads: bool) -> Tensor:
    """[..., L, d], broadcast to [*leading, L, d], as [B, H, L, d]: the last of the leading axes are heads, or H is 1.

    A view, except where one of several batch axes is broadcast and another is not.
    """
    if not has_heads:
        tensor, leading = tensor.unsqueeze(-3), (*leading, 1)
    if tuple(tensor.shape[:-2]) != tuple(leading):
        tensor = tensor.expand(*leading, *tensor.shape[-2:])
    return tensor.flatten(0, -4) if len(leading) > 1 else tensor.unsqueeze(0)


def _flattened_mask(attn_mask: Tensor, leading: tuple[int, ...], Lq: int, Lk: int, has_heads: bool) -> Tensor:
    """A mask that broadcasts to [*leading, Lq, Lk] as one that broadcasts to [B, H, Lq, Lk]; H, Lq and Lk are checked later."""
    check_is_tensor("attn_mask", attn_mask)
    scores = (*leading, Lq, Lk)
    if not 2 <= attn_mask.ndim <= len(scores):
        raise ValueError(f"attn_mask must have 2 to {len(scores)} axes, to broadcast to {scores}, got {shape_of(attn_mask)}")
    batch, own = (leading[:-1], attn_mask.shape[:-3]) if has_heads else (leading, attn_mask.shape[:-2])
    if not own:
        return attn_mask
    if any(size not in (1, full) for size, full in zip(own[::-1], batch[::-1], strict=False)):
        raise ValueError(f"attn_mask must broadcast to {scores}, got {shape_of(attn_mask)}")
    if not has_heads:
        attn_mask = attn_mask.unsqueeze(-3)
    # Not expanded without need: its gradient would be rounded once for each sum.
    return attn_mask.expand(*batch, *attn_mask.shape[-3:]).flatten(0, -4) if len(batch) > 1 else attn_mask


def _causal_argument(
    attn_mask: Tensor | None, is_causal: bool, Lq: int, Lk: int
) -> tuple[Tensor | None, bool, Literal["upper_left", "bottom_right"]]:
    """attn_mask, is_causal and the alignment, with a ``CausalBias``, which holds no values, replaced by what it stands for."""
    if not isinstance(attn_mask, CausalBias):
        return attn_mask, is_causal, "upper_left"
    if is_causal:
        raise ValueError("attn_mask excludes is_causal: a CausalBias is causal already")
    if attn_mask.variant == CausalVariant.UPPER_LEFT:
        return None, True, "upper_left"
    sizes = (attn_mask.seq_len_q, attn_mask.seq_len_kv)
    if sizes != (Lq, Lk):
        raise ValueError(f"attn_mask must be a CausalBias of {Lq} queries and {Lk} keys, got one of {sizes[0]} and {sizes[1]}")
    return None, True, "upper_left" if Lq == Lk else "bottom_right"


def _laid_out_like(out: Tensor, query: Tensor) -> Tensor:
    """``out`` [B, H, Lq, d_v] with batch, heads and rows in memory in the order in which query has them.

    Where query does not say, because one row or matrix serves a whole axis: batch outside heads, heads outside rows.
    """
    rows = query.stride(2)
    batch, heads = (
        query.stride(axis) if query.shape[axis] > 1 and query.stride(axis) > 0 else default
        for axis, default in ((0, math.inf), (1, rows))
    )
    strides = (batch, heads, rows)
    order = [0]
    for axis in (1, 2):
        place = len(order)
        # Not sorted(): torch.compile cannot, by sizes that it does not know.
        while place and strides[order[place - 1]] < strides[axis]:
            place -= 1
        order.insert(place, axis)
    permuted = out.permute(*order, 3)
    if permuted.is_contiguous():
        return out
    return permuted.contiguous().permute(*(order.index(axis) for axis in range(3)), 3)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, same arguments, same results: ``softmax(scale q k^T + mask) v``.

    Args:
        query: ``[..., Lq, d_qk]``, float16, bfloat16, float32 or float64, two axes or more.
        key: ``[..., Lk, d_qk]``; leading axes of query, key and value broadcast, without a copy up to four axes.
        value: ``[..., Lk, d_v]``; ``d_v`` may differ from ``d_qk``.
        attn_mask: bool (True = visible), or added to the scores (query's dtype or float32; it may require a gradient), of
            two axes or more that broadcast to ``[..., Lq, Lk]``; or a ``torch.nn.attention.bias.CausalBias``, upper-left of any
            size, lower-right of ``Lq`` by ``Lk``.
        dropout_p: probability in ``[0, 1)`` of dropping an attention weight; applied whenever positive.
        is_causal: query i sees keys 0 to i, upper-left also where ``Lq`` is not ``Lk``; excludes ``attn_mask``.
        scale: factor on the scores, any finite number; ``None`` is ``1/sqrt(d_qk)``.
        enable_gqa: heads of key and of value, the third axis from the end, divide those of query.

    Returns:
        ``[..., Lq, d_v]`` in query's dtype. A query that sees no key, by a mask or for want of keys, gives 0 and gets
        gradient 0. The axes lie in memory in query's order: a query that is ``[B, Lq, H, d]`` transposed gives an output
        that is one too, whose heads merge without a copy.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names it, with query, key and value as ``[B, H, L, d]``.

    Source: Vaswani et al. 2017, section 3.2.1; torch's documentation. Where torch differs: its output is in query's order from
    some of its kernels only; it lets a ``CausalBias`` of another size, ``attn_mask`` beside ``is_causal``, a value of another
    length than key, ``dropout_p`` of 1 and a scale that is not finite pass on some devices, and takes ``d_qk`` or heads of 0.
    """
    leading = _leading_axes(query, key, value, enable_gqa)
    has_heads = enable_gqa or len(leading) > 1
    Lq, Lk = query.shape[-2], key.shape[-2]
    attn_mask, is_causal, alignment = _causal_argument(attn_mask, is_causal, Lq, Lk)
    if attn_mask is not None:
        attn_mask = _flattened_mask(attn_mask, leading, Lq, Lk, has_heads)
    if enable_gqa:
        H, H_k, H_v = (tensor.shape[-3] for tensor in (query, key, value))
        if H_k != H_v and H_k and H_v and not (H % H_k or H % H_v):
            key, value = (tensor.repeat_interleave(H // tensor.shape[-3], -3) for tensor in (key, value))
        shapes = [(*leading[:-1], tensor.shape[-3]) for tensor in (query, key, value)]
    else:
        shapes = [leading] * 3
    query, key, value = (_flattened(t, shape, has_heads) for t, shape in zip((query, key, value), shapes, strict=True))
    out = attention(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, causal_alignment=alignment, dropout_p=dropout_p,
        scale=scale, enable_gqa=enable_gqa,
    )  # fmt: skip
    return _laid_out_like(out, query).reshape(*leading, Lq, value.shape[-1])
