"""How attention on CUDA C++ is computed: tiles, splits, slices and chunks, pure functions of sizes and device facts."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

from perceiver_kernels.device import DeviceFacts
from perceiver_kernels.plan.splits import WEIGHTS_BYTES, fastest_splits

# Of csrc/kernels/attention_enqueue.h: the widest head of a kernel, and the keys of its tile.
BLOCK_KV = {64: 128, 128: 128, 256: 64}
BLOCK_Q = 128
# The tile of the other kernel for 64 channels, and the keys from which on it is taken.
LONG_BLOCK_KV, LONG = 192, 8192
# The same of the backward: the queries of a block, by width, and the keys of a tile.
BACKWARD_BLOCK_Q = {64: 128, 128: 64, 256: 32}
BACKWARD_BLOCK_KV = 128
# Of the kernels for 256 channels, whose rows of lse and delta lie in blocks of BACKWARD_BLOCK_Q: rows and keys of a tile.
WIDE_BLOCK_Q, WIDE_BLOCK_KV = 128, 64
# Parts of dq take no more than this, or than the operands and gradients where those are larger.
PARTS_BYTES = 256 << 20


@dataclass(frozen=True)
class ForwardPlan:
    """Keys of a tile, splits of the keys, the keys of a split, items of work, and the blocks that share them."""

    block_kv: int
    splits: int
    keys_per_split: int
    items: int
    blocks: int


@functools.lru_cache(maxsize=1024)
def plan_forward(B: int, H: int, Lq: int, Lk: int, d_qk: int, d_v: int, device: DeviceFacts) -> ForwardPlan:
    """Splits with the least estimated time; one block fills a multiprocessor."""
    columns, block_kv = next(pair for pair in BLOCK_KV.items() if max(d_qk, d_v) <= pair[0])
    if columns == 64 and Lk >= LONG and Lq > BLOCK_Q // 2:
        block_kv = LONG_BLOCK_KV
    row_blocks, tiles = B * H * math.ceil(Lq / BLOCK_Q), math.ceil(Lk / block_kv)
    splits, per_split = fastest_splits(
        row_blocks, tiles, 2.0 * BLOCK_Q * block_kv * (d_qk + d_v), 8.0 * B * H * Lq * d_v, resident=1, device=device
    )
    items = row_blocks * splits
    return ForwardPlan(block_kv, splits, per_split * block_kv, items, min(items, device.sm_count))


@dataclass(frozen=True)
class BackwardPlan:
    """Columns and queries of a block, blocks that cover the queries, splits of the keys, their keys, items, programs.

    balanced: programs have as many tiles of keys each, side by side, of two heads where they must.
    """

    columns: int
    block_q: int
    query_blocks: int
    splits: int
    keys_per_split: int
    items: int
    blocks: int
    chunk_rows: int = 0
    chunk_keys: int = 0
    slices: int = 1
    balanced: bool = False


def plan_wide_backward(B: int, H: int, H_kv: int, Lq: int, Lk: int, device: DeviceFacts) -> BackwardPlan:
    """Chunks whose weights and their gradients fit WEIGHTS_BYTES: of rows where those outnumber the keys, else of keys."""
    row_blocks, key_tiles = math.ceil(Lq / WIDE_BLOCK_Q), math.ceil(Lk / WIDE_BLOCK_KV)
    most = max(1, WEIGHTS_BYTES // (4 * B * H * WIDE_BLOCK_Q * WIDE_BLOCK_KV))
    rows_at_once, tiles_at_once, splits = row_blocks, key_tiles, 1
    if Lq > Lk:
        rows_at_once, wave = max(1, most // key_tiles), max(1, device.sm_count // (B * H))
        rows_at_once = min(row_blocks, rows_at_once // wave * wave or rows_at_once)
    else:
        tiles_at_once = min(key_tiles, max(1, most // row_blocks))
        splits = min(tiles_at_once, max(1, device.sm_count // (B * H * row_blocks)))
        if tiles_at_once < key_tiles:
            tiles_at_once = tiles_at_once // splits * splits
        splits = math.ceil(tiles_at_once / math.ceil(tiles_at_once / splits))
    products, strips = 2 * B * H_kv * math.ceil(tiles_at_once / 2), 2 * rows_at_once
    per_slice = math.ceil(strips / min(strips, max(1, device.sm_count // products)))
    return BackwardPlan(
        256, BACKWARD_BLOCK_Q[256], math.ceil(Lq / BACKWARD_BLOCK_Q[256]), splits,
        math.ceil(tiles_at_once / splits) * WIDE_BLOCK_KV, B * H * rows_at_once * splits, device.sm_count,
        min(Lq, rows_at_once * WIDE_BLOCK_Q), min(Lk, tiles_at_once * WIDE_BLOCK_KV), math.ceil(strips / per_slice),
    )  # fmt: skip


def most_splits(B: int, H: int, Lq: int, Lk: int, d: int) -> int:
    """Splits of the keys whose parts of dq, fp32 [B, H, Lq, d] each, PARTS_BYTES or the operands and gradients outweigh."""
    operands = 8 * B * H * (Lq + Lk) * d
    return max(1, max(PARTS_BYTES, operands) // (4 * B * H * Lq * d))


@functools.lru_cache(maxsize=1024)
def plan_backward(B: int, H: int, H_kv: int, Lq: int, Lk: int, d_qk: int, d_v: int, device: DeviceFacts) -> BackwardPlan:
    """Splits with the least estimated time; one block fills a multiprocessor, and every split has a part of dq of its own."""
    columns, block_q = next(pair for pair in BACKWARD_BLOCK_Q.items() if max(d_qk, d_v) <= pair[0])
    if columns > 128:
        return plan_wide_backward(B, H, H_kv, Lq, Lk, device)
    query_blocks, tiles = math.ceil(Lq / block_q), math.ceil(Lk / BACKWARD_BLOCK_KV)
    rows = query_blocks * block_q
    splits, per_split = fastest_splits(
        B * H_kv, tiles, 2.0 * BACKWARD_BLOCK_KV * H // H_kv * rows * (3 * d_qk + 2 * d_v), 8.0 * B * H * rows * columns,
        resident=1, device=device,
    )  # fmt: skip
    most = most_splits(B, H, Lq, Lk, max(d_qk, d_v))
    if splits > most:
        per_split = math.ceil(tiles / most)
        splits = math.ceil(tiles / per_split)
    slices = 1
    if H_kv == H and B * H * tiles < device.sm_count and Lq > 16 * Lk:
        # A decoder: few tiles of keys, each by as many programs as fill the GPU, in more waves than one where parts ask it.
        splits, per_split = 1, tiles
        for wave in itertools.count(1):
            per_slice = math.ceil(query_blocks / max(1, wave * device.sm_count // (B * H)))
            if tiles == 1 or per_slice == 1 or 4 * device.sm_count * per_slice * block_q * columns <= PARTS_BYTES:
                break
        slices = math.ceil(query_blocks / per_slice)
    total, blocks = B * H_kv * tiles, device.sm_count
    parts = (tiles - 1) * blocks // total + 2
    if splits > 1 and blocks <= total <= tiles * blocks and math.ceil(total / blocks) <= 0.97 * per_split and parts <= most:
        return BackwardPlan(columns, block_q, query_blocks, parts, Lk, 2 * blocks, blocks, balanced=True)
    items = B * H_kv * splits * slices
    keys_per_split, blocks = per_split * BACKWARD_BLOCK_KV, min(items, device.sm_count)
    return BackwardPlan(columns, block_q, query_blocks, splits, keys_per_split, items, blocks, slices=slices)


def workspace_floats(made: BackwardPlan, sizes: tuple[int, ...]) -> tuple[int, int, int, int]:
    """fp32 values that hold lse and delta of all rows, the parts of dq, weights and their gradients, the parts of dk and dv."""
    B, H, H_kv, Lq, Lk, *_ = sizes
    rows = B * H * made.query_blocks * made.block_q
    if made.columns <= 128:
        # Of one tile of keys dq has no parts; of slices every program has one, and dk and dv one of every slice.
        part_rows = made.splits * rows
        if made.slices > 1:
            part_rows = made.blocks * math.ceil(made.query_blocks / made.slices) * made.block_q
        parts = part_rows * made.columns if Lk > BACKWARD_BLOCK_KV else 0
        return 2 * rows, parts, 0, 2 * B * H_kv * made.slices * Lk * made.columns if made.slices > 1 else 0
    row_blocks, tiles = math.ceil(made.chunk_rows / WIDE_BLOCK_Q), math.ceil(made.chunk_keys / WIDE_BLOCK_KV)
    parts = B * H * made.splits * Lq * made.columns if made.splits > 1 or made.chunk_keys < Lk else 0
    key_parts = 2 * B * H_kv * made.slices * Lk * made.columns if made.slices > 1 or made.chunk_rows < Lq else 0
    return 2 * rows, parts, B * H * row_blocks * tiles * WIDE_BLOCK_Q * WIDE_BLOCK_KV, key_parts
