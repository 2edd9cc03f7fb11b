"""The specification: every operation as its equation, in plain PyTorch.

Products run in the dtype of their operands and round as eager PyTorch does; softmax and statistics run in
fp32 or wider. Autograd of these functions defines every gradient, of any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

# Philox-4x32 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

_Device = torch.device | str | None


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Layer normalisation over the last axis.

    y = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(mean((x - mean)^2) + eps)

    Args:
        x: float [..., C].
        weight, bias: float [C], or None for 1 and 0.
        eps: added to the variance.

    Returns:
        [..., C] in x's dtype.

    Source: Ba, Kiros, Hinton, arXiv 1607.06450, equation 4, with eps as torch.nn.LayerNorm has it.
    """
    normalized, _ = _standardize(_widen(x), eps)
    if weight is not None:
        normalized = normalized * weight
    if bias is not None:
        normalized = normalized + bias
    return normalized.to(x.dtype)


def fourier_features(
    coordinates: Tensor,
    num_bands: int,
    max_resolution: Sequence[float],
    include_raw: bool = True,
    order: Literal["deepmind", "perceiver-pytorch"] = "deepmind",
) -> Tensor:
    """Fourier position features: sines and cosines of every coordinate at num_bands frequencies.

    x_a, sin(pi * f_ab * x_a), cos(pi * f_ab * x_a),   f_ab = linspace(1, max_resolution[a] / 2, num_bands)[b]

    Args:
        coordinates: float [..., axes], usually in [-1, 1].
        num_bands: frequencies for each axis.
        max_resolution: one number for each axis.
        include_raw: whether the coordinates themselves are features too.
        order: "deepmind": [raw | sin by axis | cos by axis]; "perceiver-pytorch": by axis [sin | cos | raw].

    Returns:
        [..., axes * (2 * num_bands + include_raw)], fp64 for fp64 coordinates and fp32 otherwise.

    Source: Perceiver, arXiv 2103.03206, section 3.2. Frequencies are fp32 values, as in DeepMind's code.
    """
    x = _widen(coordinates)
    bands = [torch.linspace(1, top / 2, num_bands, dtype=torch.float64) for top in max_resolution]
    phase = math.pi * (x[..., None] * torch.stack(bands).to(x.device, torch.float32))
    if order == "deepmind":
        waves = [phase.sin().flatten(-2), phase.cos().flatten(-2)]
        return torch.cat([x, *waves] if include_raw else waves, -1)
    by_axis = [phase.sin(), phase.cos(), x[..., None]] if include_raw else [phase.sin(), phase.cos()]
    return torch.cat(by_axis, -1).flatten(-2)


def pack_inputs(
    content: Tensor,
    positions: Tensor | None = None,
    fourier: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-5,
    channels_multiple: int = 16,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Content and positions side by side, normalised without affine part, padded with zero channels and cast.

    x = [content | positions];   packed = [(x - mean) * rstd | 0],   mean and rstd over the C real channels

    Args:
        content: float [B, M, C_content]; C_content may be 0.
        positions: float [M, P] or [B, M, P]: position channels, or coordinates when fourier is given.
        fourier: fp32 [3, F], axis a, frequency f and kind of each feature: x_a (0), sin(pi * x_a * f) (1) or
            cos(pi * x_a * f) (2).
        key_mask: bool [B, M], True = visible. Other tokens become zeros, whatever they hold; so does rstd.
        normalize: whether to normalise; False only concatenates, pads and casts.
        eps: added to the variance.
        channels_multiple: C_padded is C rounded up to it.
        dtype: of packed; content's when None.

    Returns:
        packed [B, M, C_padded] and rstd [B, M] (fp32, fp64 for fp64 content; [0] without normalize).

    Source: the input array of Perceiver, arXiv 2103.03206, sections 3.1 and 3.2; layer_norm's equation.
    """
    hidden = None if key_mask is None else ~key_mask[..., None]
    x = _widen(content)
    if positions is not None:
        positions = positions.to(x.dtype).expand(*x.shape[:2], -1)
    if hidden is not None:
        # Before any arithmetic: 0 * NaN would bring a hidden token's content back.
        x = x.masked_fill(hidden, 0)
        positions = None if positions is None else positions.masked_fill(hidden, 0)
    if positions is not None and fourier is not None:
        axis, frequency, kind = fourier[0].long(), fourier[1].to(x.dtype), fourier[2]
        raw = positions[..., axis]
        phase = math.pi * (raw * frequency)
        positions = torch.where(kind == 0, raw, torch.where(kind == 1, phase.sin(), phase.cos()))
    if positions is not None:
        x = torch.cat([x, positions], -1)
    rstd = x.new_empty(0)
    if normalize:
        x, rstd = _standardize(x, eps)
        rstd = rstd[..., 0] if hidden is None else rstd.masked_fill(hidden, 0)[..., 0]
    if hidden is not None:
        x = x.masked_fill(hidden, 0)
    return pad(x, (0, -x.shape[-1] % channels_multiple)).to(dtype or content.dtype), rstd


def philox(counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = 10) -> tuple[Tensor, ...]:
    """The counter-based generator Philox-4x32: four words of a counter to four random words.

    (c0, c1, c2, c3) <- (hi(m1 * c2) ^ c1 ^ k0, lo(m1 * c2), hi(m0 * c0) ^ c3 ^ k1, lo(m0 * c0)),   k <- k + w

    Args:
        counter: four int64 tensors of 32-bit words that broadcast.
        key: two int64 tensors of 32-bit words that broadcast with them.
        rounds: 10, unless its strength is being studied.

    Returns:
        Four int64 tensors of 32-bit words.

    Source: Salmon, Moraes, Dror, Shaw, SC 2011, section 3.3, with the known answers of their Random123.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply_words(c0, _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply_words(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD, (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def dropout_keep(
    seed: Tensor, B: int, R: int, M: int, dropout_p: float, key_offset: int = 0, device: _Device = None
) -> Tensor:
    """Which attention weights dropout keeps: a function of the seed and the weight's place, so never stored.

    keep = word >= round(dropout_p * 2^32),   word = philox((j + key_offset, r, b, 0), (seed_lo, seed_hi))[0]

    Args:
        seed: int64 [1].
        B, R, M: batch, query rows (heads folded in: r = h * N + i) and keys.
        dropout_p: probability of dropping, in [0, 1].
        key_offset: index of the first of these keys in the whole sequence.
        device: of the result; the seed's when None.

    Returns:
        bool [B, R, M]. Kept weights are divided by 1 - dropout_p.

    Source: dropout of Srivastava et al., JMLR 15 (2014), on the weights of attention, drawn with philox.
    """
    device = seed.device if device is None else torch.device(device)
    seed = seed.to(device)
    counter = (
        torch.arange(key_offset, key_offset + M, device=device)[None, None, :],
        torch.arange(R, device=device)[None, :, None],
        torch.arange(B, device=device)[:, None, None],
        torch.zeros((), dtype=torch.int64, device=device),
    )
    word = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))[0]
    return word >= round(dropout_p * 2**32)


def draw_seed(device: _Device = None) -> Tensor:
    """A dropout seed, int64 [1] on device, from torch's generator: manual_seed and checkpoint govern it."""
    info = torch.iinfo(torch.int64)
    return torch.randint(info.min, info.max, (1,), dtype=torch.int64, device=device)


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
    keys = _visible_keys(Lk, key_mask, lengths)
    if keys is not None:
        conditions.append(keys[:, None, None, :])
    if query_mask is not None:
        conditions.append(query_mask[:, None, :, None])
    i, j = torch.arange(Lq, device=device)[:, None], torch.arange(Lk, device=device)[None, :]
    shift = torch.tensor(Lk - Lq, device=device)
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
    groups = query.shape[-3] // key.shape[-3]
    if groups > 1:
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    keys = _visible_keys(Lk, key_mask, lengths)
    if keys is not None:
        key, value = (x.masked_fill(~keys[:, None, :, None], 0) for x in (key, value))
    if query_mask is not None:
        query = query.masked_fill(~query_mask[:, None, :, None], 0)
    visible = visible_pairs(
        Lq, Lk, key_mask=key_mask, lengths=lengths, query_mask=query_mask, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, causal=causal, device=query.device,
    )  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = _widen(query @ key.mT) * scale
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
        weights = _dropout(weights, dropout_p, dropout_seed).view(shape)
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
    visible = _visible_keys(x.shape[1], key_mask, lengths)
    if visible is not None:
        x = x.masked_fill(~visible[..., None], 0)
    scores = _widen(q @ x.mT) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, :], -math.inf)
    weights, lse, empty = _softmax(scores)
    rho = (~empty).to(lse.dtype)
    if dropout_p > 0:
        weights = _dropout(weights, dropout_p, dropout_seed, key_offset)
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
    visible = _visible_keys(inputs.shape[1], key_mask, lengths)
    if visible is not None:
        inputs = inputs.masked_fill(~visible[..., None], 0)
    y = layer_norm(inputs, norm_weight, norm_bias, eps) if normalize else inputs
    key = linear(y, w_k, b_k).unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
    value = linear(y, w_v, b_v).unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
    query = q.expand(inputs.shape[0], -1, -1, -1)
    return attention(
        query, key, value, key_mask=visible, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed
    )[0]


def _widen(x: Tensor) -> Tensor:
    """x in the dtype that sums and exponentials are taken in: fp64 for fp64, fp32 otherwise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centered = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    return centered * rstd, rstd


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, log-sum-exp and which rows are empty: all -inf, or without a key."""
    empty = (scores == -math.inf).all(-1)
    # exp(-inf - -inf) is NaN, its gradient too: an empty row is computed as a constant and overwritten.
    scores = scores.masked_fill(empty[..., None], 0)
    lse = scores.logsumexp(-1).masked_fill(empty, -math.inf)
    return scores.softmax(-1).masked_fill(empty[..., None], 0), lse, empty


def _dropout(weights: Tensor, dropout_p: float, seed: Tensor | None, key_offset: int = 0) -> Tensor:
    seed = draw_seed(weights.device) if seed is None else seed
    B, R, M = weights.shape
    keep = dropout_keep(seed, B, R, M, dropout_p, key_offset, weights.device)
    return weights * keep / (1 - dropout_p) if dropout_p < 1 else weights * 0


def _visible_keys(length: int, key_mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    if lengths is None:
        return key_mask
    within = torch.arange(length, device=lengths.device) < lengths[:, None]
    return within if key_mask is None else within & key_mask


def _multiply_words(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of 32-bit words, in 16-bit steps that fit in int64."""
    upper, lower = (a >> 16) * b, (a & 0xFFFF) * b
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _WORD
