"""Tensors that catch mistakes: odd strides, NaN past the end, poisoned fresh memory; comparison by bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def poison_of(dtype: torch.dtype) -> float | int | bool:
    """The value that shows best where it leaks: NaN, or the largest integer."""
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory (torch.empty and its kin) holds NaN, or the largest integer, until it is written."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _copied(x: Tensor, view: Tensor) -> Tensor:
    return view.copy_(x.detach()).requires_grad_(x.requires_grad)


def nan_tail(x: Tensor, extra: int = 130, axis: int = -2) -> Tensor:
    """x as the start of a longer tensor whose tail along axis is poison; 130 pass the end of any tile."""
    shape = list(x.shape)
    shape[axis] += extra
    longer = x.new_full(shape, poison_of(x.dtype))
    return _copied(x, longer.narrow(axis, 0, x.shape[axis]))


def gapped_rows(x: Tensor, gap: int = 8) -> Tensor:
    """x with `gap` poisoned elements after every row; 8 keep the rows of 16-bit elements 16 bytes apart."""
    return nan_tail(x, gap, -1)


def misaligned(x: Tensor) -> Tensor:
    """x, contiguous, one element past an aligned address."""
    storage = x.new_full((x.numel() + 1,), poison_of(x.dtype))
    return _copied(x, storage[1:].view(x.shape))


def permuted(x: Tensor) -> Tensor:
    """x with the two axes before its last swapped in memory: [B, H, L, d] as [B, L, H, d]."""
    return _copied(x, x.new_empty(x.transpose(-3, -2).shape).transpose(-3, -2))


def column_major(x: Tensor) -> Tensor:
    """x with its last two axes swapped in memory, so that the last stride is not 1."""
    return _copied(x, x.new_empty(x.mT.shape).mT)


def broadcast(x: Tensor, axis: int = 0) -> Tensor:
    """The first entry of x along axis, seen x.shape[axis] times with stride 0."""
    first = x.detach().narrow(axis, 0, 1).clone() if x.shape[axis] else x.detach()
    return first.requires_grad_(x.requires_grad).expand(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "permuted": permuted,
    "gapped rows": gapped_rows,
    "NaN tail": nan_tail,
    "misaligned": misaligned,
}
"""Layouts with last stride 1 that keep the values of a tensor of three axes or more."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether a and b agree in shape, dtype and every bit; equal NaNs are equal, 0 and -0 are not."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def runs_that_differ(run: Callable[[], Sequence[Tensor]], runs: int) -> tuple[Sequence[Tensor], list[int]]:
    """What a first run on a GPU gives, and in how many of ``runs`` more each of its tensors had other values.

    Other work on the GPU shifts when programs run.
    """
    first, noise, side = run(), torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    different = torch.zeros(len(first), dtype=torch.int64, device="cuda")
    for _ in range(runs):
        with torch.cuda.stream(side):
            noise @ noise
        different += torch.stack([(a != b).any() for a, b in zip(first, run(), strict=True)])
    return first, different.tolist()
