"""lucidrains' flamingo-pytorch: ``PerceiverResampler``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from perceiver_kernels.convert.resampler_layouts import WITHOUT_PROJECTIONS, lucidrains_layers, require_flamingo
from perceiver_kernels.convert.rules import Rule, affine, renamed
from perceiver_kernels.models import PerceiverResampler


def media_embedding(theirs: str) -> Rule:
    """Their table of media has an axis for the tokens, [T, 1, D]."""
    return Rule("media_embedding", (theirs,), read=_squeezed, write=_unsqueezed)


def _squeezed(table: Tensor) -> Tensor:
    return table.squeeze(1)


def _unsqueezed(table: Tensor) -> Tensor:
    return table.unsqueeze(1)


def resampler(model: PerceiverResampler) -> list[Rule]:
    config = require_flamingo(
        model, "flamingo-pytorch's PerceiverResampler", given=("max_media",), max_frames=None, **WITHOUT_PROJECTIONS
    )
    return [
        *renamed("latents", "latents"),
        media_embedding("media_pos_emb"),
        *lucidrains_layers(config.depth),
        *affine("norm", "norm"),
    ]


RULES: dict[type, Callable[[Any], list[Rule]]] = {PerceiverResampler: resampler}
