"""pack_inputs on CUDA C++: plan, fill the parameter structs, launch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends.cuda import (
    ELEMENT_TYPES,
    MAX_CHANNELS,
    address,
    binding,
    filled,
    reasons_against_device_and_dtype,
)
from perceiver_kernels.device import DeviceFacts, device_facts
from perceiver_kernels.problem import PackProblem, pad_channels

COMPOSITE = False

# Of csrc/kernels/pack.cuh and csrc/include/perceiver/device/tile_pipeline.cuh: kPipelineSlots, kHeaderBytes.
SLOTS = 2
HEADER_BYTES = 128
# What the driver keeps of the shared memory for every resident block (CUDA C++ Programming Guide).
RESERVED_BYTES = 1024
MAX_ROWS_PER_TILE = 256


def reasons_against(problem: PackProblem) -> list[str]:
    """Sentences that say why this kernel cannot serve ``problem``."""
    reasons = reasons_against_device_and_dtype(problem.device_type, problem.content_dtype, problem.dtype)
    if problem.fourier:
        reasons.append("cuda packs positions given as channels, it does not compute Fourier features")
    if problem.C > MAX_CHANNELS:
        reasons.append(f"cuda packs up to {MAX_CHANNELS} channels, got {problem.C}")
    if problem.constants:
        reasons.append("cuda packs no constant channels")
    return reasons


def _fills_tiles(channels: int) -> bool:
    """Whether rows are whole powers of two, or three times such: Triton's tiles of them have no padding and no remainders."""
    power = channels // 3 if channels % 3 == 0 else channels
    return channels % 16 == 0 and power & (power - 1) == 0


@functools.lru_cache(maxsize=4096)
def leaves(sizes: tuple[int, ...]) -> str | None:
    """Why the automatic choice leaves a call to the next backend: rows, channels, bytes of one, 1 where rows are one run.

    In ms on an H200, CUDA and Triton, bf16: 8 x 50,176 rows of 3 channels 0.0196 and 0.0199, of 32 0.0240 and 0.0245, of 64
    0.037 and 0.059, of 128 0.061 and 0.067, of 261 0.120 and 0.138, of 322 0.134 and 0.171 (2 x 182,528), of 448 0.191 and
    0.198, 52,097 of 704 0.043 and 0.051, but of 16 0.021 and 0.012, of 96 0.052 and 0.047, of 192 0.090 and 0.087, of 384
    0.168 and 0.158, of 512 0.222 and 0.201, 80,000 of 1,024 0.092 and 0.083; of 261 fp32 channels 0.165 and 0.155. Content
    beside positions: 3 and 258 0.42 and 0.15; with gaps between rows of 261 0.40 and 0.15, channels first 0.57 and 0.22. Gaps
    between entries alone were not measured.
    """
    _, C, itemsize, is_run = sizes
    if not is_run:
        return "triton is faster with positions or gaps between rows; other content that is not one run was not measured"
    if itemsize == 4:
        return "triton is faster with float32"
    if _fills_tiles(C) and C not in (32, 64, 128):
        return f"triton is faster with {C} channels"
    return None


@functools.lru_cache(maxsize=4096)
def leaves_backward(sizes: tuple[int, ...]) -> str | None:
    """Why the automatic choice leaves the backward of a call of such sizes to the next backend, or None.

    In ms on an H200, CUDA and Triton, bf16: 8 x 50,176 rows of 3 channels 0.027 and 0.064, of 64 0.049 and 0.065, of 96 0.072
    and 0.096, of 144 0.105 and 0.117, of 261 0.164 and 0.230, of 288 0.176 and 0.188, of 322 0.203 and 0.292, 80,000 of 600
    0.077 and 0.108, of 704 0.089 and 0.092, but of 128 0.084 and 0.080, of 256 0.159 and 0.145, of 384 0.233 and 0.216, of 400
    0.241 and 0.237, of 512 0.309 and 0.284, 80,000 of 1,024 0.126 and 0.119; 16,384 of 261 0.0143 and 0.0147, but 2,000 0.0060
    and 0.0055. To fp32 content of 261 channels 0.226 and 0.261; to the 3 of 261 channels that are content 0.136 and 0.212.
    """
    rows, C, *_ = sizes
    if rows * C < 1 << 22:
        return "triton is faster with less than 2^22 channels in all rows"
    if C >= 128 and (_fills_tiles(C) or C % 16 == 0 and 384 < C < 512):
        return f"triton is faster with {C} channels"
    return None


@dataclass(frozen=True)
class PackTiles:
    """How rows are dealt out: ``blocks`` resident blocks, each taking tiles of ``rows_per_tile`` in turn."""

    flat: bool
    """Rows are one aligned run, copied through shared memory, not element by element."""
    rows_per_tile: int
    blocks: int
    shared_bytes: int


def rows_together(channels: int) -> int:
    """The rows that a block takes at once, 8, 16 or 32 lanes each.

    A multiple of 8 rows is one of 16 bytes for every element type and channel count, so that every tile starts on 16 bytes.
    """
    return 32 if channels <= 64 else 16 if channels <= 128 else 8


def tile_rows(channels: int, row_bytes: int, shared_bytes: int, tile_bytes: int, blocks: int, device: DeviceFacts) -> int:
    """Rows of a tile: ``row_bytes`` of each are copied, ``shared_bytes`` lie in shared memory, which ``blocks`` share."""
    together, most = rows_together(channels), min(tile_bytes // row_bytes, device.smem_bytes // blocks // shared_bytes)
    return max(together, min(most, MAX_ROWS_PER_TILE) // together * together)


@functools.lru_cache(maxsize=1024)
def plan_tiles(
    batch: int, tokens: int, channels: int, itemsize: int, packed_row_bytes: int, flat: bool, device: DeviceFacts
) -> PackTiles:
    """Tiles of a few KiB, at the occupancy that pack.cuh states (kFlatBlocksPerSm and its like), or what shared memory allows.

    In ms on an H200, bf16, in 3, 4, 5 and 6 blocks: 8 x 50,176 rows of 261 channels 0.120, 0.122, 0.125 and 0.125, of 128
    0.060, 0.061, 0.061 and 0.061, of 64 0.038, 0.037, 0.037 and 0.036; 2 x 182,528 of 322 0.134, 0.140, 0.140 and 0.137. In
    tiles of 8 KiB, 261 channels take 0.149 in 3 blocks, of 16 KiB 0.127.
    """
    row_bytes, together = channels * itemsize, rows_together(channels)
    if flat:
        rows = tile_rows(channels, row_bytes, SLOTS * row_bytes + 2 * packed_row_bytes, 12288, 3, device)
        resident = 6 if channels <= 64 else 3
    else:
        rows, resident = 64, 2 if channels <= 512 else 1
    # Small inputs: rather smaller tiles than idle multiprocessors.
    while rows > together and batch * math.ceil(tokens / rows) < resident * device.sm_count:
        rows = max(together, rows // 2 // together * together)
    slot_bytes = math.ceil(rows * row_bytes / 128) * 128
    shared_bytes = HEADER_BYTES + SLOTS * slot_bytes + 2 * rows * packed_row_bytes if flat else 0
    resident = min(resident, (device.smem_bytes + RESERVED_BYTES) // (shared_bytes + RESERVED_BYTES))
    blocks = min(batch * math.ceil(tokens / rows), resident * device.sm_count)
    return PackTiles(flat, rows, blocks, shared_bytes)


def _content_fields(content: Tensor, key_mask: Tensor | None, alone: bool) -> tuple[bool, dict[str, Any]]:
    """Whether ``content`` is one run, and the fields for it, as one batch entry then, and its contiguous mask."""
    batch, tokens, C = content.shape
    strides = content.stride()
    flat = alone and content.data_ptr() % 16 == 0 and content.is_contiguous()
    if flat:
        batch, tokens, strides = 1, batch * tokens, (0, C, 1)
    fields = {
        "content": address(content),
        "content_type": ELEMENT_TYPES[content.dtype],
        "content_channels": C,
        "stride_content_batch": strides[0],
        "stride_content_token": strides[1],
        "stride_content_channel": strides[2],
        "key_mask": address(key_mask),
        "stride_key_mask_batch": tokens,
        "stride_key_mask_token": 1,
        "batch": batch,
        "tokens": tokens,
    }
    return flat, fields


def _position_fields(positions: Tensor | None) -> dict[str, Any]:
    strides = (0, 0, 0) if positions is None else (0, *positions.stride())[-3:]
    return {
        "positions": address(positions),
        "positions_type": 0 if positions is None else ELEMENT_TYPES[positions.dtype],
        "position_channels": 0 if positions is None else positions.shape[-1],
        "stride_positions_batch": strides[0],
        "stride_positions_token": strides[1],
        "stride_positions_channel": strides[2],
    }


def pack_inputs_forward(
    content: Tensor,
    positions: Tensor | None,
    fourier: Tensor | None,
    key_mask: Tensor | None,
    *,
    normalize: bool,
    eps: float,
    dtype: torch.dtype,
    constants: int = 0,
) -> tuple[Tensor, Tensor]:
    """Normalised, joined, padded, cast: packed = pad((x - mean(x)) * rstd), x = content ++ positions in fp32.

    Args:
        content: bf16, fp16 or fp32 ``[B, M, C_content]``, any strides.
        positions: channels ``[M, P]`` or ``[B, M, P]`` of any of these types, or None.
        fourier: None; this kernel computes no Fourier features.
        key_mask: bool ``[B, M]``, True where a token is visible; the others become zeros with rstd 0.
        normalize: False only joins, pads and casts.
        eps: added to the variance.
        dtype: of the result: bf16, fp16 or fp32.
        constants: 0; this kernel writes no channels of ones.

    Returns:
        packed ``[B, M, C_padded]`` and rstd fp32 ``[B, M]``, or ``[0]`` without normalisation.

    Raises:
        RuntimeError: the library refused or the launch failed; the message says why.
    """
    assert fourier is None and not constants, "reasons_against refuses Fourier features and constant channels"
    B, M, C_content = content.shape
    if positions is not None and positions.dtype not in ELEMENT_TYPES:
        positions = positions.float()
    channels = C_content + (0 if positions is None else positions.shape[-1])
    packed = torch.empty(B, M, pad_channels(channels), dtype=dtype, device=content.device)
    rstd = torch.empty((B, M) if normalize else (0,), dtype=torch.float32, device=content.device)
    if B * M == 0:
        return packed, rstd
    # One byte a token: a copy of a broadcast mask costs nothing beside the content.
    key_mask = None if key_mask is None else key_mask.contiguous()
    flat, content_fields = _content_fields(content, key_mask, alone=positions is None)
    batch, tokens = content_fields["batch"], content_fields["tokens"]
    itemsize, packed_row_bytes = content.element_size(), packed.shape[-1] * packed.element_size()
    tiles = plan_tiles(batch, tokens, channels, itemsize, packed_row_bytes, flat, device_facts(content.device))
    with torch.cuda.device(content.device):
        params = filled(
            binding().PackForwardParams(),
            {
                **content_fields,
                **_position_fields(positions),
                "packed": packed.data_ptr(),
                "packed_type": ELEMENT_TYPES[dtype],
                "packed_channels": packed.shape[-1],
                "rstd": address(rstd),
                "normalize": int(normalize),
                "eps": eps,
                "flat": int(flat),
                "rows_per_tile": tiles.rows_per_tile,
                "blocks": tiles.blocks,
                "device": content.get_device(),
                "stream": torch.cuda.current_stream(content.device).cuda_stream,
            },
        )
        binding().pack_inputs_fwd(params)
    return packed, rstd


@functools.lru_cache(maxsize=1024)
def plan_backward_tiles(
    rows: int, packed_channels: int, packed_itemsize: int, content_row_bytes: int, device: DeviceFacts
) -> PackTiles:
    """Tiles of packed rows, of which a block has two turns of two in flight, and two of the content's gradient.

    Occupancy is what pack_bwd.cuh states (kBackwardBlocksPerSm), or what the shared memory allows. On an H200 8 x 50,176
    gradients of 261 bf16 channels take 0.163 ms in tiles of 16 rows, four blocks, and 0.182 of 8, but 4 x 50,176 of 400 0.123
    of 8, four blocks, and 0.128 of 16, two blocks.
    """
    row_bytes, together = packed_channels * packed_itemsize, rows_together(packed_channels)
    bytes_a_row = 2 * SLOTS * row_bytes + 2 * content_row_bytes
    tile = tile_rows(packed_channels, row_bytes, bytes_a_row, 9216, 4, device)
    resident = 5 if packed_channels <= 384 else 4 if packed_channels <= 512 else 3 if packed_channels <= 768 else 2
    while tile > together and math.ceil(rows / tile) < resident * device.sm_count:
        tile = max(together, tile // 2 // together * together)
    # Where 8 rows do not fit, the content is fp32, and 4 of its rows are whole vectors too.
    tile = tile if HEADER_BYTES + tile * bytes_a_row <= device.smem_bytes else 4
    shared_bytes = HEADER_BYTES + tile * bytes_a_row
    resident = min(resident, (device.smem_bytes + RESERVED_BYTES) // (shared_bytes + RESERVED_BYTES))
    return PackTiles(True, tile, min(math.ceil(rows / tile), resident * device.sm_count), shared_bytes)


def pack_inputs_backward(
    dpacked: Tensor, packed: Tensor, rstd: Tensor, *, content_channels: int, channels: int, normalize: bool, dtype: torch.dtype
) -> Tensor:
    """dcontent = rstd (dy - mean(dy) - x_hat mean(dy x_hat)), of the packed rows x_hat and their gradient dy.

    Args:
        dpacked, packed: bf16, fp16 or fp32 ``[B, M, C_padded]``; what was packed, and its gradient.
        rstd: fp32 ``[B, M]``, of masked tokens 0; not read without normalisation.
        content_channels: of the gradient, the first of the channels.
        channels: content and positions, over which the means are taken.
        normalize: False gives the gradient of the first channels as it is.
        dtype: of the result: bf16, fp16 or fp32.

    Returns:
        The content's gradient ``[B, M, C_content]``.

    Raises:
        RuntimeError: the library refused or the launch failed; the message says why.
    """
    B, M, C_padded = packed.shape
    dcontent = torch.empty(B, M, content_channels, dtype=dtype, device=packed.device)
    if dcontent.numel() == 0:
        return dcontent
    dpacked, packed, rstd = dpacked.contiguous(), packed.contiguous(), rstd.contiguous()
    if dpacked.data_ptr() % 16:
        dpacked = dpacked.clone()
    tiles = plan_backward_tiles(
        B * M, C_padded, packed.element_size(), content_channels * dcontent.element_size(), device_facts(packed.device)
    )
    with torch.cuda.device(packed.device):
        params = filled(
            binding().PackBackwardParams(),
            {
                "dpacked": dpacked.data_ptr(),
                "packed": packed.data_ptr(),
                "rstd": address(rstd),
                "dcontent": dcontent.data_ptr(),
                "rows": B * M,
                "content_channels": content_channels,
                "channels": channels,
                "packed_channels": C_padded,
                "packed_type": ELEMENT_TYPES[packed.dtype],
                "content_type": ELEMENT_TYPES[dtype],
                "normalize": int(normalize),
                "rows_per_tile": tiles.rows_per_tile,
                "blocks": tiles.blocks,
                "device": packed.get_device(),
                "stream": torch.cuda.current_stream(packed.device).cuda_stream,
            },
        )
        binding().pack_inputs_bwd(params)
    return dcontent
