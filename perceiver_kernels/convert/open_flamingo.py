"""OpenFlamingo: ``PerceiverResampler`` of its helpers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perceiver_kernels.convert.flamingo_pytorch import media_embedding
from perceiver_kernels.convert.resampler_layouts import WITHOUT_PROJECTIONS, lucidrains_layers, require_flamingo
from perceiver_kernels.convert.rules import Rule, affine, renamed
from perceiver_kernels.models import PerceiverResampler


def resampler(model: PerceiverResampler) -> list[Rule]:
    config = require_flamingo(model, "OpenFlamingo's PerceiverResampler", **WITHOUT_PROJECTIONS)
    rules = [*renamed("latents", "latents"), *lucidrains_layers(config.depth), *affine("norm", "norm")]
    if config.max_media is not None:
        rules.append(media_embedding("media_time_embs"))
    if config.max_frames is not None:
        rules += renamed("frame_embedding", "frame_embs")
    return rules


RULES: dict[type, Callable[[Any], list[Rule]]] = {PerceiverResampler: resampler}
