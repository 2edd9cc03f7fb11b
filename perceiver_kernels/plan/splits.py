"""Parts of a loop that programs share: the count with the least estimated time."""

from __future__ import annotations

import math

from perceiver_kernels.device import DeviceFacts

WEIGHTS_BYTES = 96 << 20
"""Budget of the wide kernels' weights workspace. On an H200 (60 MB L2) larger chunks are faster: 784 x 52,097 x 704, batch 4,
forward took 1.49 ms with 48 MiB, 1.33 with 96, 1.27 with 200, because every chunk costs launches and a partial wave."""


def fastest_splits(
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
        if splits > 1 and blocks * splits > 4 * slots:
            break
        tiles = math.ceil(key_tiles / splits)
        if math.ceil(key_tiles / tiles) != splits:
            continue
        waves = math.ceil(blocks * splits / slots)
        sharing = min(resident, math.ceil(blocks * splits / device.sm_count))
        partials = splits * partial_bytes / device.memory_bandwidth if splits > 1 else 0.0
        seconds = waves * (tiles * tile_seconds * max(sharing, 1.0 / alone) + start_seconds) + partials
        if seconds < best[0] * 0.999:
            best = (seconds, splits, tiles)
    return best[1], best[2]


def product_splits(programs: int, steps: int, most: int, sm_count: int) -> int:
    """Splits of a tiled product's loop of ``steps``: the fewest, up to ``most``, whose waves take the least time."""
    best, best_time = 1, math.inf
    for splits in range(1, min(steps, most) + 1):
        time = math.ceil(programs * splits / sm_count) * (math.ceil(steps / splits) + 2)
        if time < best_time and math.ceil(steps / math.ceil(steps / splits)) == splits:
            best, best_time = splits, time
    return best
