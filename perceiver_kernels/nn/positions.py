"""Learned position channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_kernels.nn.checks import check_count


class LearnedPositions(nn.Module):
    """A trained vector for every place of the input array.

        x_j = [content_j | weight_j]

    The module gives the table; ``InputArray`` and ``pack_inputs`` take it as ``positions`` and put it beside the content:

        inputs = InputArray.image(images, positions=learned_positions())

    They are trained on whole inputs; a layer with ``chunk_size`` reads them where no gradient is wanted.

    Args:
        length: M, number of input tokens.
        channels: P, channels of a position (128 in the paper's ImageNet model with learned positions).

    Source: Perceiver, arXiv 2103.03206, section 4.1. Starts truncated normal, standard deviation 0.02, cut at +-2.
    """

    def __init__(
        self,
        length: int,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("length", length)
        check_count("channels", channels)
        self.length, self.channels = length, channels
        self.weight = nn.Parameter(torch.empty(length, channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02, a=-2.0, b=2.0)

    def forward(self) -> Tensor:
        """The position channels, [M, P]."""
        return self.weight

    def extra_repr(self) -> str:
        return f"length={self.length}, channels={self.channels}"
