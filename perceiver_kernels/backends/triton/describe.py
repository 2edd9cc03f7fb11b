"""How launchers hand tensors and options to kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends.triton.launch import Descriptor

Statistics = tuple[Tensor, Tensor, Tensor | None]
Visibility = tuple[Tensor | None, Tensor | None]


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. triton.cdiv, which kernels use too, takes 5 us on the host, a tenth of a launch."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors contiguous; None stays None. Statistics and masks come in any order of axes from vmap and from callers."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def descriptor(tensor: Tensor, rows: int, columns: int) -> Descriptor:
    """A TMA descriptor of [..., R, C] with tiles of ``rows`` x ``columns`` of one entry; past the ends it reads zeros."""
    shape, strides = list(tensor.shape), list(tensor.stride())
    for axis in reversed(range(len(shape) - 1)):
        if shape[axis] == 1:  # its stride may be anything
            strides[axis] = shape[axis + 1] * strides[axis + 1]
            strides[axis] += -strides[axis] % 16
    return Descriptor(tensor, tuple(shape), tuple(strides), (*(1,) * (len(shape) - 2), rows, columns))


def row_arguments(tensor: Tensor, rows: int, pieces: tuple[int, ...], tma: bool) -> tuple[Any, ...]:
    """What a kernel reads row tiles from: one descriptor per column piece (at most three), or the tensor's pointer."""
    if not tma:
        return tensor, None, None
    return (*(descriptor(tensor, rows, width) for width in pieces), None, None)[:3]


def tile_argument(tensor: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """What a kernel reads two-dimensional tiles from: a descriptor or the tensor's pointer."""
    return descriptor(tensor, rows, columns) if tma else tensor


def dropout_arguments(dropout_p: float, seed: Tensor | None, key_offset: int) -> tuple[Any, int, float, int]:
    """(seed, threshold, 1 / (1 - p), key offset): a weight is kept iff its 32-bit word reaches the threshold."""
    return seed, round(dropout_p * 2**32), 1.0 / (1.0 - dropout_p), key_offset


def stack_row_blocks(q: Tensor, dz: Tensor, block: int) -> Tensor:
    """Every block of query rows above the same rows of dz: [B, 2 R', C], R' = R rounded up to ``block``, zero past R."""
    padding = -q.shape[1] % block
    blocks = [torch.nn.functional.pad(t, (0, 0, 0, padding)) if padding else t for t in (q, dz)]
    return torch.stack([t.unflatten(1, (-1, block)) for t in blocks], 2).flatten(1, 3)
