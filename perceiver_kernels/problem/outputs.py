"""The problem of output queries that read the latents, projections included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perceiver_kernels.problem.base import Problem
from perceiver_kernels.problem.checks import (
    MAX_CHANNELS,
    check_device,
    check_floating,
    check_is_tensor,
    check_projection,
    check_rank,
    check_shape,
    constant,
    needs_gradient,
    pad_channels,
    shape_of,
)


@dataclass(frozen=True)
class OutputCrossAttentionProblem(Problem):
    """Output queries [b, O, C] that read keys and values of N latents: what the absorbed-or-projected choice needs.

    ``query_batch`` b is 1 where the batch shares the queries. ``constants`` are the channels of ones that packed queries bring,
    ``bias_channels`` those that absorbed keys need.
    """

    OP: ClassVar[str] = "output_cross_attention"
    SIZES: ClassVar[tuple[str, ...]] = ("B", "query_batch", "H", "O", "N", "C", "C_out", "d_qk", "d_v")

    B: int
    query_batch: int
    H: int
    O: int
    N: int
    C: int
    C_out: int
    d_qk: int
    d_v: int
    dtype: torch.dtype
    device_type: str
    packed: bool
    constants: int
    bias_channels: int
    needs_grad: bool
    queries_need_grad: bool

    @property
    def channels(self) -> int:
        """Channels of absorbed queries and keys."""
        return pad_channels(self.C + (self.constants if self.packed else self.bias_channels))

    @property
    def against_absorption(self) -> tuple[str, ...]:
        """Sentences that say why the projections cannot act on the latents."""
        reasons = []
        if self.H > 1:
            reasons.append(f"the projections of several heads do not fit into one key and one value, got H={self.H}")
        if max(self.channels, self.C_out) > MAX_CHANNELS:
            needed = f"{self.channels} and {self.C_out}"
            reasons.append(f"absorbed keys and values would have more than {MAX_CHANNELS} channels, got {needed}")
        if self.packed and self.constants < self.bias_channels:
            hint = f"pack_inputs(..., constants={self.bias_channels})"
            reasons.append(f"the biases of queries need channels of ones in packed queries, see {hint}, got {self.constants}")
        return tuple(reasons)

    @classmethod
    def of(
        cls, key: Tensor, value: Tensor, w_q: Tensor, w_o: Tensor, *, query_batch: int, O: int, C: int, dtype: torch.dtype,
        packed: bool, constants: int, bias_channels: int, queries_need_grad: bool,
    ) -> OutputCrossAttentionProblem:  # fmt: skip
        """Check key [B, H, N, d_qk], value [B, H, N, d_v], w_q [H*d_qk, C] and w_o [C_out, H*d_v] against queries [b, O, C]."""
        for name, tensor, axes in (
            ("key", key, "B, H, N, d_qk"), ("value", value, "B, H, N, d_v"), ("w_q", w_q, "H*d_qk, C"),
            ("w_o", w_o, "C_out, H*d_v"),
        ):  # fmt: skip
            check_is_tensor(name, tensor)
            check_floating(name, tensor)
            check_rank(name, tensor, axes)
            check_device(name, tensor, "key", key)
        B, H, N, d_qk = key.shape[0], constant(key.shape[1]), key.shape[2], constant(key.shape[3])
        d_v, C, C_out = constant(value.shape[3]), constant(C), constant(w_o.shape[0])
        if not (H and d_qk):
            raise ValueError(f"key must be [B, H, N, d_qk] with H and d_qk at least 1, got {shape_of(key)}")
        check_shape("value", value, "B, H, N, d_v", (B, H, N, d_v))
        if not d_v:
            raise ValueError(f"value must be [B, H, N, d_v] with d_v at least 1, got {shape_of(value)}")
        if query_batch not in (1, B):
            raise ValueError(f"queries must be [B, O, C] with B={B} or 1, got a batch of {query_batch}")
        check_projection("w_q", w_q, "H*d_qk, C", H * d_qk, C)
        check_shape("w_o", w_o, "C_out, H*d_v", (C_out, H * d_v))
        if not C_out:
            raise ValueError(f"w_o must be [C_out, H*d_v] with C_out at least 1, got {shape_of(w_o)}")
        return cls(
            B=B, query_batch=query_batch, H=H, O=O, N=N, C=C, C_out=C_out, d_qk=d_qk, d_v=d_v, dtype=dtype,
            device_type=key.device.type, packed=packed, constants=constants, bias_channels=bias_channels,
            needs_grad=needs_gradient(key, value, w_q, w_o), queries_need_grad=queries_need_grad,
        )  # fmt: skip
