"""From raw inputs to the input array: every preprocessor gives tokens of ``channels`` channels, positions among them.

Positions that follow from a token's place are left to the kernels: such a preprocessor gives an ``InputArray``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.checks import RAW_DTYPES, check_indices, check_tensor, is_integer
from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.nn import LearnedPositions, Linear
from perceiver_kernels.nn.checks import check_choice, check_count


def _check_images(images: Tensor, channels: int) -> None:
    check_tensor("images", images, "[B, Ch, H, W]", (None, channels, None, None), dtypes=RAW_DTYPES)


def _check_sizes(name: str, sizes: object, axes: str) -> None:
    """A positive integer for each of ``axes``, as "(H, W)"."""
    if not isinstance(sizes, (tuple, list)) or not all(map(is_integer, sizes)):
        raise TypeError(f"{name} must be integers {axes}, got {sizes!r}")
    if len(sizes) != axes.count(",") + 1 or min(sizes) < 1:
        raise ValueError(f"{name} must be positive integers {axes}, got {tuple(sizes)}")


def _fourier(positions: FourierPositions | None, default: FourierPositions) -> FourierPositions:
    """The default, or others of as many axes."""
    if positions is None:
        return default
    if not isinstance(positions, FourierPositions):
        raise TypeError(f"positions must be a FourierPositions, got {type(positions).__name__}")
    if positions.num_axes != default.num_axes:
        raise ValueError(f"positions must have {default.num_axes} axes, got {positions.num_axes}")
    return positions


def _as_weight(raw: Tensor, weight: Tensor) -> Tensor:
    """Values as ``InputArray`` reads them, uint8 u as u / 255, in the dtype of a weight; autocast goes on from there."""
    if raw.dtype == torch.uint8:
        raw = raw.to(torch.promote_types(weight.dtype, torch.float32)) / 255
    return raw.to(weight.dtype)


class ArrayPreprocessor(nn.Module):
    """The input array is given as it is.

    Args:
        channels: C, content and positions together.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_count("channels", channels)
        self.channels = channels

    def forward(self, array: Tensor | InputArray) -> Tensor | InputArray:
        """[B, M, C] -> the same."""
        if not isinstance(array, (Tensor, InputArray)):
            raise TypeError(f"inputs must be a Tensor or InputArray, got {type(array).__name__}")
        return array


class PixelPreprocessor(nn.Module):
    """Every pixel is a token, with Fourier features of its place.

    Args:
        in_channels: Ch, channels of the images.
        positions: of two axes; ``FourierPositions(64, (224, 224))`` when None.

    Source: Perceiver IO, arXiv 2107.14795, appendix A, ImageNet with 2D Fourier features.
    """

    def __init__(self, in_channels: int = 3, positions: FourierPositions | None = None) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        self.in_channels = in_channels
        self.positions = _fourier(positions, FourierPositions(64, (224, 224)))
        self.channels = in_channels + self.positions.channels

    def forward(self, images: Tensor) -> InputArray:
        """images float or uint8 [B, Ch, H, W] -> M = H * W tokens."""
        _check_images(images, self.in_channels)
        return InputArray.image(images, self.positions)


class ConvPreprocessor(nn.Module):
    """Images at a quarter of their size: convolution 7x7 of stride 2, batch norm, ReLU, maximum over 3x3 of stride 2.

    Args:
        in_channels: Ch, channels of the images.
        out_channels: of the convolution.
        positions: of two axes; ``FourierPositions(64, (56, 56))`` when None.
        padding: "same" as DeepMind's code, 224 becomes 56; "transformers", which pads the convolution by 3 on all sides and
            the maximum not at all, 224 becomes 55.

    Source: Perceiver IO, arXiv 2107.14795, appendix A, ImageNet with convolutional preprocessing.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 64,
        positions: FourierPositions | None = None,
        *,
        padding: Literal["same", "transformers"] = "same",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        check_count("out_channels", out_channels)
        check_choice("padding", padding, ("same", "transformers"))
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels, self.padding = in_channels, padding
        self.positions = _fourier(positions, FourierPositions(64, (56, 56)))
        self.channels = out_channels + self.positions.channels
        self.conv = nn.Conv2d(in_channels, out_channels, 7, stride=2, bias=False, **where)
        self.batch_norm = nn.BatchNorm2d(out_channels, **where)

    def forward(self, images: Tensor) -> InputArray:
        """images float or uint8 [B, Ch, H, W] -> M = ceil(H/4) * ceil(W/4) tokens with padding "same"."""
        _check_images(images, self.in_channels)
        images = _as_weight(images, self.conv.weight)
        same = self.padding == "same"
        features = F.relu(self.batch_norm(self.conv(F.pad(images, _same_padding(images, 7) if same else (3,) * 4))))
        if same:
            # What is padded is below every feature.
            features = F.pad(features, _same_padding(features, 3), value=-torch.inf)
        return InputArray.image(F.max_pool2d(features, 3, 2), self.positions)


def _same_padding(images: Tensor, window: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) that make windows of stride 2 cover ceil(size / 2) places, the odd one at the end."""
    sides: list[int] = []
    for size in reversed(images.shape[2:]):
        total = max(2 * (-(-size // 2) - 1) + window - size, 0)
        sides += [total // 2, total - total // 2]
    return sides[0], sides[1], sides[2], sides[3]


class LearnedPreprocessor(nn.Module):
    """Every pixel is a token: its channels by a linear layer, beside a learned position that has passed another.

    Args:
        size: (H, W) of the images.
        in_channels: Ch, channels of the images.
        out_channels: of the pixels' linear layer.
        position_channels: of the learned positions, before and after their linear layer.

    Source: Perceiver IO, arXiv 2107.14795, appendix A, ImageNet with learned positions.
    """

    def __init__(
        self,
        size: tuple[int, int] = (224, 224),
        in_channels: int = 3,
        out_channels: int = 256,
        position_channels: int = 256,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes("size", size, "(H, W)")
        check_count("in_channels", in_channels)
        check_count("out_channels", out_channels)
        check_count("position_channels", position_channels)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.size, self.in_channels, self.channels = tuple(size), in_channels, out_channels + position_channels
        self.pixel_proj = Linear(in_channels, out_channels, **where)
        self.positions = LearnedPositions(size[0] * size[1], position_channels, **where)
        self.position_proj = Linear(position_channels, position_channels, **where)

    def forward(self, images: Tensor) -> InputArray:
        """images float or uint8 [B, Ch, H, W] -> M = H * W tokens."""
        _check_images(images, self.in_channels)
        if tuple(images.shape[2:]) != self.size:
            raise ValueError(f"images must be {self.size} as the learned positions, got {tuple(images.shape[2:])}")
        pixels = _as_weight(images, self.pixel_proj.weight).flatten(2).mT  # [B, M, Ch]
        return InputArray.tokens(self.pixel_proj(pixels), self.position_proj(self.positions()))


class FlowPreprocessor(nn.Module):
    """Two frames as one array: every pixel's neighbourhood in both frames passes a linear layer.

    Args:
        patch_channels: channels of a neighbourhood in one frame: 27, those of 3x3 pixels of 3 colours.
        out_channels: of the linear layer.
        positions: of two axes; ``FourierPositions(64, (368, 496))``, the size of training, when None.

    Source: Perceiver IO, arXiv 2107.14795, section 4.2 and appendix H.
    """

    def __init__(
        self,
        patch_channels: int = 27,
        out_channels: int = 64,
        positions: FourierPositions | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("patch_channels", patch_channels)
        check_count("out_channels", out_channels)
        self.patch_channels = patch_channels
        self.positions = _fourier(positions, FourierPositions(64, (368, 496)))
        self.channels = out_channels + self.positions.channels
        self.patch_proj = Linear(2 * patch_channels, out_channels, device=device, dtype=dtype)

    def forward(self, frames: Tensor) -> InputArray:
        """frames float or uint8 [B, 2, 27, H, W], see ``flow_patches``, -> M = H * W tokens."""
        check_tensor("frames", frames, "[B, 2, Ch, H, W]", (None, 2, self.patch_channels, None, None), dtypes=RAW_DTYPES)
        patches = _as_weight(frames, self.patch_proj.weight).flatten(1, 2).flatten(2).mT  # [B, M, 2 * Ch]
        features = self.patch_proj(patches)
        return InputArray.image(features.mT.unflatten(2, frames.shape[3:]), self.positions)


def flow_patches(frames: Tensor) -> Tensor:
    """The 3x3 neighbourhood of every pixel, frames float or uint8 [B, 2, 3, H, W] -> [B, 2, 27, H, W], zeros past the border.

    Channels run over (row, column, colour).

    Source: Perceiver IO, arXiv 2107.14795, appendix H.
    """
    check_tensor("frames", frames, "[B, 2, 3, H, W]", (None, 2, 3, None, None), dtypes=RAW_DTYPES)
    height, width = frames.shape[3:]
    padded = F.pad(frames, (1, 1, 1, 1))
    shifted = [padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return torch.cat(shifted, 2)


class TextPreprocessor(nn.Module):
    """Token embeddings plus learned positions.

    Args:
        vocab_size: number of token ids; 262 for bytes with 6 special ids.
        channels: of an embedding.
        max_length: tokens of the longest sequence.

    Source: Perceiver IO, arXiv 2107.14795, section 4.1 and appendix F.
    """

    def __init__(
        self,
        vocab_size: int = 262,
        channels: int = 768,
        max_length: int = 2048,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("vocab_size", vocab_size)
        check_count("channels", channels)
        check_count("max_length", max_length)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.vocab_size, self.channels, self.max_length = vocab_size, channels, max_length
        self.embedding = nn.Embedding(vocab_size, channels, **where)
        self.reset_parameters()
        self.positions = LearnedPositions(max_length, channels, **where)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.embedding.weight, std=0.02, a=-2.0, b=2.0)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 or int32 [B, M] -> [B, M, C]. Ids out of range are an error on a CPU, and a fault on a GPU."""
        check_tensor("ids", ids, "[B, M]", (None, None), dtypes=(torch.int64, torch.int32))
        if ids.shape[1] > self.max_length:
            raise ValueError(f"ids must hold at most max_length={self.max_length} tokens, got {ids.shape[1]}")
        check_indices("ids", ids, "vocab_size-1", self.vocab_size)
        return self.embedding(ids) + self.positions()[: ids.shape[1]]


class AudioPreprocessor(nn.Module):
    """Every ``patch`` samples are a token, with Fourier features of its place.

    Args:
        patch: samples of a token.
        positions: of one axis, whose resolution is S; ``FourierPositions(192, (30_720,))``, 16 frames of 1,920 samples, when
            None.

    Source: Perceiver IO, arXiv 2107.14795, section 4.3; bands as in DeepMind's code.
    """

    def __init__(self, patch: int = 16, positions: FourierPositions | None = None) -> None:
        super().__init__()
        check_count("patch", patch)
        self.patch = patch
        self.positions = _fourier(positions, FourierPositions(192, (30_720,)))
        self.channels = patch + self.positions.channels

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens of the samples that ``positions`` are for; others can be read too."""
        samples = self.positions.max_resolution[0]
        if samples % self.patch:
            raise ValueError(f"patch must divide the samples, max_resolution=({samples},) of positions, got {self.patch}")
        return (int(samples) // self.patch,)

    def forward(self, samples: Tensor) -> InputArray:
        """samples float [B, S] or [B, S, 1] -> M = S / patch tokens."""
        check_tensor("samples", samples, "[B, S] or [B, S, 1]", (None, None), (None, None, 1))
        return InputArray.audio(samples, self.patch, self.positions)


class VideoPreprocessor(nn.Module):
    """Every patch of a video is a token, with Fourier features of its place.

    Args:
        in_channels: Ch, channels of a frame.
        patch: (frames, rows, columns) of a token.
        positions: of three axes, whose resolutions are tokens; ``FourierPositions(32, (16, 56, 56))`` when None.

    Source: Perceiver IO, arXiv 2107.14795, section 4.3; bands as in DeepMind's code.
    """

    def __init__(
        self, in_channels: int = 3, patch: tuple[int, int, int] = (1, 4, 4), positions: FourierPositions | None = None
    ) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        _check_sizes("patch", patch, "(frames, rows, columns)")
        self.in_channels, self.patch = in_channels, patch
        self.positions = _fourier(positions, FourierPositions(32, (16, 56, 56)))
        self.channels = in_channels * patch[0] * patch[1] * patch[2] + self.positions.channels

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens of the video that ``positions`` are for; others can be read too."""
        return tuple(map(int, self.positions.max_resolution))

    def forward(self, video: Tensor) -> InputArray:
        """video float or uint8 [B, T, Ch, H, W] -> M = T H W / (frames rows columns) tokens."""
        check_tensor("video", video, "[B, T, Ch, H, W]", (None, None, self.in_channels, None, None), dtypes=RAW_DTYPES)
        return InputArray.video(video, self.patch, self.positions)


class PointPreprocessor(nn.Module):
    """Every point is a token: Fourier features of its coordinates, beside its own features if it has any.

    Args:
        features: F, channels of a point beside its coordinates.
        positions: ``FourierPositions(64, (2240,) * 3)``, the ModelNet40 model's, when None.

    Source: Perceiver, arXiv 2103.03206, section 4.3.
    """

    def __init__(self, features: int = 0, positions: FourierPositions | None = None) -> None:
        super().__init__()
        check_count("features", features, 0)
        self.features = features
        self.positions = FourierPositions(64, (2240.0,) * 3) if positions is None else positions
        self.channels = features + self.positions.channels

    def forward(self, points: Tensor) -> InputArray:
        """points float [B, M, axes + F], coordinates first -> M tokens."""
        axes = self.positions.num_axes
        check_tensor("points", points, "[B, M, axes + F]", (None, None, axes + self.features))
        return InputArray.points(points[..., :axes], points[..., axes:] if self.features else None, self.positions)


class LabelPreprocessor(nn.Module):
    """A vector of class scores or a one-hot label is one token, without a position.

    Args:
        num_classes: channels of the label.

    Source: Perceiver IO, arXiv 2107.14795, section 4.3.
    """

    def __init__(self, num_classes: int = 700) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        self.channels = num_classes

    def forward(self, label: Tensor) -> Tensor:
        """label float [B, num_classes] -> [B, 1, num_classes]."""
        check_tensor("label", label, "[B, num_classes]", (None, self.channels))
        return label[:, None]


def grid_of(array: Tensor | InputArray) -> Sequence[int] | None:
    """The sizes of the dense grid that an array's tokens fill, where they fill one."""
    return array.grid if isinstance(array, InputArray) else None
