"""Attention over given keys and values, and over one tensor that serves as both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.dispatch import load, select
from perceiver_kernels.functional.common import cast_for_autocast, dropout_seed, visible
from perceiver_kernels.inputs import PackedInputs
from perceiver_kernels.ops import shared_kv as shared_kv_op
from perceiver_kernels.problem import AttentionProblem, SharedKVProblem, check_tensor, pad_channels


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of queries over keys and values of any lengths: ``softmax(scale q k^T + mask) v``.

    Args:
        query: ``[B, H, Lq, d_qk]``, float16, bfloat16, float32 (float64 on reference and sdpa).
        key: ``[B, H, Lk, d_qk]``; batch and heads may be 1 and are then shared.
        value: ``[B, H, Lk, d_v]``; ``d_v`` may differ from ``d_qk``.
        key_mask: bool ``[B, Lk]``, True where a key is visible.
        attn_mask: bool (True = visible) or additive, broadcastable to ``[B, H, Lq, Lk]``.
        is_causal: upper-left causal mask, as in torch.
        dropout_p: probability in ``[0, 1)`` of dropping an attention weight; applied whenever positive.
        scale: factor on the scores; ``None`` is ``1/sqrt(d_qk)``.
        enable_gqa: key heads may divide query heads.
        return_lse: also return the log-sum-exp of the scores, natural log.
        backend: a backend's name; it never falls back.

    Returns:
        ``[B, H, Lq, d_v]`` in query's dtype; with ``return_lse`` also lse, fp32 ``[B, H, Lq]``. A query that sees no key
        gives 0 and lse ``-inf``.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names it.

    Source: Vaswani et al. 2017, section 3.2.1.
    """
    query, key, value = cast_for_autocast(query, key, value)
    problem = AttentionProblem.of(
        query, key, value, key_mask, attn_mask, is_causal, dropout_p, scale, enable_gqa, return_lse
    )
    name = select(problem, backend)
    out, lse = load(problem.OP, name).attention(
        query, key, value, key_mask=key_mask, attn_mask=attn_mask, is_causal=is_causal, dropout_p=dropout_p,
        dropout_seed=dropout_seed(dropout_p, query.device), scale=scale, enable_gqa=enable_gqa,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attend_shared(
    q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, scale: float, dropout_p: float,
    needs_lse: bool, backend: str | None, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(z, lse, rho) on the selected backend, z in ``out_dtype`` (None: q's); masked rows of x must hold finite values."""
    problem = SharedKVProblem.of(q, x, key_mask, lengths, scale, dropout_p, needs_lse)
    name = select(problem, backend)
    seed = dropout_seed(dropout_p, q.device)
    module = load(problem.OP, name)
    if module.COMPOSITE:
        z, lse, rho = module.shared_kv_attention(
            q, x, key_mask=key_mask, lengths=lengths, scale=scale, dropout_p=dropout_p, dropout_seed=seed
        )
        return z if out_dtype is None else z.to(out_dtype), lse, rho
    return shared_kv_op.shared_kv_attention(
        q, x, key_mask, lengths, seed, float(scale), float(dropout_p), name, out_dtype
    )


def resolve_shared_kv(
    q: Tensor, x: Tensor | PackedInputs, key_mask: Tensor | None, lengths: Tensor | None, scale: float, dropout_p: float,
    return_lse: bool,
) -> tuple[SharedKVProblem, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Check every argument of shared_kv_attention: the problem; q and x as autocast has them; which tokens are visible."""
    check_tensor("q", q)
    if isinstance(x, PackedInputs):
        if key_mask is not None or lengths is not None:
            raise ValueError("key_mask and lengths must be given to pack_inputs, whose PackedInputs carry them")
        data, key_mask, lengths = x.data, x.key_mask, x.lengths
    else:
        check_tensor("x", x)
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
