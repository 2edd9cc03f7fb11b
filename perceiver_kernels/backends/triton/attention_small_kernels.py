"""Attention kernels for small problems in large batches: a few queries, a few keys, each head of each batch entry a problem.

One program per PROBLEMS neighbouring heads, those of a batch entry first, which lie side by side in memory: a program for each
would start four times as often for the same bytes. Queries are EACH_Q rows a problem, keys EACH_KV; products are batched over
the problems (matrix instructions take 16 rows, so that most of them is padding), and no number of one problem meets another's.
The backward has dq, dk and dv at once. It computes the weights and delta anew from the scores: lse and out, which are rounded,
would say them less exactly.

FLOPs: as attention_kernels.py's, times EACH_Q EACH_KV / (Lq Lk). Device memory: every operand and result once, no partials,
which is the time it takes (3 queries, 13 keys, 64 channels: 4 KB and 10 KFLOP a head). Arguments in tuples are those of
attention_kernels.py; one query head to a key head, one segment.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.attention_steps import (
    attn_mask_kind,
    exponent_factor,
    has_key_mask,
    has_lengths,
    mask_scores,
    row_windows,
    rows_to_read,
    softmax_weights,
    store_result,
    windowed,
)
from perceiver_kernels.backends.triton.primitives import dropout_factors, load_rows, store_rows


@triton.jit
def _places(B, H, PROBLEMS: tl.constexpr, EACH: tl.constexpr):
    """(batch entry, head, index within the problem, whether the problem exists) of a tile's rows."""
    o = tl.arange(0, PROBLEMS * EACH)
    i_problem = tl.program_id(0) * PROBLEMS + o // EACH
    i_entry = tl.minimum(i_problem, B * H - 1)
    return i_entry // H, i_entry % H, o % EACH, i_problem < B * H


@triton.jit
def _offsets(places, stride):
    """Where rows begin, in elements, as int64."""
    return places[0].to(tl.int64) * stride[0] + places[1].to(tl.int64) * stride[1] + places[2].to(tl.int64) * stride[2]


@triton.jit
def _visible(masks, i_b, o_keys, Lk, HIDES: tl.constexpr):
    """Keys that lengths and key_mask show; entries and keys broadcast against each other."""
    seen = o_keys < Lk
    if has_lengths(HIDES):
        seen = seen & (o_keys < tl.load(masks[1] + i_b))
    if has_key_mask(HIDES):
        seen = seen & (tl.load(masks[0] + i_b.to(tl.int64) * Lk + o_keys, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _hide(s, masks, stride_mask, rows, o_keys, window, m_rows, Lk, scale, HIDES: tl.constexpr):
    """Scores [PROBLEMS EACH_Q, EACH_KV] with everything hidden at -inf."""
    seen = m_rows[:, None] & _visible(masks, rows[0][:, None], o_keys[None, :], Lk, HIDES)
    if windowed(HIDES):
        seen = seen & (o_keys[None, :] >= window[0][:, None]) & (o_keys[None, :] < window[1][:, None])
    if attn_mask_kind(HIDES) != "none":
        s = mask_scores(
            s, masks, stride_mask, rows[0][:, None], rows[1][:, None], rows[2][:, None], o_keys[None, :], seen, scale, HIDES
        )
    else:
        s = tl.where(seen, s, -float("inf"))
    return s


@triton.jit
def _by_problem(tile, PROBLEMS: tl.constexpr):
    """[PROBLEMS N, C] to [PROBLEMS, N, C]."""
    return tile.reshape(PROBLEMS, tile.shape[0] // PROBLEMS, tile.shape[1])


@triton.jit
def _flat(tile):
    """[PROBLEMS, N, C] to [PROBLEMS N, C]."""
    return tile.reshape(tile.shape[0] * tile.shape[1], tile.shape[2])


@triton.jit
def _scores(a, b, PROBLEMS: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T, problem by problem: [PROBLEMS A, C] x [PROBLEMS B, C] -> [PROBLEMS A, B]."""
    s = tl.zeros([PROBLEMS, a[0].shape[0] // PROBLEMS, b[0].shape[0] // PROBLEMS], tl.float32)
    for i in tl.static_range(len(a)):
        s = tl.dot(
            _by_problem(a[i], PROBLEMS), _by_problem(b[i], PROBLEMS).permute(0, 2, 1), s, input_precision=PRECISION
        )
    return _flat(s)


@triton.jit
def _rows_of(weights, b, PROBLEMS: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """weights b, problem by problem, or weights^T b: weights [PROBLEMS A, B], b of B (A) rows a problem, in pieces."""
    w = _by_problem(weights, PROBLEMS)
    if TRANSPOSED:
        w = w.permute(0, 2, 1)
    pieces = ()
    for i in tl.static_range(len(b)):
        pieces = pieces + (_flat(tl.dot(w, _by_problem(b[i], PROBLEMS), input_precision=PRECISION)),)
    return pieces


@triton.jit
def _attention_small_fwd_kernel(
    q, k, v, out, lse, statistics, masks, dropout, scale, causal_shift, sizes, stride_q, stride_k, stride_v, stride_out,
    stride_mask,
    PIECES_QK: tl.constexpr, PIECES_V: tl.constexpr, PROBLEMS: tl.constexpr, EACH_Q: tl.constexpr, EACH_KV: tl.constexpr,
    HIDES: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    B, H, _, Lq, Lk, d_qk, d_v = sizes
    rows, keys, o_keys = _places(B, H, PROBLEMS, EACH_Q), _places(B, H, PROBLEMS, EACH_KV), tl.arange(0, EACH_KV)
    m_rows, m_keys = rows[3] & (rows[2] < Lq), keys[3] & _visible(masks, keys[0], keys[2], Lk, HIDES)
    window = row_windows(masks, rows[0], rows[2], m_rows, Lq, Lk, causal_shift, HIDES)
    b_q = load_rows(q, 1, _offsets(rows, stride_q), rows_to_read(window, m_rows, HIDES), d_qk, PIECES_QK)
    b_k = load_rows(k, 1, _offsets(keys, stride_k), m_keys, d_qk, PIECES_QK)
    b_v = load_rows(v, 1, _offsets(keys, stride_v), m_keys, d_v, PIECES_V)
    s = _hide(
        _scores(b_q, b_k, PROBLEMS, PRECISION), masks, stride_mask, rows, o_keys, window, m_rows, Lk, scale, HIDES
    )  # [PROBLEMS EACH_Q, EACH_KV]
    m_i, l_i = tl.full([PROBLEMS * EACH_Q], -float("inf"), tl.float32), tl.zeros([PROBLEMS * EACH_Q], tl.float32)
    p, _, m_i, l_i = softmax_weights(m_i, l_i, s, exponent_factor(scale, HIDES), HIDES)
    if DROPOUT:
        o_weights = (rows[1] * Lq + rows[2])[:, None]
        p *= dropout_factors(dropout[0], dropout[1], 1.0, rows[0][:, None], o_weights, o_keys[None, :])
    acc = _rows_of(p.to(b_v[0].dtype), b_v, PROBLEMS, False, PRECISION)
    o_lse = (rows[0] * H + rows[1]).to(tl.int64) * Lq + rows[2]
    store_result(
        (acc, m_i, l_i), out, lse, statistics, 0, 1, o_lse, _offsets(rows, stride_out), m_rows, d_v,
        tl.cast(B * H, tl.int64) * Lq, dropout[2], PIECES_V, DROPOUT, HIDES,
    )  # fmt: skip


@triton.jit
def _attention_small_bwd_kernel(
    q, k, v, dout, dlse, dq, dk, dv, masks, dropout, scale, causal_shift, sizes,
    stride_q, stride_k, stride_v, stride_dout, stride_dq, stride_dk, stride_dv, stride_mask,
    PIECES_QK: tl.constexpr, PIECES_V: tl.constexpr, PROBLEMS: tl.constexpr, EACH_Q: tl.constexpr, EACH_KV: tl.constexpr,
    HIDES: tl.constexpr, DROPOUT: tl.constexpr, HAS_DLSE: tl.constexpr, NEEDS_DKV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    B, H, _, Lq, Lk, d_qk, d_v = sizes
    rows, keys, o_keys = _places(B, H, PROBLEMS, EACH_Q), _places(B, H, PROBLEMS, EACH_KV), tl.arange(0, EACH_KV)
    m_rows, m_keys = rows[3] & (rows[2] < Lq), keys[3] & _visible(masks, keys[0], keys[2], Lk, HIDES)
    window = row_windows(masks, rows[0], rows[2], m_rows, Lq, Lk, causal_shift, HIDES)
    m_read = rows_to_read(window, m_rows, HIDES)
    b_do = load_rows(dout, 1, _offsets(rows, stride_dout), m_read, d_v, PIECES_V)
    b_q = load_rows(q, 1, _offsets(rows, stride_q), m_read, d_qk, PIECES_QK)
    b_k = load_rows(k, 1, _offsets(keys, stride_k), m_keys, d_qk, PIECES_QK)
    b_v = load_rows(v, 1, _offsets(keys, stride_v), m_keys, d_v, PIECES_V)
    s = _hide(
        _scores(b_q, b_k, PROBLEMS, PRECISION), masks, stride_mask, rows, o_keys, window, m_rows, Lk, scale, HIDES
    )  # [PROBLEMS EACH_Q, EACH_KV]
    dp = _scores(b_do, b_v, PROBLEMS, PRECISION)
    m_i, l_i = tl.full([PROBLEMS * EACH_Q], -float("inf"), tl.float32), tl.zeros([PROBLEMS * EACH_Q], tl.float32)
    p, _, _, l_i = softmax_weights(m_i, l_i, s, exponent_factor(scale, HIDES), HIDES)
    # Rows past the end have no maximum: their p is no number.
    p = tl.where(m_rows[:, None], p / tl.where(l_i == 0.0, 1.0, l_i)[:, None], 0.0)
    kept = p
    if DROPOUT:
        o_weights = (rows[1] * Lq + rows[2])[:, None]
        factors = dropout_factors(*dropout, rows[0][:, None], o_weights, o_keys[None, :])
        dp, kept = dp * factors, p * factors
    b_delta = tl.sum(p * dp, 1)
    if HAS_DLSE:
        o_lse = (rows[0] * H + rows[1]).to(tl.int64) * Lq + rows[2]
        b_delta -= tl.load(dlse + o_lse, mask=m_rows, other=0.0)
    ds = (p * (dp - b_delta[:, None])).to(b_k[0].dtype)
    scales_q = tl.full([PROBLEMS * EACH_Q], 1.0, tl.float32) * scale
    acc = _rows_of(ds, b_k, PROBLEMS, False, PRECISION)
    store_rows(dq, 1, _offsets(rows, stride_dq), m_rows, d_qk, acc, scales_q, PIECES_QK)
    if NEEDS_DKV:
        m_store = keys[3] & (keys[2] < Lk)
        ones = tl.full([PROBLEMS * EACH_KV], 1.0, tl.float32)
        acc_v = _rows_of(kept.to(b_do[0].dtype), b_do, PROBLEMS, True, PRECISION)
        store_rows(dv, 1, _offsets(keys, stride_dv), m_store, d_v, acc_v, ones, PIECES_V)
        acc_k = _rows_of(ds, b_q, PROBLEMS, True, PRECISION)
        store_rows(dk, 1, _offsets(keys, stride_dk), m_store, d_qk, acc_k, ones * scale, PIECES_QK)
