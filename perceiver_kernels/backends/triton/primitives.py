"""Device functions that the kernels share: row tiles in column pieces, softmax steps, visibility, dropout.

A row of C channels is held as a tuple of *pieces* whose widths are powers of two (272 = 256 + 16): Triton's shapes must be, and
rounding 272 up to 512 would nearly double the work. ``PIECES`` is the tuple of widths; columns at or past C are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
_LOG2_E = tl.constexpr(LOG2_E)


@triton.constexpr_function
def piece_start(pieces, i):
    """First column of piece ``i``."""
    return sum(pieces[:i])


@triton.jit
def piece_columns(PIECES: tl.constexpr, I: tl.constexpr):
    """Column indices of piece I."""
    START: tl.constexpr = piece_start(PIECES, I)
    WIDTH: tl.constexpr = PIECES[I]
    return START + tl.arange(0, WIDTH)


@triton.jit
def loop_indices(t, inner):
    """(t // inner, t % inner), for the index of a loop over ``inner`` steps of something, of which there may be none.

    A pipelined loop divides before it has looked whether it runs. From a division by ``inner`` LLVM concludes that it is not 0,
    so that the loop does run, and starts loads that nothing waits for: they land in shared memory that serves another purpose
    by then (Triton 3.6).
    """
    some = tl.maximum(inner, 1)
    return t // some, t % some


@triton.jit
def _zero_tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def _as_tile(block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return block.reshape(ROWS, COLUMNS)


@triton.jit
def zero_rows(ROWS: tl.constexpr, PIECES: tl.constexpr):
    """fp32 zeros [ROWS, C] in pieces."""
    pieces = ()
    for i in tl.static_range(len(PIECES)):
        pieces = pieces + (_zero_tile(ROWS, PIECES[i]),)
    return pieces


@triton.jit
def load_rows(pointer, stride_row, o_rows, m_rows, C, PIECES: tl.constexpr):
    """Rows ``o_rows`` (int64 offsets are formed here) of a matrix with ``stride_row``, in pieces; masked rows are zero."""
    p_rows = pointer + o_rows.to(tl.int64)[:, None] * stride_row
    pieces = ()
    for i in tl.static_range(len(PIECES)):
        o_c = piece_columns(PIECES, i)
        tile = tl.load(p_rows + o_c[None, :], mask=m_rows[:, None] & (o_c < C)[None, :], other=0.0)
        pieces = pieces + (tile,)
    return pieces


@triton.jit
def load_rows_tma(descriptors, entry, start, ROWS: tl.constexpr, PIECES: tl.constexpr):
    """Rows start..start+ROWS of one ``entry`` (a tuple of indices: batch, head) of a tensor; past the end they are zero.

    There is one TMA descriptor per piece.
    """
    pieces = ()
    for i in tl.static_range(len(PIECES)):
        block = descriptors[i].load(entry + (start, piece_start(PIECES, i)))
        pieces = pieces + (_as_tile(block, ROWS, PIECES[i]),)
    return pieces


@triton.jit
def load_stacked_rows(
    upper, stride_upper, lower, stride_lower, start, R, C, ROWS: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """ROWS rows of ``upper`` above the same rows of ``lower``: [2 ROWS, C] in pieces, so that one product serves both."""
    o_stack = tl.arange(0, 2 * ROWS)
    is_upper = o_stack < ROWS
    o_rows = (start + o_stack % ROWS).to(tl.int64)
    p_rows = tl.where(is_upper, upper + o_rows * stride_upper, lower + o_rows * stride_lower)
    pieces = ()
    for i in tl.static_range(len(PIECES)):
        o_c = piece_columns(PIECES, i)
        mask = (o_rows < R)[:, None] & (o_c < C)[None, :]
        pieces = pieces + (tl.load(p_rows[:, None] + o_c[None, :], mask=mask, other=0.0),)
    return pieces


@triton.constexpr_function
def shared_pieces(pieces, tail):
    """Every piece but a tail, which passes through registers."""
    return pieces[:-1] if tail else pieces


@triton.jit
def load_tail(pointer, stride_row, o_rows, m_rows, C, PIECES: tl.constexpr):
    """The last piece of rows ``o_rows``; masked rows and columns from C on are zero."""
    o_c = piece_columns(PIECES, len(PIECES) - 1)
    p = pointer + o_rows.to(tl.int64)[:, None] * stride_row + o_c[None, :]
    return tl.load(p, mask=m_rows[:, None] & (o_c < C)[None, :], other=0.0)


@triton.jit
def tail_in_registers(pieces, TAIL: tl.constexpr):
    """``pieces``, with TAIL the last one as the register operand of a product, which loads alone would put in shared memory.

    It goes through a product with the identity, whose result lies in registers as an operand does.
    """
    result = ()
    for i in tl.static_range(len(pieces)):
        piece = pieces[i]
        if TAIL and i == len(pieces) - 1:
            o = tl.arange(0, piece.shape[1])
            piece = tl.dot(piece, (o[:, None] == o[None, :]).to(piece.dtype)).to(piece.dtype)
        result = result + (piece,)
    return result


@triton.jit
def split_rows(stacked, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Upper and lower half of [2 ROWS, COLUMNS]; with 16 rows a warp both halves lie in the same thread's registers."""
    return stacked.reshape(2, ROWS, COLUMNS).permute(1, 2, 0).split()


@triton.jit
def split_columns(joined, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of [ROWS, 2 COLUMNS], in registers."""
    return joined.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()


@triton.jit
def join_columns(left, right, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[left | right]: the inverse of split_columns."""
    return tl.join(left, right).permute(0, 2, 1).reshape(ROWS, 2 * COLUMNS)


@triton.jit
def store_rows(pointer, stride_row, o_rows, m_rows, C, pieces, factor, PIECES: tl.constexpr):
    """Store ``pieces * factor`` (factor [ROWS]) to rows ``o_rows``, cast to the pointer's type."""
    p_rows = pointer + o_rows.to(tl.int64)[:, None] * stride_row
    for i in tl.static_range(len(PIECES)):
        o_c = piece_columns(PIECES, i)
        value = (pieces[i] * factor[:, None]).to(pointer.dtype.element_ty)
        tl.store(p_rows + o_c[None, :], value, mask=m_rows[:, None] & (o_c < C)[None, :])


@triton.jit
def store_rows_tma(descriptors, i_b, start, pieces, ROWS: tl.constexpr, PIECES: tl.constexpr):
    """Store rows start..start+ROWS of batch entry i_b through one TMA descriptor per piece; rows past the end are dropped."""
    for i in tl.static_range(len(PIECES)):
        value = pieces[i].to(descriptors[i].dtype).reshape(1, ROWS, PIECES[i])
        descriptors[i].store([i_b, start, piece_start(PIECES, i)], value)


# Both go from the narrowest piece to the widest: the longest product is then the one in flight when the next wait comes. The
# other way round cost the forward 9 % at 272 columns and 19 % at 336, dq 6 % at both (H200).
@triton.jit
def dot_transposed(a, b, PRECISION: tl.constexpr):
    """a b^T over all pieces: [ROWS_A, C] x [ROWS_B, C] -> [ROWS_A, ROWS_B], accumulated in fp32."""
    LAST: tl.constexpr = len(a) - 1
    product = tl.dot(a[LAST], b[LAST].T, input_precision=PRECISION)
    for i in tl.static_range(LAST):
        product = tl.dot(a[LAST - 1 - i], b[LAST - 1 - i].T, product, input_precision=PRECISION)
    return product


@triton.jit
def add_product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. In fp32 the product is summed by itself first: one chain of additions through all tiles of a loop would round
    thousands of times at the size of the whole sum.
    """
    if a.dtype == tl.float32:
        # Triton makes one chain of a product and an addition, but not of this.
        acc = tl.fma(acc, 1.0, tl.dot(a, b, input_precision=PRECISION))
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def accumulate(weights, b, acc, PRECISION: tl.constexpr):
    """acc + weights b, piece by piece: [ROWS, K] x [K, C] -> [ROWS, C]."""
    LAST: tl.constexpr = len(b) - 1
    pieces = ()
    for i in tl.static_range(len(b)):
        pieces = (add_product(weights, b[LAST - i], acc[LAST - i], PRECISION),) + pieces
    return pieces


@triton.jit
def dot_columns(weights, b, PRECISION: tl.constexpr):
    """weights^T b, piece by piece: [K, ROWS] x [K, C] -> [ROWS, C] in fp32.

    A warp group multiplies 64 rows at a time: fewer are the columns of the transposed product.
    """
    pieces = ()
    for i in tl.static_range(len(b)):
        if weights.shape[1] < 64 and b[i].shape[1] >= 64:
            pieces = pieces + (tl.dot(b[i].T, weights, input_precision=PRECISION).T,)
        else:
            pieces = pieces + (tl.dot(weights.T, b[i], input_precision=PRECISION),)
    return pieces


@triton.jit
def rescale(acc, factor):
    """acc * factor, row by row."""
    pieces = ()
    for i in tl.static_range(len(acc)):
        pieces = pieces + (acc[i] * factor[:, None],)
    return pieces


@triton.jit
def row_dots(a, b):
    """Dot products of the rows of a and b, in fp32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.jit
def row_statistics(lse, delta, drho, i_b, o_rows, m_rows, R, HAS_DRHO: tl.constexpr):
    """(lse in base 2, delta, drho) of rows; rows that are empty or past the end get lse = +inf, so that their p is 0."""
    o = i_b.to(tl.int64) * R + o_rows
    b_lse = tl.load(lse + o, mask=m_rows, other=-float("inf"))
    b_lse = tl.where(b_lse == -float("inf"), float("inf"), b_lse * _LOG2_E)
    b_delta = tl.load(delta + o, mask=m_rows, other=0.0)
    b_drho = tl.load(drho + o, mask=m_rows, other=0.0) if HAS_DRHO else b_delta * 0.0
    return b_lse, b_delta, b_drho


@triton.jit
def select_rows(acc, keep):
    """acc where ``keep`` [ROWS], 0 elsewhere."""
    pieces = ()
    for i in tl.static_range(len(acc)):
        pieces = pieces + (tl.where(keep[:, None], acc[i], 0.0),)
    return pieces


@triton.jit
def visible_keys(key_mask, i_b, o_keys, hi, M):
    """Which of the keys ``o_keys`` are below ``hi`` and set in key_mask [B, M]."""
    inside = o_keys < hi
    return inside & (tl.load(key_mask + i_b.to(tl.int64) * M + o_keys, mask=inside, other=0) != 0)


@triton.jit
def dropout_factors(seed, threshold, inverse_keep, i_b, o_rows, o_keys):
    """0 or ``inverse_keep`` for each (row, key): Philox-4x32-10, counter (key, row, batch, 0), first word >= threshold keeps.

    ``o_rows`` and ``o_keys`` broadcast against each other; keys are global indices, so chunks and splits do not matter.
    """
    key = tl.load(seed)
    c_key = (o_keys + o_rows * 0).to(tl.uint32)
    c_row = (o_rows + o_keys * 0).to(tl.uint32)
    c_batch = c_key * 0 + i_b.to(tl.uint32)
    word, _, _, _ = tl.philox(key, c_key, c_row, c_batch, c_key * 0)
    # The threshold may be 2**32, which drops everything and fits no 32-bit word.
    return tl.where(word.to(tl.int64) >= threshold, inverse_keep, 0.0)
