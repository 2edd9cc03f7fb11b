"""Parameters with zeros after them, so that matrix products of odd widths (261, 322) run on 16-byte rows.

A GPU's matrix product whose rows are not multiples of 16 bytes runs five times slower: 41 us instead of 8 for 4,096 x 1,024
x 261 in bf16 on an H200. Zero channels change no result.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from perceiver_kernels.ops.boundary import transforms_active

Shape = tuple[int, ...]


class _ZeroPadded(Function):
    """Copies of tensors in the corner of larger zero tensors that lie in one buffer: few kernels for many parameters."""

    @staticmethod
    def forward(ctx: Any, shapes: tuple[Shape, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.shapes = [t.shape for t in tensors]
        ctx.set_materialize_grads(False)
        # Every output starts on 128 bytes.
        sizes = [math.ceil(math.prod(shape) / 64) * 64 for shape in shapes]
        buffer = tensors[0].new_zeros(sum(sizes))
        outputs = [part[: math.prod(s)].view(s) for part, s in zip(buffer.split(sizes), shapes, strict=True)]
        corners = [out[tuple(slice(n) for n in t.shape)] for out, t in zip(outputs, tensors, strict=True)]
        contiguous = [i for i, corner in enumerate(corners) if corner.is_contiguous() and tensors[i].is_contiguous()]
        if contiguous:
            torch._foreach_copy_([corners[i] for i in contiguous], [tensors[i] for i in contiguous])
        for i, corner in enumerate(corners):
            if i not in contiguous:
                corner.copy_(tensors[i])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        slices = [tuple(slice(n) for n in shape) for shape in ctx.shapes]
        return (None, *(None if g is None else g[s] for g, s in zip(gradients, slices, strict=True)))


def zero_padded(*pairs: tuple[Tensor | None, Shape]) -> list[Tensor | None]:
    """Each (tensor, shape) as a tensor of that shape with zeros past the tensor's own; None stays None.

    A tensor that already has its shape is passed through.
    """
    results = [tensor for tensor, _ in pairs]
    todo = [i for i, (tensor, shape) in enumerate(pairs) if tensor is not None and tuple(tensor.shape) != shape]
    if transforms_active():
        # torch.func cannot see through the copies into one buffer.
        for i in todo:
            tensor, shape = pairs[i]
            assert tensor is not None
            missing = [(0, size - n) for size, n in zip(reversed(shape), reversed(tensor.shape), strict=True)]
            results[i] = F.pad(tensor, [amount for pair in missing for amount in pair])
        return results
    for dtype in {results[i].dtype for i in todo}:  # type: ignore[union-attr]
        group = [i for i in todo if results[i].dtype == dtype]  # type: ignore[union-attr]
        outputs = _ZeroPadded.apply(tuple(pairs[i][1] for i in group), *(results[i] for i in group))
        for i, output in zip(group, outputs, strict=True):
            results[i] = output
    return results
