"""From what a decoder gives to results: a linear layer for every kind of output. All are called alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.inputs import InputArray
from perceiver_kernels.models.multimodal import check_modalities
from perceiver_kernels.models.preprocessing import TextPreprocessor, grid_of
from perceiver_kernels.nn import Linear
from perceiver_kernels.nn.called import parameter_of
from perceiver_kernels.nn.checks import check_count, check_sequence


@dataclass(frozen=True, eq=False)
class Source:
    """What outputs belong to.

    Args:
        array: the input array, [B, M, C].
        preprocessor: that made it.
        whole: whether all outputs were asked for.
    """

    array: Tensor | InputArray
    preprocessor: nn.Module
    whole: bool = True


def _projected(decoded: Tensor, proj: nn.Linear) -> Tensor:
    check_sequence("decoded", decoded, "B, O, C", proj.in_features, parameter_of(proj))
    return proj(decoded)


class PlainHead(nn.Module):
    """What the decoder gives is the result."""

    def forward(self, decoded: Tensor, source: Source) -> Tensor:
        """[B, O, C] -> the same."""
        return decoded


class ClassHead(nn.Module):
    """Class scores of one output query: W y + b.

    Args:
        channels: of the decoder's result.
        num_classes: of the scores.
    """

    def __init__(
        self, channels: int, num_classes: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        check_count("num_classes", num_classes)
        self.proj = Linear(channels, num_classes, device=device, dtype=dtype)

    def forward(self, decoded: Tensor, source: Source) -> Tensor:
        """[B, 1, C] -> [B, num_classes]; [B, 0, C], where nothing is asked for, -> [B, 0]."""
        return _projected(decoded, self.proj)[:, :1].flatten(1)


class TokenHead(nn.Module):
    """Scores of every token id, by the embedding that the input passed: E y + b.

    Args:
        vocab_size: number of token ids.

    Source: Perceiver IO, arXiv 2107.14795, appendix F.
    """

    def __init__(
        self, vocab_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_count("vocab_size", vocab_size)
        self.bias = nn.Parameter(torch.empty(vocab_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, decoded: Tensor, source: Source) -> Tensor:
        """[B, O, C] -> [B, O, vocab_size]; the source is of a TextPreprocessor."""
        if not isinstance(source.preprocessor, TextPreprocessor):
            raise TypeError(f"preprocessor must be a TextPreprocessor, got {type(source.preprocessor).__name__}")
        weight = source.preprocessor.embedding.weight
        if weight.shape[0] != len(self.bias):
            raise ValueError(f"preprocessor must have vocab_size={len(self.bias)} as the head, got {weight.shape[0]}")
        check_sequence("decoded", decoded, "B, O, C", weight.shape[1], weight)
        return nn.functional.linear(decoded, weight, self.bias)


class FlowHead(nn.Module):
    """Optical flow of every pixel: (W y + b) / scale.

    Args:
        channels: of the decoder's result.
        scale: by which what the linear layer gives is divided; pixels come out.

    Source: Perceiver IO, arXiv 2107.14795, appendix H; scale as in DeepMind's code.
    """

    def __init__(
        self,
        channels: int,
        scale: float = 100.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        self.scale = scale
        self.proj = Linear(channels, 2, device=device, dtype=dtype)

    def forward(self, decoded: Tensor, source: Source) -> Tensor:
        """[B, H * W, C] -> [B, H, W, 2], in pixels; [B, n, C] of n pixels -> [B, n, 2]."""
        flow = _projected(decoded, self.proj) / self.scale
        if not source.whole:
            return flow
        grid = grid_of(source.array)
        if grid is None:
            raise ValueError("inputs must fill a grid, whose pixels have a flow, got tokens without one")
        if flow.shape[1] != math.prod(grid):
            raise ValueError(f"decoded must have an output for every pixel of {tuple(grid)}, got {flow.shape[1]}")
        return flow.unflatten(1, tuple(grid))


class PatchHead(nn.Module):
    """Values of every output, those of a token's patch or the scores of its classes: W y + b.

    Args:
        channels: of the decoder's result.
        values: of an output.
        flat: one after the other, [B, O * values], as samples of audio.
    """

    def __init__(
        self,
        channels: int,
        values: int,
        *,
        flat: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        check_count("values", values)
        self.flat = flat
        self.proj = Linear(channels, values, device=device, dtype=dtype)

    def forward(self, decoded: Tensor, source: Source) -> Tensor:
        """[B, O, C] -> [B, O, values], or [B, O * values]."""
        values = _projected(decoded, self.proj)
        return values.flatten(1) if self.flat else values


class MultimodalHead(nn.Module):
    """A linear layer for all modalities, then each one's head.

    Args:
        channels: of the decoder's result.
        hidden_channels: of the common layer's.
        modalities: the head of each modality.

    Source: Perceiver IO, arXiv 2107.14795, section 4.3.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        modalities: Mapping[str, nn.Module],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        check_count("hidden_channels", hidden_channels)
        self.proj = Linear(channels, hidden_channels, device=device, dtype=dtype)
        self.modalities = nn.ModuleDict({name: modalities[name] for name in sorted(modalities)})

    def forward(self, decoded: Mapping[str, Tensor], source: Source) -> dict[str, Any]:
        """[B, O_m, C] of every modality -> what its head gives."""
        check_modalities("decoded", decoded, list(self.modalities))
        return {name: head(_projected(decoded[name], self.proj), source) for name, head in self.modalities.items()}
