"""What a decoder asks: output queries, learned, from the places of the outputs, the inputs themselves, or given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.checks import check_indices, check_tensor
from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models.multimodal import CommonWidth, check_modalities, written_out
from perceiver_kernels.nn import LearnedPositions
from perceiver_kernels.nn.checks import check_count
from perceiver_kernels.positions import picked_coordinates


def _check_points(points: object, count: int) -> None:
    check_tensor("points", points, "[n]", (None,), dtypes=(torch.int64,))
    assert isinstance(points, Tensor)
    check_indices("points", points, "O-1", count)


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

    def forward(self, array: Tensor | InputArray, points: Tensor | None = None) -> Tensor:
        """The input array, and int64 [n] outputs among O or None for all -> [1, n, C]."""
        queries = self.positions()[None]
        if self.like_inputs:
            queries = queries[:, : array.shape[1] if isinstance(array, Tensor) else array.length]
        if points is None:
            return queries
        _check_points(points, queries.shape[1])
        return queries[:, points]


class FourierQueries(nn.Module):
    """Fourier features of the places of a dense grid of outputs.

    Args:
        grid: sizes of the grid.
        positions: one axis for each of them.

    Places lie evenly in [-1, 1]. Points that are picked are at ``-1 + 2 i / size`` instead: so do DeepMind's code and
    transformers, whose weights saw both. Both are made on the device, for CUDA graphs too.

    Source: Perceiver IO, arXiv 2107.14795, section 3.2.
    """

    def __init__(self, grid: tuple[int, ...], positions: FourierPositions) -> None:
        super().__init__()
        if len(grid) != positions.num_axes:
            raise ValueError(f"grid must have the {positions.num_axes} axes of positions, got {tuple(grid)}")
        self.grid, self.positions = tuple(grid), positions
        self.channels = positions.channels

    def forward(self, array: Tensor | InputArray, points: Tensor | None = None) -> InputArray:
        """The input array, for its device and dtype, and int64 [n] places of the grid or None for all -> [1, n, C]."""
        content = array if isinstance(array, Tensor) else array.content
        if points is not None:
            _check_points(points, math.prod(self.grid))
        nothing = content.new_empty(1, math.prod(self.grid) if points is None else len(points), 0)
        if not nothing.is_floating_point():
            nothing = nothing.float()
        if points is None:
            return InputArray(nothing, self.positions, grid=self.grid)
        return InputArray(nothing, self.positions, picked_coordinates(self.grid, points.to(array.device)))


class InputQueries(nn.Module):
    """The input array itself: one output for every token.

    Source: Perceiver IO, arXiv 2107.14795, section 4.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, array: Tensor | InputArray, points: Tensor | None = None) -> Tensor | InputArray:
        """The input array; ``points`` must be None."""
        if points is not None:
            raise ValueError("points must be None where the inputs are the queries, got a tensor")
        return array


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
        layout = f"[B, O, C] or [O, C], the queries, with C={self.channels}"
        check_tensor("points", points, layout, (None, None, self.channels), (None, self.channels))
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

    def forward(self, array: Tensor | InputArray, points: Mapping[str, Tensor | None] | None = None) -> dict[str, Tensor]:
        """The input array and, of every modality, int64 [n] outputs or None for all -> [1, n_m, C] of each modality."""
        if points is not None:
            check_modalities("points", points, list(self.modalities))
        dtype = next(iter(self.common.padding.values())).dtype
        picked: Mapping[str, Any] = points or {}
        return self.common(
            {name: written_out(module(array, picked.get(name)), dtype) for name, module in self.modalities.items()}
        )
