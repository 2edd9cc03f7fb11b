"""Several modalities as one array: filled up to one width with learned channels, masked, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.inputs import InputArray
from perceiver_kernels.models.preprocessing import AudioPreprocessor, VideoPreprocessor, grid_of
from perceiver_kernels.nn.called import written_out
from perceiver_kernels.nn.checks import check_count
from perceiver_kernels.problem import check_probability


def check_modalities(name: str, given: object, expected: list[str]) -> None:
    """Every modality must be given, and no other."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must map {', '.join(map(repr, expected))} to tensors, got {type(given).__name__}")
    if sorted(given) != expected:
        raise ValueError(f"{name} must hold {', '.join(map(repr, expected))}, got {', '.join(map(repr, sorted(given)))}")


class CommonWidth(nn.Module):
    """Arrays of several modalities, in the order of their names, each filled up by a learned vector of its own.

        x_m <- [x_m | padding_m],   C = max over modalities of their channels + min_padding

    Args:
        channels: of each modality's array.
        min_padding: learned channels of the widest modality.

    Source: Perceiver IO, arXiv 2107.14795, section 4.3 and appendix; the vectors start standard normal as in DeepMind's code.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        min_padding: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("min_padding", min_padding, 0)
        if not channels:
            raise ValueError("modalities must hold at least one, got none")
        self.names = sorted(channels)
        self.channels = max(channels.values()) + min_padding
        self.padding = nn.ParameterDict(
            {name: torch.empty(1, self.channels - channels[name], device=device, dtype=dtype) for name in self.names}
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for vector in self.padding.values():
            nn.init.normal_(vector)

    def forward(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[B, M_m, C_m] of every modality -> [B, M_m, C]."""
        return {
            name: torch.cat((arrays[name], self.padding[name].expand(*arrays[name].shape[:2], -1)), 2) for name in self.names
        }


class MultimodalPreprocessor(nn.Module):
    """Every modality by its own preprocessor, all as one array.

    Args:
        modalities: preprocessor of each modality; tokens follow each other in the order of the names.
        min_padding: learned channels of the widest modality.
        mask_probs: probability that a token of a modality is replaced by a learned one, in training and out of it, as where a
            label is to be found out; 0 where a modality is not named.
        grids: of tokens that a modality must fill, since the queries of its outputs have a grid that inputs of another size
            do not change; {}: any size may be read. None: the ``grid`` of every AudioPreprocessor and VideoPreprocessor.

    Source: Perceiver IO, arXiv 2107.14795, section 4.3.
    """

    def __init__(
        self,
        modalities: Mapping[str, nn.Module],
        min_padding: int = 4,
        mask_probs: Mapping[str, float] | None = None,
        *,
        grids: Mapping[str, Sequence[int]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.modalities = nn.ModuleDict({name: modalities[name] for name in sorted(modalities)})
        widths = {name: int(module.channels) for name, module in self.modalities.items()}  # type: ignore[arg-type]
        self.common = CommonWidth(widths, min_padding, **where)
        self.channels = self.common.channels
        self.mask_probs = dict(mask_probs or {})
        if grids is None:
            media = (AudioPreprocessor, VideoPreprocessor)
            grids = {name: module.grid for name, module in modalities.items() if isinstance(module, media)}
        self.grids = {name: tuple(grid) for name, grid in grids.items()}
        for argument, named in (("mask_probs", self.mask_probs), ("grids", self.grids)):
            for name in named:
                if name not in self.modalities:
                    raise ValueError(f"{argument} must name modalities among {', '.join(self.modalities)}, got {name!r}")
        for name, probability in self.mask_probs.items():
            if probability != 1:
                check_probability(f"mask_probs[{name!r}]", probability)
        self.mask_tokens = nn.ParameterDict(
            {name: torch.empty(1, self.channels, **where) for name in sorted(self.mask_probs)}
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the learned tokens; modalities have methods of their own."""
        for token in self.mask_tokens.values():
            nn.init.normal_(token)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Raw inputs of every modality, one B for all -> [B, M, C], M the tokens of all."""
        check_modalities("inputs", inputs, list(self.modalities))
        dtype = next(iter(self.common.padding.values())).dtype
        arrays = {name: written_out(self._read(name, inputs[name]), dtype) for name in self.modalities}
        sizes = [array.shape[0] for array in arrays.values()]
        if any(size != sizes[0] for size in sizes):
            batches = ", ".join(f"B={array.shape[0]} of {name!r}" for name, array in arrays.items())
            raise ValueError(f"inputs must have one batch size B for all modalities, got {batches}")
        padded = self.common(arrays)
        return torch.cat([self._masked(name, padded[name]) for name in self.modalities], 1)

    def _read(self, name: str, raw: Tensor) -> Tensor | InputArray:
        array = self.modalities[name](raw)
        found, expected = grid_of(array), self.grids.get(name)
        if expected is not None and found != expected:
            raise ValueError(f"inputs[{name!r}] must fill the grid {expected} of tokens, see grids, got {found}")
        return array

    def _masked(self, name: str, array: Tensor) -> Tensor:
        probability = self.mask_probs.get(name, 0.0)
        if probability == 0:
            return array
        hidden = torch.rand(array.shape[:2], device=array.device) < probability
        return torch.where(hidden[..., None], self.mask_tokens[name], array)
