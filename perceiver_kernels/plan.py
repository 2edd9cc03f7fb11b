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
    AttentionKind,
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
    blocks: int, tiles_in_all: int, tile_flops: float, partial_bytes: float, resident: int, device: DeviceFacts,
    alone: float = 1.0,
) -> tuple[int, int]:  # fmt: skip
    """(splits, tiles per split) of a loop that each of ``blocks`` programs would walk alone.

    A wave of programs costs its longest split plus a fixed start (loading what stays, filling the pipeline); every split writes
    and reads back ``partial_bytes``. One program on a multiprocessor reaches ``alone`` of the rate that several reach together.
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
        seconds = waves * (tiles * tile_seconds * max(sharing, 1.0 / alone) + start_seconds) + partials
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
class AttentionPlan:
    """Regime; tiles with the splits of the keys (forward, dq) and the slices of the queries (dk and dv); TMA or not.

    ``decode_forward`` and ``decode_dq`` replace forward and dq where all keys stay in shared memory, ``encode_backward`` the
    whole backward where all queries do.
    """

    regime: Regime
    forward: AttentionTile
    forward_splits: KeySplits
    dq: AttentionTile
    dq_splits: KeySplits
    dkv: AttentionTile
    dkv_slices: Slices
    decode_forward: Resident | None
    decode_dq: Resident | None
    encode_backward: Resident | None
    tma: bool


def _regime(Lq: int, Lk: int) -> Regime:
    return "encode" if Lk >= 4 * Lq else "decode" if Lq >= 4 * Lk else "process"


def _alone(tile: AttentionTile) -> float:
    """A single warp group waits for its own products: 64 x 16,384 keys took 0.41 ms with one program of four warps on a
    multiprocessor, 0.29 with two (H200)."""
    return 0.6 if tile.num_warps == 4 else 1.0


def _key_splits(kind: AttentionKind, p: AttentionProblem, tile: AttentionTile, device: DeviceFacts) -> KeySplits:
    """No splits where an additive mask wants the whole row's maximum, or packed sequences leave most tiles out."""
    segments = (p.Lk_first, p.Lk - p.Lk_first)
    per_split = tiles = sum(math.ceil(size / tile.block_kv) for size in segments)
    if p.attn_mask == "none" and not p.packed:
        blocks = p.B * p.H * math.ceil(p.Lq / tile.block_q)
        qk, v = tile.columns
        products, result = (qk + v, p.d_v) if kind == "forward" else (2 * qk + v, p.d_qk)
        _, per_split = _fastest_splits(
            max(1, blocks), max(1, tiles), 2.0 * tile.block_q * tile.block_kv * products, 8.0 * p.B * p.H * p.Lq * result,
            tile.programs_per_sm(kind, p.dtype.itemsize, device), device, _alone(tile),
        )  # fmt: skip
    length = max(1, per_split) * tile.block_kv
    first, second = (math.ceil(size / length) for size in segments)
    return KeySplits(max(first, 0 if second else 1), second, length)


def _query_slices(p: AttentionProblem, tile: AttentionTile, device: DeviceFacts) -> Slices:
    blocks = p.B * p.H_kv * math.ceil(p.Lk / tile.block_kv)
    flops = 4.0 * tile.block_q * tile.block_kv * sum(tile.columns) * (p.H // p.H_kv)
    slices, per_slice = _fastest_splits(
        max(1, blocks), max(1, math.ceil(p.Lq / tile.block_q)), flops, 8.0 * p.B * p.H_kv * p.Lk * (p.d_qk + p.d_v),
        tile.programs_per_sm("dkv", p.dtype.itemsize, device), device, _alone(tile),
    )  # fmt: skip
    return Slices(slices, per_slice * tile.block_q)


def _resident(kind: AttentionKind, p: AttentionProblem, device: DeviceFacts) -> Resident | None:
    """The kernel ``kind`` where one side fits shared memory twice over: one program computes while the other one loads."""
    encode = kind == "encode_backward"
    keys = 0 if encode else p.Lk
    tile = attention_tile(kind, p.d_qk, p.d_v, keys, p.dtype.itemsize, device)
    if tile is None or p.segments > 1 or p.packed or (encode and (p.Lq > tile.block_q or p.H_kv != p.H)):
        return None
    resident = tile.programs_per_sm(kind, p.dtype.itemsize, device, keys)
    if resident < 2 or _regime(p.Lq, p.Lk) != ("encode" if encode else "decode"):
        return None
    (length, block), columns = ((p.Lk, tile.block_kv) if encode else (p.Lq, tile.block_q)), sum(tile.columns)
    flops = 4.0 * columns * block * (tile.block_q if encode else p.Lk)
    parts, per_part = _fastest_splits(
        max(1, p.B * p.H), max(1, math.ceil(length / block)), flops, 8.0 * p.B * p.H * p.Lq * p.d_qk if encode else 0.0,
        min(resident, 2), device, _alone(tile),
    )  # fmt: skip
    return Resident(tile, Slices(parts, per_part * block))


@functools.lru_cache(maxsize=1024)
def plan_attention(problem: AttentionProblem, device: DeviceFacts) -> AttentionPlan | None:
    """Tiles and parts of one attention, a pure function; None where the heads are too wide for these kernels."""
    p, itemsize = problem, problem.dtype.itemsize
    kinds: tuple[AttentionKind, ...] = ("forward", "dq", "dkv")
    forward, dq, dkv = (attention_tile(kind, p.d_qk, p.d_v, p.Lk, itemsize, device) for kind in kinds)
    if forward is None or dq is None or dkv is None:
        return None
    return AttentionPlan(
        regime=_regime(p.Lq, p.Lk), forward=forward, forward_splits=_key_splits("forward", p, forward, device), dq=dq,
        dq_splits=_key_splits("dq", p, dq, device), dkv=dkv, dkv_slices=_query_slices(p, dkv, device),
        decode_forward=_resident("decode_forward", p, device), decode_dq=_resident("decode_dq", p, device),
        encode_backward=_resident("encode_backward", p, device), tma=device.has_tma,
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
