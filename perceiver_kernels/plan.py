"""How a problem is computed: tiles, splits and workspace as frozen results of pure functions of sizes and device facts."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from perceiver_kernels.cost import absorbed_cost, projected_cost
from perceiver_kernels.device import DeviceFacts
from perceiver_kernels.problem import AttentionProblem, CrossAttentionProblem, SharedKVProblem
from perceiver_kernels.tiles import (
    AttentionTile,
    Kind,
    ProductTile,
    Tile,
    attention_tile,
    column_pieces,
    fused_tile,
    wide_tile,
)


@dataclass(frozen=True)
class CrossAttentionPlan:
    """Absorbed or projected, with the estimated time of both in seconds."""

    method: Literal["absorbed", "projected"]
    absorbed_seconds: float
    projected_seconds: float


def plan_cross_attention(problem: CrossAttentionProblem, device: DeviceFacts) -> CrossAttentionPlan:
    """The method whose roofline time, at the measured efficiency of its parts, is smaller."""
    absorbed = absorbed_cost(problem, effective=True).seconds(device, problem.dtype)
    projected = projected_cost(problem, effective=True).seconds(device, problem.dtype)
    return CrossAttentionPlan("absorbed" if absorbed <= projected else "projected", absorbed, projected)


@dataclass(frozen=True)
class WidePlan:
    """Wide-channel kernels: product tiles, and keys per chunk so that the weights workspace stays under its budget."""

    weights: ProductTile
    weights_backward: ProductTile
    values: ProductTile
    dx: ProductTile
    chunk: int
    chunk_dq: int
    chunk_dx: int
    programs_per_split: int
    sm_count: int

    def padded(self, M: int) -> int:
        """``M`` rounded up to whole key tiles of every kernel."""
        tile = max(self.weights.columns, self.weights_backward.columns, self.dx.rows)
        return math.ceil(M / tile) * tile

    def splits(self, key_tiles: int) -> int:
        """Splits of a chunk's key tiles in the values kernel: the fewest whose waves take the least time."""
        best, best_time = 1, math.inf
        for splits in range(1, min(key_tiles, 16) + 1):
            waves = math.ceil(self.programs_per_split * splits / self.sm_count)
            time = waves * (math.ceil(key_tiles / splits) + 2)
            if time < best_time and math.ceil(key_tiles / math.ceil(key_tiles / splits)) == splits:
                best, best_time = splits, time
        return best


@dataclass(frozen=True)
class SharedKVPlan:
    """Tiles of the fused forward, dq and dx kernels (None: the wide kernels compute it), splits of the keys, TMA or not."""

    forward: Tile | None
    forward_splits: int
    forward_keys_per_split: int
    dq: Tile | None
    dq_splits: int
    dq_keys_per_split: int
    dx: Tile | None
    wide: WidePlan
    tma: bool

    def workspace_bytes(self, B: int, R: int, C: int, itemsize: int) -> int:
        """Device memory of the forward beside its result: fp32 partials 4 B S R (C + 2), or a chunk's weights."""
        if self.forward is None:
            rows = math.ceil(R / self.wide.weights.rows) * self.wide.weights.rows
            return B * rows * self.wide.chunk * itemsize
        return 4 * B * self.forward_splits * R * (C + 2) if self.forward_splits > 1 else 0


def _choose_splits(
    kind: Kind, tile: Tile, products: int, B: int, R: int, M: int, C: int, itemsize: int, device: DeviceFacts
) -> tuple[int, int]:
    """(splits, keys per split): the split count with the least estimated time.

    Exactly one full wave is usually best.
    """
    blocks = B * math.ceil(R / tile.block_q)
    resident = tile.programs_per_sm(kind, itemsize, device)
    key_tiles = max(1, math.ceil(M / tile.block_kv))
    tile_flops = 2.0 * products * tile.block_q * tile.block_kv * C
    splits, tiles = _fastest_splits(blocks, key_tiles, tile_flops, 8.0 * B * R * C, resident, device)
    return splits, tiles * tile.block_kv


def _fastest_splits(
    blocks: int, tiles_in_all: int, tile_flops: float, partial_bytes: float, resident: int, device: DeviceFacts
) -> tuple[int, int]:
    """(splits, tiles per split) of a loop that each of ``blocks`` programs would walk alone.

    A wave of programs costs its longest split plus a fixed start (loading what stays, filling the pipeline); every split writes
    and reads back ``partial_bytes``.
    """
    tile_seconds = tile_flops / (0.7 * device.matmul_flops / device.sm_count)
    start_seconds = 4e-6
    key_tiles, slots = tiles_in_all, device.sm_count * resident
    best = (math.inf, 1, key_tiles)
    for splits in range(1, min(key_tiles, 4 * slots) + 1):
        tiles = math.ceil(key_tiles / splits)
        if math.ceil(key_tiles / tiles) != splits:
            continue
        waves = math.ceil(blocks * splits / slots)
        sharing = min(resident, math.ceil(blocks * splits / device.sm_count))
        partials = splits * partial_bytes / device.memory_bandwidth if splits > 1 else 0.0
        seconds = waves * (tiles * tile_seconds * sharing + start_seconds) + partials
        if seconds < best[0] * 0.999:
            best = (seconds, splits, tiles)
        if blocks * splits > 4 * slots:
            break
    return best[1], best[2]


WEIGHTS_BYTES = 96 << 20
"""Budget of the wide kernels' weights workspace. On an H200 (60 MB L2) larger chunks are faster: 784 x 52,097 x 704, batch 4,
forward took 1.49 ms with 48 MiB, 1.33 with 96, 1.27 with 200, because every chunk costs launches and a partial wave."""


def _plan_wide(B: int, R: int, M: int, C: int, itemsize: int, dropout: bool, device: DeviceFacts) -> WidePlan:
    weights, backward, values, dx = (
        wide_tile(kind, itemsize, device, dropout=dropout) for kind in ("weights", "weights_backward", "values", "dx")
    )

    def chunk(tile: ProductTile, arrays: int) -> int:
        per_tile = B * math.ceil(R / tile.rows) * tile.rows * tile.columns * itemsize * arrays
        tiles = math.ceil(M / tile.columns)
        chunks = math.ceil(tiles / max(1, WEIGHTS_BYTES // max(1, per_tile)))
        return max(1, math.ceil(tiles / max(1, chunks))) * tile.columns

    programs = B * math.ceil(R / values.rows) * math.ceil(C / values.columns)
    return WidePlan(
        weights, backward, values, dx, chunk(weights, 1), chunk(backward, 1), chunk(backward, 2), programs, device.sm_count
    )


@functools.lru_cache(maxsize=1024)
def _plan_sizes(B: int, R: int, M: int, C: int, itemsize: int, dropout: bool, device: DeviceFacts) -> SharedKVPlan:
    forward, dq, dx = (fused_tile(kind, C, itemsize, device) for kind in ("forward", "dq", "dx"))
    forward_splits = _choose_splits("forward", forward, 2, B, R, M, C, itemsize, device) if forward else (1, M)
    dq_splits = _choose_splits("dq", dq, 3, B, R, M, C, itemsize, device) if dq else (1, M)
    wide = _plan_wide(B, R, M, C, itemsize, dropout, device)
    return SharedKVPlan(forward, *forward_splits, dq, *dq_splits, dx, wide, device.has_tma)


def plan_shared_kv(problem: SharedKVProblem, device: DeviceFacts) -> SharedKVPlan:
    """Tiles and splits of one shared-KV attention; a pure, cached function of its sizes, element size and the device."""
    p = problem
    return _plan_sizes(p.B, p.R, p.M, p.C, p.dtype.itemsize, p.dropout, device)


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
class AttentionPlan:
    """Regime, tiles, splits of the keys in the forward; ranges of the keys and slices of the queries in the backward; TMA."""

    regime: Regime
    forward: AttentionTile
    forward_splits: KeySplits
    backward: AttentionTile
    ranges: KeySplits
    slices: int
    queries_per_slice: int
    tma: bool


def _regime(Lq: int, Lk: int) -> Regime:
    return "encode" if Lk >= 4 * Lq else "decode" if Lq >= 4 * Lk else "process"


def _key_splits(p: AttentionProblem, tile: AttentionTile, tiles_per_split: int) -> KeySplits:
    """Both segments in parts of ``tiles_per_split`` tiles; at least one part."""
    length = max(1, tiles_per_split) * tile.block_kv
    first, second = (math.ceil(size / length) for size in (p.Lk_first, p.Lk - p.Lk_first))
    return KeySplits(max(first, 0 if second else 1), second, length)


def _forward_splits(p: AttentionProblem, tile: AttentionTile, device: DeviceFacts) -> KeySplits:
    """None where an additive mask wants the whole row's maximum, or packed sequences leave most tiles out."""
    tiles = sum(math.ceil(size / tile.block_kv) for size in (p.Lk_first, p.Lk - p.Lk_first))
    if p.attn_mask != "none" or p.packed:
        return _key_splits(p, tile, tiles)
    blocks = p.B * p.H * math.ceil(p.Lq / tile.block_q)
    _, per_split = _fastest_splits(
        max(1, blocks), max(1, tiles), 2.0 * tile.block_q * tile.block_kv * sum(tile.columns), 8.0 * p.B * p.H * p.Lq * p.d_v,
        tile.programs_per_sm("forward", p.dtype.itemsize, device), device,
    )  # fmt: skip
    return _key_splits(p, tile, per_split)


def _backward_parts(p: AttentionProblem, tile: AttentionTile, device: DeviceFacts) -> tuple[KeySplits, int, int]:
    """(ranges of the keys, slices of the queries, queries per slice) with the least estimated time.

    A wave costs its longest program, and a start for each of its key blocks; slices leave partials of dk and dv, ranges of dq.
    """
    qk, v = tile.columns
    query_tiles, key_tiles = max(1, math.ceil(p.Lq / tile.block_q)), max(1, math.ceil(p.Lk / tile.block_kv))
    groups, heads = p.H // p.H_kv, p.B * p.H_kv
    slots = device.sm_count * tile.programs_per_sm("backward", p.dtype.itemsize, device)
    tile_flops = 2.0 * tile.block_q * tile.block_kv * (3 * qk + 2 * v) * groups
    tile_seconds = tile_flops * slots / (0.6 * device.matmul_flops)
    best = (math.inf, 1, 1)
    for ranges in _divisions(key_tiles, 4 * slots // max(1, heads)):
        for slices in _divisions(query_tiles, 4 * slots // max(1, heads * ranges)):
            programs = heads * ranges * slices
            keys, queries = math.ceil(key_tiles / ranges), math.ceil(query_tiles / slices)
            partials = 8.0 * p.B * p.H * p.Lq * qk * (ranges if ranges > 1 else 0)
            partials += 8.0 * heads * p.Lk * (qk + v) * (slices if slices > 1 else 0)
            seconds = math.ceil(programs / slots) * keys * (queries * tile_seconds + 2e-6) + partials / device.memory_bandwidth
            if seconds < 0.999 * best[0]:
                best = (seconds, keys, queries)
    _, keys, queries = best
    return _key_splits(p, tile, keys), math.ceil(query_tiles / queries), queries * tile.block_q


def _divisions(tiles: int, most: int) -> list[int]:
    """Numbers of parts, up to ``most``, that cut ``tiles`` tiles into parts of different sizes."""
    return sorted({math.ceil(tiles / math.ceil(tiles / parts)) for parts in range(1, max(1, min(tiles, most)) + 1)})


@functools.lru_cache(maxsize=1024)
def plan_attention(problem: AttentionProblem, device: DeviceFacts) -> AttentionPlan | None:
    """Tiles and parts of one attention, a pure function; None where the heads are too wide for these kernels."""
    p, itemsize = problem, problem.dtype.itemsize
    forward, backward = (attention_tile(kind, p.d_qk, p.d_v, itemsize, device) for kind in ("forward", "backward"))
    if forward is None or backward is None:
        return None
    return AttentionPlan(
        _regime(p.Lq, p.Lk), forward, _forward_splits(p, forward, device), backward, *_backward_parts(p, backward, device),
        device.has_tma,
    )  # fmt: skip


@dataclass(frozen=True)
class PackPlan:
    """Column pieces, tokens per program, batch entries per program, warps."""

    pieces: tuple[int, ...]
    block_m: int
    batch_per_program: int
    num_warps: int


def plan_pack(B: int, M: int, C_padded: int, *, shared: bool, device: DeviceFacts) -> PackPlan:
    """One warp and about 2,048 channels a program: rows are reduced within a warp (8 warps took 3.5 times as long, H200).

    With positions that the batch shares, one program serves as many batch entries as still fill the device.
    """
    # Past 512 columns one row fills a warp's registers.
    block_m = 1 if C_padded > 512 else min(64, 1 << (2048 // C_padded).bit_length() - 1)
    tiles = math.ceil(M / block_m)
    groups = 1 if shared else B
    while groups < B and tiles * groups < 16 * device.sm_count:
        groups += 1
    return PackPlan(column_pieces(C_padded), block_m, math.ceil(B / groups), 1)
