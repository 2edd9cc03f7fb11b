"""IP-Adapter Plus: ``Resampler``, the part ``image_proj`` of its files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from perceiver_kernels.convert.resampler_layouts import WITHOUT_EMBEDDINGS, lucidrains_layers, require_flamingo
from perceiver_kernels.convert.rules import Rule, affine
from perceiver_kernels.models import PerceiverResampler, PerceiverResamplerConfig


def require_ip_adapter(model: PerceiverResampler, theirs: str) -> PerceiverResamplerConfig:
    """The configuration of a model that IP-Adapter's resampler can be."""
    return require_flamingo(
        model, theirs, given=("input_dim", "output_dim"), input_hidden_dim=None, **WITHOUT_EMBEDDINGS
    )  # fmt: skip


def projections() -> list[Rule]:
    """What lies around the layers; their latents have a batch axis."""
    return [
        Rule("latents", ("latents",), read=_squeezed, write=_unsqueezed),
        *affine("input_proj", "proj_in"),
        *affine("output_proj", "proj_out"),
        *affine("norm", "norm_out"),
    ]


def _squeezed(latents: Tensor) -> Tensor:
    return latents.squeeze(0)


def _unsqueezed(latents: Tensor) -> Tensor:
    return latents.unsqueeze(0)


def resampler(model: PerceiverResampler) -> list[Rule]:
    config = require_ip_adapter(model, "IP-Adapter's Resampler")
    return [*projections(), *lucidrains_layers(config.depth, norm_media="norm1", norm_latents="norm2")]


RULES: dict[type, Callable[[Any], list[Rule]]] = {PerceiverResampler: resampler}
