"""How shared-KV attention is computed: tiles, splits and workspace."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from perceiver_kernels.device import DeviceFacts
from perceiver_kernels.plan import splits
from perceiver_kernels.plan.splits import fastest_splits, product_splits
from perceiver_kernels.problem import SharedKVProblem
from perceiver_kernels.tiles import Kind, ProductTile, Tile, fused_tile, wide_tile


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
        """Splits of a chunk's key tiles in the values kernel."""
        return product_splits(self.programs_per_split, key_tiles, 16, self.sm_count)


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
    splits, tiles = fastest_splits(blocks, key_tiles, tile_flops, 8.0 * B * R * C, resident, device)
    return splits, tiles * tile.block_kv


def _plan_wide(B: int, R: int, M: int, C: int, itemsize: int, dropout: bool, device: DeviceFacts) -> WidePlan:
    weights, backward, values, dx = (
        wide_tile(kind, itemsize, device, crowded=dropout) for kind in ("weights", "weights_backward", "values", "dx")
    )

    def chunk(tile: ProductTile, arrays: int) -> int:
        per_tile = B * math.ceil(R / tile.rows) * tile.rows * tile.columns * itemsize * arrays
        tiles = math.ceil(M / tile.columns)
        chunks = math.ceil(tiles / max(1, splits.WEIGHTS_BYTES // max(1, per_tile)))
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
