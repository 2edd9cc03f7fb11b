"""How attention over separate keys and values is computed: regime, tiles, splits and workspace."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from perceiver_kernels.device import DeviceFacts
from perceiver_kernels.plan import splits
from perceiver_kernels.plan.splits import fastest_splits, product_splits
from perceiver_kernels.problem import AttentionProblem
from perceiver_kernels.tiles import (
    AttentionKind,
    AttentionTile,
    ProductTile,
    SmallTile,
    attention_tile,
    small_tile,
    stored_product_tile,
    wide_tile,
)

Regime = Literal["encode", "process", "decode"]


@dataclass(frozen=True)
class KeySplits:
    """Parts of the keys of each segment, and the keys of a part."""

    first: int
    second: int
    length: int

    @property
    def total(self) -> int:
        """Parts in all."""
        return self.first + self.second


@dataclass(frozen=True)
class Slices:
    """Parts of a loop over queries (or keys), and the length of one."""

    total: int
    length: int


@dataclass(frozen=True)
class Resident:
    """A kernel that keeps one side in shared memory: its tile, and the parts of the other side."""

    tile: AttentionTile
    parts: Slices


@dataclass(frozen=True)
class StoredScores:
    """A backward that keeps ds for dq, which then is one product, where a kernel of its own computes three.

    ds of ``entries`` batch entries is kept at a time; the product sums over ``slices`` of the keys.
    """

    entries: int
    product: ProductTile
    slices: Slices


@dataclass(frozen=True)
class WideAttentionPlan:
    """Wide heads: product tiles, and the queries (``by_queries``) or keys of a chunk, so that its weights meet their budget.

    The longer side is taken in chunks, the shorter one whole; ``keys`` are all keys, in whole tiles of every kernel. With
    ``whole_rows`` nothing divides the keys of a query: lse alone cannot merge rows of an additive mask's lowest number.
    """

    weights: ProductTile
    weights_backward: ProductTile
    values: ProductTile
    products: ProductTile
    by_queries: bool
    whole_rows: bool
    chunk: int
    chunk_backward: int
    keys: int
    sm_count: int

    def value_splits(self, entries: int, rows: int, columns: int, key_tiles: int) -> int:
        """Splits of a chunk's key tiles in the values kernel, for ``entries`` heads of a batch."""
        programs = entries * math.ceil(rows / self.values.rows) * math.ceil(columns / self.values.columns)
        return product_splits(max(1, programs), key_tiles, 64, self.sm_count)

    def row_slices(self, entries: int, rows: int, keys: int, columns: int, heads: int) -> Slices:
        """Slices of a chunk's queries in the kernel of dk or dv; ``heads`` share a key head."""
        tile = self.products
        programs = entries * math.ceil(keys / tile.rows) * math.ceil(columns / tile.columns)
        steps = math.ceil(rows / tile.inner)
        slices = product_splits(max(1, programs), max(1, steps), max(1, 64 // heads), self.sm_count)
        return Slices(slices, math.ceil(steps / slices) * tile.inner)


@dataclass(frozen=True)
class AttentionPlan:
    """Regime; tiles with the splits of the keys (forward, dq) and the slices of the queries (dk and dv); TMA or not.

    Where there is no tile the wide kernels compute that pass. ``decode_forward`` and ``decode_dq`` replace forward and dq where
    all keys stay in shared memory, ``encode_backward`` the whole backward where all queries do, ``stored`` the kernel of dq,
    and ``small`` everything where several problems share a program.
    """

    regime: Regime
    forward: AttentionTile | None
    forward_splits: KeySplits
    dq: AttentionTile | None
    dq_splits: KeySplits
    dkv: AttentionTile | None
    dkv_slices: Slices
    wide: WideAttentionPlan
    decode_forward: Resident | None
    decode_dq: Resident | None
    encode_backward: Resident | None
    stored: StoredScores | None
    small: SmallTile | None
    tma: bool


def _regime(Lq: int, Lk: int) -> Regime:
    return "encode" if Lk >= 4 * Lq else "decode" if Lq >= 4 * Lk else "process"


def _alone(tile: AttentionTile) -> float:
    """A single warp group waits for its own products: 64 x 16,384 keys took 0.41 ms with one program of four warps on a
    multiprocessor, 0.29 with two (H200)."""
    return 0.6 if tile.num_warps == 4 else 1.0


def _key_splits(kind: AttentionKind, p: AttentionProblem, tile: AttentionTile | None, device: DeviceFacts) -> KeySplits:
    """No splits where an additive mask wants the whole row's maximum, or packed sequences leave most tiles out."""
    if tile is None:
        return KeySplits(1, 0, max(1, p.Lk))
    segments = (p.Lk_first, p.Lk - p.Lk_first)
    per_split = tiles = sum(math.ceil(size / tile.block_kv) for size in segments)
    if p.attn_mask == "none" and not p.packed:
        blocks = p.B * p.H * math.ceil(p.Lq / tile.block_q)
        qk, v = tile.columns
        products, result = (qk + v, p.d_v) if kind == "forward" else (2 * qk + v, p.d_qk)
        _, per_split = fastest_splits(
            max(1, blocks), max(1, tiles), 2.0 * tile.block_q * tile.block_kv * products, 8.0 * p.B * p.H * p.Lq * result,
            tile.programs_per_sm(kind, p.dtype.itemsize, device), device, _alone(tile),
        )  # fmt: skip
    length = max(1, per_split) * tile.block_kv
    first, second = (math.ceil(size / length) for size in segments)
    return KeySplits(max(first, 0 if second else 1), second, length)


def _query_slices(p: AttentionProblem, tile: AttentionTile | None, device: DeviceFacts) -> Slices:
    if tile is None:
        return Slices(1, max(1, p.Lq))
    blocks = p.B * p.H_kv * math.ceil(p.Lk / tile.block_kv)
    flops = 4.0 * tile.block_q * tile.block_kv * sum(tile.columns) * (p.H // p.H_kv)
    slices, per_slice = fastest_splits(
        max(1, blocks), max(1, math.ceil(p.Lq / tile.block_q)), flops, 8.0 * p.B * p.H_kv * p.Lk * (p.d_qk + p.d_v),
        tile.programs_per_sm("dkv", p.dtype.itemsize, device), device, _alone(tile),
    )  # fmt: skip
    return Slices(slices, per_slice * tile.block_q)


def _resident(kind: AttentionKind, p: AttentionProblem, device: DeviceFacts) -> Resident | None:
    """The kernel ``kind`` where one side fits shared memory twice over: one program computes while the other one loads.

    The loop over keys that stay is unrolled, and several generators of dropout's factors at a time spill 2 KB a thread.
    """
    encode = kind == "encode_backward"
    keys = 0 if encode else p.Lk
    tile = attention_tile(kind, p.d_qk, p.d_v, p.Lq, keys, p.dtype.itemsize, device)
    if tile is None or p.segments > 1 or p.packed or (p.dropout and not encode):
        return None
    if encode and (p.Lq > tile.block_q or p.H_kv != p.H):
        return None
    resident = tile.programs_per_sm(kind, p.dtype.itemsize, device, keys)
    if resident < 2 or _regime(p.Lq, p.Lk) != ("encode" if encode else "decode"):
        return None
    (length, block), columns = ((p.Lk, tile.block_kv) if encode else (p.Lq, tile.block_q)), sum(tile.columns)
    flops = 4.0 * columns * block * (tile.block_q if encode else p.Lk)
    parts, per_part = fastest_splits(
        max(1, p.B * p.H), max(1, math.ceil(length / block)), flops, 8.0 * p.B * p.H * p.Lq * p.d_qk if encode else 0.0,
        min(resident, 2), device, _alone(tile),
    )  # fmt: skip
    return Resident(tile, Slices(parts, per_part * block))


def _stored(p: AttentionProblem, dkv: AttentionTile | None, slices: Slices, device: DeviceFacts) -> StoredScores | None:
    """Where the two products that a kernel of dq computes again cost more than ds written and read, 4 bytes an element.

    Those of narrower heads do not, nor those of few queries and many keys, whose dq wants splits. What masks skip would have to
    be zeroed; a key mask skips nothing.
    """
    skips = p.packed or p.lengths or p.query_mask or p.causal != "none" or p.attn_mask != "none"
    if dkv is None or slices.total > 1 or skips or p.segments > 1 or p.H_kv != p.H or p.dropout or p.dtype.itemsize != 2:
        return None
    product = stored_product_tile(p.d_qk, device)
    # A step of the product must not reach past the blocks that were written.
    if _regime(p.Lq, p.Lk) != "process" or p.d_qk <= 64 or p.Lk < 128 or dkv.block_kv % product.inner:
        return None
    blocks = math.ceil(p.Lk / dkv.block_kv)
    per_entry = p.H * math.ceil(p.Lq / product.rows) * product.rows * blocks * dkv.block_kv * p.dtype.itemsize
    entries = max(1, min(p.B, splits.WEIGHTS_BYTES // per_entry))
    entries = math.ceil(max(1, p.B) / math.ceil(max(1, p.B) / entries))
    if entries * per_entry > splits.WEIGHTS_BYTES or (entries < p.B and entries * p.H * blocks < 4 * device.sm_count):
        return None
    steps = math.ceil(p.Lk / product.inner)
    programs = entries * p.H * math.ceil(p.Lq / product.rows) * math.ceil(p.d_qk / product.columns)
    parts = product_splits(programs, steps, 64, device.sm_count)
    return StoredScores(entries, product, Slices(parts, math.ceil(steps / parts) * product.inner))


def _small(p: AttentionProblem) -> SmallTile | None:
    """Neighbouring heads of one query length and one key length, each with keys of its own."""
    if p.packed or p.segments > 1 or p.H_kv != p.H or min(p.Lq, p.Lk) < 1:
        return None
    return small_tile(p.Lq, p.Lk, p.d_qk, p.d_v, p.dtype.itemsize)


def _plan_wide(p: AttentionProblem, device: DeviceFacts) -> WideAttentionPlan:
    itemsize = p.dtype.itemsize
    crowded = p.dropout or p.attn_mask != "none"
    weights, backward, values, products = (
        wide_tile(kind, itemsize, device, crowded=crowded) for kind in ("weights", "separate_backward", "values", "dx")
    )
    key_unit = max(weights.columns, backward.columns, products.rows)
    keys = max(1, math.ceil(p.Lk / key_unit)) * key_unit
    whole_rows = p.attn_mask == "additive"
    by_queries = whole_rows or p.Lk <= p.Lq

    def chunk(rows: int, arrays: int) -> int:
        whole_rows = max(1, math.ceil(p.Lq / rows)) * rows
        unit, length, other = (rows, p.Lq, keys) if by_queries else (key_unit, p.Lk, whole_rows)
        per_unit = max(1, p.B * p.H) * unit * other * itemsize * arrays
        units = max(1, math.ceil(length / unit))
        chunks = math.ceil(units / max(1, splits.WEIGHTS_BYTES // per_unit))
        return math.ceil(units / chunks) * unit

    return WideAttentionPlan(
        weights, backward, values, products, by_queries, whole_rows, chunk(weights.rows, 1), chunk(backward.rows, 2), keys,
        device.sm_count,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def plan_attention(problem: AttentionProblem, device: DeviceFacts) -> AttentionPlan:
    """Tiles and parts of one attention, a pure function."""
    p, itemsize = problem, problem.dtype.itemsize
    kinds: tuple[AttentionKind, ...] = ("forward", "dq", "dkv")
    forward, dq, dkv = (attention_tile(kind, p.d_qk, p.d_v, p.Lq, p.Lk, itemsize, device) for kind in kinds)
    slices = _query_slices(p, dkv, device)
    return AttentionPlan(
        regime=_regime(p.Lq, p.Lk), forward=forward, forward_splits=_key_splits("forward", p, forward, device),
        dq=dq, dq_splits=_key_splits("dq", p, dq, device), dkv=dkv, dkv_slices=slices,
        wide=_plan_wide(p, device),
        decode_forward=_resident("decode_forward", p, device), decode_dq=_resident("decode_dq", p, device),
        encode_backward=_resident("encode_backward", p, device), stored=_stored(p, dkv, slices, device), small=_small(p),
        tma=device.has_tma,
    )  # fmt: skip
