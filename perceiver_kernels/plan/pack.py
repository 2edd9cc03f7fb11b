"""How tokens are packed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from perceiver_kernels.device import DeviceFacts
from perceiver_kernels.tiles import column_pieces


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
