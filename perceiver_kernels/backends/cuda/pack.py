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
# Of a tile: with less, what it costs by itself shows; with more, warps wait longer for each other. On an H200 8 x 50,176 rows
# of 261 bf16 channels take 0.1222 ms in tiles of 8 rows and 0.1235 of 32, but of 192 channels 0.105 of 8 and 0.088 of 16; of 32
# channels, which share a warp, 0.0229 of 64 and 0.0208 of 128.
TILE_BYTES, SHARED_TILE_BYTES = 4096, 8192


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


@dataclass(frozen=True)
class PackTiles:
    """How rows are dealt out: ``blocks`` resident blocks, each taking tiles of ``rows_per_tile`` in turn."""

    flat: bool
    """Content is copied as one aligned run per batch entry through shared memory, not by elements."""
    rows_per_tile: int
    blocks: int
    shared_bytes: int


@functools.lru_cache(maxsize=1024)
def plan_tiles(
    batch: int, tokens: int, channels: int, itemsize: int, flat: bool, device: DeviceFacts
) -> PackTiles:
    """Tiles of a few KiB, at the occupancy that pack.cuh states (kFlatBlocksPerSm and its like)."""
    row_bytes = channels * itemsize
    shared_per_sm = device.smem_bytes + RESERVED_BYTES
    if flat:
        resident = 6 if channels <= 384 else 4
        slot_bytes = (shared_per_sm // resident - RESERVED_BYTES - HEADER_BYTES) // SLOTS // 128 * 128
        tile_bytes = SHARED_TILE_BYTES if channels <= 128 else TILE_BYTES
        rows = min(slot_bytes // row_bytes, math.ceil(tile_bytes / row_bytes / 8) * 8)
    else:
        resident = 2 if channels <= 512 else 1
        rows = 64
    # The rows that a block takes at once, 8, 16 or 32 lanes each. A multiple of 8 rows is one of 16 bytes for
    # every element type and channel count, so that every tile starts on 16 bytes.
    together = 32 if channels <= 64 else 16 if channels <= 128 else 8
    rows = max(together, min(rows, MAX_ROWS_PER_TILE) // together * together)
    # Small inputs: rather smaller tiles than idle multiprocessors.
    while rows > together and batch * math.ceil(tokens / rows) < resident * device.sm_count:
        rows = max(together, rows // 2 // together * together)
    shared_bytes = HEADER_BYTES + SLOTS * math.ceil(rows * row_bytes / 128) * 128 if flat else 0
    resident = min(resident, shared_per_sm // (shared_bytes + RESERVED_BYTES))
    blocks = min(batch * math.ceil(tokens / rows), resident * device.sm_count)
    return PackTiles(flat, rows, blocks, shared_bytes)


def _content_fields(content: Tensor, key_mask: Tensor | None, alone: bool) -> tuple[bool, dict[str, Any]]:
    """Whether ``content`` is flat, and the fields for it and its contiguous mask; joins adjoining batches."""
    batch, tokens, C = content.shape
    strides = content.stride()
    aligned = alone and content.data_ptr() % 16 == 0
    flat = aligned and strides[1:] == (C, 1) and strides[0] * content.element_size() % 16 == 0
    if aligned and content.is_contiguous():
        flat, batch, tokens, strides = True, 1, batch * tokens, (0, C, 1)
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
    tiles = plan_tiles(batch, tokens, channels, content.element_size(), flat, device_facts(content.device))
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


def backward_rows_per_tile(content_channels: int) -> int:
    """Rows of a block of the backward: one pass of its warps, or two, whose results leave together."""
    return 32 if content_channels <= 64 else 16 if content_channels <= 512 else 8


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
                "rows_per_tile": backward_rows_per_tile(content_channels),
                "device": packed.get_device(),
                "stream": torch.cuda.current_stream(packed.device).cuda_stream,
            },
        )
        binding().pack_inputs_bwd(params)
    return dcontent
