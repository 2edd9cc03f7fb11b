"""Attention kernels over separate keys and values: forward, and one backward for dq, dk and dv.

forward: one program per (BLOCK_Q queries, split of the keys, head, batch entry); query blocks vary fastest. backward: one
program per (slice of the queries, range of the keys, key head, batch entry); it walks over the BLOCK_KV keys of its range, and
for each over the queries of its slice and of all heads that share the key head. Many keys are cut into ranges, many queries
into slices. Splits, ranges and slices write fp32 partials [B*H, S, L, d] that combine.py reduces in a fixed order: everything
is deterministic.

A query sees a window lo..hi of keys (causal, lengths, packed sequences, hidden queries), less what masks hide. Tiles outside
every window of a block are skipped, tiles inside all of them are not masked. Two segments of keys are two ranges of splits.

FLOPs: forward 2 BH Lq Lk (d_qk + d_v), backward 2 BH Lq Lk (3 d_qk + 2 d_v): nothing is computed twice. Device memory: every
operand once while the programs that share it run together, and 4 B H S L d bytes of partials; the backward adds to dq_sum, 8 BH
Lq d_qk bytes for each block of keys, in the L2 while 4 d_qk bytes for every row of the slices at work fit it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.primitives import (
    LN_2,
    LOG2_E,
    accumulate,
    add_rows,
    dot_columns,
    dot_transposed,
    dropout_factors,
    load_rows,
    load_rows_tma,
    rescale,
    scale_rows,
    store_rows,
    zero_rows,
)

_LN_2 = tl.constexpr(LN_2)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _load_tile(
    source, source_1, source_2, i_b, i_h, start, m_rows, stride_b, stride_h, stride_row, d,
    PIECES: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows start..start+ROWS of one head: through descriptors of the column pieces (TMA), or masked, through a pointer."""
    if TMA:
        pieces = load_rows_tma((source, source_1, source_2), (i_b, i_h), start, ROWS, PIECES)
    else:
        base = source + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
        pieces = load_rows(base, stride_row, start + tl.arange(0, ROWS), m_rows, d, PIECES)
    return pieces


@triton.jit
def _windows(
    window_lo, window_hi, lengths, query_mask, i_b, o_rows, m_rows, Lq, Lk, causal_shift,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_QUERY_MASK: tl.constexpr,
):  # fmt: skip
    """The keys lo..hi that each query may see, hi >= lo; rows past the end see all that any row does."""
    lo = o_rows * 0
    hi = lo + Lk
    if PACKED:
        lo = tl.load(window_lo + o_rows, mask=m_rows, other=0)
        hi = tl.load(window_hi + o_rows, mask=m_rows, other=0)
    if CAUSAL:
        hi = tl.minimum(hi, o_rows + 1 + causal_shift)
    if HAS_LENGTHS:
        hi = tl.minimum(hi, tl.load(lengths + i_b))
    if HAS_QUERY_MASK:
        seen = tl.load(query_mask + i_b.to(tl.int64) * Lq + o_rows, mask=m_rows, other=0)
        hi = tl.where(seen != 0, hi, lo)
    return lo, tl.maximum(hi, lo)


@triton.jit
def _key_range(i_s, first_splits, keys_per_split, Lk_first, Lk):
    """(begin, end, base): the keys of split i_s, which lie in one segment, and the first key of that segment."""
    in_first = i_s < first_splits
    base = tl.where(in_first, 0, Lk_first)
    begin = base + tl.where(in_first, i_s, i_s - first_splits) * keys_per_split
    end = tl.minimum(begin + keys_per_split, tl.where(in_first, Lk_first, Lk))
    return begin, end, base


@triton.jit
def _one_of(second, source, stride_b, stride_h, stride_l, source_2, stride_2_b, stride_2_h, stride_2_l):
    """The pointer and strides of the segment that a program reads."""
    return (
        tl.where(second, source_2, source), tl.where(second, stride_2_b, stride_b), tl.where(second, stride_2_h, stride_h),
        tl.where(second, stride_2_l, stride_l),
    )  # fmt: skip


@triton.jit
def _additive_mask(attn_mask, i_b, i_h, o_rows, o_keys, seen, stride_b, stride_h, stride_q, stride_k):
    p = attn_mask + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    p += o_rows.to(tl.int64) * stride_q + o_keys.to(tl.int64) * stride_k
    return tl.load(p, mask=seen, other=0.0).to(tl.float32)


@triton.jit
def _scores(
    s, attn_mask, i_b, i_h, o_rows, o_keys, lo, hi, m_rows, m_keys, start, end, inner_lo, inner_hi, scale, stride_mask_b,
    stride_mask_h, stride_mask_q, stride_mask_k,
    BLOCK_KV: tl.constexpr, WINDOWED: tl.constexpr, KEY_MASKED: tl.constexpr, ATTN_MASK: tl.constexpr,
):  # fmt: skip
    """Scores with everything hidden at -inf. ``o_rows``, ``lo``, ``hi``, ``m_rows`` broadcast against ``o_keys``, ``m_keys``.

    With an additive mask they are scaled already: its finfo.min must not meet a factor that makes -inf of it.
    """
    if ATTN_MASK != "none":
        seen = m_rows & m_keys & (o_keys >= lo) & (o_keys < hi)
        added = _additive_mask(
            attn_mask, i_b, i_h, o_rows, o_keys, seen, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k
        )
        if ATTN_MASK == "additive":
            s = tl.where(seen, s * scale + added, -float("inf"))
        else:
            s = tl.where(seen & (added != 0.0), s, -float("inf"))
    elif KEY_MASKED:
        s = tl.where(m_keys & (o_keys >= lo) & (o_keys < hi), s, -float("inf"))
    elif WINDOWED:
        if (start < inner_lo) | (start + BLOCK_KV > tl.minimum(inner_hi, end)):
            s = tl.where((o_keys >= lo) & (o_keys < tl.minimum(hi, end)), s, -float("inf"))
    elif start + BLOCK_KV > end:
        s = tl.where(o_keys < end, s, -float("inf"))
    return s


@triton.jit
def _visible_keys(
    key_mask, i_b, o_keys, end, block_hi, Lk, KEY_MASKED: tl.constexpr, HAS_LENGTHS: tl.constexpr
):
    """Which keys are read: those that no row of the block may see, by length or mask, count as zero, whatever they hold."""
    m_keys = o_keys < end
    if HAS_LENGTHS:
        m_keys = m_keys & (o_keys < block_hi)
    if KEY_MASKED:
        m_keys = m_keys & (tl.load(key_mask + i_b.to(tl.int64) * Lk + o_keys, mask=m_keys, other=0) != 0)
    return m_keys


@triton.jit
def _attention_fwd_kernel(
    q, k, k_1, k_2, v, v_1, v_2, k_second, v_second, out, lse, statistics, key_mask, lengths, query_mask, attn_mask, window_lo,
    window_hi, seed, threshold, inverse_keep, scale, causal_shift, B, H, G, Lq, Lk, Lk_first, d_qk, d_v, S, first_splits,
    keys_per_split, stride_q_b, stride_q_h, stride_q_l, stride_k_b, stride_k_h, stride_k_l, stride_v_b, stride_v_h, stride_v_l,
    stride_k2_b, stride_k2_h, stride_k2_l, stride_v2_b, stride_v2_h, stride_v2_l, stride_o_b, stride_o_h, stride_o_s,
    stride_o_l,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    PIECES_QK: tl.constexpr, PIECES_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, SEGMENTS: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_QUERY_MASK: tl.constexpr, KEY_MASKED: tl.constexpr, ATTN_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """After tile t, (acc, m, l) is the softmax state of the split's keys before tile t + 1."""
    WINDOWED: tl.constexpr = PACKED or CAUSAL or HAS_LENGTHS or HAS_QUERY_MASK
    HIDING: tl.constexpr = WINDOWED or KEY_MASKED or ATTN_MASK != "none"
    row_blocks = tl.cdiv(Lq, BLOCK_Q)
    i = tl.program_id(0)
    i_block, i_s, i_h, i_b = i % row_blocks, (i // row_blocks) % S, (i // (row_blocks * S)) % H, i // (row_blocks * S * H)
    i_row = i_block * BLOCK_Q
    o_rows = i_row + tl.arange(0, BLOCK_Q)
    m_rows = o_rows < Lq
    begin, end, base = _key_range(i_s, first_splits, keys_per_split, Lk_first, Lk)
    if SEGMENTS == 2:
        second = i_s >= first_splits
        k, stride_k_b, stride_k_h, stride_k_l = _one_of(
            second, k, stride_k_b, stride_k_h, stride_k_l, k_second, stride_k2_b, stride_k2_h, stride_k2_l
        )
        v, stride_v_b, stride_v_h, stride_v_l = _one_of(
            second, v, stride_v_b, stride_v_h, stride_v_l, v_second, stride_v2_b, stride_v2_h, stride_v2_l
        )
    lo, hi = _windows(
        window_lo, window_hi, lengths, query_mask, i_b, o_rows, m_rows, Lq, Lk, causal_shift, PACKED, CAUSAL, HAS_LENGTHS,
        HAS_QUERY_MASK,
    )  # fmt: skip
    inner_lo, inner_hi, block_hi = 0, Lk, Lk
    if WINDOWED:
        used = m_rows & (hi > lo)
        inner_lo, inner_hi = tl.max(lo, 0), tl.min(tl.where(m_rows, hi, Lk), 0)
        block_hi = tl.max(tl.where(used, hi, 0), 0)
        block_lo = tl.min(tl.where(used, lo, Lk), 0)
        first = tl.maximum(block_lo - begin, 0) // BLOCK_KV * BLOCK_KV
        begin, end = begin + first, tl.minimum(end, tl.maximum(block_hi, begin))
    m_read = m_rows
    if HAS_QUERY_MASK:
        m_read = m_rows & (hi > lo)
    b_q = _load_tile(q, q, q, i_b, i_h, i_row, m_read, stride_q_b, stride_q_h, stride_q_l, d_qk, PIECES_QK, BLOCK_Q, False)
    # Base 2 throughout: scores times ``factor`` are exponents of 2.
    factor = _LOG2_E if ATTN_MASK == "additive" else scale * _LOG2_E
    acc = zero_rows(BLOCK_Q, PIECES_V)
    m_i = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    for start in tl.range(begin, end, BLOCK_KV, num_stages=STAGES):
        o_keys = start + tl.arange(0, BLOCK_KV)
        m_keys = _visible_keys(key_mask, i_b, o_keys, end, block_hi, Lk, KEY_MASKED, HAS_LENGTHS)
        b_k = _load_tile(
            k, k_1, k_2, i_b, i_h // G, start - base, m_keys, stride_k_b, stride_k_h, stride_k_l, d_qk, PIECES_QK, BLOCK_KV, TMA
        )
        s = dot_transposed(b_q, b_k, PRECISION)  # [BLOCK_Q, BLOCK_KV]
        s = _scores(
            s, attn_mask, i_b, i_h, o_rows[:, None], o_keys[None, :], lo[:, None], hi[:, None], m_rows[:, None],
            m_keys[None, :], start, end, inner_lo, inner_hi, scale, stride_mask_b, stride_mask_h, stride_mask_q,
            stride_mask_k, BLOCK_KV, WINDOWED, KEY_MASKED, ATTN_MASK,
        )  # fmt: skip
        # A row that has seen no key yet has m = -inf; 0 in its place keeps exp2(-inf - m) at 0 instead of NaN.
        if ATTN_MASK == "additive":
            m_new = tl.maximum(m_i, tl.max(s, 1))
            m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
            p = tl.exp2((s - m_safe[:, None]) * factor)
            alpha = tl.exp2((m_i - m_safe) * factor)
        else:
            m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
            m_safe = tl.where(m_new == -float("inf"), 0.0, m_new) if HIDING else m_new
            p = tl.exp2(s * factor - m_safe[:, None])
            alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        if DROPOUT:
            # 1 or 0: the factor 1/(1-p) follows at the end, where it is not rounded.
            r_rows = i_h * Lq + o_rows
            p = p * dropout_factors(seed, threshold, 1.0, i_b, r_rows[:, None], o_keys[None, :])
        b_v = _load_tile(
            v, v_1, v_2, i_b, i_h // G, start - base, m_keys, stride_v_b, stride_v_h, stride_v_l, d_v, PIECES_V, BLOCK_KV, TMA
        )
        acc = accumulate(p.to(b_v[0].dtype), b_v, rescale(acc, alpha), PRECISION)
    inverse_l = 1.0 / tl.where(l_i == 0.0, 1.0, l_i)
    if DROPOUT:
        inverse_l *= inverse_keep
    o_out = i_b.to(tl.int64) * stride_o_b + i_h.to(tl.int64) * stride_o_h + i_s.to(tl.int64) * stride_o_s
    store_rows(out + o_out, stride_o_l, o_rows, m_rows, d_v, acc, inverse_l, PIECES_V)
    o_lse = ((i_b * H + i_h).to(tl.int64) * S + i_s) * Lq + o_rows
    log_l = tl.log2(l_i) * _LN_2
    if ATTN_MASK == "additive":
        tl.store(lse + o_lse, m_i + log_l, mask=m_rows)
        # lse would lose log l beside a maximum of finfo.min: the backward takes the two apart. S is 1.
        tl.store(statistics + o_lse, tl.where(m_i == -float("inf"), float("inf"), m_i), mask=m_rows)
        tl.store(statistics + tl.cast(B * H, tl.int64) * Lq + o_lse, tl.where(l_i == 0.0, 0.0, log_l), mask=m_rows)
    else:
        tl.store(lse + o_lse, m_i * _LN_2 + log_l, mask=m_rows)


@triton.jit
def _row_state(lse, statistics, o, m_rows, size, ATTN_MASK: tl.constexpr):
    """(shift, log2 l): p = exp2((s - shift) factor - log2 l); rows that see nothing get a shift of +inf, so that p is 0."""
    if ATTN_MASK == "additive":
        shift = tl.load(statistics + o, mask=m_rows, other=float("inf"))
        log_l = tl.load(statistics + size + o, mask=m_rows, other=0.0) * _LOG2_E
    else:
        shift = tl.load(lse + o, mask=m_rows, other=-float("inf"))
        shift = tl.where(shift == -float("inf"), float("inf"), shift * _LOG2_E)
        log_l = shift * 0.0
    return shift, log_l


@triton.jit
def _weights(s, shift, log_l, factor, ATTN_MASK: tl.constexpr):
    """Attention weights from scores and what _row_state loads."""
    return tl.exp2((s - shift) * factor - log_l) if ATTN_MASK == "additive" else tl.exp2(s * factor - shift)


@triton.jit
def _attention_bwd_kernel(
    q, q_1, q_2, dout, dout_1, dout_2, k, v, k_second, v_second, lse, statistics, delta, dlse, dq, dq_sum, dk, dv, key_mask,
    lengths, query_mask, attn_mask, window_lo, window_hi, key_window_lo, key_window_hi, seed, threshold, inverse_keep, scale,
    causal_shift, B, H, G, Lq, Lk, Lk_first, d_qk, d_v, S_q, rows_per_slice, S_k, first_ranges, keys_per_range, stride_q_b,
    stride_q_h, stride_q_l, stride_do_b, stride_do_h, stride_do_l, stride_k_b, stride_k_h, stride_k_l, stride_v_b, stride_v_h,
    stride_v_l, stride_k2_b, stride_k2_h, stride_k2_l, stride_v2_b, stride_v2_h, stride_v2_l, stride_dq_b, stride_dq_h,
    stride_dq_l, stride_dk_b, stride_dk_h, stride_dk_s, stride_dk_l, stride_dv_b, stride_dv_h, stride_dv_s,
    stride_dv_l, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    PIECES_QK: tl.constexpr, PIECES_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, SEGMENTS: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_QUERY_MASK: tl.constexpr, KEY_MASKED: tl.constexpr, ATTN_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_DLSE: tl.constexpr, ONE_BLOCK: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk_j = scale sum_i ds_ij q_i, dv_j = sum_i d_ij p_ij dout_i, dq_i = scale sum_j ds_ij k_j; scores are [keys, queries].

    The program owns the dq of its slice and range: after block b, dq_sum [B*H, S_k, Lq, d_qk] holds what the range's keys
    before block b + 1 add. With DIRECT, one range, its last block writes dq; with windows blocks leave rows out,
    and dq_sum starts as
    zeros. With ONE_BLOCK all keys lie in one block, and delta_i = sum_j p_ij d_ij dp_ij - dlse_i needs no array.
    """
    WINDOWED: tl.constexpr = PACKED or CAUSAL or HAS_LENGTHS or HAS_QUERY_MASK
    H_kv = H // G
    i = tl.program_id(0)
    i_q, i_k = i % S_q, (i // S_q) % S_k
    i_kv, i_b = (i // (S_q * S_k)) % H_kv, i // (S_q * S_k * H_kv)
    range_begin, range_end, base = _key_range(i_k, first_ranges, keys_per_range, Lk_first, Lk)
    if SEGMENTS == 2:
        second = i_k >= first_ranges
        k, stride_k_b, stride_k_h, stride_k_l = _one_of(
            second, k, stride_k_b, stride_k_h, stride_k_l, k_second, stride_k2_b, stride_k2_h, stride_k2_l
        )
        v, stride_v_b, stride_v_h, stride_v_l = _one_of(
            second, v, stride_v_b, stride_v_h, stride_v_l, v_second, stride_v2_b, stride_v2_h, stride_v2_l
        )
    key_end = Lk
    if HAS_LENGTHS:
        key_end = tl.load(lengths + i_b)
    factor = _LOG2_E if ATTN_MASK == "additive" else scale * _LOG2_E
    ones_q, ones_k = tl.full([BLOCK_Q], 1.0, tl.float32), tl.full([BLOCK_KV], 1.0, tl.float32)
    slice_begin = i_q * rows_per_slice
    slice_end = tl.minimum(slice_begin + rows_per_slice, Lq)
    for start in range(range_begin, range_end, BLOCK_KV):
        o_keys = start + tl.arange(0, BLOCK_KV)
        m_store = o_keys < range_end
        m_keys = _visible_keys(key_mask, i_b, o_keys, range_end, key_end, Lk, KEY_MASKED, HAS_LENGTHS)
        b_k = _load_tile(
            k, k, k, i_b, i_kv, start - base, m_keys, stride_k_b, stride_k_h, stride_k_l, d_qk, PIECES_QK, BLOCK_KV, False
        )
        b_v = _load_tile(
            v, v, v, i_b, i_kv, start - base, m_keys, stride_v_b, stride_v_h, stride_v_l, d_v, PIECES_V, BLOCK_KV, False
        )
        row_begin, row_end = slice_begin, slice_end
        if PACKED:
            # Rows of the sequences that the block's keys belong to.
            row_begin = tl.maximum(row_begin, tl.min(tl.load(key_window_lo + o_keys, mask=m_store, other=Lq), 0))
            row_end = tl.minimum(row_end, tl.max(tl.load(key_window_hi + o_keys, mask=m_store, other=0), 0))
        elif CAUSAL:
            row_begin = tl.maximum(row_begin, start - causal_shift)
        if HAS_LENGTHS:
            row_end = tl.where(start < key_end, row_end, row_begin)
        # A row stays in the same place of a tile, and so with the same thread, which reads what it wrote.
        row_begin = slice_begin + (row_begin - slice_begin) // BLOCK_Q * BLOCK_Q
        tiles = tl.maximum(tl.cdiv(row_end - row_begin, BLOCK_Q), 0)
        acc_k = zero_rows(BLOCK_KV, PIECES_QK)
        acc_v = zero_rows(BLOCK_KV, PIECES_V)
        for t in tl.range(0, tiles * G, num_stages=STAGES):
            i_h = i_kv * G + t // tiles
            i_row = row_begin + (t % tiles) * BLOCK_Q
            o_rows = i_row + tl.arange(0, BLOCK_Q)
            m_rows = o_rows < slice_end
            lo, hi = _windows(
                window_lo, window_hi, lengths, query_mask, i_b, o_rows, m_rows, Lq, Lk, causal_shift, PACKED, CAUSAL,
                HAS_LENGTHS, HAS_QUERY_MASK,
            )  # fmt: skip
            m_read = m_rows
            if HAS_QUERY_MASK:
                m_read = m_rows & (hi > lo)
            b_q = _load_tile(
                q, q_1, q_2, i_b, i_h, i_row, m_read, stride_q_b, stride_q_h, stride_q_l, d_qk, PIECES_QK, BLOCK_Q, TMA
            )
            b_do = _load_tile(
                dout, dout_1, dout_2, i_b, i_h, i_row, m_read, stride_do_b, stride_do_h, stride_do_l, d_v, PIECES_V, BLOCK_Q,
                TMA,
            )  # fmt: skip
            o_lse = (i_b * H + i_h).to(tl.int64) * Lq + o_rows
            shift, log_l = _row_state(lse, statistics, o_lse, m_rows, tl.cast(B * H, tl.int64) * Lq, ATTN_MASK)
            s = dot_transposed(b_k, b_q, PRECISION)  # [BLOCK_KV, BLOCK_Q]
            dp = dot_transposed(b_v, b_do, PRECISION)
            inner_lo, inner_hi = 0, Lk
            if WINDOWED:
                inner_lo, inner_hi = tl.max(lo, 0), tl.min(tl.where(m_rows, hi, Lk), 0)
            s = _scores(
                s, attn_mask, i_b, i_h, o_rows[None, :], o_keys[:, None], lo[None, :], hi[None, :], m_rows[None, :],
                m_keys[:, None], start, range_end, inner_lo, inner_hi, scale, stride_mask_b, stride_mask_h, stride_mask_q,
                stride_mask_k, BLOCK_KV, WINDOWED, KEY_MASKED, ATTN_MASK,
            )  # fmt: skip
            p = _weights(s, shift[None, :], log_l[None, :], factor, ATTN_MASK)
            kept = p
            if DROPOUT:
                r_rows = i_h * Lq + o_rows
                factors = dropout_factors(seed, threshold, inverse_keep, i_b, r_rows[None, :], o_keys[:, None])
                dp, kept = dp * factors, p * factors
            if ONE_BLOCK:
                b_delta = tl.sum(p * dp, 0)
                if HAS_DLSE:
                    b_delta -= tl.load(dlse + o_lse, mask=m_rows, other=0.0)
            else:
                b_delta = tl.load(delta + o_lse, mask=m_rows, other=0.0)
            acc_v = accumulate(kept.to(b_do[0].dtype), b_do, acc_v, PRECISION)
            ds = (p * (dp - b_delta[None, :])).to(b_q[0].dtype)
            acc_k = accumulate(ds, b_q, acc_k, PRECISION)
            acc_q = scale_rows(dot_columns(ds, b_k, PRECISION), scale)  # [BLOCK_Q, d_qk]
            o_sum = (((i_b * H + i_h).to(tl.int64) * S_k + i_k) * Lq) * d_qk
            if not ONE_BLOCK:
                if WINDOWED or start > range_begin:
                    acc_q = add_rows(acc_q, dq_sum + o_sum, d_qk, o_rows, m_rows, d_qk, PIECES_QK)
                if not DIRECT or start + BLOCK_KV < range_end:
                    store_rows(dq_sum + o_sum, d_qk, o_rows, m_rows, d_qk, acc_q, ones_q, PIECES_QK)
            if DIRECT and start + BLOCK_KV >= range_end:
                o_dq = i_b.to(tl.int64) * stride_dq_b + i_h.to(tl.int64) * stride_dq_h
                store_rows(dq + o_dq, stride_dq_l, o_rows, m_rows, d_qk, acc_q, ones_q, PIECES_QK)
        o_dk = i_b.to(tl.int64) * stride_dk_b + i_kv.to(tl.int64) * stride_dk_h + i_q.to(tl.int64) * stride_dk_s
        o_dv = i_b.to(tl.int64) * stride_dv_b + i_kv.to(tl.int64) * stride_dv_h + i_q.to(tl.int64) * stride_dv_s
        store_rows(dk + o_dk, stride_dk_l, o_keys, m_store, d_qk, acc_k, ones_k * scale, PIECES_QK)
        store_rows(dv + o_dv, stride_dv_l, o_keys, m_store, d_v, acc_v, ones_k, PIECES_V)
