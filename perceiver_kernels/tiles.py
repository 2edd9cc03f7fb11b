"""Tile shapes of the Triton kernels: tables of measured choices, and the rules that say which of them fit a device.

Times behind the tables are medians on an H200 (bf16, torch 2.11, triton 3.6) at the published sizes; docs/kernels.md has them.
Attention's Hopper tiles were chosen in a sweep on an H100.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from perceiver_kernels.device import DeviceFacts

Kind = Literal["forward", "dq", "dx"]


@dataclass(frozen=True)
class Tile:
    """One fused program: column pieces of a row, query rows, keys, warps, software-pipeline stages.

    ``tail``: the last piece passes through registers: the resident rows' stays there, streamed rows share one buffer for it.
    """

    pieces: tuple[int, ...]
    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    tail: bool = False

    @property
    def columns(self) -> int:
        return sum(self.pieces)

    @property
    def shared_pieces(self) -> tuple[int, ...]:
        """The pieces that every stage keeps in shared memory."""
        return self.pieces[:-1] if self.tail else self.pieces

    def shared_bytes(self, kind: Kind, itemsize: int) -> int:
        """Shared memory of operands: what stays for the whole program, and one streamed tile a stage."""
        resident, streamed = {
            "forward": (self.block_q, self.block_kv),
            "dq": (2 * self.block_q, self.block_kv),
            "dx": (self.block_kv, 2 * self.block_q),
        }[kind]
        tail = streamed * self.pieces[-1] if self.tail else 0
        return ((resident + streamed * self.num_stages) * sum(self.shared_pieces) + tail) * itemsize

    def programs_per_sm(self, kind: Kind, itemsize: int, device: DeviceFacts) -> int:
        """Programs that one multiprocessor holds at a time, by shared memory and by its 65,536 registers."""
        shared = self.shared_bytes(kind, itemsize) + _SHARED_RESERVE + _SHARED_SYSTEM
        scores = self.block_q * self.block_kv * (1 if kind == "forward" else 2) // (32 * self.num_warps)
        # What kernels take beside the accumulator and the scores is at most 64 (offline, for sm_90a).
        registers = min(256, self.accumulator_registers(kind) + scores + 64) * 32 * self.num_warps
        return max(1, min((device.smem_bytes + _SHARED_SYSTEM) // shared, 65_536 // registers))

    def accumulator_registers(self, kind: Kind) -> int:
        """fp32 accumulator registers of one thread."""
        rows = self.block_kv if kind == "dx" else self.block_q
        return rows * self.columns // (32 * self.num_warps)


@dataclass(frozen=True)
class ProductTile:
    """One program of a tiled product: output rows and columns, depth of one step, warps, stages."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


@functools.cache
def column_pieces(channels: int) -> tuple[int, ...]:
    """Powers of two, widest first, whose sum covers ``channels`` (a multiple of 16) in at most three pieces.

    272 = 256 + 16, 336 = 256 + 64 + 16, 704 = 512 + 128 + 64; 496 would take five and is rounded up to 512.
    """
    units = channels // 16
    while units.bit_count() > 3:
        units += 1
    return tuple(16 << bit for bit in reversed(range(units.bit_length())) if units >> bit & 1)


# (widest row, block_q, block_kv, warps, stages, whether a last piece of 16 columns is a tail), first fit wins. Hopper, 16-bit:
# two warpgroups hold a full-width accumulator of 128 rows up to about 336 columns; fewer stages than these cost 15 to 40 %.
_FUSED_HOPPER: dict[Kind, tuple[tuple[int, int, int, int, int, bool], ...]] = {
    "forward": ((128, 128, 128, 8, 3, False), (336, 128, 64, 8, 3, False), (400, 128, 32, 8, 2, False)),
    "dq": ((64, 128, 128, 8, 3, False), (256, 128, 64, 8, 3, False), (272, 128, 64, 8, 3, True), (336, 128, 32, 8, 3, True)),
    "dx": ((192, 32, 64, 4, 3, False), (256, 64, 64, 4, 1, False), (288, 32, 64, 4, 2, False), (336, 16, 64, 4, 3, False)),
}
# Ampere and Ada, 16-bit: synchronous matrix instructions keep operands in registers too, so 64 rows over eight warps.
_FUSED_AMPERE: dict[Kind, tuple[tuple[int, int, int, int, int, bool], ...]] = {
    "forward": ((128, 64, 64, 4, 2, False), (336, 64, 32, 8, 2, False)),
    # Wider rows would spill; the wide kernels compute their gradients.
    "dq": ((128, 64, 32, 4, 2, False),),
    "dx": ((128, 32, 64, 4, 2, False),),
}
# Shared memory that a program needs beyond its operands: barriers, reductions across warps; and what the system keeps of it.
_SHARED_RESERVE = 1024
_SHARED_SYSTEM = 1024


def fused_tile(kind: Kind, channels: int, itemsize: int, device: DeviceFacts) -> Tile | None:
    """The fused kernel's tile for rows of ``channels``, or None where no full-width accumulator fits.

    fp32 rows are twice as wide in shared memory and their exact products live in registers: they take the wide kernels.
    """
    if itemsize != 2:
        return None
    pieces = column_pieces(channels)
    table = _FUSED_HOPPER if device.capability >= (9, 0) and device.smem_bytes >= 200_000 else _FUSED_AMPERE
    for widest, block_q, block_kv, warps, stages, tail in table[kind]:
        tile = Tile(pieces, block_q, block_kv, warps, stages, tail and len(pieces) > 1 and pieces[-1] == 16)
        if tile.columns <= widest and tile.shared_bytes(kind, itemsize) + _SHARED_RESERVE <= device.smem_bytes:
            return tile
    return None


WideKind = Literal["weights", "weights_backward", "separate_backward", "values", "dx"]
"""Kernels of wide heads; separate_backward is the weights kernel of a backward whose keys are not its values."""

_WIDE_HOPPER: dict[WideKind, ProductTile] = {
    "weights": ProductTile(64, 256, 64, 4, 4),
    "weights_backward": ProductTile(64, 128, 64, 4, 3),
    "separate_backward": ProductTile(128, 128, 64, 8, 3),
    "values": ProductTile(128, 256, 64, 8, 3),
    "dx": ProductTile(128, 256, 64, 8, 3),
}
_WIDE_AMPERE: dict[WideKind, ProductTile] = {
    "weights": ProductTile(128, 128, 32, 8, 3),
    "weights_backward": ProductTile(64, 128, 32, 8, 3),
    "separate_backward": ProductTile(64, 128, 32, 8, 3),
    "values": ProductTile(128, 128, 32, 8, 3),
    "dx": ProductTile(128, 128, 32, 8, 3),
}
_WIDE_FLOAT32: dict[WideKind, ProductTile] = {
    "weights": ProductTile(64, 64, 32, 4, 2),
    "weights_backward": ProductTile(32, 64, 32, 4, 2),
    "separate_backward": ProductTile(32, 64, 32, 4, 2),
    "values": ProductTile(64, 64, 32, 4, 2),
    "dx": ProductTile(64, 64, 32, 4, 2),
}


# Dropout's generator, or the loads of an attn_mask, need the registers that a larger tile of weights would take.
_WIDE_CROWDED = ProductTile(64, 128, 32, 8, 3)


def wide_tile(kind: WideKind, itemsize: int, device: DeviceFacts, *, crowded: bool = False) -> ProductTile:
    """The product tile of a wide-channel kernel; it does not depend on the channel count.

    ``crowded``: weights are computed under dropout or an attn_mask.
    """
    if itemsize != 2:
        return _WIDE_FLOAT32[kind]
    if crowded and kind in ("weights", "weights_backward", "separate_backward"):
        return _WIDE_CROWDED
    hopper = device.capability >= (9, 0) and device.smem_bytes >= 200_000
    return (_WIDE_HOPPER if hopper else _WIDE_AMPERE)[kind]


def stored_product_tile(columns: int, device: DeviceFacts) -> ProductTile:
    """The tile of dq = ds k in 16 bits, keys of ``columns``: ds is read once where one program has all of them."""
    hopper = device.capability >= (9, 0) and device.smem_bytes >= 200_000
    if columns <= 128:
        return ProductTile(128, 128, 64, 8, 3) if hopper else ProductTile(128, 128, 32, 8, 3)
    return (_WIDE_HOPPER if hopper else _WIDE_AMPERE)["values"]


AttentionKind = Literal["forward", "dq", "dkv", "decode_forward", "decode_dq", "encode_backward"]


@dataclass(frozen=True)
class AttentionTile:
    """One program of attention over separate keys and values: column pieces of both widths, queries, keys, warps, stages."""

    pieces_qk: tuple[int, ...]
    pieces_v: tuple[int, ...]
    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int

    @property
    def columns(self) -> tuple[int, int]:
        """Columns of queries and keys, and of values."""
        return sum(self.pieces_qk), sum(self.pieces_v)

    def shared_bytes(self, kind: AttentionKind, itemsize: int, keys: int = 0) -> int:
        """Shared memory of operands: what stays for the whole loop, ``keys`` of it if all do, and a streamed tile a stage."""
        qk, v = self.columns
        queries = self.block_q * (qk if kind in ("forward", "decode_forward") else qk + v)
        resident, streamed = queries, self.block_kv * (qk + v)
        if kind == "dkv":
            resident, streamed = streamed, queries
        elif kind in ("decode_forward", "decode_dq"):
            resident, streamed = -(-keys // self.block_kv) * streamed, queries
        scores = 2 * self.block_q * self.block_kv if kind == "encode_backward" else 0
        return (resident + scores + streamed * self.num_stages) * itemsize

    def programs_per_sm(self, kind: AttentionKind, itemsize: int, device: DeviceFacts, keys: int = 0) -> int:
        """Programs that one multiprocessor holds at a time, by shared memory and by its 65,536 registers."""
        shared = self.shared_bytes(kind, itemsize, keys) + _SHARED_RESERVE + _SHARED_SYSTEM
        qk, v = self.columns
        held = self.block_q * self.block_kv * (1 if kind in ("forward", "decode_forward") else 2)
        held += {
            "forward": self.block_q * v, "decode_forward": self.block_q * v, "dq": self.block_q * qk,
            "decode_dq": self.block_q * qk, "dkv": self.block_kv * (qk + v),
            "encode_backward": self.block_q * qk + self.block_kv * (qk + v),
        }[kind]  # fmt: skip
        registers = min(256, held // (32 * self.num_warps) + 64) * 32 * self.num_warps
        return min((device.smem_bytes + _SHARED_SYSTEM) // shared, max(1, 65_536 // registers))


# (widest head, fewest keys, most queries (0: any), block_q, block_kv, warps, stages): the first fit wins that pads the keys by
# no more than a twelfth, or else the one that pads least. Past the widest the wide kernels compute.
_AttentionTable = dict[AttentionKind, tuple[tuple[int, int, int, int, int, int, int], ...]]
_ATTENTION_HOPPER: _AttentionTable = {
    "forward": (
        (64, 4096, 64, 64, 128, 4, 2), (64, 4096, 0, 64, 128, 4, 3), (64, 0, 0, 64, 128, 4, 2), (64, 0, 0, 64, 64, 4, 3),
        (128, 4096, 0, 128, 64, 8, 3), (128, 0, 0, 128, 128, 8, 2), (128, 0, 0, 64, 64, 4, 3),
        (192, 0, 0, 64, 64, 4, 2), (256, 0, 0, 128, 64, 8, 2),
    ),
    "dq": ((64, 0, 0, 64, 64, 4, 3), (128, 0, 0, 64, 32, 4, 3), (192, 0, 0, 64, 32, 4, 3)),
    "dkv": (
        (64, 0, 1024, 64, 64, 4, 3), (64, 0, 0, 32, 128, 4, 4), (128, 0, 0, 64, 64, 4, 2), (160, 0, 1024, 32, 64, 4, 2),
        (160, 0, 0, 32, 128, 8, 2), (192, 0, 0, 32, 64, 4, 2),
    ),
    "decode_forward": ((64, 0, 0, 64, 128, 4, 3), (128, 0, 0, 64, 64, 4, 2)),
    "decode_dq": ((64, 0, 0, 64, 64, 4, 2), (128, 0, 0, 64, 64, 4, 2)),
    "encode_backward": ((64, 0, 0, 64, 64, 4, 3), (128, 0, 0, 64, 64, 4, 2)),
}  # fmt: skip
_ATTENTION_AMPERE: _AttentionTable = {
    "forward": ((64, 0, 0, 128, 64, 4, 2), (128, 0, 0, 64, 64, 4, 2), (256, 0, 0, 64, 32, 8, 1)),
    "dq": ((64, 0, 0, 64, 64, 4, 2), (128, 0, 0, 64, 32, 4, 2), (256, 0, 0, 32, 32, 8, 1)),
    "dkv": ((64, 0, 0, 64, 64, 4, 2), (128, 0, 0, 32, 64, 4, 2), (256, 0, 0, 32, 32, 8, 1)),
    "decode_forward": ((64, 0, 0, 64, 64, 4, 2),),
    "decode_dq": ((64, 0, 0, 64, 64, 4, 2),),
    "encode_backward": ((64, 0, 0, 64, 32, 4, 2),),
}
# Exact fp32 products live in registers: kernels unrolled over blocks that stay, and wider accumulators, spill kilobytes.
_ATTENTION_FLOAT32: _AttentionTable = {
    "forward": ((64, 0, 0, 32, 32, 8, 2),),
    "dq": ((64, 0, 0, 32, 32, 8, 2),),
    "dkv": ((64, 0, 0, 32, 32, 4, 2),),
    "decode_forward": (),
    "decode_dq": (),
    "encode_backward": (),
}


def attention_tile(
    kind: AttentionKind, d_qk: int, d_v: int, queries: int, keys: int, itemsize: int, device: DeviceFacts
) -> AttentionTile | None:
    """The tile for heads of widths ``d_qk`` and ``d_v`` (any), or None where no full-width accumulator fits."""
    pieces_qk, pieces_v = (column_pieces(width + -width % 16) for width in (d_qk, d_v))
    hopper = device.capability >= (9, 0) and device.smem_bytes >= 200_000
    table = (_ATTENTION_HOPPER if hopper else _ATTENTION_AMPERE) if itemsize == 2 else _ATTENTION_FLOAT32
    best, least = None, math.inf
    for widest, fewest_keys, most_queries, *shape in table[kind]:
        tile = AttentionTile(pieces_qk, pieces_v, *shape)
        if max(tile.columns) > widest or keys < fewest_keys or queries > (most_queries or queries):
            continue
        padding = -keys % tile.block_kv
        if padding >= least or tile.programs_per_sm(kind, itemsize, device, keys) == 0:
            continue
        if padding <= keys / 12:
            return tile
        best, least = tile, padding
    return best


@dataclass(frozen=True)
class SmallTile:
    """One program of small attention problems: how many, the rows that queries and keys of each take, warps."""

    pieces_qk: tuple[int, ...]
    pieces_v: tuple[int, ...]
    problems: int
    each_q: int
    each_kv: int
    num_warps: int


_SMALL_SIDE = 64
"""Rows of a small tile: four problems of 16 rows, which matrix instructions take, or two of 32."""


def small_tile(Lq: int, Lk: int, d_qk: int, d_v: int, itemsize: int) -> SmallTile | None:
    """The tile of problems of ``Lq`` queries and ``Lk`` keys (1 or more), or None where they are not small, or heads wide.

    Rows and columns of a problem are in registers all at once: 16 rows of 128 channels, or 32 of 64, over eight warps; half as
    many over four, or in fp32.
    """
    pieces_qk, pieces_v = (column_pieces(width + -width % 16) for width in (d_qk, d_v))
    each_q, each_kv = (max(16, 1 << (length - 1).bit_length()) for length in (Lq, Lk))
    longest, widest = max(each_q, each_kv), max(sum(pieces_qk), sum(pieces_v))
    size = longest * widest * itemsize
    if longest > 32 or size > 4096:
        return None
    return SmallTile(pieces_qk, pieces_v, _SMALL_SIDE // longest, each_q, each_kv, 4 if size <= 2048 else 8)
