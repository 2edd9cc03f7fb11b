"""The rotary_embedding boundary: one operator, whose gradient is itself, turned the other way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from perceiver_kernels.dispatch import load
from perceiver_kernels.layouts import empty_heads
from perceiver_kernels.ops.boundary import BatchFold, define, transforms_active


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, backend: str) -> Tensor:
    return load("rotary_embedding", backend).rotary_embedding(x, cos, sin, interleaved=interleaved, inverse=inverse)


def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, backend: str) -> Tensor:
    return empty_heads(x, *x.shape)


ROTARY = define(
    "rotary_embedding",
    "(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse, str backend) -> Tensor",
    _rotary,
    _rotary_fake,
)


@register_flop_formula(torch.ops.perceiver_kernels.rotary_embedding)
def _rotary_flops(x_shape: Any, cos_shape: Any, *args: Any, **kwargs: Any) -> int:
    B, H, L, _ = x_shape
    # Four products and two sums a pair.
    return 6 * B * H * L * cos_shape[-1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, *arguments = inputs
    ctx.save_for_backward(cos, sin)
    ctx.arguments = arguments


def _gradient(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    """The transposed rotation of dout, itself differentiable: derivatives of any order."""
    cos, sin = ctx.saved_tensors
    interleaved, inverse, backend = ctx.arguments
    dx = rotary_embedding(dout, cos, sin, interleaved, not inverse, backend) if ctx.needs_input_grad[0] else None
    return (dx, *(None,) * 5)


class _Rotary(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = ROTARY(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradient)


class _RotaryFunctorch(Function):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return ROTARY(*inputs)

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradient)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """The mapped axis is folded into the batch; tables shared by the batch stay shared."""
        x, cos, sin, *rest = inputs
        batch = x.shape[0] if in_dims[0] is None else x.movedim(in_dims[0], 0).shape[1]
        fold = BatchFold(info.batch_size, batch)
        tables = list(zip((cos, sin), in_dims[1:3], strict=True))
        if any(dim is not None or table.ndim == 3 for table, dim in tables):
            cos, sin = (fold(table, dim, rank=3) for table, dim in tables)
        out = rotary_embedding(fold(x, in_dims[0]), cos, sin, *rest)
        return out.unflatten(0, (info.batch_size, batch)), 0


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, backend: str) -> Tensor:
    """Differentiable rotation of x on a kernel backend; see functional.rotary_embedding."""
    inputs = (x, cos, sin, interleaved, inverse, backend)
    if transforms_active():
        return _RotaryFunctorch.apply(*inputs)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotary.apply(*inputs)
    return ROTARY(*inputs)
