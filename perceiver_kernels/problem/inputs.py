"""The problems of the input array: packing it, attending to it packed, and with projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perceiver_kernels.checks import FLOAT_DTYPES
from perceiver_kernels.problem.base import Problem
from perceiver_kernels.problem.checks import (
    MAX_CHANNELS,
    check_constants,
    check_device,
    check_floating,
    check_is_tensor,
    check_key_visibility,
    check_like,
    check_probability,
    check_projection,
    check_rank,
    check_scale,
    check_shape,
    constant,
    is_positive,
    needs_gradient,
    pad_channels,
    shape_of,
)


@dataclass(frozen=True)
class PackProblem(Problem):
    """Normalise, concatenate, pad and cast inputs: [B, M, C_content] (+ positions) to [B, M, C_padded]."""

    OP: ClassVar[str] = "pack_inputs"
    SIZES: ClassVar[tuple[str, ...]] = ("B", "M", "C_content", "C_positions")

    B: int
    M: int
    C_content: int
    C_positions: int
    content_dtype: torch.dtype
    dtype: torch.dtype
    device_type: str
    fourier: bool
    positions_batched: bool
    normalize: bool
    masked: bool
    needs_grad: bool
    constants: int = 0

    @property
    def C(self) -> int:
        return self.C_content + self.C_positions

    @property
    def C_padded(self) -> int:
        return pad_channels(self.C + self.constants)

    @classmethod
    def of(
        cls,
        content: Tensor,
        positions: Tensor | None,
        fourier: Tensor | None,
        key_mask: Tensor | None,
        lengths: Tensor | None,
        normalize: bool,
        dtype: torch.dtype | None,
        constants: int = 0,
    ) -> PackProblem:
        """Check the tensors of one pack: content [B, M, C_content], positions [M, P] or [B, M, P], fourier [3, F]."""
        check_is_tensor("content", content)
        check_floating("content", content)
        check_rank("content", content, "B, M, C_content")
        B, M, C_content = *content.shape[:2], constant(content.shape[2])
        C_positions, batched = 0, False
        if positions is not None:
            check_is_tensor("positions", positions)
            check_floating("positions", positions)
            check_device("positions", positions, "content", content)
            batched = positions.ndim == 3
            if batched:
                check_shape("positions", positions, "B, M, P", (B, M, positions.shape[-1]))
            else:
                check_rank("positions", positions, "M, P")
                check_shape("positions", positions, "M, P", (M, positions.shape[-1]))
            C_positions = positions.shape[-1] if fourier is None else fourier.shape[-1]
        channels = C_content + C_positions
        if not 1 <= channels <= MAX_CHANNELS:
            raise ValueError(f"content and positions must have 1 to {MAX_CHANNELS} channels together, got {channels}")
        check_constants(constants, channels)
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        check_key_visibility(key_mask, lengths, B, M, content.device)
        return cls(
            B=B, M=M, C_content=C_content, C_positions=C_positions, content_dtype=content.dtype,
            dtype=dtype or content.dtype, device_type=content.device.type, fourier=fourier is not None,
            positions_batched=batched, normalize=normalize,
            masked=key_mask is not None or lengths is not None, needs_grad=needs_gradient(content, positions),
            constants=constants,
        )  # fmt: skip


@dataclass(frozen=True)
class SharedKVProblem(Problem):
    """z = softmax(scale q x^T) x with keys and values one tensor: q [B, R, C], x [B, M, C]."""

    OP: ClassVar[str] = "shared_kv_attention"
    SIZES: ClassVar[tuple[str, ...]] = ("B", "R", "M")

    B: int
    R: int
    M: int
    C: int
    dtype: torch.dtype
    device_type: str
    masked: bool
    dropout: bool
    needs_lse: bool
    needs_grad: bool

    @classmethod
    def of(
        cls, q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, scale: float, dropout_p: float,
        needs_lse: bool,
    ) -> SharedKVProblem:  # fmt: skip
        """Check q [B, R, C], x [B, M, C], key_mask bool [B, M] or lengths int32 [B]."""
        for name, tensor, axes in (("q", q, "B, R, C"), ("x", x, "B, M, C")):
            check_is_tensor(name, tensor)
            check_floating(name, tensor)
            check_rank(name, tensor, axes)
        B, R, C = *q.shape[:2], constant(q.shape[2])
        M = x.shape[1]
        if not 1 <= C <= MAX_CHANNELS:
            raise ValueError(f"q must have 1 to {MAX_CHANNELS} channels, got C={C}")
        check_shape("x", x, "B, M, C", (B, M, C))
        check_like("x", x, "q", q)
        check_key_visibility(key_mask, lengths, B, M, q.device)
        check_scale(scale)
        check_probability("dropout_p", dropout_p)
        return cls(
            B=B, R=R, M=M, C=C, dtype=q.dtype, device_type=q.device.type,
            masked=key_mask is not None or lengths is not None, dropout=is_positive(dropout_p), needs_lse=needs_lse,
            needs_grad=needs_gradient(q, x),
        )  # fmt: skip


@dataclass(frozen=True)
class CrossAttentionProblem(Problem):
    """Input-to-latent cross-attention with its key and value projections: what the absorbed-or-projected choice needs."""

    OP: ClassVar[str] = "input_cross_attention"
    SIZES: ClassVar[tuple[str, ...]] = ("B", "H", "N", "M", "C", "d_qk", "d_v")

    B: int
    H: int
    N: int
    M: int
    C: int
    d_qk: int
    d_v: int
    dtype: torch.dtype
    device_type: str
    packed: bool
    needs_grad: bool
    inputs_need_grad: bool

    @classmethod
    def of(
        cls, q: Tensor, w_k: Tensor, w_v: Tensor, *, B: int, M: int, C: int, dtype: torch.dtype, packed: bool,
        inputs_need_grad: bool,
    ) -> CrossAttentionProblem:  # fmt: skip
        """Check q [B or 1, H, N, d_qk], w_k [H*d_qk, C] and w_v [H*d_v, C] against inputs of [B, M, C]."""
        for name, tensor, axes in (("q", q, "B, H, N, d_qk"), ("w_k", w_k, "H*d_qk, C"), ("w_v", w_v, "H*d_v, C")):
            check_is_tensor(name, tensor)
            check_floating(name, tensor)
            check_rank(name, tensor, axes)
            check_device(name, tensor, "q", q)
        H, N, d_qk, C = constant(q.shape[1]), q.shape[2], constant(q.shape[3]), constant(C)
        if q.shape[0] not in (1, B) or not (H and d_qk):
            raise ValueError(f"q must be [B, H, N, d_qk] with B={B} or 1, H and d_qk at least 1, got {shape_of(q)}")
        if not 1 <= C <= MAX_CHANNELS:
            raise ValueError(f"inputs must have 1 to {MAX_CHANNELS} channels, got C={C}")
        check_projection("w_k", w_k, "H*d_qk, C", H * d_qk, C)
        if w_v.shape[0] % H or not w_v.shape[0]:
            raise ValueError(f"w_v must be [H*d_v, C] with H={H}, d_v at least 1, got {shape_of(w_v)}")
        check_projection("w_v", w_v, "H*d_v, C", w_v.shape[0], C)
        return cls(
            B=B, H=H, N=N, M=M, C=C, d_qk=d_qk, d_v=w_v.shape[0] // H, dtype=dtype,
            device_type=q.device.type, packed=packed, needs_grad=needs_gradient(q, w_k, w_v), inputs_need_grad=inputs_need_grad,
        )  # fmt: skip
