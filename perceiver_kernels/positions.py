"""Where tokens are: Fourier features as data, the coordinates of dense grids, and the angles of rotary embedding."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from perceiver_kernels.checks import FLOAT_DTYPES, check_numbers, check_positive, check_range, check_tensor, is_integer

# Rows of FourierPositions.table hold the axis, the frequency and one of these kinds.
KIND_RAW, KIND_SIN, KIND_COS = 0, 1, 2

# More shapes than a training set usually mixes; a table of 64 bands and three axes takes 5 KB.
MAX_CONSTANTS = 256

_Key = tuple[Hashable, torch.device]
_constants: OrderedDict[_Key, Tensor] = OrderedDict()
"""The last MAX_CONSTANTS that were used, the least recent first."""
_captured: dict[_Key, Tensor] = {}
"""Those that a CUDA graph reads at every replay: they stay."""


def constant(
    key: Hashable, device: torch.device, build: Callable[[], Sequence[Any]], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The tensor of build() on device, kept: a later call copies nothing and suits a CUDA graph."""
    if torch.compiler.is_compiling():
        return torch.tensor(build(), dtype=dtype, device=device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    place = (key, device)
    constant = _constants.pop(place, _captured.get(place))
    if constant is None:
        # An inference tensor could never be saved for a later backward pass.
        with torch.inference_mode(False):
            constant = torch.tensor(build(), dtype=dtype, device=device)
    # A fake tensor must not outlive the mode that made it.
    if type(constant) is Tensor:
        _constants[place] = constant
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured[place] = constant
        while len(_constants) > MAX_CONSTANTS:
            _constants.popitem(last=False)
    return constant


@dataclass(frozen=True)
class FourierPositions:
    """Fourier features of coordinates x_a: their values, and sines and cosines at num_bands frequencies.

    x_a, sin(pi * f_ab * x_a), cos(pi * f_ab * x_a),   f_ab = linspace(1, max_resolution[a] / 2, num_bands)[b]

    Args:
        num_bands: frequencies for each axis, at least 1.
        max_resolution: one number for each axis; half of it is the highest frequency.
        include_raw: whether the coordinates themselves are features too.
        order: channel order. "deepmind": [raw | sin, axis-major | cos, axis-major];
            "perceiver-pytorch": for each axis [sin | cos | raw].

    Raises:
        TypeError, ValueError: an argument of another type, or out of range.

    Source: Perceiver, arXiv 2103.03206, section 3.2. Frequencies are rounded to fp32 once.
    """

    num_bands: int
    max_resolution: tuple[float, ...]
    include_raw: bool = True
    order: Literal["deepmind", "perceiver-pytorch"] = "deepmind"

    def __post_init__(self) -> None:
        if isinstance(self.num_bands, bool) or not isinstance(self.num_bands, int):
            raise TypeError(f"num_bands must be an integer, got {self.num_bands!r}")
        if self.num_bands < 1:
            raise ValueError(f"num_bands must be at least 1, got {self.num_bands}")
        resolution = check_numbers("max_resolution", self.max_resolution, positive=True)
        if not resolution:
            raise ValueError("max_resolution must hold one number for each axis, got ()")
        object.__setattr__(self, "max_resolution", resolution)
        if not isinstance(self.include_raw, bool):
            raise TypeError(f"include_raw must be a bool, got {self.include_raw!r}")
        if self.order not in ("deepmind", "perceiver-pytorch"):
            raise ValueError(f"order must be 'deepmind' or 'perceiver-pytorch', got {self.order!r}")

    @property
    def num_axes(self) -> int:
        """Coordinates of one token."""
        return len(self.max_resolution)

    @property
    def channels(self) -> int:
        """Features of one token."""
        return self.num_axes * (2 * self.num_bands + self.include_raw)

    def table(self, device: torch.device | str | None = None) -> Tensor:
        """The features as data: x_a (kind 0), sin(pi * x_a * f) (kind 1) or cos(pi * x_a * f) (kind 2).

        Args:
            device: where the table lives; torch's default device when None.

        Returns:
            fp32 [3, channels]: rows axis a, frequency f (0 for kind 0), kind. Kept by device: read only.
        """
        device = torch.get_default_device() if device is None else torch.device(device)
        return constant(self, device, self._table_rows)

    def _table_rows(self) -> list[tuple[float, ...]]:
        raw = [[(axis, 0.0, KIND_RAW)] if self.include_raw else [] for axis in range(self.num_axes)]
        waves: dict[int, list[list[tuple[int, float, int]]]] = {KIND_SIN: [], KIND_COS: []}
        for axis, resolution in enumerate(self.max_resolution):
            step = (resolution / 2 - 1) / max(self.num_bands - 1, 1)
            for kind, bands_by_axis in waves.items():
                bands_by_axis.append([(axis, 1 + band * step, kind) for band in range(self.num_bands)])
        if self.order == "deepmind":
            groups = [*raw, *waves[KIND_SIN], *waves[KIND_COS]]
        else:
            by_axis = zip(waves[KIND_SIN], waves[KIND_COS], raw, strict=True)
            groups = [group for axis_groups in by_axis for group in axis_groups]
        return list(zip(*(feature for group in groups for feature in group), strict=True))


def check_coordinates(coordinates: object, positions: FourierPositions, batch: int, length: int) -> None:
    """Raise unless coordinates are those of ``length`` tokens, shared by the batch or not, on the axes of positions."""
    axes = positions.num_axes
    check_tensor("coordinates", coordinates, "[M, axes] or [B, M, axes]", (length, axes), (batch, length, axes))


def grid_coordinates(
    shape: Sequence[int], start: int = 0, stop: int | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    """Coordinates of the tokens start..stop of a dense row-major grid, each axis linspace(-1, 1, size).

    Args:
        shape: sizes of the grid; an axis of size 1 is at -1, as numpy's linspace has it.
        start: first token of the flattened grid.
        stop: token past the last one; all of them when None.
        device: of the result.

    Returns:
        fp32 [stop - start, len(shape)]; independent of how the grid is cut into ranges.

    Raises:
        ValueError: start and stop are not a range of the grid.

    Source: Perceiver, arXiv 2103.03206, section 3.2 (positions in [-1, 1] along every axis).
    """
    shape = tuple(shape)
    start, stop = check_range(start, stop, math.prod(shape))
    device = torch.get_default_device() if device is None else torch.device(device)
    # For each axis: tokens of one step along it, its size, and its last place (1 for an axis of size 1, which puts it at -1).
    steps, sizes, last = constant(("grid", shape), device, lambda: _grid_rows(shape), torch.float64)
    index = torch.arange(start, stop, device=device, dtype=torch.float64)[:, None]
    # (2 i - (n - 1)) / (n - 1), one rounding in fp64, so that every device gets the same fp32 values.
    return ((2 * (index // steps % sizes) - last) / last).float()


def picked_coordinates(shape: Sequence[int], points: Tensor) -> Tensor:
    """Coordinates -1 + 2 i / size of tokens that are picked from a dense row-major grid.

    Args:
        shape: sizes of the grid.
        points: int64 [n], tokens of the flattened grid.

    Returns:
        fp32 [n, len(shape)].

    Source: deepmind-research/perceiver, whose subsampled output points are placed so, without the grid's last step.
    """
    shape = tuple(shape)
    steps, sizes, _ = constant(("grid", shape), points.device, lambda: _grid_rows(shape), torch.float64)
    return (-1 + 2 * (points[:, None] // steps % sizes) / sizes).float()


def _grid_rows(shape: tuple[int, ...]) -> list[list[int]]:
    steps = [max(math.prod(shape[axis + 1 :]), 1) for axis in range(len(shape))]
    return [steps, [max(size, 1) for size in shape], [max(size - 1, 1) for size in shape]]


def rotary_tables(
    positions: int | Tensor, width: int, *, base: float = 10_000.0, periods: tuple[float, float] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cosines and sines for ``rotary_embedding``: angle i of a token at position t is t times frequency i.

        f_i = base^(-2 i / width)               or, where periods = (shortest, longest) are given,
        f_i = 2 pi / (shortest (longest / shortest)^(i / (width / 2 - 1)))

    Args:
        positions: integers or floats ``[L]`` or ``[B, L]``: places in a sequence, or times in the unit of ``periods``; a
            number L stands for 0..L-1. Before 2^24 fp32 tells integers apart; int64 and float64 are exact beyond.
        width: r, even, the channels that are turned.
        base: how much slower the last pair of channels turns than the first, nearly.
        periods: shortest and longest period, inclusive, for positions that are times; instead of ``base``.
        device: of the tables; where positions are when None.

    Returns:
        cos and sin, fp32 ``[L, width/2]`` or ``[B, L, width/2]``. Angles are computed in fp64 and rounded as cosines and sines:
        fp32 angles are off by up to 0.005 at position 100,000.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range.

    Source: RoFormer, arXiv 2104.09864, section 3.4.2, equation 15; periods as in POYO, arXiv 2310.16046.
    """
    if not is_integer(width):
        raise TypeError(f"width must be an integer, got {width!r}")
    if width < 2 or width % 2:
        raise ValueError(f"width must be even and at least 2, got {width}")
    if isinstance(positions, Tensor):
        dtypes = (torch.int64, torch.int32, *FLOAT_DTYPES)
        check_tensor("positions", positions, "[L] or [B, L]", (None,), (None, None), dtypes=dtypes)
        t = positions.to(device, torch.float64)
    elif not is_integer(positions):
        raise TypeError(f"positions must be a tensor [L] or [B, L] or a length, got {positions!r}")
    elif positions < 0:
        raise ValueError(f"positions must be a tensor [L] or [B, L] or a length, got {positions}")
    else:
        t = torch.arange(positions, device=device, dtype=torch.float64)
    # Frequency i is slowest^x * fastest^(1 - x), x its place among them.
    half = width // 2
    if periods is None:
        slowest, fastest, last = 1 / check_positive("base", base), 1.0, half
    else:
        shortest, longest = _check_periods(periods)
        slowest, fastest, last = 2 * math.pi / longest, 2 * math.pi / shortest, max(half - 1, 1)
    place = torch.arange(half, device=t.device, dtype=torch.float64) / last
    angles = t[..., None] * (fastest * (slowest / fastest) ** place)
    return angles.cos().float(), angles.sin().float()


def _check_periods(periods: tuple[float, float]) -> tuple[float, float]:
    checked = check_numbers("periods", periods, positive=True)
    if len(checked) != 2 or checked[0] > checked[1]:
        raise ValueError(f"periods must be the shortest and the longest, got {periods!r}")
    return checked[0], checked[1]
