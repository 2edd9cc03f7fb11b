"""How rotary embedding is cut into programs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from perceiver_kernels.device import DeviceFacts

# A row has at most so many pairs. In 16-byte vectors of 16-bit elements they are one item for each thread of four warps.
PAIRS_PER_PROGRAM = 1024
# Loads of so many heads are in flight at once; their tables, in registers, are read once.
MAX_HEADS = 4


@dataclass(frozen=True)
class RotaryPlan:
    """A program turns the items of ``block_l`` tokens and ``heads`` heads; an item is a vector of ``pairs`` pairs of channels.

    Channels beyond the rotary width are items too, that are copied. ``align`` divides every offset of an item, in elements.
    """

    align: int
    pairs: int
    columns: int
    """Items of one row."""
    items: int
    block_l: int
    heads: int
    num_warps: int


def plan_rotary(
    B: int, H: int, L: int, d: int, width: int, *, interleaved: bool, itemsize: int, strides: tuple[int, ...],
    device: DeviceFacts,
) -> RotaryPlan:  # fmt: skip
    """Vectors as wide as 16 bytes, both widths and the ``strides`` of x allow; B, H and L are at least 1.

    What divides both widths divides d, and with it every stride of the result.
    """
    align = math.gcd(16 // itemsize, width if interleaved else width // 2, d - width, *strides)
    # Interleaved, the two channels of a pair lie in one vector; half-split, pairs lie in two vectors of one channel each.
    pairs = max(align // 2, 1) if interleaved else align
    columns = width // 2 // pairs + math.ceil((d - width) / (2 * pairs if interleaved else pairs))
    items = PAIRS_PER_PROGRAM // pairs
    block_l = items // columns
    blocks = B * math.ceil(L / block_l)
    groups = math.ceil(H / MAX_HEADS)
    while groups < H and blocks * groups < 4 * device.sm_count:
        groups += 1
    # Every item costs a thread its offsets: with narrow vectors they would fill its registers.
    return RotaryPlan(align, pairs, columns, items, block_l, math.ceil(H / groups), 4 if pairs >= 4 else 8)
