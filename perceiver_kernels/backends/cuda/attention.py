"""attention on CUDA C++: plan, fill the parameter struct, launch, merge. Forward only, on Hopper."""

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
    binding,
    filled,
    on_device_of,
    readable,
    reasons_against_attending,
    stream_of,
)
from perceiver_kernels.backends.cuda.states import merge_states
from perceiver_kernels.device import DeviceFacts, device_facts
from perceiver_kernels.layouts import empty_heads, positive_scale
from perceiver_kernels.masks import Masks
from perceiver_kernels.plan.splits import fastest_splits
from perceiver_kernels.problem import AttentionProblem

COMPOSITE = False

# Of csrc/kernels/attention_enqueue.h: the widest head of a kernel, and the keys of its tile.
BLOCK_KV = {64: 128, 128: 128, 256: 64}
BLOCK_Q = 128


def reasons_against(problem: AttentionProblem) -> list[str]:
    """Sentences that say why these kernels cannot serve ``problem``."""
    reasons = reasons_against_attending(problem.device_type, problem.dtype)
    if max(problem.d_qk, problem.d_v) > max(BLOCK_KV):
        reasons.append(f"cuda attends with heads of up to {max(BLOCK_KV)} channels, got {problem.d_qk} and {problem.d_v}")
    if problem.d_qk % 8 or problem.d_v % 8:
        reasons.append(f"cuda attends with heads of a multiple of 8 channels, got {problem.d_qk} and {problem.d_v}")
    # Hidden values are multiplied with weights of 0 here, and may be no numbers.
    refused = {
        "a key_mask": problem.key_mask, "lengths": problem.lengths,
        "an attn_mask": problem.attn_mask != "none", "a query_mask": problem.query_mask, "packed sequences": problem.packed,
        "a causal mask": problem.causal != "none", "two segments": problem.segments > 1, "dropout": problem.dropout,
    }  # fmt: skip
    reasons += [f"cuda attends without {what}" for what, asked in refused.items() if asked]
    if problem.needs_grad:
        reasons.append("cuda has no gradient of attention")
    return reasons


@dataclass(frozen=True)
class ForwardPlan:
    """Keys of a tile, splits of the keys, the keys of a split, items of work, and the blocks that share them."""

    block_kv: int
    splits: int
    keys_per_split: int
    items: int
    blocks: int


@functools.lru_cache(maxsize=1024)
def plan_forward(B: int, H: int, Lq: int, Lk: int, d_qk: int, d_v: int, device: DeviceFacts) -> ForwardPlan:
    """Splits with the least estimated time; one block fills a multiprocessor."""
    block_kv = next(keys for columns, keys in BLOCK_KV.items() if max(d_qk, d_v) <= columns)
    row_blocks, tiles = B * H * math.ceil(Lq / BLOCK_Q), math.ceil(Lk / block_kv)
    splits, per_split = fastest_splits(
        row_blocks, tiles, 2.0 * BLOCK_Q * block_kv * (d_qk + d_v), 8.0 * B * H * Lq * d_v, resident=1, device=device
    )
    items = row_blocks * splits
    return ForwardPlan(block_kv, splits, per_split * block_kv, items, min(items, device.sm_count))


@functools.lru_cache(maxsize=4096)
def leaves(sizes: tuple[int, ...]) -> str | None:
    """Why the automatic choice leaves a call of sizes (B, H, Lq, Lk, d_qk, d_v) to the next backend, or None.

    In ms on an H200, CUDA and Triton: 512 x 512 in 256 heads of 128 channels 0.074 and 0.117, 256 x 256 in 256 of 160 0.042
    and 0.047, 1,048,576 x 512 of 256 0.84 and 1.19, 256 x 1,048,576 of 256 0.36 and 0.53, 512 x 50,176 of 128 0.160 and 0.230;
    of 64 channels 2,048 x 2,048 0.163 and 0.170, but 784 x 784 0.140 and 0.128, 1,048,576 x 256 1.62 and 1.53, 64 x 16,384
    0.161 and 0.152.
    """
    B, H, Lq, Lk, d_qk, d_v = sizes
    if d_qk != d_v or d_qk not in (64, 128, 160, 256):
        return f"heads of {d_qk} and {d_v} channels were not measured against triton"
    if d_qk == 64 and Lk < 2048:
        return f"triton is faster with heads of 64 channels and fewer than 2,048 keys, got {Lk}"
    if BLOCK_Q * math.ceil(Lq / BLOCK_Q) > 1.25 * Lq:
        return f"{Lq} queries leave more than a fifth of their blocks of {BLOCK_Q} empty"
    if 4 * B * H * Lq * Lk * d_qk < LEAST_FLOPS:
        return "triton is faster with less than 5 GFLOP"
    return None


def plan(problem: AttentionProblem, device: DeviceFacts) -> ForwardPlan:
    """How the forward of ``problem`` is computed."""
    p = problem
    return plan_forward(max(1, p.B), p.H, max(1, p.Lq), max(1, p.Lk), p.d_qk, p.d_v, device)


@functools.lru_cache(maxsize=1024)
def _params(
    sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, out_dtype: torch.dtype, made: ForwardPlan,
    scale: float, device: int,
) -> Any:  # fmt: skip
    """What calls alike have in common; strides are query's, key's, value's and out's. Copied, not changed."""
    B, H, H_kv, Lq, Lk, d_qk, d_v = sizes
    names = [f"{tensor}_{axis}" for tensor in ("query", "key", "value") for axis in ("batch", "head", "row")]
    names += [f"out_{axis}" for axis in ("batch", "head", "split", "row")]
    fields = {f"stride_{name}": stride for name, stride in zip(names, strides, strict=True)} | {
        "batch": B, "heads": H, "heads_per_key_head": H // H_kv, "queries": Lq, "keys": Lk, "channels_qk": d_qk,
        "channels_v": d_v, "type": ELEMENT_TYPES[dtype], "out_type": ELEMENT_TYPES[out_dtype], "splits": made.splits,
        "keys_per_split": made.keys_per_split, "items": made.items, "blocks": made.blocks, "scale_log2": scale * LOG2_E,
        "device": device,
    }  # fmt: skip
    return filled(binding().AttentionForwardParams(), fields)


def attention_forward(
    query: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], masks: Masks, *, scale: float, dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, lse, statistics), the last of them empty: these kernels take no additive mask.

    Args:
        query: bf16 or fp16 ``[B, H, Lq, d_qk]``, d_qk a multiple of 8 up to 256.
        keys, values: one segment ``[B, H_kv, Lk, d_qk]`` and ``[B, H_kv, Lk, d_v]``.
        masks: none; these kernels hide nothing.
        scale: of the scores.
        dropout_p: 0; these kernels drop nothing.
        dropout_seed: of dropout, not read.

    Raises:
        RuntimeError: the library refused or the launch failed; the message says why.
    """
    assert dropout_p == 0.0 and len(keys) == 1, "reasons_against refuses dropout and two segments"
    (key,), (value,) = keys, values
    if key.stride(1) == 0 == value.stride(1):
        # Heads that are one tensor repeated: the kernel reads that, no copy of it.
        key, value = key[:, :1], value[:, :1]
    B, H, Lq, d_qk = query.shape
    H_kv, Lk, d_v = *key.shape[1:3], value.shape[3]
    out = empty_heads(query, B, H, Lq, d_v)
    lse = torch.empty(B, H, Lq, dtype=torch.float32, device=query.device)
    statistics = torch.empty(0, dtype=torch.float32, device=query.device)
    if out.numel() == 0 or Lk == 0:
        return out.zero_(), lse.fill_(-torch.inf), statistics
    query, scale = positive_scale(query, scale)
    query, key, value = readable(query), readable(key), readable(value)
    made = plan_forward(B, H, Lq, Lk, d_qk, d_v, device_facts(query.device))
    merged = made.splits > 1
    part, lse_part, strides = out, lse, (*out.stride()[:2], 0, out.stride(2))
    if merged:
        part = torch.empty(B * H, made.splits, Lq, d_v, dtype=torch.float32, device=query.device)
        lse_part = torch.empty(B * H, made.splits, Lq, dtype=torch.float32, device=query.device)
        strides = (H * part.stride(0), *part.stride()[:3])
    with on_device_of(query):
        stream = stream_of(query)
        strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *strides)
        sizes = (B, H, H_kv, Lq, Lk, d_qk, d_v)
        params = _params(sizes, strides, query.dtype, part.dtype, made, scale, query.get_device())
        addresses = {
            "query": query.data_ptr(), "key": key.data_ptr(), "value": value.data_ptr(),
            "out": part.data_ptr(), "lse_out": lse_part.data_ptr(), "stream": stream,
        }  # fmt: skip
        binding().attention_fwd(filled(binding().AttentionForwardParams(params), addresses))
        if merged:
            merge_states(part, lse_part, None, out, lse, None, stream)
    return out, lse, statistics
