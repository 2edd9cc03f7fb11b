"""Rotary embedding: one read and one write of x. The backward is the same kernel, INVERSE turned over.

One program per (BLOCK_L tokens, group of HEADS heads), groups first: heads inside rows are neighbours in memory. A row is
COLUMNS items, vectors of PAIRS pairs of channels, followed by those of channels that pass, so that widths that are no power
of two leave no lanes idle but a program's last few; a tile is [ITEMS, PAIRS] with ITEMS >= BLOCK_L COLUMNS. The tables are read
once for all heads of a program. Device memory: 2 B H L d e, and the tables' L r e_t (B L r e_t where each entry has its own).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _aligned(stride, ALIGN: tl.constexpr):
    """``stride``, of which the launcher knows that ALIGN divides it; Triton itself looks for 16 alone."""
    return stride // ALIGN * ALIGN


@triton.jit
def _load_table(table, strides, i_b, o_l, m_rotary, o_pair, ALIGN: tl.constexpr):
    p = table + i_b * strides[0] + (o_l * _aligned(strides[1], ALIGN))[:, None] + o_pair
    return tl.load(p, mask=m_rotary[:, None], other=0.0).to(tl.float32)


@triton.jit
def _rotary_fwd_kernel(
    x, cos, sin, out, H, L, strides_x, strides_out, strides_cos, strides_sin,
    D: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, ITEMS: tl.constexpr,
    BLOCK_L: tl.constexpr, HEADS: tl.constexpr, ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = WIDTH // 2
    # Aligned to less than a pair, its channels are loaded apart: taking a tile apart would go through shared memory.
    JOINED: tl.constexpr = INTERLEAVED and ALIGN > 1
    groups = tl.cdiv(H, HEADS)
    token_blocks = tl.cdiv(L, BLOCK_L)
    i_h = tl.program_id(0) % groups * HEADS
    i_b = (tl.program_id(0) // groups // token_blocks).to(tl.int64)
    first = (tl.program_id(0) // groups % token_blocks).to(tl.int64) * BLOCK_L
    o_item = tl.arange(0, ITEMS)
    i_column = o_item % COLUMNS
    o_l = first + o_item // COLUMNS
    m_item = (o_item < BLOCK_L * COLUMNS) & (o_l < L)
    m_rotary = m_item & (i_column < HALF // PAIRS)
    o_pair = i_column[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]  # [ITEMS, PAIRS]
    b_cos = _load_table(cos, strides_cos, i_b, o_l, m_rotary, o_pair, TABLE_ALIGN)
    b_sin = _load_table(sin, strides_sin, i_b, o_l, m_rotary, o_pair, TABLE_ALIGN)
    if INVERSE:
        b_sin = -b_sin
    if JOINED:
        o_first = i_column[:, None] * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)[None, :]  # [ITEMS, 2 PAIRS]
        m_first = m_item[:, None]
    elif INTERLEAVED:
        o_first, o_second = 2 * o_pair, 2 * o_pair + 1
        m_first, m_second = m_item[:, None], m_item[:, None] & (o_second < D)
    else:
        # Channels that pass begin half a rotary width after the last pair's first channel.
        o_first, o_second = o_pair + tl.where(i_column < HALF // PAIRS, 0, HALF)[:, None], o_pair + HALF
        m_first, m_second = m_item[:, None], m_rotary[:, None]
    p_x = x + i_b * _aligned(strides_x[0], ALIGN) + (o_l * _aligned(strides_x[2], ALIGN))[:, None]
    p_out = out + i_b * _aligned(strides_out[0], ALIGN) + (o_l * _aligned(strides_out[2], ALIGN))[:, None]
    # All loads before the first store, which they could not pass: x and out might be one tensor to the compiler.
    firsts, seconds = (), ()
    for h in tl.static_range(HEADS):
        p = p_x + (i_h + h).to(tl.int64) * _aligned(strides_x[1], ALIGN)
        b_first = tl.load(p + o_first, mask=m_first & (i_h + h < H), other=0.0)
        if JOINED:
            b_first, b_second = b_first.reshape(ITEMS, PAIRS, 2).split()
        else:
            b_second = tl.load(p + o_second, mask=m_second & (i_h + h < H), other=0.0)
        firsts, seconds = firsts + (b_first,), seconds + (b_second,)
    for h in tl.static_range(HEADS):
        b_x1, b_x2 = firsts[h].to(tl.float32), seconds[h].to(tl.float32)
        b_y1 = (b_x1 * b_cos - b_x2 * b_sin).to(out.dtype.element_ty)
        b_y2 = (b_x1 * b_sin + b_x2 * b_cos).to(out.dtype.element_ty)
        if D > WIDTH:
            # Selected, not turned by 0: what passes keeps its bits, NaN's too.
            b_y1 = tl.where(m_rotary[:, None], b_y1, firsts[h])
            b_y2 = tl.where(m_rotary[:, None], b_y2, seconds[h])
        p = p_out + (i_h + h).to(tl.int64) * _aligned(strides_out[1], ALIGN)
        if JOINED:
            tl.store(p + o_first, tl.join(b_y1, b_y2).reshape(ITEMS, 2 * PAIRS), mask=m_first & (i_h + h < H))
        else:
            tl.store(p + o_first, b_y1, mask=m_first & (i_h + h < H))
            tl.store(p + o_second, b_y2, mask=m_second & (i_h + h < H))
