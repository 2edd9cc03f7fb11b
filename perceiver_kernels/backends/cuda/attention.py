"""attention on CUDA C++: plan, fill the parameter structs, launch, merge. On Hopper."""

from __future__ import annotations

import functools
import itertools
import math
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
from perceiver_kernels.backends.cuda.attention_plans import (
    BACKWARD_BLOCK_KV,
    BACKWARD_BLOCK_Q,
    BLOCK_KV,
    BLOCK_Q,
    LONG,
    BackwardPlan,
    ForwardPlan,
    most_splits,
    plan_backward,
    plan_forward,
    workspace_floats,
)
from perceiver_kernels.backends.cuda.states import merge_states
from perceiver_kernels.device import DeviceFacts, device_facts
from perceiver_kernels.layouts import empty_heads, positive_scale
from perceiver_kernels.masks import Masks
from perceiver_kernels.problem import AttentionProblem

COMPOSITE = False

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
    return reasons


@functools.lru_cache(maxsize=4096)
def leaves(sizes: tuple[int, ...]) -> str | None:
    """Why the automatic choice leaves a call of sizes (B, H, Lq, Lk, d_qk, d_v) to the next backend, or None.

    In ms on an H200, CUDA and Triton: 512 x 512 in 256 heads of 128 channels 0.074 and 0.116, 784 x 784 0.173 and 0.208, 256
    x 256 in 256 of 160 0.042 and 0.046, 1,048,576 x 512 of 256 0.84 and 1.19, 256 x 1,048,576 of 256 0.36 and 0.53, 512 x
    50,176 of 128 0.160 and 0.230, 48 x 8,192 in 32 of 128 0.036 and 0.048; of 64 channels 256 x 256 in 512 heads 0.036 and
    0.040, 512 x 512 0.100 and 0.105, 1,024 x 1,024 in 128 0.092 and 0.096, 2,048 x 2,048 in 64 0.169 and 0.171, 128 x 8,192
    in 128 0.089 and 0.090, 64 x 16,384 in 128 0.143 and 0.154, 512 x 50,176 in 32 0.440 and 0.462, but 784 x 784 in 256 0.137
    and 0.129, 512 x 4,096 in 64 0.047 and 0.045, 1,048,576 x 512 in 4 1.41 and 1.36.
    """
    B, H, Lq, Lk, d_qk, d_v = sizes
    if d_qk != d_v or d_qk not in (64, 128, 160, 256):
        return f"heads of {d_qk} and {d_v} channels were not measured against triton"
    if d_qk == 64:
        if Lq > 16 * Lk:
            return f"triton is faster with heads of 64 channels and more than 16 queries a key, got {Lq} and {Lk}"
        if BLOCK_KV[64] * math.ceil(Lk / BLOCK_KV[64]) > 1.1 * Lk or 2048 < Lk < LONG:
            return f"triton is faster with heads of 64 channels and {Lk} keys: neither whole tiles of 128, nor 8,192"
    if BLOCK_Q // 2 * math.ceil(2 * Lq / BLOCK_Q) > 1.25 * Lq:
        return f"{Lq} queries leave more than a fifth of their blocks of {BLOCK_Q // 2} empty"
    if 4 * B * H * Lq * Lk * d_qk < LEAST_FLOPS:
        return "triton is faster with less than 5 GFLOP"
    return None


@functools.lru_cache(maxsize=4096)
def leaves_backward(sizes: tuple[int, ...]) -> str | None:
    """Why the automatic choice leaves the backward of a call of such sizes to the next backend, or None.

    In ms on an H200, CUDA and Triton: of 256 channels, 256 x 1,048,576 1.64 and 2.70, 1,048,576 x 512 3.46 and 5.31, 512 x
    512 in 64 heads 0.119 and 0.168, 20,000 x 512 0.098 and 0.124; of 128 channels, 512 x 512 in 256 heads 0.262 and 0.289, in
    128 heads 0.138 and 0.147, 4,096 x 4,096 in 16 0.82 and 0.83, 512 x 50,176 in 8 0.50 and 0.71, but 2,048 x 2,048 in 8
    0.131 and 0.120; of 64 channels, 784 x 784 in 256 heads 0.341 and 0.381, 2,048 x 2,048 in 64 0.46 and 0.53, 4,096 x 256 in
    64 0.162 and 0.190, but 8,077 x 2,048 in 4 0.215 and 0.198, 64 x 16,384 in 128 0.53 and 0.31. Decoders: 1,048,576 x 256 in
    8 heads of 64 3.76 and 4.74, 1,048,576 x 128 of 64 0.287 and 0.370, 524,288 x 256 in 4 of 128 1.87 and 2.30, but 100,352 x
    256 in 2 of 64 0.146 and 0.138, 1,048,576 x 512 of 128 2.06 and 1.83.
    """
    B, H, Lq, Lk, d_qk, d_v = sizes
    if d_qk != d_v or d_qk not in BACKWARD_BLOCK_Q:
        return f"gradients of heads of {d_qk} and {d_v} channels were not measured against triton"
    if 4 * B * H * Lq * Lk * d_qk < LEAST_FLOPS:
        return "triton is faster with less than 5 GFLOP"
    if d_qk == 256:
        return None
    block_q = BACKWARD_BLOCK_Q[d_qk]
    if block_q * math.ceil(Lq / block_q) > 1.25 * Lq:
        return f"{Lq} queries leave more than a fifth of their blocks of {block_q} empty"
    if Lq <= block_q:
        return f"{Lq} queries, one block, were not measured against triton"
    tiles = B * H * math.ceil(Lk / BACKWARD_BLOCK_KV)
    if Lq > 16 * Lk:
        if Lk > 2 * BACKWARD_BLOCK_KV or B * H * Lq < 1 << 19:
            return f"triton is faster with more than 16 queries a key, but of 2^19 and up to 256 keys, got {Lq} and {Lk}"
    elif tiles < (least := {64: 128, 128: 512}[d_qk]):
        return f"triton is faster with fewer than {least} tiles of keys in all heads, got {tiles}"
    elif B * H * most_splits(B, H, Lq, Lk, d_qk) < 64:
        return f"parts of dq that fill the GPU would take more memory than the operands, with {B * H} heads of {Lq} queries"
    return None


def plan(problem: AttentionProblem, device: DeviceFacts) -> ForwardPlan:
    """How the forward of ``problem`` is computed."""
    p = problem
    return plan_forward(max(1, p.B), p.H, max(1, p.Lq), max(1, p.Lk), p.d_qk, p.d_v, device)


def _stride_names(*tensors: str) -> list[str]:
    return [f"stride_{tensor}_{axis}" for tensor in tensors for axis in ("batch", "head", "row")]


@functools.lru_cache(maxsize=1024)
def _forward_params(
    sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, out_dtype: torch.dtype, made: ForwardPlan,
    scale: float, device: int,
) -> Any:  # fmt: skip
    """What calls alike have in common; strides are query's, key's, value's and out's. Copied, not changed."""
    B, H, H_kv, Lq, Lk, d_qk, d_v = sizes
    names = [*_stride_names("query", "key", "value"), *(f"stride_out_{axis}" for axis in ("batch", "head", "split", "row"))]
    fields = dict(zip(names, strides, strict=True)) | {
        "batch": B, "heads": H, "heads_per_key_head": H // H_kv, "queries": Lq, "keys": Lk, "channels_qk": d_qk,
        "channels_v": d_v, "type": ELEMENT_TYPES[dtype], "out_type": ELEMENT_TYPES[out_dtype], "block_kv": made.block_kv,
        "splits": made.splits, "keys_per_split": made.keys_per_split, "items": made.items, "blocks": made.blocks,
        "scale_log2": scale * LOG2_E, "device": device,
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
        params = _forward_params(sizes, strides, query.dtype, part.dtype, made, scale, query.get_device())
        addresses = {
            "query": query.data_ptr(), "key": key.data_ptr(), "value": value.data_ptr(),
            "out": part.data_ptr(), "lse_out": lse_part.data_ptr(), "stream": stream,
        }  # fmt: skip
        binding().attention_fwd(filled(binding().AttentionForwardParams(params), addresses))
        if merged:
            merge_states(part, lse_part, None, out, lse, None, stream)
    return out, lse, statistics


@functools.lru_cache(maxsize=1024)
def _backward_params(
    sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, made: BackwardPlan, scale: float, device: int
) -> Any:
    """What calls alike have in common; strides are query's, key's, value's, out's, dout's, dq's, dk's, dv's. Copied."""
    B, H, H_kv, Lq, Lk, d_qk, d_v = sizes
    names, tiles = _stride_names("query", "key", "value", "out", "dout", "dq", "dk", "dv"), math.ceil(Lk / BACKWARD_BLOCK_KV)
    fields = dict(zip(names, strides, strict=True)) | {
        "batch": B, "heads": H, "heads_per_key_head": H // H_kv, "queries": Lq, "keys": Lk, "channels_qk": d_qk,
        "channels_v": d_v, "type": ELEMENT_TYPES[dtype], "query_blocks": made.query_blocks, "splits": made.splits,
        "keys_per_split": made.keys_per_split, "items": made.items, "blocks": made.blocks,
        "balanced_tiles": tiles if made.balanced else 0, "all_tiles": tiles * B * H_kv if made.balanced else 0,
        "chunk_rows": made.chunk_rows, "chunk_keys": made.chunk_keys, "slices": made.slices, "scale": scale,
        "scale_log2": scale * LOG2_E, "device": device,
    }  # fmt: skip
    return filled(binding().AttentionBackwardParams(), fields)


def attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, statistics: Tensor, query: Tensor, keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...], masks: Masks, *, scale: float, dropout_p: float, dropout_seed: Tensor | None,
    needs_dq: bool = True, needs_dkv: bool = True, into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv] of what attention_forward gives; what is not needed is empty.

    Args:
        dout, out: ``[B, H, Lq, d_v]`` in the dtype of query; the gradient of out, and out.
        dlse, lse: fp32 ``[B, H, Lq]``; dlse may be None.
        query, keys, values, scale: as in attention_forward, heads of up to 256 channels.
        statistics, masks, dropout_p, dropout_seed: of what these kernels do not take, as in attention_forward.
        into: where the gradients go, rows of 16 bytes; fresh memory when None.

    Raises:
        RuntimeError: the library refused or the launch failed; the message says why.
    """
    assert dropout_p == 0.0 and len(keys) == 1, "reasons_against refuses dropout and two segments"
    (key,), (value,) = keys, values
    (B, H, Lq, d_qk), (_, H_kv, Lk, d_v) = query.shape, value.shape
    dq, dk, dv = into or (empty_heads(like, *like.shape) for like in (query, key, value))
    if out.numel() == 0 or Lk == 0:
        gradients = [dq.zero_(), dk.zero_(), dv.zero_()]
    else:
        operand, positive = positive_scale(query, scale)
        operand, key, value, out, dout = (readable(operand), readable(key), readable(value), readable(out), readable(dout))
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        made = plan_backward(B, H, H_kv, Lq, Lk, d_qk, d_v, device_facts(query.device))
        sizes = (B, H, H_kv, Lq, Lk, d_qk, d_v)
        # One after the other; every one of them begins on 128 bytes, as all but the first have whole tiles.
        floats = workspace_floats(made, sizes)
        workspace = torch.empty(sum(floats), dtype=torch.float32, device=query.device)
        ends = list(itertools.accumulate(floats, initial=0))
        rows, dq_parts, tiles, key_parts = (
            workspace.data_ptr() + 4 * start if size else 0 for start, size in zip(ends, floats, strict=False)
        )
        with on_device_of(query):
            strides = (
                *operand.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3], *dout.stride()[:3],
                *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            )  # fmt: skip
            params = _backward_params(sizes, strides, query.dtype, made, positive, query.get_device())
            addresses = {
                "query": operand.data_ptr(), "key": key.data_ptr(), "value": value.data_ptr(), "out": out.data_ptr(),
                "dout": dout.data_ptr(), "lse": lse.data_ptr(), "dlse": address(dlse), "rows": rows, "dq_parts": dq_parts,
                "tiles": tiles, "key_parts": key_parts, "dq": dq.data_ptr(), "dk": dk.data_ptr(),
                "dv": dv.data_ptr(), "stream": stream_of(query),
            }  # fmt: skip
            binding().attention_bwd(filled(binding().AttentionBackwardParams(params), addresses))
        if scale <= 0.0:
            # positive_scale moved the sign, or the zero, into the queries.
            dq.neg_() if scale < 0.0 else dq.zero_()
        gradients = [dq, dk, dv]
    if needs_dq and needs_dkv:
        return gradients
    empty = query.new_empty(0)
    return [gradient if needed else empty for gradient, needed in zip(gradients, (needs_dq, needs_dkv, needs_dkv), strict=True)]
