"""What a decoder asks: output queries, learned, from the places of the outputs, the inputs themselves, or given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.checks import check_indices, check_tensor, is_integer
from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models.multimodal import CommonWidth, check_modalities, written_out
from perceiver_kernels.nn import LearnedPositions
from perceiver_kernels.nn.checks import check_count
from perceiver_kernels.positions import grid_coordinates, picked_coordinates

Points = Tensor | slice | None
"""Which outputs are wanted: int64 [n], a slice of consecutive ones, or all."""


def _check_points(points: object, count: int) -> None:
    check_tensor("points", points, "[n], a slice or None", (None,), dtypes=(torch.int64,))
    assert isinstance(points, Tensor)
    check_indices("points", points, "O-1", count)


def _bounds(points: slice, count: int) -> tuple[int, int]:
    """Start and stop of consecutive outputs; unlike a list's, they must exist."""
    start, stop = 0 if points.start is None else points.start, count if points.stop is None else points.stop
    if points.step not in (None, 1) or not (is_integer(start) and is_integer(stop) and 0 <= start <= stop <= count):
        raise ValueError(f"points must be a slice of 0..O={count} without a step, got {points}")
    return start, stop


def _part_of(array: Tensor | InputArray, points: slice) -> Tensor | InputArray:
    """Consecutive tokens of an array, where they were."""
    if isinstance(array, Tensor):
        start, stop = _bounds(points, array.shape[1])
        return array[:, start:stop]
    start, stop = _bounds(points, array.length)
    part: dict[str, Any] = {"content": array.content[:, start:stop], "grid": None}
    if isinstance(array.positions, Tensor):
        part["positions"] = array.positions[..., start:stop, :]
    if array.grid is not None:
        part["coordinates"] = grid_coordinates(array.grid, start, stop, device=array.device)
    elif array.coordinates is not None:
        part["coordinates"] = array.coordinates[..., start:stop, :]
    if array.key_mask is not None:
        part["key_mask"] = array.key_mask[:, start:stop]
    if array.lengths is not None:
        part["lengths"] = array.lengths - start
    return replace(array, **part)


class LearnedQueries(nn.Module):
    """A trained vector for every output.

    Args:
        count: O, the most outputs.
        channels: of a query.
        like_inputs: as many queries as the inputs have tokens, from the first on, as for masked language modelling.

    Source: Perceiver IO, arXiv 2107.14795, section 3.2.
    """

    def __init__(
        self,
        count: int,
        channels: int,
        *,
        like_inputs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.count, self.channels, self.like_inputs = count, channels, like_inputs
        self.positions = LearnedPositions(count, channels, device=device, dtype=dtype)

    def forward(self, array: Tensor | InputArray, points: Points = None) -> Tensor:
        """The input array, and int64 [n] outputs among O, a slice of them or None for all -> [1, n, C]."""
        queries = self.positions()[None]
        if self.like_inputs:
            queries = queries[:, : array.shape[1] if isinstance(array, Tensor) else array.length]
        if points is None:
            return queries
        if isinstance(points, slice):
            start, stop = _bounds(points, queries.shape[1])
            return queries[:, start:stop]
        _check_points(points, queries.shape[1])
        return queries[:, points]


class FourierQueries(nn.Module):
    """Fourier features of the places of a dense grid of outputs.

    Args:
        grid: sizes of the grid.
        positions: one axis for each of them.

    Places lie evenly in [-1, 1], of the whole grid and of a slice of it. Points that are picked are at ``-1 + 2 i / size``
    instead: so do DeepMind's code and transformers, whose weights saw both. All are made on the device, for CUDA graphs too.

    Source: Perceiver IO, arXiv 2107.14795, section 3.2.
    """

    def __init__(self, grid: tuple[int, ...], positions: FourierPositions) -> None:
        super().__init__()
        if len(grid) != positions.num_axes:
            raise ValueError(f"grid must have the {positions.num_axes} axes of positions, got {tuple(grid)}")
        self.grid, self.positions = tuple(grid), positions
        self.channels = positions.channels

    def forward(self, array: Tensor | InputArray, points: Points = None) -> InputArray:
        """The input array, for its device and dtype, and int64 [n] places, a slice or None for all -> [1, n, C]."""
        content, count = array if isinstance(array, Tensor) else array.content, math.prod(self.grid)
        coordinates = None
        if isinstance(points, slice):
            start, stop = _bounds(points, count)
            coordinates, count = grid_coordinates(self.grid, start, stop, device=array.device), stop - start
        elif points is not None:
            _check_points(points, count)
            coordinates, count = picked_coordinates(self.grid, points.to(array.device)), len(points)
        nothing = content.new_empty(1, count, 0)
        if not nothing.is_floating_point():
            nothing = nothing.float()
        return InputArray(nothing, self.positions, coordinates, self.grid if coordinates is None else None)


class InputQueries(nn.Module):
    """The input array itself: one output for every token.

    Source: Perceiver IO, arXiv 2107.14795, section 4.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, array: Tensor | InputArray, points: Points = None) -> Tensor | InputArray:
        """The input array, or the slice of its tokens that ``points`` is."""
        if points is None:
            return array
        if not isinstance(points, slice):
            raise TypeError(f"points must be a slice or None where the inputs are the queries, got {type(points).__name__}")
        return _part_of(array, points)


class GivenQueries(nn.Module):
    """Queries that come with every call, as its ``points``.

    Args:
        channels: of a query.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_count("channels", channels)
        self.channels = channels

    def forward(self, array: Tensor | InputArray, points: Tensor | None = None) -> Tensor:
        """The input array, and float queries [B, O, C] or [O, C] for the whole batch -> [B or 1, O, C]."""
        check_tensor("points", points, "[B, O, C] or [O, C], the queries", (None, None, self.channels), (None, self.channels))
        assert points is not None
        return points if points.ndim == 3 else points[None]


class MultimodalQueries(nn.Module):
    """Queries of several modalities, filled up to one width, one after the other in the order of their names.

    Args:
        modalities: queries of each modality.
        min_padding: learned channels of the widest modality.

    Source: Perceiver IO, arXiv 2107.14795, section 4.3.
    """

    def __init__(
        self,
        modalities: Mapping[str, nn.Module],
        min_padding: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.modalities = nn.ModuleDict({name: modalities[name] for name in sorted(modalities)})
        widths = {name: int(module.channels) for name, module in self.modalities.items()}  # type: ignore[arg-type]
        self.common = CommonWidth(widths, min_padding, device=device, dtype=dtype)
        self.channels = self.common.channels

    def forward(self, array: Tensor | InputArray, points: Mapping[str, Points] | None = None) -> dict[str, Tensor]:
        """The input array and, of every modality, int64 [n] outputs, a slice or None for all -> [1, n_m, C] of each."""
        if points is not None:
            check_modalities("points", points, list(self.modalities))
        dtype = next(iter(self.common.padding.values())).dtype
        picked: Mapping[str, Any] = points or {}
        return self.common(
            {name: written_out(module(array, picked.get(name)), dtype) for name, module in self.modalities.items()}
        )
