"""Attention over given keys and values, over one tensor that serves as both, and over projected inputs."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from perceiver_kernels.reference.dropout import dropout
from perceiver_kernels.reference.inputs import layer_norm, widen

_Device = torch.device | str | None


def visible_keys(length: int, key_mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """Visible keys, bool [B, length], from a mask, from lengths int32 [B], or both; None where all are."""
    if lengths is None:
        return key_mask
    within = torch.arange(length, device=lengths.device) < lengths[:, None]
    return within if key_mask is None else within & key_mask


def visible_pairs(
    Lq: int,
    Lk: int,
    *,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    query_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: Literal["none", "upper_left", "bottom_right"] = "none",
    device: _Device = None,
) -> Tensor | None:
    """Which keys each query sees: all given conditions at once.

    key_mask[b, j],   j < lengths[b],   query_mask[b, i],   sequence(i) = sequence(j),
    j - i <= 0 (upper_left) or Lk - Lq (bottom_right), with i, j, Lq, Lk counted within the sequence when packed

    Args:
        Lq, Lk: queries and keys.
        key_mask: bool [B, Lk]. lengths: int32 [B]. query_mask: bool [B, Lq].
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], starts of packed sequences and the token count.
        causal: alignment of the causal mask, or "none".
        device: of the result.

    Returns:
        bool, broadcastable to [B, H, Lq, Lk]; None where every query sees every key.

    Source: torch.nn.attention.bias for the two alignments; arXiv 2205.14135 (FlashAttention) packs sequences so.
    """
    conditions = []
    keys = visible_keys(Lk, key_mask, lengths)
    if keys is not None:
        conditions.append(keys[:, None, None, :])
    if query_mask is not None:
        conditions.append(query_mask[:, None, :, None])
    if causal != "none" or (cu_seqlens_q is not None and cu_seqlens_k is not None):
        i, j = torch.arange(Lq, device=device)[:, None], torch.arange(Lk, device=device)[None, :]
        shift: int | Tensor = Lk - Lq
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            # Sequence s holds the tokens from starts[s] on; empty sequences hold none.
            of_i, of_j = (torch.searchsorted(c[1:], x.int(), right=True) for c, x in ((cu_seqlens_q, i), (cu_seqlens_k, j)))
            conditions.append(of_i == of_j)
            start_q, start_k = cu_seqlens_q[of_i], cu_seqlens_k[of_j]
            shift = (cu_seqlens_k[1:] - cu_seqlens_k[:-1])[of_i] - (cu_seqlens_q[1:] - cu_seqlens_q[:-1])[of_i]
            i, j = i - start_q, j - start_k
        if causal != "none":
            conditions.append(j - i <= (shift if causal == "bottom_right" else 0))
    visible = None
    for condition in conditions:
        visible = condition if visible is None else visible & condition
    return visible


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    query_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: Literal["none", "upper_left", "bottom_right"] = "none",
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with its log-sum-exp.

    s_ij = scale * q_i . k_j + mask_ij,   lse_i = log sum_j exp(s_ij),   out_i = sum_j exp(s_ij - lse_i) v_j

    Args:
        query: float [..., H, Lq, d_qk].
        key: float [..., Hk, Lk, d_qk]; Hk divides H, and H / Hk consecutive query heads share a key head.
        value: float [..., Hk, Lk, d_v].
        key_mask, lengths, query_mask, cu_seqlens_q, cu_seqlens_k, causal: visible_pairs. Keys and values hidden by
            key_mask or lengths, and queries hidden by query_mask, are never read, whatever they hold.
        attn_mask: bool (True = visible) or float (added to the scores), broadcast to [..., H, Lq, Lk].
        dropout_p, dropout_seed: dropout_keep, with rows r = h * Lq + i; a seed is drawn when None.
        scale: 1 / sqrt(d_qk) when None.

    Returns:
        out [..., H, Lq, d_v] in query's dtype and lse [..., H, Lq] (fp32, fp64 for fp64). A query without a
        visible key gives 0, lse -inf and zero gradients.

    Source: Vaswani et al., arXiv 1706.03762, equation 1; masks as in torch's scaled_dot_product_attention.
    """
    Lq, Lk = query.shape[-2], key.shape[-2]
    key, value = _for_heads_of(query, key), _for_heads_of(query, value)
    keys = visible_keys(Lk, key_mask, lengths)
    if keys is not None:
        key, value = (x.masked_fill(~keys[:, None, :, None], 0) for x in (key, value))
    if query_mask is not None:
        query = query.masked_fill(~query_mask[:, None, :, None], 0)
    visible = visible_pairs(
        Lq, Lk, key_mask=key_mask, lengths=lengths, query_mask=query_mask, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, causal=causal, device=query.device,
    )  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = widen(query @ key.mT) * scale
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = attn_mask if visible is None else visible & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    weights, lse, _ = _softmax(scores)
    if dropout_p > 0:
        shape = weights.shape
        weights = weights.reshape(math.prod(shape[:-3]), math.prod(shape[-3:-1]), shape[-1])  # [B, R, M]
        weights = dropout(weights, dropout_p, dropout_seed).view(shape)
    return weights.to(value.dtype) @ value, lse


def shared_kv_attention(
    q: Tensor,
    x: Tensor,
    *,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    key_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention whose keys and values are one tensor.

    s_ij = scale * q_i . x_j,   p_ij = exp(s_ij - lse_i),   z_i = sum_j p_ij x_j,   rho_i = sum_j p_ij

    Args:
        q: float [B, R, C_padded], heads folded into rows.
        x: float [B, M, C_padded].
        key_mask: bool [B, M], True = visible. Other tokens are never read, whatever they hold.
        lengths: int32 [B]; only tokens j < lengths[b] are visible.
        scale: of the scores.
        dropout_p, dropout_seed: dropout_keep; a seed is drawn when None. p in z and rho is after dropout.
        key_offset: index of x's first token in the whole sequence, for dropout alone.

    Returns:
        z [B, R, C_padded] in q's dtype; lse and rho [B, R] (fp32, fp64 for fp64); rho is 1 without dropout. A
        row that sees no token gives z = 0, lse = -inf, rho = 0 and zero gradients.

    Source: multi-query attention of Shazeer, arXiv 1911.02150, section 3, with K = V = x.
    """
    visible = visible_keys(x.shape[1], key_mask, lengths)
    if visible is not None:
        x = x.masked_fill(~visible[..., None], 0)
    scores = widen(q @ x.mT) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, :], -math.inf)
    weights, lse, empty = _softmax(scores)
    rho = (~empty).to(lse.dtype)
    if dropout_p > 0:
        weights = dropout(weights, dropout_p, dropout_seed, key_offset)
        rho = weights.sum(-1)
    return weights.to(x.dtype) @ x, lse, rho


def input_cross_attention(
    q: Tensor,
    inputs: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    *,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-5,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """Latent queries attend to projections of normalised inputs, as the textbook writes it.

    k_j = W_k layer_norm(x_j) + b_k,   v_j = W_v layer_norm(x_j) + b_v,   out = attention(q, k, v)

    Args:
        q: float [B or 1, H, N, d_qk].
        inputs: float [B, M, C], content and positions together.
        w_k, w_v: float [H * d_qk, C] and [H * d_v, C], heads outermost.
        b_k, b_v: float [H * d_qk] and [H * d_v], or None.
        norm_weight, norm_bias: float [C], LayerNorm's affine part, or None.
        normalize: whether inputs pass through LayerNorm at all.
        eps: added to the variance.
        scale: 1 / sqrt(d_qk) when None.
        key_mask: bool [B, M], True = visible. Other tokens are never read, whatever they hold.
        lengths: int32 [B]; only tokens j < lengths[b] are visible.
        dropout_p, dropout_seed: dropout_keep, with rows r = h * N + i; a seed is drawn when None.

    Returns:
        [B, H, N, d_v] in q's dtype.

    Source: Perceiver, arXiv 2103.03206, section 3.1.
    """
    visible = visible_keys(inputs.shape[1], key_mask, lengths)
    if visible is not None:
        inputs = inputs.masked_fill(~visible[..., None], 0)
    y = layer_norm(inputs, norm_weight, norm_bias, eps) if normalize else inputs
    key = linear(y, w_k, b_k).unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
    value = linear(y, w_v, b_v).unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
    query = q.expand(inputs.shape[0], -1, -1, -1)
    return attention(
        query, key, value, key_mask=visible, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed
    )[0]


def output_cross_attention(
    queries: Tensor,
    key: Tensor,
    value: Tensor,
    w_q: Tensor,
    w_o: Tensor,
    *,
    b_q: Tensor | None = None,
    b_o: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-5,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    query_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """Projections of normalised output queries attend to keys and values of latents, as the textbook writes it.

    q_i = W_q layer_norm(y_i) + b_q,   out = W_o attention(q, k, v) + b_o

    Args:
        queries: float [B or 1, O, C].
        key, value: float [B, H, N, d_qk] and [B, H, N, d_v].
        w_q, w_o: float [H * d_qk, C] and [C_out, H * d_v], heads outermost.
        b_q, b_o: float [H * d_qk] and [C_out], or None.
        norm_weight, norm_bias: float [C], LayerNorm's affine part, or None.
        normalize: whether queries pass through LayerNorm at all.
        eps: added to the variance.
        scale: 1 / sqrt(d_qk) when None.
        key_mask, lengths, query_mask: visible_pairs. Hidden keys, values and queries are never read, whatever they hold.
        dropout_p, dropout_seed: dropout_keep, with rows r = h * O + i; a seed is drawn when None.

    Returns:
        [B, O, C_out] in queries' dtype. A query without a visible key gives b_o.

    Source: Perceiver IO, arXiv 2107.14795, section 3.2.
    """
    B, H = key.shape[:2]
    queries = queries.expand(B, -1, -1)
    if query_mask is not None:
        queries = queries.masked_fill(~query_mask[..., None], 0)
    y = layer_norm(queries, norm_weight, norm_bias, eps) if normalize else queries
    query = linear(y, w_q, b_q).unflatten(-1, (H, -1)).transpose(1, 2)
    out, _ = attention(
        query, key, value, key_mask=key_mask, lengths=lengths, query_mask=query_mask, scale=scale, dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )  # fmt: skip
    return linear(out.transpose(1, 2).flatten(2), w_o, b_o)


def _for_heads_of(query: Tensor, shared: Tensor) -> Tensor:
    """Keys or values, each head repeated for the consecutive query heads that share it; a single one broadcasts."""
    if query.ndim < 3 or shared.ndim < 3 or shared.shape[-3] <= 1:
        return shared
    return shared.repeat_interleave(max(1, query.shape[-3] // shared.shape[-3]), -3)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, log-sum-exp and which rows are empty: all -inf, or without a key."""
    empty = (scores == -math.inf).all(-1)
    # exp(-inf - -inf) is NaN, its gradient too: an empty row is computed as a constant and overwritten.
    scores = scores.masked_fill(empty[..., None], 0)
    lse = scores.logsumexp(-1).masked_fill(empty, -math.inf)
    return scores.softmax(-1).masked_fill(empty[..., None], 0), lse, empty
