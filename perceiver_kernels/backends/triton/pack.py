"""pack_inputs on Triton: allocate, launch."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.backends.triton import reasons_against_device_and_dtype
from perceiver_kernels.backends.triton.describe import ceil_div, contiguous
from perceiver_kernels.backends.triton.launch import launch
from perceiver_kernels.backends.triton.pack_kernels import _pack_bwd_kernel, _pack_fwd_kernel
from perceiver_kernels.device import device_facts
from perceiver_kernels.layouts import unit_stride
from perceiver_kernels.plan import plan_pack
from perceiver_kernels.problem import PackProblem, pad_channels
from perceiver_kernels.tiles import column_pieces

COMPOSITE = False


def reasons_against(problem: PackProblem) -> list[str]:
    """Sentences that say why these kernels cannot serve ``problem``."""
    return reasons_against_device_and_dtype(problem.device_type, problem.content_dtype, problem.dtype)


def pack_inputs_forward(
    content: Tensor, positions: Tensor | None, fourier: Tensor | None, key_mask: Tensor | None, *, normalize: bool,
    eps: float, dtype: torch.dtype, constants: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(packed [B, M, C_padded], rstd fp32 [B, M], or [0] without normalisation)."""
    B, M, C_content = content.shape
    C = C_content
    if positions is not None:
        C += positions.shape[-1] if fourier is None else fourier.shape[-1]
        positions = unit_stride(positions)
    packed = torch.empty(B, M, pad_channels(C + constants), dtype=dtype, device=content.device)
    rstd = torch.empty((B, M) if normalize else (0,), dtype=torch.float32, device=content.device)
    if B * M == 0:
        return packed, rstd
    fourier, key_mask = contiguous(fourier, key_mask)
    batched = positions is not None and positions.ndim == 3
    shared = positions is not None and not batched
    plan = plan_pack(B, M, packed.shape[-1], shared=shared, device=device_facts(content.device))
    with torch.cuda.device_of(content):
        launch(
            _pack_fwd_kernel, ceil_div(M, plan.block_m) * ceil_div(B, plan.batch_per_program),
            content, positions, fourier, key_mask, packed, rstd, B, M, C_content, C, packed.shape[-1], eps,
            plan.batch_per_program, *content.stride(), positions.stride(0) if batched else 0,
            0 if positions is None else positions.stride(-2), PIECES=plan.pieces, BLOCK_M=plan.block_m,
            POSITIONS=positions is not None, FOURIER=fourier is not None, BATCHED=batched, NORMALIZE=normalize,
            MASKED=key_mask is not None, CONSTANTS=constants, num_warps=plan.num_warps,
        )  # fmt: skip
    return packed, rstd


def pack_inputs_backward(
    dpacked: Tensor, packed: Tensor, rstd: Tensor, *, content_channels: int, channels: int, normalize: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The content's gradient [B, M, C_content]."""
    B, M, C_padded = packed.shape
    dcontent = torch.empty(B, M, content_channels, dtype=dtype, device=packed.device)
    if dcontent.numel() == 0:
        return dcontent
    dpacked, packed, rstd = contiguous(dpacked, packed, rstd)
    block_m = 4
    with torch.cuda.device_of(packed):
        launch(
            _pack_bwd_kernel, ceil_div(B * M, block_m),
            dpacked, packed, rstd, dcontent, B * M, content_channels, channels, C_padded, PIECES=column_pieces(C_padded),
            BLOCK_M=block_m, NORMALIZE=normalize, num_warps=4,
        )  # fmt: skip
    return dcontent
