"""The problem of rotary embedding."""

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
    check_like,
    check_rank,
    check_shape,
    constant,
    needs_gradient,
    shape_of,
)


@dataclass(frozen=True)
class RotaryProblem(Problem):
    """Turn the first ``width`` channels of x [B, H, L, d] by tables cos and sin, [L, width / 2] or one for each batch entry."""

    OP: ClassVar[str] = "rotary_embedding"
    SIZES: ClassVar[tuple[str, ...]] = ("B", "H", "L")

    B: int
    H: int
    L: int
    d: int
    width: int
    dtype: torch.dtype
    table_dtype: torch.dtype
    device_type: str
    batched: bool
    learned: bool
    needs_grad: bool

    @classmethod
    def of(cls, x: Tensor, cos: Tensor, sin: Tensor) -> RotaryProblem:
        """Check x [B, H, L, d], and cos and sin [L, r/2] or [B or 1, L, r/2] with 2 <= r <= d."""
        check_is_tensor("x", x)
        check_floating("x", x)
        check_rank("x", x, "B, H, L, d")
        (B, H, L), d = x.shape[:3], constant(x.shape[3])
        if d > MAX_CHANNELS:
            raise ValueError(f"x must have at most {MAX_CHANNELS} channels, got d={d}")
        for name, table in (("cos", cos), ("sin", sin)):
            check_is_tensor(name, table)
            check_floating(name, table)
            check_device(name, table, "x", x)
        if cos.ndim not in (2, 3):
            raise ValueError(f"cos must be [L, r/2] or [B, L, r/2], got {shape_of(cos)}")
        batched, half = cos.ndim == 3 and cos.shape[0] != 1, constant(cos.shape[-1])
        if not 2 <= 2 * half <= d:
            raise ValueError(f"cos must be [L, r/2] with r from 2 to x's d={d} channels, got r/2={half} in {shape_of(cos)}")
        axes, expected = ("L, r/2", (L, half)) if cos.ndim == 2 else ("B, L, r/2", (B if batched else 1, L, half))
        check_shape("cos", cos, axes, expected)
        check_shape("sin", sin, axes, expected)
        check_like("sin", sin, "cos", cos)
        return cls(
            B=B, H=H, L=L, d=d, width=2 * half, dtype=x.dtype, table_dtype=cos.dtype, device_type=x.device.type,
            batched=batched, learned=needs_gradient(cos, sin), needs_grad=needs_gradient(x, cos, sin),
        )  # fmt: skip
