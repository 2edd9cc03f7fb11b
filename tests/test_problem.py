"""Bad calls: a TypeError or ValueError that names the argument, the rule and the value, before anything is computed."""

# The table below has one row for each refusal.
# ruff: noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import perceiver_kernels as pk
from perceiver_kernels.masks import NO_MASKS, Masks
from perceiver_kernels.problem import (
    PROBLEMS,
    AttentionProblem,
    CrossAttentionProblem,
    PackProblem,
    SharedKVProblem,
    pad_channels,
)

B, H, N, M, C = 2, 2, 3, 7, 16
COMPUTING = ("mm", "bmm", "addmm", "baddbmm", "_softmax", "mean", "rsqrt", "exp", "_scaled_dot_product", "mul")


class Recorder(TorchDispatchMode):
    """Names of the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("perceiver_kernels::") or name.removeprefix("aten::").split(".")[0].startswith(COMPUTING):
            self.computed.append(name)
        return func(*args, **(kwargs or {}))


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def shared(**changes: Any) -> Any:
    arguments = {"q": zeros(B, N, C), "x": zeros(B, M, C)} | changes
    return pk.shared_kv_attention(arguments.pop("q"), arguments.pop("x"), **arguments)


def pack(**changes: Any) -> Any:
    arguments = {"content": zeros(B, M, 5)} | changes
    return pk.pack_inputs(arguments.pop("content"), **arguments)


def attend(**changes: Any) -> Any:
    arguments = {"query": zeros(B, H, N, 4), "key": zeros(B, H, M, 4), "value": zeros(B, H, M, 6)} | changes
    return pk.attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)


def starts(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rotate(**changes: Any) -> Any:
    arguments = {"x": zeros(B, H, N, 8), "cos": zeros(N, 3), "sin": zeros(N, 3)} | changes
    return pk.rotary_embedding(arguments.pop("x"), arguments.pop("cos"), arguments.pop("sin"), **arguments)


def packed(**changes: Any) -> Any:
    given = {"query": zeros(1, H, N, 4), "key": zeros(1, H, M, 4), "value": zeros(1, H, M, 6)}
    return attend(**given | {"cu_seqlens_q": starts(0, 1, 3), "cu_seqlens_k": starts(0, 3, 7)} | changes)


def cross(**changes: Any) -> Any:
    arguments = {"q": zeros(B, H, N, 4), "inputs": zeros(B, M, C), "w_k": zeros(8, C), "w_v": zeros(12, C)} | changes
    positional = [arguments.pop(name) for name in ("q", "inputs", "w_k", "w_v")]
    return pk.input_cross_attention(*positional, **arguments)


def decode(**changes: Any) -> Any:
    arguments = {
        "queries": zeros(B, M, C), "key": zeros(B, 1, N, 4), "value": zeros(B, 1, N, 6), "w_q": zeros(4, C), "w_o": zeros(5, 6)
    } | changes  # fmt: skip
    positional = [arguments.pop(name) for name in ("queries", "key", "value", "w_q", "w_o")]
    return pk.output_cross_attention(*positional, **arguments)


F64, F16, INT, I32, META = torch.float64, torch.float16, torch.int64, torch.int32, "meta"
ENTRY: dict[str, Callable[..., Any]] = {
    "shared": shared, "pack": pack, "attend": attend, "packed": packed, "cross": cross, "decode": decode, "rotate": rotate
}  # fmt: skip

# entry, changed arguments, error, what the message says: argument, rule, value
REFUSED: list[tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ("shared", {"q": [1.0]}, TypeError, ("q must be a torch.Tensor", "list")),
    ("shared", {"x": None}, TypeError, ("x must be a torch.Tensor", "NoneType")),
    ("shared", {"q": zeros(B, C)}, ValueError, ("q must be [B, R, C]", "(2, 16)")),
    ("shared", {"x": zeros(B, H, M, C)}, ValueError, ("x must be [B, M, C]", "(2, 2, 7, 16)")),
    ("shared", {"x": zeros(3, M, C)}, ValueError, ("x must be [B, M, C] with B=2, M=7, C=16", "(3, 7, 16)")),
    ("shared", {"x": zeros(B, M, 8)}, ValueError, ("x must be [B, M, C] with B=2, M=7, C=16", "(2, 7, 8)")),
    ("shared", {"q": zeros(B, N, C, dtype=INT)}, TypeError, ("q must be float16, bfloat16, float32", "torch.int64")),
    ("shared", {"x": zeros(B, M, C, dtype=F16)}, TypeError, ("x must have q's dtype torch.float32", "torch.float16")),
    ("shared", {"x": zeros(B, M, C, device=META)}, ValueError, ("x must be on q's device cpu", "meta")),
    ("shared", {"q": zeros(B, N, 1025), "x": zeros(B, M, 1025)}, ValueError, ("1 to 1024 channels", "C=1025")),
    ("shared", {"q": zeros(B, N, 0), "x": zeros(B, M, 0)}, ValueError, ("1 to 1024 channels", "C=0")),
    ("shared", {"scale": math.nan}, ValueError, ("scale must be a finite number", "nan")),
    ("shared", {"scale": math.inf}, ValueError, ("scale must be a finite number", "inf")),
    ("shared", {"scale": "1"}, ValueError, ("scale must be a finite number", "'1'")),
    ("shared", {"dropout_p": 1.0}, ValueError, ("dropout_p must be in [0, 1)", "1.0")),
    ("shared", {"dropout_p": -0.1}, ValueError, ("dropout_p must be in [0, 1)", "-0.1")),
    ("shared", {"dropout_p": math.nan}, ValueError, ("dropout_p must be in [0, 1)", "nan")),
    ("shared", {"key_mask": zeros(B, M)}, TypeError, ("key_mask must be torch.bool", "True = the token is visible", "float32", "polarity")),
    ("shared", {"key_mask": zeros(B, M, dtype=torch.uint8)}, TypeError, ("key_mask must be torch.bool", "uint8")),
    ("shared", {"key_mask": zeros(B, N, dtype=torch.bool)}, ValueError, ("key_mask must be [B, M] with B=2, M=7", "(2, 3)")),
    ("shared", {"key_mask": zeros(M, dtype=torch.bool)}, ValueError, ("key_mask must be [B, M] with B=2, M=7", "(7,)")),
    ("shared", {"key_mask": zeros(B, M, dtype=torch.bool, device=META)}, ValueError, ("key_mask must be on cpu", "meta")),
    ("shared", {"lengths": zeros(B, dtype=INT)}, TypeError, ("lengths must be torch.int32 [B]", "torch.int64")),
    ("shared", {"lengths": zeros(3, dtype=torch.int32)}, ValueError, ("lengths must be [B] with B=2", "(3,)")),
    ("shared", {"lengths": zeros(B, dtype=torch.int32, device=META)}, ValueError, ("lengths must be on cpu", "meta")),
    ("shared", {"lengths": zeros(B, dtype=torch.int32), "key_mask": zeros(B, M, dtype=torch.bool)}, ValueError, ("key_mask and lengths exclude each other",)),
    ("shared", {"x": pk.PackedInputs(zeros(B, M, C), C, True), "lengths": zeros(B, dtype=torch.int32)}, ValueError, ("must be given to pack_inputs",)),
    ("shared", {"backend": "cudnn"}, ValueError, ("backend must name backends among cuda, triton, sdpa, reference", "'cudnn'")),
    ("shared", {"backend": "sdpa", "return_lse": True}, ValueError, ("no backend can serve shared_kv_attention", "sdpa does not return lse")),
    ("shared", {"backend": "sdpa", "dropout_p": 0.5}, ValueError, ("no backend can serve shared_kv_attention", "row sums")),
    ("shared", {"dropout_p": "0.1"}, ValueError, ("dropout_p must be in [0, 1)", "'0.1'")),
    ("shared", {"dropout_p": None}, ValueError, ("dropout_p must be in [0, 1)", "None")),
    ("pack", {"eps": -1e-5}, ValueError, ("eps must be a finite number, at least 0", "-1e-05")),
    ("pack", {"eps": math.nan}, ValueError, ("eps must be a finite number, at least 0", "nan")),
    ("pack", {"eps": "1e-5"}, ValueError, ("eps must be a finite number, at least 0", "'1e-5'")),
    ("pack", {"content": [1]}, TypeError, ("content must be a torch.Tensor", "list")),
    ("pack", {"content": zeros(B, M)}, ValueError, ("content must be [B, M, C_content]", "(2, 7)")),
    ("pack", {"content": zeros(B, M, 5, dtype=torch.uint8)}, TypeError, ("content must be float16", "torch.uint8")),
    ("pack", {"content": zeros(B, M, 1025)}, ValueError, ("1 to 1024 channels together", "1025")),
    ("pack", {"content": zeros(B, M, 1000), "positions": zeros(M, 25)}, ValueError, ("1 to 1024 channels together", "1025")),
    ("pack", {"content": zeros(B, M, 0)}, ValueError, ("1 to 1024 channels together", "0")),
    ("pack", {"positions": zeros(3, 4)}, ValueError, ("positions must be [M, P] with M=7", "(3, 4)")),
    ("pack", {"positions": zeros(4)}, ValueError, ("positions must be [M, P]", "(4,)")),
    ("pack", {"positions": zeros(3, M, 4)}, ValueError, ("positions must be [B, M, P] with B=2, M=7", "(3, 7, 4)")),
    ("pack", {"positions": zeros(M, 4, dtype=INT)}, TypeError, ("positions must be float16", "torch.int64")),
    ("pack", {"positions": zeros(M, 4, device=META)}, ValueError, ("positions must be on content's device cpu", "meta")),
    ("pack", {"positions": pk.FourierPositions(2, (4.0, 4.0))}, ValueError, ("positions must have one max_resolution per grid axis (7,)", "2")),
    ("pack", {"coordinates": zeros(M, 1)}, ValueError, ("coordinates must come with FourierPositions",)),
    ("pack", {"dtype": INT}, TypeError, ("dtype must be float16", "torch.int64")),
    ("pack", {"key_mask": zeros(B, M, dtype=INT)}, TypeError, ("key_mask must be torch.bool", "int64")),
    ("pack", {"content": pk.InputArray.tokens(zeros(B, M, 5)), "positions": zeros(M, 2)}, ValueError, ("an InputArray brings its own",)),
    ("pack", {"positions": pk.FourierPositions(2, (4.0,)), "coordinates": zeros(M, 2)}, ValueError, ("coordinates must be", "axes=1", "(7, 2)")),
    ("pack", {"backend": "gpu"}, ValueError, ("backend must name backends", "'gpu'")),
    ("attend", {"query": torch.nested.nested_tensor([zeros(H, N, 4)])}, TypeError, ("query must be a dense tensor", "nested", "mask or lengths")),
    ("attend", {"query": zeros(B, N, 4)}, ValueError, ("query must be [B, H, Lq, d_qk]", "(2, 3, 4)")),
    ("attend", {"key": zeros(3, H, M, 4), "value": zeros(3, H, M, 6)}, ValueError, ("query and key must have one batch size", "2 and 3")),
    ("attend", {"key": zeros(B, H, M, 5)}, ValueError, ("key must be [B, H, Lk, d_qk]", "d_qk=4", "(2, 2, 7, 5)")),
    ("attend", {"value": zeros(B, H, M + 1, 6)}, ValueError, ("value must be [B, H, Lk, d_v]", "Lk=7", "(2, 2, 8, 6)")),
    ("attend", {"key": zeros(B, 3, M, 4), "value": zeros(B, 3, M, 6)}, ValueError, ("key must have", "H=2", "H=3")),
    ("attend", {"key": zeros(B, H, M, 4, dtype=F64)}, TypeError, ("key must have query's dtype torch.float32", "torch.float64")),
    ("attend", {"value": zeros(B, H, M, 6, device=META)}, ValueError, ("value must be on query's device cpu", "meta")),
    ("attend", {"scale": -math.inf}, ValueError, ("scale must be a finite number", "-inf")),
    ("attend", {"dropout_p": 1}, ValueError, ("dropout_p must be in [0, 1)", "1")),
    ("attend", {"attn_mask": zeros(N, M), "is_causal": True}, ValueError, ("attn_mask excludes is_causal",)),
    ("attend", {"attn_mask": zeros(N, M, dtype=INT)}, TypeError, ("attn_mask must be bool, float32", "torch.int64")),
    ("attend", {"attn_mask": zeros(N, M - 1)}, ValueError, ("attn_mask must broadcast to [B, H, Lq, Lk] = (2, 2, 3, 7)", "(3, 6)")),
    ("attend", {"attn_mask": zeros(1, B, H, N, M)}, ValueError, ("attn_mask must broadcast to [B, H, Lq, Lk]", "(1, 2, 2, 3, 7)")),
    ("attend", {"attn_mask": zeros(3, 1, 1, M)}, ValueError, ("attn_mask must broadcast to [B, H, Lq, Lk]", "(3, 1, 1, 7)")),
    ("attend", {"attn_mask": zeros(N, M, device=META)}, ValueError, ("attn_mask must be on query's device cpu", "meta")),
    ("attend", {"query": None}, TypeError, ("query must be a torch.Tensor", "NoneType")),
    ("attend", {"value": None}, TypeError, ("value must be a torch.Tensor", "NoneType")),
    ("attend", {"query": zeros(B, 0, N, 4)}, ValueError, ("query must be [B, H, Lq, d_qk] with H and d_qk at least 1", "(2, 0, 3, 4)")),
    ("attend", {"query": zeros(B, H, N, 0), "key": zeros(B, H, M, 0)}, ValueError, ("query must be [B, H, Lq, d_qk] with H and d_qk at least 1", "(2, 2, 3, 0)")),
    ("attend", {"key": zeros(B, 0, M, 4), "value": zeros(B, 0, M, 6), "enable_gqa": True}, ValueError, ("key must have a divisor", "H=0")),
    ("attend", {"key_mask": zeros(B, M)}, TypeError, ("key_mask must be torch.bool", "float32")),
    ("attend", {"key_mask": zeros(B, N, dtype=torch.bool)}, ValueError, ("key_mask must be [B, M]", "(2, 3)")),
    ("attend", {"backend": "sdpa", "return_lse": True}, ValueError, ("sdpa does not return lse",)),
    ("attend", {"causal_alignment": "lower_right"}, ValueError, ("causal_alignment must be one of upper_left, bottom_right", "'lower_right'")),
    ("attend", {"lengths": torch.ones(B)}, TypeError, ("lengths must be torch.int32", "float32")),
    ("attend", {"lengths": torch.ones(B, dtype=I32), "key_mask": zeros(B, M, dtype=torch.bool)}, ValueError, ("key_mask and lengths exclude each other",)),
    ("attend", {"query_mask": zeros(B, N)}, TypeError, ("query_mask must be torch.bool", "float32")),
    ("attend", {"query_mask": zeros(B, M, dtype=torch.bool)}, ValueError, ("query_mask must be [B, Lq] with B=2, Lq=3", "(2, 7)")),
    ("attend", {"key": (zeros(B, H, M, 4), zeros(B, H, M, 4))}, ValueError, ("key and value must be tensors or pairs", "2 and 1")),
    ("attend", {"key": (zeros(B, H, M, 4), zeros(B, H, M, 5)), "value": (zeros(B, H, M, 6),) * 2}, ValueError, ("key[1] must be [B, H, Lk, d_qk]", "(2, 2, 7, 5)")),
    ("attend", {"key": zeros(B, 1, M, 4)}, ValueError, ("value must be [B, H, Lk, d_v]", "H=1", "(2, 2, 7, 6)")),
    ("packed", {"cu_seqlens_k": None}, ValueError, ("cu_seqlens_q and cu_seqlens_k must be given together", "cu_seqlens_q alone")),
    ("packed", {"cu_seqlens_q": starts(0, 1, 2)}, ValueError, ("cu_seqlens_q must begin at 0 and end at the token count 3", "0 and 2")),
    ("packed", {"cu_seqlens_k": starts(1, 3, 7)}, ValueError, ("cu_seqlens_k must begin at 0 and end at the token count 7", "1 and 7")),
    ("packed", {"cu_seqlens_q": starts(0, 2, 1, 3), "cu_seqlens_k": starts(0, 1, 2, 7)}, ValueError, ("cu_seqlens_q must not decrease", "2 and then 1")),
    ("packed", {"cu_seqlens_q": starts(0, 1, 2, 3)}, ValueError, ("cu_seqlens_k must have cu_seqlens_q's 4 entries", "3")),
    ("packed", {"cu_seqlens_q": starts(0, 1, 3).long()}, TypeError, ("cu_seqlens_q must be torch.int32", "torch.int64")),
    ("packed", {"cu_seqlens_q": starts(0, 3)[None]}, ValueError, ("cu_seqlens_q must be [sequences + 1]", "(1, 2)")),
    ("packed", {"query": zeros(B, H, N, 4)}, ValueError, ("packed sequences must lie in one batch entry", "B=2")),
    ("packed", {"key_mask": zeros(1, M, dtype=torch.bool)}, ValueError, ("key_mask excludes cu_seqlens_q and cu_seqlens_k",)),
    ("packed", {"attn_mask": zeros(N, M)}, ValueError, ("attn_mask excludes cu_seqlens_q and cu_seqlens_k",)),
    ("cross", {"q": zeros(B, N, 4)}, ValueError, ("q must be [B, H, N, d_qk]", "(2, 3, 4)")),
    ("cross", {"q": zeros(3, H, N, 4)}, ValueError, ("q must be [B, H, N, d_qk] with B=2 or 1", "(3, 2, 3, 4)")),
    ("cross", {"w_k": zeros(9, C)}, ValueError, ("w_k must be [H*d_qk, C] with H*d_qk=8, C=16", "(9, 16)")),
    ("cross", {"w_v": zeros(12, C + 1)}, ValueError, ("w_v must be [H*d_v, C]", "C=16", "(12, 17)")),
    ("cross", {"w_v": zeros(13, C)}, ValueError, ("w_v must be [H*d_v, C] with H=2", "(13, 16)")),
    ("cross", {"w_v": zeros(12, C, device=META)}, ValueError, ("w_v must be on q's device cpu", "meta")),
    ("cross", {"b_v": zeros(11)}, ValueError, ("b_v must be [H*d_v] with H*d_v=12", "(11,)")),
    ("cross", {"norm_weight": zeros(C + 1)}, ValueError, ("norm_weight must be [C] with C=16", "(17,)")),
    ("cross", {"inputs": zeros(B, M, 1025), "w_k": zeros(8, 1025), "w_v": zeros(12, 1025)}, ValueError, ("1 to 1024 channels", "C=1025")),
    ("cross", {"inputs": zeros(B, M, C, dtype=INT)}, TypeError, ("content must be", "int64")),
    ("cross", {"inputs": pk.InputArray(zeros(B, M, C - 2), zeros(M, 2).requires_grad_()), "chunk_size": 4}, ValueError, ("chunk_size needs positions without gradient",)),
    ("cross", {"inputs": pk.InputArray.tokens(zeros(B, M, C)), "key_mask": zeros(B, M, dtype=torch.bool)}, ValueError, ("must come with the InputArray",)),
    ("cross", {"inputs": None}, TypeError, ("inputs must be a torch.Tensor", "NoneType")),
    ("cross", {"inputs": pk.PackedInputs(zeros(B, M, C, device=META), C, True)}, ValueError, ("inputs must be on q's device cpu", "meta")),
    ("cross", {"w_k": None}, TypeError, ("w_k must be a torch.Tensor", "NoneType")),
    ("cross", {"q": zeros(B, 0, N, 4)}, ValueError, ("q must be [B, H, N, d_qk]", "H and d_qk at least 1", "(2, 0, 3, 4)")),
    ("cross", {"q": zeros(B, H, N, 0)}, ValueError, ("q must be [B, H, N, d_qk]", "H and d_qk at least 1", "(2, 2, 3, 0)")),
    ("cross", {"w_v": zeros(0, C)}, ValueError, ("w_v must be [H*d_v, C] with H=2, d_v at least 1", "(0, 16)")),
    ("cross", {"norm_weight": zeros(C, device=META)}, ValueError, ("norm_weight must be on q's device cpu", "meta")),
    ("cross", {"b_v": zeros(12, device=META)}, ValueError, ("b_v must be on q's device cpu", "meta")),
    ("cross", {"norm_bias": zeros(C, dtype=INT)}, TypeError, ("norm_bias must be float16", "torch.int64")),
    ("cross", {"eps": math.nan}, ValueError, ("eps must be a finite number, at least 0", "nan")),
    ("cross", {"eps": -1.0, "chunk_size": 4}, ValueError, ("eps must be a finite number, at least 0", "-1.0")),
    ("cross", {"chunk_size": 2.5}, ValueError, ("chunk_size must be a positive number of tokens", "2.5")),
    ("cross", {"chunk_size": True}, ValueError, ("chunk_size must be a positive number of tokens", "True")),
    ("cross", {"dropout_p": "0.5"}, ValueError, ("dropout_p must be in [0, 1)", "'0.5'")),
    ("cross", {"method": "fused"}, ValueError, ("method must be 'absorbed', 'projected' or None", "'fused'")),
    ("cross", {"chunk_size": 0}, ValueError, ("chunk_size must be a positive number of tokens", "0")),
    ("cross", {"chunk_size": 4, "method": "projected"}, ValueError, ("chunk_size needs method='absorbed'",)),
    ("cross", {"scale": math.nan}, ValueError, ("scale must be a finite number", "nan")),
    ("cross", {"dropout_p": 2}, ValueError, ("dropout_p must be in [0, 1)", "2")),
    ("cross", {"key_mask": zeros(B, M, dtype=INT)}, TypeError, ("key_mask must be bool", "int64")),
    ("cross", {"backend": "triton", "key_mask": zeros(B, 1, dtype=torch.bool)}, ValueError, ("key_mask must be [B, M] with B=2, M=7", "(2, 1)")),
    ("rotate", {"x": [1.0]}, TypeError, ("x must be a torch.Tensor", "list")),
    ("rotate", {"x": zeros(B, N, 8)}, ValueError, ("x must be [B, H, L, d]", "(2, 3, 8)")),
    ("rotate", {"x": zeros(B, H, N, 8, dtype=INT)}, TypeError, ("x must be float16, bfloat16, float32", "torch.int64")),
    ("rotate", {"x": zeros(B, H, N, 1025)}, ValueError, ("x must have at most 1024 channels", "d=1025")),
    ("rotate", {"cos": None}, TypeError, ("cos must be a torch.Tensor", "NoneType")),
    ("rotate", {"sin": zeros(N, 3, dtype=INT)}, TypeError, ("sin must be float16, bfloat16, float32", "torch.int64")),
    ("rotate", {"cos": zeros(N)}, ValueError, ("cos must be [L, r/2] or [B, L, r/2]", "(3,)")),
    ("rotate", {"cos": zeros(B, 1, N, 3)}, ValueError, ("cos must be [L, r/2] or [B, L, r/2]", "(2, 1, 3, 3)")),
    ("rotate", {"cos": zeros(N, 5), "sin": zeros(N, 5)}, ValueError, ("r from 2 to x's d=8 channels", "r/2=5 in (3, 5)")),
    ("rotate", {"cos": zeros(N, 0), "sin": zeros(N, 0)}, ValueError, ("r from 2 to x's d=8 channels", "r/2=0 in (3, 0)")),
    ("rotate", {"x": zeros(B, H, N, 1)}, ValueError, ("r from 2 to x's d=1 channels", "r/2=3 in (3, 3)")),
    ("rotate", {"cos": zeros(M, 3)}, ValueError, ("cos must be [L, r/2] with L=3, r/2=3", "(7, 3)")),
    ("rotate", {"cos": zeros(3, N, 3), "sin": zeros(3, N, 3)}, ValueError, ("cos must be [B, L, r/2] with B=2, L=3, r/2=3", "(3, 3, 3)")),
    ("rotate", {"sin": zeros(N, 2)}, ValueError, ("sin must be [L, r/2] with L=3, r/2=3", "(3, 2)")),
    ("rotate", {"sin": zeros(B, N, 3)}, ValueError, ("sin must be [L, r/2] with L=3, r/2=3", "(2, 3, 3)")),
    ("rotate", {"sin": zeros(N, 3, dtype=F16)}, TypeError, ("sin must have cos's dtype torch.float32", "torch.float16")),
    ("rotate", {"cos": zeros(N, 3, device=META)}, ValueError, ("cos must be on x's device cpu", "meta")),
    ("rotate", {"interleaved": 1}, TypeError, ("interleaved must be a bool", "1")),
    ("rotate", {"inverse": "yes"}, TypeError, ("inverse must be a bool", "'yes'")),
    ("rotate", {"backend": "cuda"}, ValueError, ("no backend can serve rotary_embedding", "cuda has no rotary_embedding")),
    ("decode", {"queries": None}, TypeError, ("queries must be a torch.Tensor", "NoneType")),
    ("decode", {"queries": zeros(M, C)}, ValueError, ("queries must be [B, O, C]", "(7, 16)")),
    ("decode", {"queries": zeros(3, M, C)}, ValueError, ("queries must be [B, O, C] with B=2 or 1", "3")),
    ("decode", {"queries": zeros(B, M, 0), "w_q": zeros(4, 0)}, ValueError, ("content and positions must have a channel between them", "C=0")),
    ("decode", {"queries": pk.PackedInputs(zeros(B, M, C, device=META), C, True)}, ValueError, ("queries must be on key's device cpu", "meta")),
    ("decode", {"queries": pk.InputArray.tokens(zeros(B, M, C), key_mask=zeros(B, M, dtype=torch.bool)), "query_mask": zeros(B, M, dtype=torch.bool)}, ValueError, ("query_mask and a mask or lengths of the InputArray exclude each other",)),
    ("decode", {"key": None}, TypeError, ("key must be a torch.Tensor", "NoneType")),
    ("decode", {"key": zeros(B, N, 4)}, ValueError, ("key must be [B, H, N, d_qk]", "(2, 3, 4)")),
    ("decode", {"key": zeros(B, 1, N, 0)}, ValueError, ("key must be [B, H, N, d_qk] with H and d_qk at least 1", "(2, 1, 3, 0)")),
    ("decode", {"value": zeros(B, 1, N + 1, 6)}, ValueError, ("value must be [B, H, N, d_v] with B=2, H=1, N=3", "(2, 1, 4, 6)")),
    ("decode", {"value": zeros(B, 1, N, 0), "w_o": zeros(5, 0)}, ValueError, ("value must be [B, H, N, d_v] with d_v at least 1", "(2, 1, 3, 0)")),
    ("decode", {"value": zeros(B, 1, N, 6, dtype=INT)}, TypeError, ("value must be float16", "torch.int64")),
    ("decode", {"w_q": zeros(4, C + 1)}, ValueError, ("w_q must be [H*d_qk, C] with H*d_qk=4, C=16", "(4, 17)")),
    ("decode", {"w_q": zeros(4, C, device=META)}, ValueError, ("w_q must be on key's device cpu", "meta")),
    ("decode", {"w_o": zeros(5, 7)}, ValueError, ("w_o must be [C_out, H*d_v] with C_out=5, H*d_v=6", "(5, 7)")),
    ("decode", {"w_o": zeros(0, 6)}, ValueError, ("w_o must be [C_out, H*d_v] with C_out at least 1", "(0, 6)")),
    ("decode", {"b_q": zeros(5)}, ValueError, ("b_q must be [H*d_qk] with H*d_qk=4", "(5,)")),
    ("decode", {"b_o": zeros(5, device=META)}, ValueError, ("b_o must be on key's device cpu", "meta")),
    ("decode", {"norm_bias": zeros(C + 1)}, ValueError, ("norm_bias must be [C] with C=16", "(17,)")),
    ("decode", {"lengths": zeros(B, dtype=INT)}, TypeError, ("lengths must be torch.int32", "torch.int64")),
    ("decode", {"query_mask": zeros(B, M)}, TypeError, ("query_mask must be torch.bool", "float32")),
    ("decode", {"query_mask": zeros(B, N, dtype=torch.bool)}, ValueError, ("query_mask must be [B, O] with B=2, O=7", "(2, 3)")),
    ("decode", {"method": "fused"}, ValueError, ("method must be 'absorbed', 'projected' or None", "'fused'")),
    ("decode", {"method": "absorbed", "key": zeros(B, 2, N, 2), "value": zeros(B, 2, N, 3)}, ValueError, ("method='absorbed' cannot serve this call", "several heads", "H=2")),
    ("decode", {"method": "absorbed", "queries": zeros(B, M, 1023), "w_q": zeros(4, 1023), "b_q": zeros(4, dtype=F16), "key": zeros(B, 1, N, 4, dtype=F16)}, ValueError, ("more than 1024 channels", "1040 and 5")),
    ("decode", {"eps": -1.0}, ValueError, ("eps must be a finite number, at least 0", "-1.0")),
    ("decode", {"scale": math.nan}, ValueError, ("scale must be a finite number", "nan")),
    ("decode", {"dropout_p": 1.0}, ValueError, ("dropout_p must be in [0, 1)", "1.0")),
    ("pack", {"constants": -1}, ValueError, ("constants must be a number of channels, at least 0", "-1")),
    ("pack", {"constants": 2.0}, ValueError, ("constants must be a number of channels, at least 0", "2.0")),
    ("pack", {"content": zeros(B, M, 1023), "constants": 2}, ValueError, ("constants must leave at most 1024 channels in all", "2 after 1023")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "changes", "error", "parts"),
    REFUSED,
    ids=[f"{entry}-{'-'.join(changes)}-{number}" for number, (entry, changes, _, _) in enumerate(REFUSED)],
)
def test_bad_call_is_one_sentence_before_any_launch(
    entry: str, changes: dict[str, Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with Recorder() as recorder, pytest.raises(error) as raised:
        ENTRY[entry](**changes)
    assert type(raised.value) is error
    assert [part for part in parts if part not in str(raised.value)] == [], str(raised.value)
    assert recorder.computed == []


@pytest.mark.parametrize(("entry", "changes"), [row[:2] for row in REFUSED])
def test_explain_refuses_with_the_same_sentence(entry: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument that the call refuses; backends that refuse are what an explanation lists."""
    with pytest.raises((TypeError, ValueError)) as called:
        ENTRY[entry](**changes)
    names = "shared_kv_attention pack_inputs attention input_cross_attention output_cross_attention rotary_embedding"
    for name in names.split():
        monkeypatch.setattr(pk, name, partial(pk.explain, name))
    if str(called.value).startswith("no backend can serve"):
        explanation = ENTRY[entry](**changes)
        assert explanation.backend is None and all("; ".join(why) in str(called.value) for why in explanation.refused.values())
        return
    with pytest.raises(called.type) as explained:
        ENTRY[entry](**changes)
    assert str(explained.value) == str(called.value)


@pytest.mark.parametrize("entry", ENTRY)
def test_the_same_call_without_the_mistake_computes(entry: str) -> None:
    with Recorder() as recorder:
        ENTRY[entry](backend="reference")
    assert recorder.computed


@pytest.mark.parametrize("scale", [None, 0, -2.5, 1e-30])
def test_finite_scales_are_taken(scale: float | None) -> None:
    assert cross(scale=scale).isfinite().all()


@pytest.mark.parametrize("mixed", ["w_k", "w_v", "b_k", "b_v", "norm_weight", "norm_bias"])
@pytest.mark.parametrize("heads", [1, 2])
def test_parameters_in_another_dtype_raise_or_are_cast(mixed: str, heads: int) -> None:
    """fp32 parameters beside bf16 queries: the result has q's dtype whatever the head count, or a TypeError says no."""
    arguments: dict[str, Any] = {
        "q": zeros(B, heads, N, 4, dtype=torch.bfloat16), "inputs": zeros(B, M, C, dtype=torch.bfloat16),
        "w_k": zeros(4 * heads, C, dtype=torch.bfloat16), "w_v": zeros(6 * heads, C, dtype=torch.bfloat16),
        "b_k": zeros(4 * heads, dtype=torch.bfloat16), "b_v": zeros(6 * heads, dtype=torch.bfloat16),
        "norm_weight": zeros(C, dtype=torch.bfloat16), "norm_bias": zeros(C, dtype=torch.bfloat16),
    }  # fmt: skip
    arguments[mixed] = arguments[mixed].float()
    for method in ("absorbed", "projected"):
        try:
            out = cross(**arguments, method=method)
        except TypeError as error:
            assert mixed in str(error)
        else:
            assert out.dtype == torch.bfloat16


def test_problems_hold_no_tensors_and_name_their_sizes() -> None:
    for op, problem_type in PROBLEMS.items():
        assert op == problem_type.OP
        assert set(problem_type.SIZES) <= set(problem_type.__dataclass_fields__)
    problem = SharedKVProblem.of(zeros(B, N, C), zeros(B, M, C), None, None, 1.0, 0.0, False)
    assert (problem.B, problem.R, problem.M, problem.C) == (B, N, M, C)
    assert hash(problem) == hash(problem.with_sizes(M=M)) and problem != problem.with_sizes(M=M + 1)
    assert problem.static_values() == problem.with_sizes(B=9, R=9, M=9).static_values()
    assert problem.static_values() != replace(problem, masked=True).static_values()


def test_problem_fields_follow_the_tensors() -> None:
    q, x = zeros(B, N, C).requires_grad_(), zeros(B, M, C)
    lengths = torch.ones(B, dtype=torch.int32)
    problem = SharedKVProblem.of(q, x, None, lengths, 1.0, 0.5, True)
    assert problem.masked and problem.dropout and problem.needs_lse and problem.needs_grad
    with torch.no_grad():
        assert not SharedKVProblem.of(q, x, None, None, 1.0, 0.0, False).needs_grad
    packing = PackProblem.of(zeros(B, M, 3), zeros(B, M, 2), zeros(3, 14), None, None, True, F16)
    assert packing.fourier and packing.positions_batched and (packing.C, packing.C_padded) == (17, 32)
    assert packing.content_dtype == torch.float32 and packing.dtype == F16
    keys, values = (zeros(B, 1, M, 4), zeros(B, 1, 5, 4)), (zeros(B, 1, M, 6), zeros(B, 1, 5, 6))
    broadcast = AttentionProblem.of(zeros(1, H, N, 4), keys, values, NO_MASKS)
    assert (broadcast.B, broadcast.H_kv, broadcast.Lk, broadcast.Lk_first, broadcast.segments) == (B, 1, M + 5, M, 2)
    assert broadcast.attn_mask == "none" and broadcast.causal == "none" and not broadcast.needs_grad
    masks = Masks(attn_mask=zeros(N, M).requires_grad_(), lengths=lengths)
    masked = AttentionProblem.of(zeros(B, H, N, 4), (zeros(B, H, M, 4),), (zeros(B, H, M, 6),), masks)
    assert (masked.attn_mask, masked.lengths, masked.key_mask, masked.needs_grad) == ("learned", True, False, True)


def test_starts_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them waits for the GPU; a change in place is looked at again."""
    looks = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: looks.append(1) or tolist(tensor))
    given = starts(0, 1, 3)
    for _ in range(2):
        packed(cu_seqlens_q=given)
    assert len(looks) == 3  # cu_seqlens_k is new each time
    given[1] = 2
    packed(cu_seqlens_q=given)
    assert len(looks) == 5


def test_problem_of_a_crossing() -> None:
    crossing = CrossAttentionProblem.of(
        zeros(1, H, N, 4), zeros(8, C), zeros(12, C), B=B, M=M, C=C, dtype=F16, packed=False, inputs_need_grad=False
    )
    assert (crossing.B, crossing.d_qk, crossing.d_v) == (B, 4, 6)


@pytest.mark.parametrize(("channels", "padded"), [(1, 16), (15, 16), (16, 16), (17, 32), (261, 272), (1024, 1024)])
def test_pad_channels(channels: int, padded: int) -> None:
    assert pad_channels(channels) == padded
