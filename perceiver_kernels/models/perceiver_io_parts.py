"""Encoders and decoders as the constructors of Perceiver IO share them."""

from __future__ import annotations

from typing import Any, Literal

import torch

from perceiver_kernels.models.encoder import EncoderConfig, PerceiverEncoder
from perceiver_kernels.models.model import changed
from perceiver_kernels.nn import OutputBlock
from perceiver_kernels.nn.checks import check_choice

Like = Literal["deepmind", "transformers"]
Where = torch.device | str | None

# Of the language model of arXiv 2107.14795, section 4.1.
LANGUAGE: dict[str, Any] = {
    "num_latents": 256, "latent_dim": 1280, "num_blocks": 1, "layers_per_block": 26, "cross_heads": 8, "qk_channels": 256,
    "v_channels": 1280, "latent_qk_channels": 256, "latent_v_channels": 1280,
}  # fmt: skip


def encoder_of(preprocessor: Any, like: Like, changes: dict[str, Any], where: dict[str, Any]) -> PerceiverEncoder:
    """One cross-attend, then blocks that share their weights; ImageNet's sizes but for ``changes``."""
    check_choice("like", like, ("deepmind", "transformers"))
    fields: dict[str, Any] = {
        "input_dim": preprocessor.channels, "num_cross_attends": 1,
        "activation": "gelu_tanh" if like == "deepmind" else "gelu",
    }  # fmt: skip
    return PerceiverEncoder(changed(EncoderConfig, fields, changes), **where)


def decoder_of(encoder: PerceiverEncoder, channels: int, where: dict[str, Any], **options: Any) -> OutputBlock:
    """The published decoders have one head as wide as the latents but where ``options`` say otherwise.

    What is dropped of the attention's result, krasserm/perceiver-io drops before a residual alone.
    """
    config = encoder.config
    if options.get("residual"):
        options["out_dropout"] = config.attention_result_dropout
    return OutputBlock(
        channels, config.latent_dim, activation=config.activation, attention_dropout=config.attention_dropout,
        dropout=config.dropout, eps=config.eps, **options, **where,
    )  # fmt: skip
