"""shared_kv_attention on CUDA C++: plan, fill the parameter structs, launch, merge. On Hopper."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends.cuda import (
    ELEMENT_TYPES,
    LEAST_FLOPS,
    LOG2_E,
    address,
    binding,
    filled,
    on_device_of,
    readable,
    reasons_against_attending,
    stream_of,
)
from perceiver_kernels.backends.cuda.states import merge_states, row_products, sum_parts
from perceiver_kernels.device import DeviceFacts, device_facts
from perceiver_kernels.layouts import positive_scale
from perceiver_kernels.plan.splits import fastest_splits
from perceiver_kernels.problem import SharedKVProblem

COMPOSITE = False

# Of csrc/kernels/shared_kv_enqueue.h: the widest row of a kernel, and the tokens of its tile; the query rows of a block.
BLOCK_KV = {64: 128, 128: 128, 256: 80, 272: 80, 336: 48, 512: 64}
BLOCK_Q = {64: 128, 128: 128, 256: 128, 272: 128, 336: 128, 512: 64}
# The same of the gradients: the tokens of a tile of dq, and those of a block of dx.
DQ_BLOCK_KV = {64: 128, 128: 96, 256: 64, 272: 64, 336: 32}
DX_BLOCK_KV = 128
# With rows of 257 to 336 channels, the work that the forward takes on.
WIDE_LEAST_FLOPS = 12e9


def reasons_against(problem: SharedKVProblem) -> list[str]:
    """Sentences that say why these kernels cannot serve ``problem``."""
    reasons = reasons_against_attending(problem.device_type, problem.dtype)
    if max(BLOCK_KV) < problem.C:
        reasons.append(f"cuda attends to rows of up to {max(BLOCK_KV)} channels, got {problem.C}")
    elif problem.needs_grad and max(DQ_BLOCK_KV) < problem.C:
        reasons.append(f"cuda has the gradients of rows of up to {max(DQ_BLOCK_KV)} channels, got {problem.C}")
    if problem.dropout:
        reasons.append("cuda attends without dropout")
    return reasons


@dataclass(frozen=True)
class ForwardPlan:
    """Tokens of a tile, splits of the tokens, and the tokens of a split."""

    block_kv: int
    splits: int
    tokens_per_split: int


@functools.lru_cache(maxsize=1024)
def plan_forward(B: int, R: int, M: int, C: int, device: DeviceFacts) -> ForwardPlan:
    """Splits with the least estimated time: exactly one full wave is usually best. One block fills a multiprocessor."""
    columns = next(columns for columns in BLOCK_KV if columns >= C)
    block_q, block_kv = BLOCK_Q[columns], BLOCK_KV[columns]
    blocks, tiles = B * math.ceil(R / block_q), math.ceil(M / block_kv)
    splits, per_split = fastest_splits(
        blocks, tiles, 4.0 * block_q * block_kv * C, 8.0 * B * R * C, resident=1, device=device
    )
    return ForwardPlan(block_kv, splits, per_split * block_kv)


@functools.lru_cache(maxsize=4096)
def leaves(sizes: tuple[int, ...]) -> str | None:
    """Why the automatic choice leaves a call of sizes (B, R, M, C) to the next backend, or None.

    In ms on an H200, CUDA and Triton: 8 x 512 x 50,176 of 272 channels 0.283 and 0.355, of 288 0.352 and 0.370, of 256 0.272
    and 0.334, of 192 0.253 and 0.260, but of 160 0.246 and 0.239; of 128 0.156 and 0.188, of 96 0.151 and 0.164, of 64 0.123
    and 0.147; of 352 0.550 and 0.763, of 512 0.587 and 1.199; 2 x 2,048 x 182,528 of 336 1.34 and 1.47; 4 x 512 x 6,528 of
    272 0.036 and 0.043, but 4 x 256 x 8,192 of 272 0.041 and 0.035, of 320 0.042 and 0.037; 4 x 256 x 4,352 of 512 0.035 and
    0.051, 4 x 256 x 32,768 of 64 0.031 and 0.034.
    """
    B, R, M, C = sizes
    flops = 4 * B * R * M * C
    if flops < LEAST_FLOPS or (256 < C <= 336 and flops < WIDE_LEAST_FLOPS):
        return "triton is faster with less than 5 GFLOP, or 12 where rows have 257 to 336 channels"
    if 128 < C < 192:
        return f"triton is faster with rows of 129 to 191 channels, got {C}"
    return None


@functools.lru_cache(maxsize=4096)
def leaves_backward(sizes: tuple[int, ...]) -> str | None:
    """Why the automatic choice leaves the backward of a call of such sizes to the next backend, or None.

    In ms on an H200, dq and dx on CUDA, on Triton: 8 x 512 x 50,176 of 272 channels 0.422 and 0.609, 0.474 and 0.742; of 288
    0.607 and 0.807, 0.588 and 1.039; of 256 0.397 and 0.576, 0.426 and 0.703; of 128 0.199 and 0.285, 0.250 and 0.326; of 96
    0.189 and 0.272, 0.230 and 0.344; of 64 0.130 and 0.196, 0.167 and 0.239; but of 192 0.373 and 0.541, 0.342 and 0.527, of
    160 0.370 and 0.541, 0.317 and 0.535; 2 x 2,048 x 182,528 of 336 2.13 and 2.94, 2.71 and 3.70; 4 x 256 x 8,192 of 272
    0.037 and 0.038, 0.040 and 0.109.
    """
    B, R, M, C = sizes
    if 4 * B * R * M * C < LEAST_FLOPS:
        return "triton is faster with less than 5 GFLOP"
    if 128 < C <= 192:
        return f"triton is faster with the gradients of rows of 129 to 192 channels, got {C}"
    return None


def plan(problem: SharedKVProblem, device: DeviceFacts) -> ForwardPlan:
    """How the forward of ``problem`` is computed."""
    return plan_forward(problem.B, problem.R, max(1, problem.M), problem.C, device)


@functools.lru_cache(maxsize=1024)
def _forward_params(
    B: int, R: int, M: int, C: int, dtype: torch.dtype, z_dtype: torch.dtype, strides: tuple[int, ...], made: ForwardPlan,
    scale: float, device: int,
) -> Any:  # fmt: skip
    """What calls alike have in common; strides are q's and x's of batch entry and row. Copied, not changed."""
    fields = {
        "stride_q_batch": strides[0], "stride_q_row": strides[1], "stride_x_batch": strides[2], "stride_x_token": strides[3],
        "batch": B, "rows": R, "tokens": M, "channels": C, "type": ELEMENT_TYPES[dtype], "z_out_type": ELEMENT_TYPES[z_dtype],
        "splits": made.splits, "tokens_per_split": made.tokens_per_split, "scale_log2": scale * LOG2_E, "device": device,
    }  # fmt: skip
    return filled(binding().SharedKVForwardParams(), fields)


def shared_kv_attention_forward(
    q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, *, scale: float, dropout_p: float,
    dropout_seed: Tensor | None, key_offset: int, state: tuple[Tensor, Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(z, lse, rho), continued from the ``state`` of earlier tokens where one is given.

    Args:
        q: bf16 or fp16 ``[B, R, C]``, C a multiple of 8 up to 512.
        x: keys and values, as q, ``[B, M, C]``.
        key_mask: bool ``[B, M]``, True where a token is visible, or None.
        lengths: int32 ``[B]``, tokens that count, or None.
        scale: of the scores.
        dropout_p: 0; these kernels drop nothing.
        dropout_seed, key_offset: of dropout, not read.
        state: fp32 z ``[B, R, C]``, lse and rho ``[B, R]`` of tokens before x.
        out_dtype: of z; None: q's.

    Raises:
        RuntimeError: the library refused or the launch failed; the message says why.
    """
    assert dropout_p == 0.0, "reasons_against refuses dropout"
    B, R, C = q.shape
    M, dtype = x.shape[1], out_dtype or q.dtype
    z = torch.empty(B, R, C, dtype=dtype, device=q.device)
    lse = torch.empty(B, R, dtype=torch.float32, device=q.device)
    rho = torch.empty_like(lse)
    if B * R == 0:
        return z, lse, rho
    if M == 0 and state is None:
        return z.zero_(), lse.fill_(-torch.inf), rho.zero_()
    q, scale = positive_scale(q, scale)
    q, x = readable(q), readable(x)
    key_mask, lengths = (None if t is None else t.contiguous() for t in (key_mask, lengths))
    made = plan_forward(B, R, max(1, M), C, device_facts(q.device))
    splits = made.splits if M > 0 else 0
    z_part, lse_part, rho_part = z, lse, address(rho)
    merged = splits != 1 or state is not None or dtype not in (torch.float32, q.dtype)
    if merged:
        z_part = torch.empty(B, splits, R, C, dtype=torch.float32, device=q.device)
        lse_part, rho_part = torch.empty(B, splits, R, dtype=torch.float32, device=q.device), 0
    with on_device_of(q):
        stream = stream_of(q)
        if splits > 0:
            strides = (*q.stride()[:2], *x.stride()[:2])
            params = _forward_params(B, R, M, C, q.dtype, z_part.dtype, strides, made, scale, q.get_device())
            addresses = {
                "q": q.data_ptr(), "x": x.data_ptr(), "key_mask": address(key_mask), "lengths": address(lengths),
                "z_out": z_part.data_ptr(), "lse_out": lse_part.data_ptr(), "rho_out": rho_part, "stream": stream,
            }  # fmt: skip
            binding().shared_kv_fwd(filled(binding().SharedKVForwardParams(params), addresses))
        if merged:
            merge_states(z_part, lse_part, None if state is None else state[:2], z[:, None], lse, rho, stream)
    return z, lse, rho


@dataclass(frozen=True)
class BackwardPlan:
    """Tokens of a tile of dq, splits of the tokens, the tokens of a split; blocks that share dx."""

    block_kv: int
    splits: int
    tokens_per_split: int
    blocks: int


@functools.lru_cache(maxsize=1024)
def plan_backward(B: int, R: int, M: int, C: int, device: DeviceFacts) -> BackwardPlan:
    """Splits of dq with the least estimated time; one block of either kernel fills a multiprocessor."""
    columns, block_kv = next(pair for pair in DQ_BLOCK_KV.items() if pair[0] >= C)
    block_q = BLOCK_Q[columns]
    splits, per_split = fastest_splits(
        B * math.ceil(R / block_q), math.ceil(M / block_kv), 6.0 * block_q * block_kv * C, 8.0 * B * R * C, resident=1,
        device=device,
    )  # fmt: skip
    blocks = min(B * math.ceil(M / DX_BLOCK_KV), device.sm_count)
    return BackwardPlan(block_kv, splits, per_split * block_kv, blocks)


@functools.lru_cache(maxsize=1024)
def _backward_params(
    sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, dq_dtype: torch.dtype, made: BackwardPlan,
    scales: tuple[float, float], device: int,
) -> Any:  # fmt: skip
    """What calls alike have in common; strides are q's, dz's and x's of batch entry and row. Copied, not changed."""
    (B, R, M, C), (scale, dq_scale) = sizes, scales
    names = ("q_batch", "q_row", "dz_batch", "dz_row", "x_batch", "x_token")
    fields = {f"stride_{name}": stride for name, stride in zip(names, strides, strict=True)} | {
        "batch": B, "rows": R, "tokens": M, "channels": C, "type": ELEMENT_TYPES[dtype], "dq_out_type": ELEMENT_TYPES[dq_dtype],
        "splits": made.splits, "tokens_per_split": made.tokens_per_split, "blocks": made.blocks, "scale": scale,
        "scale_log2": scale * LOG2_E, "dq_scale": dq_scale, "device": device,
    }  # fmt: skip
    return filled(binding().SharedKVBackwardParams(), fields)


def shared_kv_attention_delta(
    dz: Tensor, z: Tensor, dlse: Tensor | None, drho: Tensor | None, rho: Tensor
) -> Tensor:
    """delta = dz . z - dlse, fp32 ``[B, R]``; rho is constant without dropout, and its gradient cancels."""
    if z.numel() == 0:
        return torch.zeros(z.shape[:2], dtype=torch.float32, device=z.device)
    dz, z, dlse = readable(dz), z.float().contiguous(), None if dlse is None else dlse.contiguous()
    with on_device_of(z):
        return row_products(dz, z, dlse, stream_of(z))


def shared_kv_attention_backward(
    dz: Tensor, delta: Tensor, drho: Tensor | None, q: Tensor, x: Tensor, lse: Tensor, key_mask: Tensor | None,
    lengths: Tensor | None, *, scale: float, dropout_p: float, dropout_seed: Tensor | None, key_offset: int,
    needs_dq: bool, needs_dx: bool, dq_sum: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dq = scale ds x and dx = scale ds^T q + p^T dz, ds = p (dz x^T - delta); None for what is not needed.

    Args:
        dz: the gradient of z, ``[B, R, C]`` in the dtype of q.
        delta, lse: fp32 ``[B, R]``; of shared_kv_attention_delta and of the forward, over all tokens.
        q, x, key_mask, lengths, scale: as in the forward; tokens that are masked are zeros.
        drho, dropout_p, dropout_seed, key_offset: of dropout, as in the forward.
        dq_sum: fp32 ``[B, R, C]``, contiguous; dq is added to it in place, and it is returned.

    Raises:
        RuntimeError: the library refused or the launch failed; the message says why.
    """
    assert dropout_p == 0.0, "reasons_against refuses dropout"
    (B, R, C), M = q.shape, x.shape[1]
    if B * R == 0 or M == 0:
        nothing = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if dq_sum is None else dq_sum
        return nothing if needs_dq else None, torch.zeros_like(x) if needs_dx else None
    operand, positive = positive_scale(q, scale)
    operand, dz, tokens = readable(operand), readable(dz), readable(x)
    delta, lse = delta.contiguous(), lse.contiguous()
    key_mask, lengths = (None if t is None else t.contiguous() for t in (key_mask, lengths))
    made = plan_backward(B, R, M, C, device_facts(q.device))
    dq: Tensor | None = None
    part: Tensor | None = None
    if needs_dq:
        dq = torch.empty(B, R, C, dtype=q.dtype, device=q.device) if dq_sum is None else dq_sum
        alone = made.splits == 1 and dq_sum is None
        part = dq if alone else torch.empty(B, made.splits, R, C, dtype=torch.float32, device=q.device)
    dx = torch.empty(B, M, C, dtype=x.dtype, device=x.device) if needs_dx else None
    with on_device_of(q):
        stream, strides = stream_of(q), (*operand.stride()[:2], *dz.stride()[:2], *tokens.stride()[:2])
        dq_dtype = torch.float32 if part is None else part.dtype
        scales = positive, float(scale)
        params = _backward_params((B, R, M, C), strides, q.dtype, dq_dtype, made, scales, q.get_device())
        addresses = {
            "q": operand.data_ptr(), "dz": dz.data_ptr(), "x": tokens.data_ptr(), "lse": lse.data_ptr(),
            "delta": delta.data_ptr(), "key_mask": address(key_mask), "lengths": address(lengths), "dq_out": address(part),
            "dx": address(dx), "stream": stream,
        }  # fmt: skip
        binding().shared_kv_bwd(filled(binding().SharedKVBackwardParams(params), addresses))
        if part is not None and dq is not None and part is not dq:
            sum_parts(part, dq_sum, dq, stream)
    return dq, dx
