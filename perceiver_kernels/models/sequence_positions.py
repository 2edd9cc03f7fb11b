"""What tells a sequence model where a token is, beside rotary positions: a vector for every place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perceiver_kernels.checks import check_tensor, has_values
from perceiver_kernels.nn import LearnedPositions
from perceiver_kernels.nn.checks import check_choice, check_count

PositionKind = Literal["learned", "sinusoidal"]


class SequencePositions(nn.Module):
    """Vectors that are added to the embeddings of the tokens of a sequence.

        "learned"                p_t = W[t]
        "learned", with a grid   p_0 = sum_a W_a[0],  p_t = sum_a W_a[1 + i_a],  i = token t - 1 in the row-major grid
        "sinusoidal"             p_t = [sin(t f) | cos(t f)],  f_i = 10000^(-i / (D/2 - 1))

    Args:
        kind: "learned" or "sinusoidal".
        length: places there are.
        dim: D.
        grid: sizes of the grid whose elements are the tokens from the second on; the first one starts the sequence.

    Raises:
        ValueError: an odd ``dim`` for sinusoids; a grid of another number of elements than ``length - 1``.

    Source: Perceiver AR, arXiv 2202.07765, appendix; google-research/perceiver-ar, whose data count places from 1.
    """

    def __init__(
        self,
        kind: PositionKind,
        length: int,
        dim: int,
        *,
        grid: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positions(kind, length, dim, grid)
        self.kind, self.length, self.dim, self.grid = kind, length, dim, None if grid is None else tuple(grid)
        rows = [length] if self.grid is None else [size + 1 for size in self.grid]
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        learned = kind == "learned"
        self.tables = nn.ModuleList(LearnedPositions(count, dim, **where) for count in rows) if learned else None

    def forward(self, start: int, stop: int, like: Tensor, padding: Tensor | None = None) -> Tensor:
        """The vectors of the tokens start..stop.

        Args:
            start: the first of the tokens.
            stop: the one after the last, at most ``length``.
            like: whose dtype sinusoids get, and whose device.
            padding: int64 [B], places before the first one of each sequence.

        Returns:
            [stop - start, D]; with ``padding`` [B, stop - start, D].
        """
        if padding is None:
            return self._vectors(start, stop, like)
        place = torch.arange(start, stop, device=padding.device) - padding[:, None]
        return self._vectors(0, stop, like)[place.clamp(min=0)]

    def _vectors(self, start: int, stop: int, like: Tensor) -> Tensor:
        if self.tables is None:
            return _sinusoids(start, stop, self.dim, like.device).to(like.dtype)
        if self.grid is None:
            whole: Tensor = self.tables[0]()
            return whole[start:stop]
        place = torch.arange(start, stop, device=like.device) - 1
        rows: list[Tensor] = []
        for axis, (size, table) in enumerate(zip(self.grid, self.tables, strict=True)):
            along = place.div(math.prod(self.grid[axis + 1 :]), rounding_mode="floor") % size + 1
            rows.append(table()[torch.where(place < 0, 0, along)])
        return torch.stack(rows).sum(0)

    def extra_repr(self) -> str:
        return f"kind={self.kind}, length={self.length}, grid={self.grid}"


def mask_of_padding(padding: Tensor, batch: int, prefix_length: int) -> Tensor:
    """Which tokens of the prefix may be read, bool [B, prefix_length], where ``padding`` [B] of them are none."""
    check_tensor("padding", padding, "[B]", (batch,), dtypes=(torch.int64,))
    if has_values(padding):
        least, most = padding.aminmax()
        if least < 0 or most > prefix_length:
            raise ValueError(f"padding must be in 0..prefix_length={prefix_length}, got {least.item()}..{most.item()}")
    return torch.arange(prefix_length, device=padding.device) >= padding[:, None]


def check_positions(kind: object, length: int, dim: int, grid: Sequence[int] | None) -> None:
    """What SequencePositions refuses."""
    check_choice("positions", kind, ("learned", "sinusoidal"))
    check_count("length", length)
    check_count("dim", dim)
    if kind == "sinusoidal" and (dim % 2 or dim < 4):
        raise ValueError(f"dim must be even and at least 4 with sinusoidal positions, got {dim}")
    if grid is None:
        return
    if kind != "learned":
        raise ValueError(f"grid needs learned positions, got {kind!r}")
    if not isinstance(grid, (tuple, list)):
        raise TypeError(f"grid must be a tuple of sizes, got {grid!r}")
    for size in grid:
        check_count("grid", size)
    if math.prod(grid) + 1 != length:
        raise ValueError(f"grid must have length - 1 = {length - 1} elements, got {tuple(grid)}")


def _sinusoids(start: int, stop: int, dim: int, device: torch.device) -> Tensor:
    """fp64 [stop - start, dim]."""
    place = torch.arange(start, stop, device=device, dtype=torch.float64)
    frequency = 10_000.0 ** (-torch.arange(dim // 2, device=device, dtype=torch.float64) / (dim // 2 - 1))
    angles = place[:, None] * frequency
    return torch.cat((angles.sin(), angles.cos()), -1)
