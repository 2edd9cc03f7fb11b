"""What a Perceiver reads: raw inputs with their positions, a slice of them, and the packed form of both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from perceiver_kernels.checks import (
    FLOAT_DTYPES,
    RAW_DTYPES,
    check_numbers,
    check_patch,
    check_range,
    check_tensor,
    is_integer,
)
from perceiver_kernels.positions import FourierPositions, check_coordinates, constant, grid_coordinates
from perceiver_kernels.tensors import Tensors


def _check_visibility(key_mask: Tensor | None, lengths: Tensor | None, batch: int, length: int) -> None:
    if key_mask is not None and lengths is not None:
        raise ValueError("key_mask and lengths exclude each other: give one of them")
    if key_mask is not None:
        check_tensor("key_mask", key_mask, "[B, M]", (batch, length), dtypes=(torch.bool,))
    if lengths is not None:
        check_tensor("lengths", lengths, "[B]", (batch,), dtypes=(torch.int32,))


@dataclass(frozen=True, eq=False, repr=False)
class PackedInputs(Tensors):
    """Inputs ready for any number of cross-attentions: joined with positions, normalised, padded and cast.

    Args:
        data: float [B, M, C_padded]; channels past `channels` (and `constants`) and tokens that are not visible are zeros.
        channels: C, the real channels.
        normalized: whether LayerNorm (without its affine part) has been applied.
        key_mask: bool [B, M], True = visible; None: all are.
        lengths: int32 [B], visible prefix of each sequence (above M all of it, below 0 nothing); None: all of it.
        constants: channels of ones that follow the real ones, see pack_inputs.

    Raises:
        TypeError: a field of another type or dtype.
        ValueError: a field of another shape, or channels and constants outside 1..C_padded.
    """

    data: Tensor
    channels: int
    normalized: bool
    key_mask: Tensor | None = None
    lengths: Tensor | None = None
    constants: int = 0

    def __post_init__(self) -> None:
        check_tensor("data", self.data, "[B, M, C_padded]", (None, None, None))
        if not is_integer(self.channels):
            raise TypeError(f"channels must be an integer, got {self.channels!r}")
        batch, length, padded = self.data.shape
        if not 1 <= self.channels <= padded:
            raise ValueError(f"channels must be in 1..C_padded={padded}, got {self.channels}")
        if not (is_integer(self.constants) and 0 <= self.constants <= padded - self.channels):
            raise ValueError(f"constants must be in 0..C_padded-channels={padded - self.channels}, got {self.constants!r}")
        if not isinstance(self.normalized, bool):
            raise TypeError(f"normalized must be a bool, got {self.normalized!r}")
        _check_visibility(self.key_mask, self.lengths, batch, length)

    @property
    def length(self) -> int:
        """M, the tokens of each sequence."""
        return self.data.shape[1]


@dataclass(frozen=True, eq=False)
class TokenSlice:
    """What one pack call reads: m consecutive tokens on one device, in floating point, with any strides.

    Args:
        content: float [B, m, C_content]; C_content may be 0.
        positions: float [m, P] or [B, m, P]: position channels; with fourier, coordinates, fp32 or wider.
        fourier: fp32 [3, F], a FourierPositions.table, or None.
        key_mask: bool [B, m], True = visible, whether by a mask or by lengths; None: all are.
    """

    content: Tensor
    positions: Tensor | None = None
    fourier: Tensor | None = None
    key_mask: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class InputArray(Tensors):
    """Raw inputs and where they are; content may be uint8 and in host memory, positions are made on the fly.

    The named constructors (image, video, audio, points, tokens) take torch's layouts and add positions.

    Args:
        content: float or uint8 [B, M, C_content], any strides; C_content may be 0 when there are positions.
        positions: float [M, P] or [B, M, P] channels (learned or given), a FourierPositions, or None.
        coordinates: float [M, axes] or [B, M, axes] for a FourierPositions, where tokens fill no dense grid.
        grid: sizes of that grid where they do, their product M.
        key_mask: bool [B, M], True = visible.
        lengths: int32 [B], visible prefix of each sequence (above M all of it, below 0 nothing), without key_mask.
        mean: one number for each content channel; uint8 content u becomes (u / 255 - mean) / std.
        std: likewise.

    Raises:
        TypeError: a field of another type or dtype.
        ValueError: a field of another shape, or fields that contradict each other.
    """

    content: Tensor
    positions: Tensor | FourierPositions | None = None
    coordinates: Tensor | None = None
    grid: tuple[int, ...] | None = None
    key_mask: Tensor | None = None
    lengths: Tensor | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_tensor("content", self.content, "[B, M, C_content]", (None,) * 3, dtypes=RAW_DTYPES)
        if isinstance(self.positions, FourierPositions):
            self._check_coordinates(self.positions)
        else:
            for name in ("coordinates", "grid"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} must be None unless positions is a FourierPositions")
            if self.positions is not None:
                shapes = (self.length, None), (self.batch, self.length, None)
                check_tensor("positions", self.positions, "[M, P] or [B, M, P], or a FourierPositions", *shapes)
        if self.channels == 0:
            raise ValueError("content and positions must have a channel between them, got C=0")
        _check_visibility(self.key_mask, self.lengths, self.batch, self.length)
        for name in ("mean", "std"):
            self._check_moments(name)

    def _check_coordinates(self, fourier: FourierPositions) -> None:
        axes = fourier.num_axes
        if (self.coordinates is None) == (self.grid is None):
            got = "neither" if self.grid is None else "both"
            raise ValueError(f"either coordinates or grid must be given with a FourierPositions, got {got}")
        if self.coordinates is not None:
            check_coordinates(self.coordinates, fourier, self.batch, self.length)
            return
        grid = self.grid
        if not isinstance(grid, (tuple, list)) or not all(is_integer(size) for size in grid):
            raise TypeError(f"grid must be a tuple of integers, got {grid!r}")
        if len(grid) != axes or any(size < 0 for size in grid) or math.prod(grid) != self.length:
            raise ValueError(f"grid must be {axes} sizes whose product is M={self.length}, got {tuple(grid)}")
        object.__setattr__(self, "grid", tuple(grid))

    def _check_moments(self, name: str) -> None:
        values = getattr(self, name)
        if values is None:
            return
        if self.content.dtype != torch.uint8:
            dtype = str(self.content.dtype).removeprefix("torch.")
            raise TypeError(f"{name} must be None unless content is uint8, got content of {dtype}")
        values = check_numbers(name, values, positive=name == "std")
        if len(values) != self.content.shape[2]:
            raise ValueError(f"{name} must hold C_content={self.content.shape[2]} numbers, got {len(values)}")
        object.__setattr__(self, name, values)

    @property
    def batch(self) -> int:
        """B."""
        return self.content.shape[0]

    @property
    def length(self) -> int:
        """M, the tokens of each sequence."""
        return self.content.shape[1]

    @property
    def channels(self) -> int:
        """C, content and position channels together."""
        if isinstance(self.positions, FourierPositions):
            return self.content.shape[2] + self.positions.channels
        return self.content.shape[2] + (0 if self.positions is None else self.positions.shape[-1])

    @property
    def device(self) -> torch.device:
        """Where the content lives; slice() copies from there."""
        return self.content.device

    def slice(
        self, start: int = 0, stop: int | None = None, *, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TokenSlice:  # fmt: skip
        """The tokens start..stop on a device, in floating point; the rest stays where and as it is.

        Args:
            start: first token.
            stop: token past the last one; M when None.
            device: of the result; the content's own when None. Pinned host memory is copied asynchronously.
            dtype: of content and positions; None: the content's own, fp32 for uint8. Coordinates are fp32, or fp64 if it is.

        Returns:
            TokenSlice of stop - start tokens: views where nothing had to be converted or copied.

        Raises:
            TypeError: dtype is not a floating-point type.
            ValueError: start and stop are not a range of the tokens.
        """
        start, stop = check_range(start, stop, self.length)
        if dtype is None:
            dtype = torch.float32 if self.content.dtype == torch.uint8 else self.content.dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be a floating-point type, got {dtype}")
        device = self.device if device is None else torch.device(device)
        content = _moved(self.content[:, start:stop], device)
        if content.dtype == torch.uint8:
            content = self._from_bytes(content, torch.promote_types(dtype, torch.float32))
        positions, fourier = self._positions(start, stop, device, dtype)
        return TokenSlice(content.to(dtype), positions, fourier, self._visible(start, stop, device))

    def _from_bytes(self, content: Tensor, dtype: torch.dtype) -> Tensor:
        content = content.to(dtype) / 255
        if self.mean is not None:
            content = content - constant(self.mean, content.device, partial(tuple, self.mean))
        if self.std is not None:
            content = content / constant(self.std, content.device, partial(tuple, self.std))
        return content

    def _positions(
        self, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.positions is None:
            return None, None
        if isinstance(self.positions, Tensor):
            return _moved(self.positions[..., start:stop, :], device).to(dtype), None
        if self.grid is not None:
            coordinates = grid_coordinates(self.grid, start, stop, device=device)
        elif self.coordinates is not None:
            coordinates = _moved(self.coordinates[..., start:stop, :], device)
        # Half precision would leave no correct bit of the phase of a high frequency.
        wide = torch.promote_types(dtype, torch.float32)
        return coordinates.to(wide), self.positions.table(device)

    def _visible(self, start: int, stop: int, device: torch.device) -> Tensor | None:
        if self.lengths is not None:
            return torch.arange(start, stop, device=device) < _moved(self.lengths, device)[:, None]
        return None if self.key_mask is None else _moved(self.key_mask[:, start:stop], device)

    @classmethod
    def image(
        cls,
        images: Tensor,
        positions: Tensor | FourierPositions | None = None,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> InputArray:
        """Every pixel is a token: a view of images float or uint8 [B, Ch, H, W], M = H * W.

        positions default to FourierPositions(64, (H, W)): 258 channels; mean and std hold Ch numbers.

        Source: Perceiver, arXiv 2103.03206, section 4.1.
        """
        check_tensor("images", images, "[B, Ch, H, W]", (None,) * 4, dtypes=RAW_DTYPES)
        grid = tuple(images.shape[2:])
        positions = _default_fourier(64, grid) if positions is None else positions
        return cls(images.flatten(2).mT, positions, grid=_grid(positions, grid), mean=mean, std=std)

    @classmethod
    def video(
        cls,
        video: Tensor,
        patch: tuple[int, int, int] = (1, 1, 1),
        positions: Tensor | FourierPositions | None = None,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> InputArray:
        """Every patch (frames, rows, columns) of float or uint8 [B, T, Ch, H, W] is a token, rearranged once.

        Channels run over (frame, row, column, Ch). positions default to FourierPositions(32, (T, H, W)); mean
        and std hold Ch numbers.

        Source: Perceiver IO, arXiv 2107.14795, section 4.3; the channel order is DeepMind's.
        """
        check_tensor("video", video, "[B, T, Ch, H, W]", (None,) * 5, dtypes=RAW_DTYPES)
        batch, frames, channels, height, width = video.shape
        check_patch("patch", patch, (frames, height, width), "(T, H, W)")
        grid = (frames // patch[0], height // patch[1], width // patch[2])
        content = video.reshape(batch, grid[0], patch[0], channels, grid[1], patch[1], grid[2], patch[2])
        content = content.permute(0, 1, 4, 6, 2, 5, 7, 3)  # [B, grid, patch, Ch]
        content = content.reshape(batch, math.prod(grid), math.prod(patch) * channels)
        positions = _default_fourier(32, (frames, height, width)) if positions is None else positions
        mean = _repeated("mean", mean, channels, math.prod(patch))
        std = _repeated("std", std, channels, math.prod(patch))
        return cls(content, positions, grid=_grid(positions, grid), mean=mean, std=std)

    @classmethod
    def audio(
        cls, samples: Tensor, patch: int = 16, positions: Tensor | FourierPositions | None = None
    ) -> InputArray:
        """Every `patch` consecutive samples of float [B, S] or [B, S, Ch] are a token, a view: M = S / patch.

        positions default to FourierPositions(192, (S,)).

        Source: Perceiver IO, arXiv 2107.14795, section 4.3; bands as in DeepMind's code.
        """
        check_tensor("samples", samples, "[B, S] or [B, S, Ch]", (None, None), (None, None, None))
        count = samples.shape[1]
        check_patch("patch", (patch,), (count,), "(S,)")
        content = samples.reshape(samples.shape[0], count // patch, patch * math.prod(samples.shape[2:]))
        positions = _default_fourier(192, (count,)) if positions is None else positions
        return cls(content, positions, grid=_grid(positions, (count // patch,)))

    @classmethod
    def points(
        cls,
        coordinates: Tensor,
        features: Tensor | None = None,
        positions: FourierPositions | None = None,
        *,
        key_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> InputArray:
        """Every point of float [B, M, axes] is a token; its content, if any, are features float [B, M, F].

        positions default to FourierPositions(64, (2240,) * axes), whose highest frequency is the paper's 1120: 387 channels for
        three axes.

        Source: Perceiver, arXiv 2103.03206, section 4.3.
        """
        check_tensor("coordinates", coordinates, "[B, M, axes]", (None, None, None))
        if coordinates.shape[2] == 0:
            raise ValueError(f"coordinates must have at least one axis, got {tuple(coordinates.shape)}")
        if positions is not None and not isinstance(positions, FourierPositions):
            raise TypeError(f"positions must be a FourierPositions, got {type(positions).__name__}")
        if features is not None:
            check_tensor("features", features, "[B, M, F]", (*coordinates.shape[:2], None))
        content = coordinates[:, :, :0] if features is None else features
        positions = FourierPositions(64, (2240.0,) * coordinates.shape[2]) if positions is None else positions
        return cls(content, positions, coordinates, key_mask=key_mask, lengths=lengths)

    @classmethod
    def tokens(
        cls,
        content: Tensor,
        positions: Tensor | FourierPositions | None = None,
        *,
        key_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> InputArray:
        """Tokens float or uint8 [B, M, C] as they are; FourierPositions of one axis lie evenly in [-1, 1]."""
        check_tensor("content", content, "[B, M, C]", (None,) * 3, dtypes=RAW_DTYPES)
        grid = _grid(positions, (content.shape[1],))
        return cls(content, positions, grid=grid, key_mask=key_mask, lengths=lengths)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """tensor on device; asynchronously from pinned memory, which the device reads while the host goes on."""
    if tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and tensor.is_pinned())


def _repeated(
    name: str, values: tuple[float, ...] | None, channels: int, times: int
) -> tuple[float, ...] | None:
    if values is None:
        return None
    values = check_numbers(name, values, positive=False)
    if len(values) != channels:
        raise ValueError(f"{name} must hold Ch={channels} numbers, got {len(values)}")
    return values * times


def _default_fourier(num_bands: int, sizes: tuple[int, ...]) -> FourierPositions:
    # An array without a token has no resolution; its positions still have channels.
    return FourierPositions(num_bands, tuple(max(size, 1) for size in sizes))


def _grid(positions: object, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return shape if isinstance(positions, FourierPositions) else None
