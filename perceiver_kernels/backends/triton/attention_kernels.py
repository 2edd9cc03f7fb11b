"""Attention kernels over separate keys and values: forward, dq (and delta), dk and dv.

forward, dq: one program per (BLOCK_Q queries, split of the keys, head, batch entry); query blocks vary fastest. dk, dv: one
program per (BLOCK_KV keys, slice of the queries, key head, batch entry), which walks over the queries of its slice and of all
heads that share the key head; key blocks vary fastest. Splits and slices write fp32 partials [B*H, S, L, d] that combine.py
reduces in a fixed order: everything is deterministic.

A query sees a window lo..hi of keys (causal, lengths, packed sequences, hidden queries), less what masks hide. Tiles outside
every window of a block are skipped, tiles inside all of them are not masked. Two segments of keys are two ranges of splits.

FLOPs: forward 2 BH Lq Lk (d_qk + d_v), dq 2 BH Lq Lk (2 d_qk + d_v), dk and dv 2 BH Lq Lk (2 d_qk + 2 d_v). Device memory:
every operand once while the programs that share it run together, and 8 B H S L d bytes of partials.

Arguments in tuples: sizes = (B, H, G, Lq, Lk, d_qk, d_v) with G query heads to a key head; parts = (S, parts of the first
segment, length of a part, keys of the first segment); masks = (key_mask, lengths, query_mask, attn_mask, window_lo, window_hi);
dropout = (seed, threshold, inverse_keep); strides of batch, head and row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.attention_steps import (
    attention_weights,
    causal,
    exact_delta,
    exponent_factor,
    has_lengths,
    hide,
    hides_anything,
    keys_to_read,
    load_head,
    load_row_state,
    packed,
    row_windows,
    rows_to_read,
    softmax_step,
    store_result,
    window_bounds,
)
from perceiver_kernels.backends.triton.primitives import (
    accumulate,
    dot_transposed,
    dropout_factors,
    loop_indices,
    row_dots,
    store_rows,
    zero_rows,
)


@triton.jit
def _one_of(second, source, stride, source_2, stride_2):
    """The pointer and strides of the segment that a program reads."""
    strides = (
        tl.where(second, stride_2[0], stride[0]), tl.where(second, stride_2[1], stride[1]),
        tl.where(second, stride_2[2], stride[2]),
    )  # fmt: skip
    return (tl.where(second, source_2, source),), strides


@triton.jit
def _key_range(i_s, parts, Lk):
    """(begin, end, base, second): the keys of part i_s, which lie in one segment, and the first key of that segment."""
    _, first, length, Lk_first = parts
    second = i_s >= first
    base = tl.where(second, Lk_first, 0)
    begin = base + tl.where(second, i_s - first, i_s) * length
    return begin, tl.minimum(begin + length, tl.where(second, Lk, Lk_first)), base, second


@triton.jit
def _attention_fwd_kernel(
    q, k, k_1, k_2, v, v_1, v_2, k_second, v_second, out, lse, statistics, masks, dropout, scale, causal_shift, sizes, parts,
    stride_q, stride_k,
    stride_v, stride_k_second, stride_v_second, stride_out, stride_mask,
    PIECES_QK: tl.constexpr, PIECES_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, SEGMENTS: tl.constexpr, HIDES: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """After tile t, (acc, m, l) is the softmax state of the split's keys before tile t + 1."""
    B, H, G, Lq, Lk, d_qk, d_v = sizes
    S = parts[0]
    row_blocks = tl.cdiv(Lq, BLOCK_Q)
    i = tl.program_id(0)
    i_row, i_s = i % row_blocks * BLOCK_Q, (i // row_blocks) % S
    i_h, i_b = (i // (row_blocks * S)) % H, i // (row_blocks * S * H)
    o_rows = i_row + tl.arange(0, BLOCK_Q)
    m_rows = o_rows < Lq
    begin, end, base, second = _key_range(i_s, parts, Lk)
    keys, values = (k, k_1, k_2), (v, v_1, v_2)
    if SEGMENTS == 2:
        keys, stride_k = _one_of(second, k, stride_k, k_second, stride_k_second)
        values, stride_v = _one_of(second, v, stride_v, v_second, stride_v_second)
    window = row_windows(masks, i_b, o_rows, m_rows, Lq, Lk, causal_shift, HIDES)
    some_lo, some_hi, all_lo, all_hi = window_bounds(window, m_rows, Lk, HIDES)
    end = tl.minimum(end, tl.maximum(some_hi, begin))
    begin += tl.maximum(some_lo - begin, 0) // BLOCK_KV * BLOCK_KV
    b_q = load_head((q,), i_b, i_h, i_row, rows_to_read(window, m_rows, HIDES), stride_q, d_qk, PIECES_QK, BLOCK_Q, False)
    factor = exponent_factor(scale, HIDES)
    m_i, l_i = tl.full([BLOCK_Q], -float("inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    state = (zero_rows(BLOCK_Q, PIECES_V), m_i, l_i)
    for start in tl.range(begin, end, BLOCK_KV, num_stages=STAGES):
        o_keys = start + tl.arange(0, BLOCK_KV)
        m_keys = keys_to_read(masks, i_b, o_keys, end, some_hi, Lk, HIDES)
        b_k = load_head(keys, i_b, i_h // G, start - base, m_keys, stride_k, d_qk, PIECES_QK, BLOCK_KV, TMA)
        s = dot_transposed(b_q, b_k, PRECISION)  # [BLOCK_Q, BLOCK_KV]
        s = hide(
            s, masks, stride_mask, i_b, i_h, o_rows[:, None], o_keys[None, :], window[0][:, None], window[1][:, None],
            m_rows[:, None], m_keys[None, :], (start, end, all_lo, all_hi), scale, BLOCK_KV, HIDES,
        )  # fmt: skip
        b_v = load_head(values, i_b, i_h // G, start - base, m_keys, stride_v, d_v, PIECES_V, BLOCK_KV, TMA)
        # 1 or 0: the factor 1/(1-p) follows at the end, where it is not rounded.
        kept = 1.0
        if DROPOUT:
            kept = dropout_factors(dropout[0], dropout[1], 1.0, i_b, (i_h * Lq + o_rows)[:, None], o_keys[None, :])
        state = softmax_step(state, s, b_v, kept, factor, DROPOUT, HIDES, PRECISION)
    o_out = i_b.to(tl.int64) * stride_out[0] + i_h.to(tl.int64) * stride_out[1] + i_s.to(tl.int64) * stride_out[2]
    o_lse = ((i_b * H + i_h).to(tl.int64) * S + i_s) * Lq + o_rows
    store_result(
        state, out, lse, statistics, o_out, stride_out[3], o_lse, o_rows, m_rows, d_v, tl.cast(B * H, tl.int64) * Lq,
        dropout[2], PIECES_V, DROPOUT, HIDES,
    )  # fmt: skip


@triton.jit
def _attention_bwd_dq_kernel(
    q, k, k_1, k_2, v, v_1, v_2, k_second, v_second, out, dout, dlse, lse, statistics, delta, dq, masks, dropout, scale,
    causal_shift, sizes, parts,
    stride_q, stride_k, stride_v, stride_k_second, stride_v_second, stride_out, stride_dout, stride_dq, stride_mask,
    PIECES_QK: tl.constexpr, PIECES_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, SEGMENTS: tl.constexpr, HIDES: tl.constexpr, DROPOUT: tl.constexpr, HAS_DLSE: tl.constexpr,
    FEW_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = scale sum_j ds_j k_j, ds = p (d dp - delta), dp = dout v^T; delta = dout.out - dlse is stored for dk and dv.

    With FEW_KEYS, rows all of whose keys lie in one tile have delta = sum_j p_j d_j dp_j instead: where a row sees a few
    keys the rounding of ``out`` would weigh as much as the gradient.
    """
    B, H, G, Lq, Lk, d_qk, d_v = sizes
    S = parts[0]
    row_blocks = tl.cdiv(Lq, BLOCK_Q)
    i = tl.program_id(0)
    i_row, i_s = i % row_blocks * BLOCK_Q, (i // row_blocks) % S
    i_h, i_b = (i // (row_blocks * S)) % H, i // (row_blocks * S * H)
    o_rows = i_row + tl.arange(0, BLOCK_Q)
    m_rows = o_rows < Lq
    begin, end, base, second = _key_range(i_s, parts, Lk)
    keys, values = (k, k_1, k_2), (v, v_1, v_2)
    if SEGMENTS == 2:
        keys, stride_k = _one_of(second, k, stride_k, k_second, stride_k_second)
        values, stride_v = _one_of(second, v, stride_v, v_second, stride_v_second)
    window = row_windows(masks, i_b, o_rows, m_rows, Lq, Lk, causal_shift, HIDES)
    some_lo, some_hi, all_lo, all_hi = window_bounds(window, m_rows, Lk, HIDES)
    end = tl.minimum(end, tl.maximum(some_hi, begin))
    begin += tl.maximum(some_lo - begin, 0) // BLOCK_KV * BLOCK_KV
    m_read = rows_to_read(window, m_rows, HIDES)
    b_o = load_head((out,), i_b, i_h, i_row, m_read, stride_out, d_v, PIECES_V, BLOCK_Q, False)
    b_do = load_head((dout,), i_b, i_h, i_row, m_read, stride_dout, d_v, PIECES_V, BLOCK_Q, False)
    b_q = load_head((q,), i_b, i_h, i_row, m_read, stride_q, d_qk, PIECES_QK, BLOCK_Q, False)
    o_lse = (i_b * H + i_h).to(tl.int64) * Lq + o_rows
    b_delta = row_dots(b_o, b_do)
    b_dlse = b_delta * 0.0
    if HAS_DLSE:
        b_dlse = tl.load(dlse + o_lse, mask=m_rows, other=0.0)
        b_delta -= b_dlse
    one_tile = (S == 1) & (end - begin <= BLOCK_KV)
    shift, log_l = load_row_state(lse, statistics, o_lse, m_rows, tl.cast(B * H, tl.int64) * Lq, HIDES)
    factor = exponent_factor(scale, HIDES)
    acc = zero_rows(BLOCK_Q, PIECES_QK)
    for start in tl.range(begin, end, BLOCK_KV, num_stages=STAGES):
        o_keys = start + tl.arange(0, BLOCK_KV)
        m_keys = keys_to_read(masks, i_b, o_keys, end, some_hi, Lk, HIDES)
        b_k = load_head(keys, i_b, i_h // G, start - base, m_keys, stride_k, d_qk, PIECES_QK, BLOCK_KV, TMA)
        b_v = load_head(values, i_b, i_h // G, start - base, m_keys, stride_v, d_v, PIECES_V, BLOCK_KV, TMA)
        s = dot_transposed(b_q, b_k, PRECISION)  # [BLOCK_Q, BLOCK_KV]
        dp = dot_transposed(b_do, b_v, PRECISION)
        s = hide(
            s, masks, stride_mask, i_b, i_h, o_rows[:, None], o_keys[None, :], window[0][:, None], window[1][:, None],
            m_rows[:, None], m_keys[None, :], (start, end, all_lo, all_hi), scale, BLOCK_KV, HIDES,
        )  # fmt: skip
        p = attention_weights(s, shift[:, None], log_l[:, None], factor, HIDES)
        if DROPOUT:
            dp *= dropout_factors(*dropout, i_b, (i_h * Lq + o_rows)[:, None], o_keys[None, :])
        if FEW_KEYS:
            b_delta = exact_delta(p, dp, b_dlse, b_delta, one_tile)
        ds = p * (dp - b_delta[:, None])
        acc = accumulate(ds.to(b_k[0].dtype), b_k, acc, PRECISION)
    if i_s == 0:
        tl.store(delta + o_lse, b_delta, mask=m_rows)
    o_dq = i_b.to(tl.int64) * stride_dq[0] + i_h.to(tl.int64) * stride_dq[1] + i_s.to(tl.int64) * stride_dq[2]
    scales = tl.full([BLOCK_Q], 1.0, tl.float32) * scale
    store_rows(dq + o_dq, stride_dq[3], o_rows, m_rows, d_qk, acc, scales, PIECES_QK)


@triton.jit
def _keep(target, tile, i_b, i_h, row, column, m_columns, stride, TMA: tl.constexpr):
    """Store a tile of ds: through a descriptor (TMA), which leaves running products alone, or masked, through a pointer.

    Stored through a pointer on Hopper, ptxas waits for every wgmma of the loop (C7515).
    """
    if TMA:
        target.store([i_b, i_h, row, column], tile.reshape(1, 1, tile.shape[0], tile.shape[1]))
    else:
        o_rows, o_columns = row + tl.arange(0, tile.shape[0]), column + tl.arange(0, tile.shape[1])
        base = target + i_b.to(tl.int64) * stride[0] + i_h.to(tl.int64) * stride[1]
        tl.store(base + o_rows.to(tl.int64)[:, None] * stride[2] + o_columns[None, :], tile, mask=m_columns[None, :])


@triton.jit
def _attention_bwd_dkv_kernel(
    q, q_1, q_2, dout, dout_1, dout_2, k, v, k_second, v_second, lse, statistics, delta, dk, dv, kept_ds, masks, key_windows,
    dropout, scale, causal_shift, sizes,
    parts, slices, stride_q, stride_dout, stride_k, stride_v, stride_k_second, stride_v_second, stride_dk, stride_dv,
    stride_ds, stride_mask,
    PIECES_QK: tl.constexpr, PIECES_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, SEGMENTS: tl.constexpr, HIDES: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    KEEP_DS: tl.constexpr,
):  # fmt: skip
    """dk_j = scale sum_i ds_ij q_i and dv_j = sum_i d_ij p_ij dout_i over one slice of the queries.

    Scores are [keys, queries]. slices = (S, queries of a slice); a part of the keys is one block; key_windows are, for packed
    sequences, lo and hi of the queries that see each key. With KEEP_DS scale ds goes to ``kept_ds`` [B, H, keys in whole
    blocks, queries], from which dq is a product.
    """
    B, H, G, Lq, Lk, d_qk, d_v = sizes
    S, rows_per_slice = slices
    key_blocks = parts[0]
    H_kv = H // G
    i = tl.program_id(0)
    i_block, i_s = i % key_blocks, (i // key_blocks) % S
    i_kv, i_b = (i // (key_blocks * S)) % H_kv, i // (key_blocks * S * H_kv)
    start, end, base, second = _key_range(i_block, parts, Lk)
    keys, values = (k,), (v,)
    if SEGMENTS == 2:
        keys, stride_k = _one_of(second, k, stride_k, k_second, stride_k_second)
        values, stride_v = _one_of(second, v, stride_v, v_second, stride_v_second)
    o_keys = start + tl.arange(0, BLOCK_KV)
    m_store = o_keys < end
    visible_end = Lk
    if has_lengths(HIDES):
        visible_end = tl.load(masks[1] + i_b)
    m_keys = keys_to_read(masks, i_b, o_keys, end, visible_end, Lk, HIDES)
    b_k = load_head(keys, i_b, i_kv, start - base, m_keys, stride_k, d_qk, PIECES_QK, BLOCK_KV, False)
    b_v = load_head(values, i_b, i_kv, start - base, m_keys, stride_v, d_v, PIECES_V, BLOCK_KV, False)
    row_begin = i_s * rows_per_slice
    row_end = tl.minimum(row_begin + rows_per_slice, Lq)
    if packed(HIDES):
        # Rows of the sequences that the block's keys belong to.
        row_begin = tl.maximum(row_begin, tl.min(tl.load(key_windows[0] + o_keys, mask=m_store, other=Lq), 0))
        row_end = tl.minimum(row_end, tl.max(tl.load(key_windows[1] + o_keys, mask=m_store, other=0), 0))
    elif causal(HIDES):
        row_begin = tl.maximum(row_begin, (start - causal_shift) // BLOCK_Q * BLOCK_Q)
    if has_lengths(HIDES):
        row_end = tl.where(start < visible_end, row_end, row_begin)
    tiles = tl.maximum(tl.cdiv(row_end - row_begin, BLOCK_Q), 0)
    factor = exponent_factor(scale, HIDES)
    acc_k = zero_rows(BLOCK_KV, PIECES_QK)
    acc_v = zero_rows(BLOCK_KV, PIECES_V)
    for t in tl.range(0, tiles * G, num_stages=STAGES):
        i_g, i_tile = loop_indices(t, tiles)
        i_h = i_kv * G + i_g
        i_row = row_begin + i_tile * BLOCK_Q
        o_rows = i_row + tl.arange(0, BLOCK_Q)
        m_rows = o_rows < row_end
        window = row_windows(masks, i_b, o_rows, m_rows, Lq, Lk, causal_shift, HIDES)
        m_read = rows_to_read(window, m_rows, HIDES)
        b_q = load_head((q, q_1, q_2), i_b, i_h, i_row, m_read, stride_q, d_qk, PIECES_QK, BLOCK_Q, TMA)
        b_do = load_head((dout, dout_1, dout_2), i_b, i_h, i_row, m_read, stride_dout, d_v, PIECES_V, BLOCK_Q, TMA)
        o_lse = (i_b * H + i_h).to(tl.int64) * Lq + o_rows
        shift, log_l = load_row_state(lse, statistics, o_lse, m_rows, tl.cast(B * H, tl.int64) * Lq, HIDES)
        b_delta = tl.load(delta + o_lse, mask=m_rows, other=0.0)
        s = dot_transposed(b_k, b_q, PRECISION)  # [BLOCK_KV, BLOCK_Q]
        dp = dot_transposed(b_v, b_do, PRECISION)
        # Without masks only keys past the end are left, whose weights end in rows that are not stored.
        if hides_anything(HIDES):
            _, _, all_lo, all_hi = window_bounds(window, m_rows, Lk, HIDES)
            s = hide(
                s, masks, stride_mask, i_b, i_h, o_rows[None, :], o_keys[:, None], window[0][None, :], window[1][None, :],
                m_rows[None, :], m_keys[:, None], (start, end, all_lo, all_hi), scale, BLOCK_KV, HIDES,
            )  # fmt: skip
        p = attention_weights(s, shift[None, :], log_l[None, :], factor, HIDES)
        kept = p
        if DROPOUT:
            factors = dropout_factors(*dropout, i_b, (i_h * Lq + o_rows)[None, :], o_keys[:, None])
            dp, kept = dp * factors, p * factors
        if KEEP_DS:
            # Before the products that run on; keys past the end are zeros of any weight, infinity included.
            b_ds = tl.where(m_store[:, None], (p * (dp - b_delta[None, :]) * scale).to(b_q[0].dtype), 0.0)
            _keep(kept_ds, b_ds, i_b, i_h, i_block * BLOCK_KV, i_row, m_rows, stride_ds, TMA)
        acc_v = accumulate(kept.to(b_do[0].dtype), b_do, acc_v, PRECISION)
        ds = p * (dp - b_delta[None, :])
        acc_k = accumulate(ds.to(b_q[0].dtype), b_q, acc_k, PRECISION)
    ones = tl.full([BLOCK_KV], 1.0, tl.float32)
    o_dk = i_b.to(tl.int64) * stride_dk[0] + i_kv.to(tl.int64) * stride_dk[1] + i_s.to(tl.int64) * stride_dk[2]
    o_dv = i_b.to(tl.int64) * stride_dv[0] + i_kv.to(tl.int64) * stride_dv[1] + i_s.to(tl.int64) * stride_dv[2]
    store_rows(dk + o_dk, stride_dk[3], o_keys, m_store, d_qk, acc_k, ones * scale, PIECES_QK)
    store_rows(dv + o_dv, stride_dv[3], o_keys, m_store, d_v, acc_v, ones, PIECES_V)
