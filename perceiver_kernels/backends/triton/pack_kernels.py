"""Pack kernels: one pass over the inputs, forward and backward.

forward: one program per (BLOCK_M tokens, group of batch entries). Positions that the batch shares (dense channels or Fourier
features) are computed once per program and reused for every batch entry of the group. Reads B M C_content e_in (+ positions),
writes B M C_padded e_out + 4 B M (rstd). backward: one program per BLOCK_M tokens of [B * M]; reads two packed arrays, writes
the content's gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.primitives import piece_columns, piece_start


@triton.jit
def _sin_half_turns(t, quarter):
    """sin(pi t), or cos(pi t) where ``quarter``: |error| < 2e-7 in fp32 for any |t| < 2**22.

    t = n + r with |r| <= 1/2 exactly; sin(pi t) = (-1)^n sin(pi r), cos(pi t) = (-1)^n sin(pi (1/2 - |r|)). The Taylor series
    through x^11 is exact to 6e-8 on a quarter turn and costs a tenth of a general sine.
    """
    n = tl.floor(t + 0.5)
    r = t - n
    r = tl.where(quarter, 0.5 - tl.abs(r), r)
    y = r * r
    series = -0.5992645293 + y * (0.0821458866 - 0.0073704309 * y)
    series = 3.1415926536 + y * (-5.1677127800 + y * (2.5501640399 + y * series))
    odd = n - 2.0 * tl.floor(n * 0.5)
    return r * series * (1.0 - 2.0 * odd)


@triton.jit
def _fourier_columns(positions, table, o_m, m_m, stride_p_m, o_f, m_f, F):
    """Feature channels o_f of tokens o_m: the coordinate itself, sin(pi c f) or cos(pi c f), as the table [3, F] says."""
    axis = tl.load(table + o_f, mask=m_f, other=0.0).to(tl.int32)
    frequency = tl.load(table + F + o_f, mask=m_f, other=0.0)
    kind = tl.load(table + 2 * F + o_f, mask=m_f, other=0.0)
    mask = m_m[:, None] & m_f[None, :]
    coordinate = tl.load(positions + o_m[:, None] * stride_p_m + axis[None, :], mask=mask, other=0.0).to(tl.float32)
    wave = _sin_half_turns(coordinate * frequency[None, :], (kind == 2.0)[None, :])
    return tl.where((kind == 0.0)[None, :], coordinate, wave)


@triton.jit
def _position_pieces(
    positions, table, o_m, m_m, stride_p_m, C_content, C, PIECES: tl.constexpr, FOURIER: tl.constexpr
):  # fmt: skip
    """Position channels in their columns (content columns zero), fp32, in pieces."""
    pieces = ()
    for i in tl.static_range(len(PIECES)):
        o_p = piece_columns(PIECES, i) - C_content
        m_p = (o_p >= 0) & (o_p < C - C_content)
        if FOURIER:
            tile = _fourier_columns(positions, table, o_m, m_m, stride_p_m, o_p, m_p, C - C_content)
            tile = tl.where(m_m[:, None] & m_p[None, :], tile, 0.0)
        else:
            mask = m_m[:, None] & m_p[None, :]
            tile = tl.load(positions + o_m[:, None] * stride_p_m + o_p[None, :], mask=mask, other=0.0).to(tl.float32)
        pieces = pieces + (tile,)
    return pieces


@triton.jit
def _content_pieces(content, o_m, visible, stride_c_m, stride_c_c, C_content, PIECES: tl.constexpr):
    pieces = ()
    for i in tl.static_range(len(PIECES)):
        o_c = piece_columns(PIECES, i).to(tl.int64)
        mask = visible[:, None] & (o_c < C_content)[None, :]
        tile = tl.load(content + o_m[:, None] * stride_c_m + o_c[None, :] * stride_c_c, mask=mask, other=0.0)
        pieces = pieces + (tile.to(tl.float32),)
    return pieces


@triton.jit
def _row_sum(pieces):
    total = tl.sum(pieces[0], 1)
    for i in tl.static_range(1, len(pieces)):
        total += tl.sum(pieces[i], 1)
    return total


@triton.jit
def _add(a, b):
    pieces = ()
    for i in tl.static_range(len(a)):
        pieces = pieces + (a[i] + b[i],)
    return pieces


@triton.jit
def _multiply(a, b):
    pieces = ()
    for i in tl.static_range(len(a)):
        pieces = pieces + (a[i] * b[i],)
    return pieces


@triton.jit
def _centered(pieces, mean, C, PIECES: tl.constexpr):
    """pieces - mean [ROWS] on the C real columns, 0 on padding."""
    centered = ()
    for i in tl.static_range(len(PIECES)):
        real = piece_columns(PIECES, i) < C
        centered = centered + (tl.where(real[None, :], pieces[i] - mean[:, None], 0.0),)
    return centered


@triton.jit
def _store_vectors(pointer, tile, o_m, m_m, C_padded, START: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Store a tile [BLOCK_M, WIDTH] as 16-byte vectors.

    The reshape frees the store from the layout of loads whose rows are unaligned: those coalesce one element a thread.
    """
    o_v = tl.arange(0, WIDTH // 8)
    o_c = START + o_v[:, None] * 8 + tl.arange(0, 8)[None, :]  # [WIDTH / 8, 8]
    p = pointer + (o_m * C_padded)[:, None, None] + o_c[None, :, :]
    mask = m_m[:, None, None] & (o_c < C_padded)[None, :, :]
    tl.store(p, tile.to(pointer.dtype.element_ty).reshape(BLOCK_M, WIDTH // 8, 8), mask=mask)


@triton.jit
def _pack_fwd_kernel(
    content, positions, table, key_mask, packed, rstd, B, M, C_content, C, C_padded, eps, batch_per_program,
    stride_c_b, stride_c_m, stride_c_c, stride_p_b, stride_p_m,
    PIECES: tl.constexpr, BLOCK_M: tl.constexpr, POSITIONS: tl.constexpr, FOURIER: tl.constexpr, BATCHED: tl.constexpr,
    NORMALIZE: tl.constexpr, MASKED: tl.constexpr, CONSTANTS: tl.constexpr,
):  # fmt: skip
    token_blocks = tl.cdiv(M, BLOCK_M)
    o_m = (tl.program_id(0) % token_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    first = (tl.program_id(0) // token_blocks).to(tl.int64) * batch_per_program
    if POSITIONS and not BATCHED:
        shared = _position_pieces(positions, table, o_m, m_m, stride_p_m, C_content, C, PIECES, FOURIER)
    for i_b in range(first, tl.minimum(first + batch_per_program, B)):
        visible = m_m
        if MASKED:
            visible = m_m & (tl.load(key_mask + i_b * M + o_m, mask=m_m, other=0) != 0)
        x = _content_pieces(content + i_b * stride_c_b, o_m, visible, stride_c_m, stride_c_c, C_content, PIECES)
        if POSITIONS:
            if BATCHED:
                x = _add(x, _position_pieces(
                    positions + i_b * stride_p_b, table, o_m, visible, stride_p_m, C_content, C, PIECES, FOURIER
                ))  # fmt: skip
            else:
                x = _add(x, shared)
        scale = visible.to(tl.float32)
        if NORMALIZE:
            # Twice: the first mean carries the rounding of a sum of large numbers, the second that of small ones.
            x = _centered(x, _row_sum(x) / C, C, PIECES)
            x = _centered(x, _row_sum(x) / C, C, PIECES)
            row_rstd = tl.rsqrt(_row_sum(_multiply(x, x)) / C + eps)
            scale = tl.where(visible, row_rstd, 0.0)
            tl.store(rstd + i_b * M + o_m, scale, mask=m_m)
        for i in tl.static_range(len(PIECES)):
            tile = x[i] * scale[:, None]
            if CONSTANTS > 0:
                o_c = piece_columns(PIECES, i)
                tile = tl.where(((o_c >= C) & (o_c < C + CONSTANTS))[None, :], 1.0, tile)
            if MASKED:
                # Selected, not multiplied by 0: what a hidden token holds, NaN too, goes no further.
                tile = tl.where(visible[:, None], tile, 0.0)
            _store_vectors(
                packed + i_b * M * C_padded, tile, o_m, m_m, C_padded, piece_start(PIECES, i), BLOCK_M, PIECES[i]
            )


@triton.jit
def _packed_pieces(pointer, o_m, m_m, C, C_padded, PIECES: tl.constexpr):
    pieces = ()
    for i in tl.static_range(len(PIECES)):
        o_c = piece_columns(PIECES, i)
        mask = m_m[:, None] & (o_c < C)[None, :]
        tile = tl.load(pointer + o_m[:, None] * C_padded + o_c[None, :], mask=mask, other=0.0)
        pieces = pieces + (tile.to(tl.float32),)
    return pieces


@triton.jit
def _pack_bwd_kernel(
    dpacked, packed, rstd, dcontent, rows, C_content, C, C_padded,
    PIECES: tl.constexpr, BLOCK_M: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """dcontent = rstd (dy - mean(dy) - x_hat mean(dy x_hat)); masked tokens have rstd 0."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    dy = _packed_pieces(dpacked, o_m, m_m, C, C_padded, PIECES)
    if NORMALIZE:
        x_hat = _packed_pieces(packed, o_m, m_m, C, C_padded, PIECES)
        row_rstd = tl.load(rstd + o_m, mask=m_m, other=0.0)
        mean = _row_sum(dy) / C
        projection = _row_sum(_multiply(dy, x_hat)) / C
    for i in tl.static_range(len(PIECES)):
        o_c = piece_columns(PIECES, i)
        value = dy[i]
        if NORMALIZE:
            value = (value - mean[:, None] - x_hat[i] * projection[:, None]) * row_rstd[:, None]
        mask = m_m[:, None] & (o_c < C_content)[None, :]
        tl.store(dcontent + o_m[:, None] * C_content + o_c[None, :], value.to(dcontent.dtype.element_ty), mask=mask)
