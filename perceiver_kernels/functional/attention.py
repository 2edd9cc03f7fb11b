"""Attention over given keys and values, and over one tensor that serves as both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from perceiver_kernels.checks import autocasts
from perceiver_kernels.dispatch import candidates, is_composite, load, select_passes
from perceiver_kernels.functional.common import cast_for_autocast, dropout_seed, visible
from perceiver_kernels.inputs import PackedInputs
from perceiver_kernels.masks import ALIGNMENTS, CAUSAL_MASKS, NO_MASKS, Causal, Masks
from perceiver_kernels.ops import attention as attention_op
from perceiver_kernels.ops import shared_kv as shared_kv_op
from perceiver_kernels.problem import AttentionProblem, SharedKVProblem, check_is_tensor, needs_gradient, pad_channels

Segments = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention, checked: tensors as autocast has them, and what decides how it is computed."""

    problem: AttentionProblem
    query: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    masks: Masks


def resolve_attention(
    query: Tensor, key: Segments, value: Segments, *, key_mask: Tensor | None = None, lengths: Tensor | None = None,
    query_mask: Tensor | None = None, attn_mask: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, is_causal: bool = False, causal_alignment: Causal = "upper_left",
    dropout_p: float = 0.0, scale: float | None = None, enable_gqa: bool = False, return_lse: bool = False,
) -> AttentionCall:  # fmt: skip
    """Check every argument of attention."""
    if causal_alignment not in ALIGNMENTS:
        raise ValueError(f"causal_alignment must be one of {', '.join(ALIGNMENTS)}, got {causal_alignment!r}")
    keys = tuple(key) if isinstance(key, (tuple, list)) else (key,)
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    query, *rest = cast_for_autocast(query, *keys, *values)
    keys, values = tuple(rest[: len(keys)]), tuple(rest[len(keys) :])
    masks = Masks(
        key_mask, lengths, query_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, causal_alignment if is_causal else "none"
    )
    problem = AttentionProblem.of(query, keys, values, masks, dropout_p, scale, enable_gqa, return_lse)
    return AttentionCall(problem, query, keys, values, masks)


def attention(
    query: Tensor,
    key: Tensor | tuple[Tensor, Tensor],
    value: Tensor | tuple[Tensor, Tensor],
    *,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    query_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: Literal["upper_left", "bottom_right"] = "upper_left",
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of queries over keys and values of any lengths: ``softmax(scale q k^T + mask) v``.

    Args:
        query: ``[B, H, Lq, d_qk]``, float16, bfloat16, float32 (float64 on reference and sdpa); a batch of 1 is shared.
        key: ``[B, H, Lk, d_qk]``; batch and heads may be 1 and are then shared. A pair of tensors is two segments, read one
            after the other as if they were concatenated along Lk; masks count the keys of both.
        value: ``[B, H, Lk, d_v]``, or a pair; ``d_v`` may differ from ``d_qk``.
        key_mask: bool ``[B, Lk]``, True where a key is visible. What hidden keys and values hold is never used, NaN included.
        lengths: int32 ``[B]``, instead of ``key_mask``: keys visible from the front, all of them above Lk and none below 0.
        query_mask: bool ``[B, Lq]``, False for queries that see nothing: their result and gradients are 0.
        attn_mask: bool (True = visible), or added to the scores (query's dtype or float32; it may need a gradient),
            broadcastable to ``[B, H, Lq, Lk]``.
        cu_seqlens_q: int32 ``[sequences + 1]``: where each of the sequences starts that lie one after the other in the only
            batch entry, and the token count. A query sees its own sequence.
        cu_seqlens_k: the same for the keys.
        is_causal: query i sees keys 0..i, as in torch; within its sequence when packed. Not together with ``attn_mask``.
        causal_alignment: ``"bottom_right"`` lets the last query see the last key instead: keys 0..i + Lk - Lq.
        dropout_p: probability in ``[0, 1)`` of dropping an attention weight; applied whenever positive.
        scale: factor on the scores; ``None`` is ``1/sqrt(d_qk)``.
        enable_gqa: key heads may divide query heads.
        return_lse: also return the log-sum-exp of the scores, natural log; it is differentiable.
        backend: a backend's name; it never falls back.

    Returns:
        ``[B, H, Lq, d_v]`` in query's dtype; with ``return_lse`` also lse, fp32 ``[B, H, Lq]``. A query that sees no key
        gives 0 and lse ``-inf``.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names it.

    Source: Vaswani et al. 2017, section 3.2.1.
    """
    seen = None
    if all(mask is None for mask in (key_mask, lengths, query_mask, attn_mask, cu_seqlens_q, cu_seqlens_k)):
        options = (is_causal, causal_alignment, dropout_p, scale, enable_gqa, return_lse, backend)
        seen = _signature(query, key, value, options)
        if seen is not None and (names := _served.get(seen)) is not None:
            masks = CAUSAL_MASKS[causal_alignment] if is_causal else NO_MASKS
            return _attend(names, query, (key,), (value,), masks, dropout_p, scale, return_lse)  # type: ignore[arg-type]
    call = resolve_attention(
        query, key, value, key_mask=key_mask, lengths=lengths, query_mask=query_mask, attn_mask=attn_mask,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, is_causal=is_causal, causal_alignment=causal_alignment,
        dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa, return_lse=return_lse,
    )  # fmt: skip
    names = select_passes(call.problem, backend)
    if seen is not None:
        if len(_served) >= _MOST_SERVED:
            _served.clear()
        _served[seen] = names
    return _attend(names, call.query, call.keys, call.values, call.masks, dropout_p, scale, return_lse)


# Calls without masks that were checked, and the backends that serve them.
_served: dict[tuple[Any, ...], tuple[str, str]] = {}
_MOST_SERVED = 4096


def _signature(query: Any, key: Any, value: Any, options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that checking a call without masks, and choosing its backend, depend on; None where that is not so plain."""
    for tensor in (query, key, value):
        if type(tensor) not in (Tensor, Parameter) or tensor.is_nested:
            return None
    if torch.compiler.is_compiling() or autocasts(query.device):
        return None
    found = (
        query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype, query.device, key.device, value.device,
        needs_gradient(query, key, value), candidates("attention", options[-1]), options,
    )  # fmt: skip
    try:
        hash(found)
    except TypeError:
        # An argument of a type that the checks refuse.
        return None
    return found


def _attend(
    names: tuple[str, str], query: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], masks: Masks, dropout_p: float,
    scale: float | None, return_lse: bool,
) -> Any:  # fmt: skip
    """A checked call on the backends ``names`` of its forward and backward."""
    seed = dropout_seed(dropout_p, query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    composite = is_composite("attention", names[0])
    run = load("attention", names[0]).attention if composite else partial(attention_op.attention, backends=names)
    out, lse = run(query, keys, values, masks=masks, scale=scale, dropout_p=float(dropout_p), dropout_seed=seed)
    return (out, lse) if return_lse else out


def attend_shared(
    q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, scale: float, dropout_p: float,
    needs_lse: bool, backend: str | None, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(z, lse, rho) on the selected backend, z in ``out_dtype`` (None: q's); masked rows of x must hold finite values."""
    problem = SharedKVProblem.of(q, x, key_mask, lengths, scale, dropout_p, needs_lse)
    backends = select_passes(problem, backend)
    seed = dropout_seed(dropout_p, q.device)
    if is_composite(problem.OP, backends[0]):
        z, lse, rho = load(problem.OP, backends[0]).shared_kv_attention(
            q, x, key_mask=key_mask, lengths=lengths, scale=scale, dropout_p=dropout_p, dropout_seed=seed
        )
        return z if out_dtype is None else z.to(out_dtype), lse, rho
    return shared_kv_op.shared_kv_attention(
        q, x, key_mask, lengths, seed, float(scale), float(dropout_p), backends, out_dtype
    )


def resolve_shared_kv(
    q: Tensor, x: Tensor | PackedInputs, key_mask: Tensor | None, lengths: Tensor | None, scale: float, dropout_p: float,
    return_lse: bool,
) -> tuple[SharedKVProblem, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Check every argument of shared_kv_attention: the problem; q and x as autocast has them; which tokens are visible."""
    check_is_tensor("q", q)
    if isinstance(x, PackedInputs):
        if key_mask is not None or lengths is not None:
            raise ValueError("key_mask and lengths must be given to pack_inputs, whose PackedInputs carry them")
        data, key_mask, lengths = x.data, x.key_mask, x.lengths
    else:
        check_is_tensor("x", x)
        data = x
    q, data = cast_for_autocast(q, data)
    return SharedKVProblem.of(q, data, key_mask, lengths, scale, dropout_p, return_lse), q, data, key_mask, lengths


def shared_kv_attention(
    q: Tensor,
    x: Tensor | PackedInputs,
    *,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention whose keys and values are one tensor: ``z = softmax(scale q x^T) x``.

    Args:
        q: ``[B, R, C]``; heads are folded into the rows R.
        x: ``[B, M, C]`` or PackedInputs; C from 1 to 1024. Fastest with C a multiple of 16 (pack_inputs pads so); other C
            are padded here, at the cost of a copy.
        key_mask: bool ``[B, M]``, True where a token is visible. What masked tokens hold is never used, NaN included.
        lengths: int32 ``[B]``, tokens visible from the front, all of them above M and none below 0; instead of ``key_mask``.
        scale: factor on the scores (absorbed queries carry theirs, hence 1).
        dropout_p: probability in ``[0, 1)`` of dropping an attention weight.
        return_lse: also return the log-sum-exp of the scaled scores, natural log; it is differentiable.
        backend: a backend's name; it never falls back.

    Returns:
        z ``[B, R, C]`` in q's dtype; with ``return_lse`` also lse, fp32 ``[B, R]``. A row that sees no token gives 0, -inf.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names it.
    """
    _, q, data, key_mask, lengths = resolve_shared_kv(q, x, key_mask, lengths, scale, dropout_p, return_lse)
    seen = None if isinstance(x, PackedInputs) else visible(key_mask, lengths, data.shape[1])
    if seen is not None:
        data = torch.where(seen[..., None], data, 0.0)
    channels = q.shape[-1]
    padding = pad_channels(channels) - channels
    if padding:
        q, data = torch.nn.functional.pad(q, (0, padding)), torch.nn.functional.pad(data, (0, padding))
    # The backward subtracts dz.z from every score's gradient: z stays in fp32 for it, and is rounded here.
    wide = torch.promote_types(q.dtype, torch.float32)
    z, lse, _ = attend_shared(q, data, key_mask, lengths, scale, dropout_p, return_lse, backend, wide)
    z = (z[..., :channels] if padding else z).to(q.dtype)
    return (z, lse) if return_lse else z
