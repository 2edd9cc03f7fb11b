"""A linear layer whose bias gradient takes no workspace."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from perceiver_kernels.functional.common import autocast_dtype
from perceiver_kernels.ops.boundary import transforms_active


class _BiasGradient(Function):
    """Identity in ``out`` [..., D]; ``bias`` [D], already added to it, gets the sum of the gradient's rows."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        # Not a view: torch lets nobody change those of a function in place.
        return out.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows = gradient.flatten(0, -2)
        return gradient, torch.mv(rows.mT, rows.new_ones(rows.shape[0])).to(ctx.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias as `torch.nn.functional.linear` computes it, x [..., C], weight [D, C].

    In 16 bits on a GPU the gradient of the bias is a matrix-vector product: torch's sum over rows takes a workspace for it,
    32 MiB for 4,096 rows of 1,024 on an H200, which was the peak of a whole layer's backward.
    """
    half = (autocast_dtype(x) or x.dtype).itemsize == 2  # in wider dtypes a product might be rounded to TF32
    if bias is None or not (bias.requires_grad and torch.is_grad_enabled()) or not (half and x.is_cuda) or transforms_active():
        return F.linear(x, weight, bias)
    return _BiasGradient.apply(F.linear(x, weight, bias.detach()), bias)
