"""shared_kv_attention on CUDA C++: plan, fill the parameter structs, launch, merge. Forward only, on Hopper."""

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
from perceiver_kernels.backends.cuda.states import merge_states
from perceiver_kernels.device import DeviceFacts, device_facts
from perceiver_kernels.layouts import positive_scale
from perceiver_kernels.plan.splits import fastest_splits
from perceiver_kernels.problem import SharedKVProblem

COMPOSITE = False

# Of csrc/kernels/shared_kv_enqueue.h: the widest row of a kernel, and the tokens of its tile; the query rows of a block.
BLOCK_KV = {64: 128, 128: 128, 256: 80, 272: 80, 336: 48, 512: 64}
BLOCK_Q = {64: 128, 128: 128, 256: 128, 272: 128, 336: 128, 512: 64}


def reasons_against(problem: SharedKVProblem) -> list[str]:
    """Sentences that say why these kernels cannot serve ``problem``."""
    reasons = reasons_against_attending(problem.device_type, problem.dtype)
    if max(BLOCK_KV) < problem.C:
        reasons.append(f"cuda attends to rows of up to {max(BLOCK_KV)} channels, got {problem.C}")
    if problem.dropout:
        reasons.append("cuda attends without dropout")
    if problem.needs_grad:
        reasons.append("cuda has no gradient of shared_kv_attention")
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

    In ms on an H200, CUDA and Triton: 8 x 512 x 50,176 of 272 channels 0.278 and 0.355, of 256 0.262 and 0.311, of 192 0.250
    and 0.261, of 128 0.155 and 0.189, of 96 0.152 and 0.165, of 64 0.121 and 0.148; 2 x 2,048 x 182,528 of 336 1.23 and 1.48.
    """
    B, R, M, C = sizes
    if 4 * B * R * M * C < LEAST_FLOPS:
        return "triton is faster with less than 5 GFLOP"
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
