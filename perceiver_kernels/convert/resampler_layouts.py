"""What the libraries' resamplers have in common: lucidrains' layout of a layer, and what a library's model cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perceiver_kernels.convert.rules import Rule, affine, under
from perceiver_kernels.models import PerceiverResampler, PerceiverResamplerConfig

WITHOUT_EMBEDDINGS: dict[str, Any] = {"max_media": None, "max_frames": None}
WITHOUT_PROJECTIONS: dict[str, Any] = {"input_dim": None, "output_dim": None}


def require(model: PerceiverResampler, theirs: str, given: Sequence[str] = (), **fields: Any) -> PerceiverResamplerConfig:
    """The model's configuration, if a model of ``theirs`` can have it.

    Args:
        given: fields that may not be None.
        fields: the value that a field must have; a tuple: one of them.

    Raises:
        ValueError: it cannot; the message names the field, the rule and the value.
    """
    config = model.config
    for name in given:
        if getattr(config, name) is None:
            raise ValueError(f"{name} must be given for {theirs}, got None")
    for name, wanted in fields.items():
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if getattr(config, name) not in allowed:
            rule = " or ".join(map(repr, allowed))
            raise ValueError(f"{name} must be {rule} for {theirs}, got {getattr(config, name)!r}")
    return config


def require_flamingo(
    model: PerceiverResampler, theirs: str, given: Sequence[str] = (), **fields: Any
) -> PerceiverResamplerConfig:  # fmt: skip
    """``require`` of what Flamingo's public descendants do not let one choose, and of ``fields``."""
    fixed: dict[str, Any] = {
        "num_kv_heads": (None, model.config.num_heads), "activation": "gelu", "norm": "layer", "qk_norm": None, "eps": 1e-5,
    }  # fmt: skip
    return require(model, theirs, given, **fixed, **fields)


def lucidrains_layers(depth: int, norm_media: str = "norm_media", norm_latents: str = "norm_latents") -> list[Rule]:
    """Layers of attention ``layers.i.0`` and of feed-forward ``layers.i.1``, a Sequential."""
    rules = []
    for i in range(depth):
        rules += under(
            f"layers.{i}.attention.",
            f"layers.{i}.0.",
            [
                *affine("norm_context", norm_media),
                *affine("norm", norm_latents),
                *affine("q_proj", "to_q", bias=False),
                *affine("kv_proj", "to_kv", bias=False),
                *affine("out_proj", "to_out", bias=False),
            ],
        )
        rules += under(
            f"layers.{i}.feed_forward.",
            f"layers.{i}.1.",
            [*affine("norm", "0"), *affine("up_proj", "1", bias=False), *affine("down_proj", "3", bias=False)],
        )
    return rules
