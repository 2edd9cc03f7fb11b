"""Steps that the attention kernels share: what queries see, scores, softmax, the weights of the backward.

Arguments in tuples: masks = (key_mask, lengths, query_mask, attn_mask, window_lo, window_hi); a window is (lo, hi), the keys
that each query may see; stride is that of batch, head and row.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.primitives import (
    LN_2,
    LOG2_E,
    accumulate,
    load_rows,
    load_rows_tma,
    rescale,
    store_rows,
)

_LN_2 = tl.constexpr(LN_2)
_LOG2_E = tl.constexpr(LOG2_E)


class Hides(NamedTuple):
    """What hides keys from queries, as far as a kernel is compiled for it; attn_mask is none, boolean or additive.

    A kernel sees a plain tuple and reads it through the functions below.
    """

    packed: bool = False
    causal: bool = False
    lengths: bool = False
    query_mask: bool = False
    key_mask: bool = False
    attn_mask: str = "none"


@triton.constexpr_function
def packed(hides):
    return hides[0]


@triton.constexpr_function
def causal(hides):
    return hides[1]


@triton.constexpr_function
def has_lengths(hides):
    return hides[2]


@triton.constexpr_function
def has_query_mask(hides):
    return hides[3]


@triton.constexpr_function
def has_key_mask(hides):
    return hides[4]


@triton.constexpr_function
def attn_mask_kind(hides):
    return hides[5]


@triton.constexpr_function
def windowed(hides):
    """Whether queries see windows."""
    return any(hides[:4])


@triton.constexpr_function
def hides_anything(hides):
    return any(hides[:5]) or hides[5] != "none"


@triton.jit
def load_head(
    source, i_b, i_h, start, m_rows, stride, d, PIECES: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Rows start..start+ROWS of one head: through descriptors of the column pieces (TMA), or masked, through a pointer."""
    if TMA:
        pieces = load_rows_tma(source, (i_b, i_h), start, ROWS, PIECES)
    else:
        base = source[0] + i_b.to(tl.int64) * stride[0] + i_h.to(tl.int64) * stride[1]
        pieces = load_rows(base, stride[2], start + tl.arange(0, ROWS), m_rows, d, PIECES)
    return pieces


@triton.jit
def row_windows(masks, i_b, o_rows, m_rows, Lq, Lk, causal_shift, HIDES: tl.constexpr):
    """The keys lo..hi that each query may see, hi >= lo."""
    lo = o_rows * 0
    hi = lo + Lk
    if packed(HIDES):
        lo = tl.load(masks[4] + o_rows, mask=m_rows, other=0)
        hi = tl.load(masks[5] + o_rows, mask=m_rows, other=0)
    if causal(HIDES):
        hi = tl.minimum(hi, o_rows + 1 + causal_shift)
    if has_lengths(HIDES):
        hi = tl.minimum(hi, tl.load(masks[1] + i_b))
    if has_query_mask(HIDES):
        seen = tl.load(masks[2] + i_b.to(tl.int64) * Lq + o_rows, mask=m_rows, other=0)
        hi = tl.where(seen != 0, hi, lo)
    return lo, tl.maximum(hi, lo)


@triton.jit
def window_bounds(window, m_rows, Lk, HIDES: tl.constexpr):
    """(lo, hi) of the keys that some row of a block sees, and (lo, hi) of those that all of its rows see."""
    some_lo, some_hi, all_lo, all_hi = 0, Lk, 0, Lk
    if windowed(HIDES):
        lo, hi = window
        used = m_rows & (hi > lo)
        some_lo, some_hi = tl.min(tl.where(used, lo, Lk), 0), tl.max(tl.where(used, hi, 0), 0)
        all_lo, all_hi = tl.max(tl.where(m_rows, lo, 0), 0), tl.min(tl.where(m_rows, hi, Lk), 0)
    return some_lo, some_hi, all_lo, all_hi


@triton.jit
def rows_to_read(window, m_rows, HIDES: tl.constexpr):
    """Rows whose content counts: what hidden queries hold must not reach a product."""
    if has_query_mask(HIDES):
        m_rows = m_rows & (window[1] > window[0])
    return m_rows


@triton.jit
def keys_to_read(masks, i_b, o_keys, end, visible_end, Lk, HIDES: tl.constexpr):
    """Keys below ``end`` whose content counts; others are read as zeros, whatever they hold."""
    m_keys = o_keys < end
    if has_lengths(HIDES):
        m_keys = m_keys & (o_keys < visible_end)
    if has_key_mask(HIDES):
        m_keys = m_keys & (tl.load(masks[0] + i_b.to(tl.int64) * Lk + o_keys, mask=m_keys, other=0) != 0)
    return m_keys


@triton.jit
def mask_scores(s, masks, stride_mask, i_b, i_h, o_rows, o_keys, seen, scale, HIDES: tl.constexpr):
    """Scores where attn_mask shows a ``seen`` pair, -inf elsewhere. With an additive mask they come back scaled."""
    p = masks[3] + i_b.to(tl.int64) * stride_mask[0] + i_h.to(tl.int64) * stride_mask[1]
    p += o_rows.to(tl.int64) * stride_mask[2] + o_keys.to(tl.int64) * stride_mask[3]
    added = tl.load(p, mask=seen, other=0.0).to(tl.float32)
    if attn_mask_kind(HIDES) == "additive":
        s = tl.where(seen, s * scale + added, -float("inf"))
    else:
        s = tl.where(seen & (added != 0.0), s, -float("inf"))
    return s


@triton.jit
def hide(
    s, masks, stride_mask, i_b, i_h, o_rows, o_keys, lo, hi, m_rows, m_keys, tile, scale,
    BLOCK_KV: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Scores of a tile (start, end, all_lo, all_hi) with everything hidden at -inf; indices of rows broadcast against keys'.

    With an additive mask they come back scaled: its finfo.min must not meet a factor that makes -inf of it.
    """
    start, end, all_lo, all_hi = tile
    if attn_mask_kind(HIDES) != "none":
        seen = m_rows & m_keys & (o_keys >= lo) & (o_keys < hi)
        s = mask_scores(s, masks, stride_mask, i_b, i_h, o_rows, o_keys, seen, scale, HIDES)
    elif has_key_mask(HIDES):
        s = tl.where(m_keys & (o_keys >= lo) & (o_keys < hi), s, -float("inf"))
    elif windowed(HIDES):
        if (start < all_lo) | (start + BLOCK_KV > tl.minimum(all_hi, end)):
            s = tl.where((o_keys >= lo) & (o_keys < tl.minimum(hi, end)), s, -float("inf"))
    elif start + BLOCK_KV > end:
        s = tl.where(o_keys < end, s, -float("inf"))
    return s


@triton.jit
def exponent_factor(scale, HIDES: tl.constexpr):
    """What ``hide``'s scores are multiplied with to be exponents of 2."""
    return _LOG2_E if attn_mask_kind(HIDES) == "additive" else scale * _LOG2_E


@triton.jit
def softmax_weights(m_i, l_i, s, factor, HIDES: tl.constexpr):
    """(p, alpha, m, l) of one more tile of scores: p relative to the new maximum m, what came before is multiplied with alpha.

    m is scaled, except under an additive mask.
    """
    # A row that has seen no key yet has m = -inf; 0 in its place keeps exp2(-inf - m) at 0 instead of NaN.
    if attn_mask_kind(HIDES) == "additive":
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2((s - m_safe[:, None]) * factor)
        alpha = tl.exp2((m_i - m_safe) * factor)
    else:
        m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new) if hides_anything(HIDES) else m_new
        p = tl.exp2(s * factor - m_safe[:, None])
        alpha = tl.exp2(m_i - m_safe)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def softmax_step(state, s, b_v, kept, factor, DROPOUT: tl.constexpr, HIDES: tl.constexpr, PRECISION: tl.constexpr):
    """(acc, m, l) with one more tile of scores and values."""
    acc, m_i, l_i = state
    p, alpha, m_i, l_i = softmax_weights(m_i, l_i, s, factor, HIDES)
    if DROPOUT:
        p = p * kept
    return accumulate(p.to(b_v[0].dtype), b_v, rescale(acc, alpha), PRECISION), m_i, l_i


@triton.jit
def store_row_state(lse, statistics, o_lse, o_statistics, m_i, l_i, m_rows, total_rows, HIDES: tl.constexpr):
    """lse, and under an additive mask the maximum and log l apart: lse would lose log l beside finfo.min.

    m is a power of two, except under an additive mask.
    """
    log_l = tl.log2(l_i) * _LN_2
    if attn_mask_kind(HIDES) == "additive":
        tl.store(lse + o_lse, m_i + log_l, mask=m_rows)
        tl.store(statistics + o_statistics, tl.where(m_i == -float("inf"), float("inf"), m_i), mask=m_rows)
        tl.store(statistics + total_rows + o_statistics, tl.where(l_i == 0.0, 0.0, log_l), mask=m_rows)
    else:
        tl.store(lse + o_lse, m_i * _LN_2 + log_l, mask=m_rows)


@triton.jit
def store_result(
    state, out, lse, statistics, o_out, stride_row, o_lse, o_rows, m_rows, d_v, total_rows, inverse_keep, PIECES: tl.constexpr,
    DROPOUT: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """acc / l, and the rows' state."""
    acc, m_i, l_i = state
    inverse_l = 1.0 / tl.where(l_i == 0.0, 1.0, l_i)
    if DROPOUT:
        inverse_l *= inverse_keep
    store_rows(out + o_out, stride_row, o_rows, m_rows, d_v, acc, inverse_l, PIECES)
    store_row_state(lse, statistics, o_lse, o_lse, m_i, l_i, m_rows, total_rows, HIDES)


@triton.jit
def load_row_state(lse, statistics, o, m_rows, total_rows, HIDES: tl.constexpr):
    """(shift, log2 l): p = exp2((s - shift) factor - log2 l); rows that see nothing get a shift of +inf, so that p is 0."""
    if attn_mask_kind(HIDES) == "additive":
        shift = tl.load(statistics + o, mask=m_rows, other=float("inf"))
        log_l = tl.load(statistics + total_rows + o, mask=m_rows, other=0.0) * _LOG2_E
    else:
        shift = tl.load(lse + o, mask=m_rows, other=-float("inf"))
        shift = tl.where(shift == -float("inf"), float("inf"), shift * _LOG2_E)
        log_l = shift * 0.0
    return shift, log_l


@triton.jit
def attention_weights(s, shift, log_l, factor, HIDES: tl.constexpr):
    """Weights from scores and what load_row_state gives."""
    return tl.exp2((s - shift) * factor - log_l) if attn_mask_kind(HIDES) == "additive" else tl.exp2(s * factor - shift)


@triton.jit
def exact_delta(p, dp, dlse, delta, all_keys):
    """sum_j p_j dp_j - dlse of each row if the tile holds ``all_keys`` of it, else ``delta``."""
    if all_keys:
        delta = tl.sum(p * dp, 1) - dlse
    return delta
