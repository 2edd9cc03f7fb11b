"""Attention kernels for a few hundred keys, or a few queries, that stay in shared memory while the long side streams past.

decode forward and dq: one program per (slice of the queries, head, batch entry) loads all keys and values once, in BLOCKS
blocks of BLOCK_KV, and walks over the queries of its slice. In attention_kernels.py every block of queries reads all keys from
the L2: 8.6 GB for a million queries, 256 keys and 8 heads of 64 channels. encode backward: one program per (range of the keys,
head, batch entry) holds all queries, BLOCK_Q at most, and walks over the keys of its range: dk and dv of a block are complete
at once, dq is a sum in registers, nothing is computed twice.

FLOPs: decode forward and dq as in attention_kernels.py; encode backward 2 BH Lq Lk (3 d_qk + 2 d_v). Device memory: every
operand and result once. Arguments in tuples are those of attention_kernels.py; parts = (S, length of a part).
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.attention_steps import (
    attention_weights,
    exact_delta,
    exponent_factor,
    has_lengths,
    hide,
    keys_to_read,
    load_head,
    load_row_state,
    row_windows,
    rows_to_read,
    softmax_step,
    store_result,
    window_bounds,
)
from perceiver_kernels.backends.triton.primitives import (
    accumulate,
    dot_columns,
    dot_transposed,
    dropout_factors,
    row_dots,
    store_rows,
    zero_rows,
)


@triton.jit
def _load_all_keys(
    k, v, masks, i_b, i_kv, visible_end, Lk, stride_k, stride_v, d_qk, d_v, PIECES_QK: tl.constexpr, PIECES_V: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCKS: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """All keys and values of one head, block by block."""
    keys = ()
    values = ()
    for j in tl.static_range(BLOCKS):
        m_keys = keys_to_read(masks, i_b, j * BLOCK_KV + tl.arange(0, BLOCK_KV), Lk, visible_end, Lk, HIDES)
        keys = keys + (load_head((k,), i_b, i_kv, j * BLOCK_KV, m_keys, stride_k, d_qk, PIECES_QK, BLOCK_KV, False),)
        values = values + (load_head((v,), i_b, i_kv, j * BLOCK_KV, m_keys, stride_v, d_v, PIECES_V, BLOCK_KV, False),)
    return keys, values


@triton.jit
def _attention_decode_fwd_kernel(
    q, q_1, q_2, k, v, out, lse, statistics, masks, dropout, scale, causal_shift, sizes, parts, stride_q, stride_k, stride_v,
    stride_out, stride_mask,
    PIECES_QK: tl.constexpr, PIECES_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCKS: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, HIDES: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tl.static_assert(not DROPOUT, "the plan keeps dropout out: its generators, unrolled over blocks, need too many registers")
    B, H, G, Lq, Lk, d_qk, d_v = sizes
    S, rows_per_slice = parts
    i = tl.program_id(0)
    i_s, i_h, i_b = i % S, (i // S) % H, i // (S * H)
    visible_end = Lk
    if has_lengths(HIDES):
        visible_end = tl.load(masks[1] + i_b)
    keys, values = _load_all_keys(
        k, v, masks, i_b, i_h // G, visible_end, Lk, stride_k, stride_v, d_qk, d_v, PIECES_QK, PIECES_V, BLOCK_KV, BLOCKS, HIDES
    )
    factor = exponent_factor(scale, HIDES)
    for i_row in tl.range(i_s * rows_per_slice, tl.minimum((i_s + 1) * rows_per_slice, Lq), BLOCK_Q, num_stages=STAGES):
        o_rows = i_row + tl.arange(0, BLOCK_Q)
        m_rows = o_rows < Lq
        window = row_windows(masks, i_b, o_rows, m_rows, Lq, Lk, causal_shift, HIDES)
        _, _, all_lo, all_hi = window_bounds(window, m_rows, Lk, HIDES)
        b_q = load_head((q, q_1, q_2), i_b, i_h, i_row, rows_to_read(window, m_rows, HIDES), stride_q, d_qk, PIECES_QK,
        BLOCK_Q, TMA)
        m_i, l_i = tl.full([BLOCK_Q], -float("inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)
        state = (zero_rows(BLOCK_Q, PIECES_V), m_i, l_i)
        for j in tl.static_range(BLOCKS):
            o_keys = j * BLOCK_KV + tl.arange(0, BLOCK_KV)
            m_keys = keys_to_read(masks, i_b, o_keys, Lk, visible_end, Lk, HIDES)
            s = dot_transposed(b_q, keys[j], PRECISION)  # [BLOCK_Q, BLOCK_KV]
            s = hide(
                s, masks, stride_mask, i_b, i_h, o_rows[:, None], o_keys[None, :], window[0][:, None], window[1][:, None],
                m_rows[:, None], m_keys[None, :], (j * BLOCK_KV, Lk, all_lo, all_hi), scale, BLOCK_KV, HIDES,
            )  # fmt: skip
            state = softmax_step(state, s, values[j], 1.0, factor, DROPOUT, HIDES, PRECISION)
        o_out = i_b.to(tl.int64) * stride_out[0] + i_h.to(tl.int64) * stride_out[1]
        o_lse = (i_b * H + i_h).to(tl.int64) * Lq + o_rows
        store_result(
            state, out, lse, statistics, o_out, stride_out[2], o_lse, o_rows, m_rows, d_v, tl.cast(B * H, tl.int64) * Lq,
            dropout[2], PIECES_V, DROPOUT, HIDES,
        )  # fmt: skip


@triton.jit
def _attention_decode_bwd_dq_kernel(
    q, q_1, q_2, k, v, out, out_1, out_2, dout, dout_1, dout_2, dlse, lse, statistics, delta, dq, masks, dropout, scale,
    causal_shift, sizes, parts, stride_q, stride_k,
    stride_v, stride_out, stride_dout, stride_dq, stride_mask,
    PIECES_QK: tl.constexpr, PIECES_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCKS: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, HIDES: tl.constexpr, DROPOUT: tl.constexpr, HAS_DLSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tl.static_assert(not DROPOUT, "the plan keeps dropout out: its generators, unrolled over blocks, need too many registers")
    B, H, G, Lq, Lk, d_qk, d_v = sizes
    S, rows_per_slice = parts
    i = tl.program_id(0)
    i_s, i_h, i_b = i % S, (i // S) % H, i // (S * H)
    visible_end = Lk
    if has_lengths(HIDES):
        visible_end = tl.load(masks[1] + i_b)
    keys, values = _load_all_keys(
        k, v, masks, i_b, i_h // G, visible_end, Lk, stride_k, stride_v, d_qk, d_v, PIECES_QK, PIECES_V, BLOCK_KV, BLOCKS, HIDES
    )
    factor = exponent_factor(scale, HIDES)
    scales = tl.full([BLOCK_Q], 1.0, tl.float32) * scale
    for i_row in tl.range(i_s * rows_per_slice, tl.minimum((i_s + 1) * rows_per_slice, Lq), BLOCK_Q, num_stages=STAGES):
        o_rows = i_row + tl.arange(0, BLOCK_Q)
        m_rows = o_rows < Lq
        window = row_windows(masks, i_b, o_rows, m_rows, Lq, Lk, causal_shift, HIDES)
        _, _, all_lo, all_hi = window_bounds(window, m_rows, Lk, HIDES)
        m_read = rows_to_read(window, m_rows, HIDES)
        b_q = load_head((q, q_1, q_2), i_b, i_h, i_row, m_read, stride_q, d_qk, PIECES_QK, BLOCK_Q, TMA)
        b_do = load_head((dout, dout_1, dout_2), i_b, i_h, i_row, m_read, stride_dout, d_v, PIECES_V, BLOCK_Q, TMA)
        b_o = load_head((out, out_1, out_2), i_b, i_h, i_row, m_read, stride_out, d_v, PIECES_V, BLOCK_Q, TMA)
        o_lse = (i_b * H + i_h).to(tl.int64) * Lq + o_rows
        b_delta = row_dots(b_o, b_do)
        b_dlse = b_delta * 0.0
        if HAS_DLSE:
            b_dlse = tl.load(dlse + o_lse, mask=m_rows, other=0.0)
            b_delta -= b_dlse
        shift, log_l = load_row_state(lse, statistics, o_lse, m_rows, tl.cast(B * H, tl.int64) * Lq, HIDES)
        acc = zero_rows(BLOCK_Q, PIECES_QK)
        for j in tl.static_range(BLOCKS):
            o_keys = j * BLOCK_KV + tl.arange(0, BLOCK_KV)
            m_keys = keys_to_read(masks, i_b, o_keys, Lk, visible_end, Lk, HIDES)
            s = dot_transposed(b_q, keys[j], PRECISION)  # [BLOCK_Q, BLOCK_KV]
            dp = dot_transposed(b_do, values[j], PRECISION)
            s = hide(
                s, masks, stride_mask, i_b, i_h, o_rows[:, None], o_keys[None, :], window[0][:, None], window[1][:, None],
                m_rows[:, None], m_keys[None, :], (j * BLOCK_KV, Lk, all_lo, all_hi), scale, BLOCK_KV, HIDES,
            )  # fmt: skip
            p = attention_weights(s, shift[:, None], log_l[:, None], factor, HIDES)
            b_delta = exact_delta(p, dp, b_dlse, b_delta, BLOCKS == 1)
            ds = p * (dp - b_delta[:, None])
            acc = accumulate(ds.to(b_q[0].dtype), keys[j], acc, PRECISION)
        tl.store(delta + o_lse, b_delta, mask=m_rows)
        o_dq = i_b.to(tl.int64) * stride_dq[0] + i_h.to(tl.int64) * stride_dq[1]
        store_rows(dq + o_dq, stride_dq[2], o_rows, m_rows, d_qk, acc, scales, PIECES_QK)


@triton.jit
def _attention_encode_bwd_kernel(
    q, k, k_1, k_2, v, v_1, v_2, dout, lse, statistics, delta, dq, dk, dv, masks, dropout, scale, causal_shift, sizes, parts,
    stride_q, stride_k,
    stride_v, stride_dout, stride_dq, stride_dk, stride_dv, stride_mask,
    PIECES_QK: tl.constexpr, PIECES_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, HIDES: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of every block of keys, and the part of dq that the range adds; one query head to a key head."""
    B, H, _, Lq, Lk, d_qk, d_v = sizes
    S, keys_per_range = parts
    i = tl.program_id(0)
    i_s, i_h, i_b = i % S, (i // S) % H, i // (S * H)
    o_rows = tl.arange(0, BLOCK_Q)
    m_rows = o_rows < Lq
    window = row_windows(masks, i_b, o_rows, m_rows, Lq, Lk, causal_shift, HIDES)
    _, some_hi, all_lo, all_hi = window_bounds(window, m_rows, Lk, HIDES)
    m_read = rows_to_read(window, m_rows, HIDES)
    b_q = load_head((q,), i_b, i_h, 0, m_read, stride_q, d_qk, PIECES_QK, BLOCK_Q, False)
    b_do = load_head((dout,), i_b, i_h, 0, m_read, stride_dout, d_v, PIECES_V, BLOCK_Q, False)
    o_lse = (i_b * H + i_h).to(tl.int64) * Lq + o_rows
    b_delta = tl.load(delta + o_lse, mask=m_rows, other=0.0)
    shift, log_l = load_row_state(lse, statistics, o_lse, m_rows, tl.cast(B * H, tl.int64) * Lq, HIDES)
    factor = exponent_factor(scale, HIDES)
    scales, ones = tl.full([BLOCK_KV], 1.0, tl.float32) * scale, tl.full([BLOCK_KV], 1.0, tl.float32)
    acc = zero_rows(BLOCK_Q, PIECES_QK)
    end = tl.minimum((i_s + 1) * keys_per_range, Lk)
    for start in tl.range(i_s * keys_per_range, end, BLOCK_KV, num_stages=STAGES):
        o_keys = start + tl.arange(0, BLOCK_KV)
        m_keys = keys_to_read(masks, i_b, o_keys, end, some_hi, Lk, HIDES)
        b_k = load_head((k, k_1, k_2), i_b, i_h, start, m_keys, stride_k, d_qk, PIECES_QK, BLOCK_KV, TMA)
        b_v = load_head((v, v_1, v_2), i_b, i_h, start, m_keys, stride_v, d_v, PIECES_V, BLOCK_KV, TMA)
        s = dot_transposed(b_q, b_k, PRECISION)  # [BLOCK_Q, BLOCK_KV]
        dp = dot_transposed(b_do, b_v, PRECISION)
        s = hide(
            s, masks, stride_mask, i_b, i_h, o_rows[:, None], o_keys[None, :], window[0][:, None], window[1][:, None],
            m_rows[:, None], m_keys[None, :], (start, end, all_lo, all_hi), scale, BLOCK_KV, HIDES,
        )  # fmt: skip
        p = attention_weights(s, shift[:, None], log_l[:, None], factor, HIDES)
        kept = p
        if DROPOUT:
            factors = dropout_factors(*dropout, i_b, (i_h * Lq + o_rows)[:, None], o_keys[None, :])
            dp, kept = dp * factors, p * factors
        ds = (p * (dp - b_delta[:, None])).to(b_k[0].dtype)
        acc_v = dot_columns(kept.to(b_do[0].dtype), b_do, PRECISION)
        acc_k = dot_columns(ds, b_q, PRECISION)
        acc = accumulate(ds, b_k, acc, PRECISION)
        m_store = o_keys < end
        o_dk = i_b.to(tl.int64) * stride_dk[0] + i_h.to(tl.int64) * stride_dk[1]
        o_dv = i_b.to(tl.int64) * stride_dv[0] + i_h.to(tl.int64) * stride_dv[1]
        store_rows(dk + o_dk, stride_dk[2], o_keys, m_store, d_qk, acc_k, scales, PIECES_QK)
        store_rows(dv + o_dv, stride_dv[2], o_keys, m_store, d_v, acc_v, ones, PIECES_V)
    o_dq = i_b.to(tl.int64) * stride_dq[0] + i_h.to(tl.int64) * stride_dq[1] + i_s.to(tl.int64) * stride_dq[2]
    scales_q = tl.full([BLOCK_Q], 1.0, tl.float32) * scale
    store_rows(dq + o_dq, stride_dq[3], o_rows, m_rows, d_qk, acc, scales_q, PIECES_QK)
