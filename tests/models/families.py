"""One small model of every family, with what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.models import (
    RIN,
    LinformerLM,
    LinformerLMConfig,
    Perceiver,
    PerceiverAR,
    PerceiverARConfig,
    PerceiverConfig,
    PerceiverIO,
    PerceiverResampler,
    PerceiverResamplerConfig,
    RINConfig,
    SetTransformer,
    SetTransformerConfig,
    VecSetAutoencoder,
    VecSetConfig,
)

ENCODER: dict[str, Any] = {"num_latents": 4, "latent_dim": 8, "latent_heads": 2, "num_blocks": 1, "layers_per_block": 1}
LANGUAGE: dict[str, Any] = {
    **ENCODER, "vocab_size": 7, "channels": 8, "max_length": 6, "cross_heads": 2, "qk_channels": 8, "v_channels": 8,
    "decoder_heads": 2, "decoder_qk_channels": 8,
}  # fmt: skip
MODELS: dict[str, Callable[..., nn.Module]] = {
    "perceiver": lambda **where: Perceiver(
        PerceiverConfig(input_dim=6, num_classes=5, num_cross_attends=1, **ENCODER), **where
    ),
    "images": lambda **where: PerceiverIO.imagenet_fourier(image_size=4, num_classes=5, **ENCODER, **where),
    "language": lambda **where: PerceiverIO.language(**LANGUAGE, **where),
    "flow": lambda **where: PerceiverIO.optical_flow(size=(4, 4), **ENCODER, **where),
    "autoregressive": lambda **where: PerceiverAR(
        PerceiverARConfig(vocab_size=7, max_length=6, num_latents=3, dim=8, num_heads=2, num_layers=1, init_std=0.02), **where
    ),
    "resampler": lambda **where: PerceiverResampler(
        PerceiverResamplerConfig(dim=8, num_latents=4, depth=1, num_heads=2, head_dim=4, max_media=3, max_frames=3), **where
    ),
    "set transformer": lambda **where: SetTransformer(
        SetTransformerConfig(input_dim=3, output_dim=4, dim=8, num_inducing=4, num_heads=2), **where
    ),
    "linformer": lambda **where: LinformerLM(
        LinformerLMConfig(vocab_size=7, length=6, depth=1, dim=8, num_keys=3, num_heads=2), **where
    ),
    "interface": lambda **where: RIN(
        RINConfig(image_size=4, patch_size=2, num_classes=4, num_latents=4, latent_dim=8, tape_dim=8, layers=(1,),
                  latent_heads=2, tape_heads=2, tape_widening_factor=2), **where
    ),
    "vector sets": lambda **where: VecSetAutoencoder(
        VecSetConfig(num_latents=4, dim=8, decoder_layers=1, latent_heads=2, bottleneck_dim=2, queries="learned"), **where
    ),
}  # fmt: skip


def arguments(name: str, batch: int) -> tuple[Tensor, ...]:
    """What the model of that name is called with."""
    shapes = {
        "perceiver": [(9, 6)], "images": [(3, 4, 4)], "flow": [(2, 27, 4, 4)], "resampler": [(2, 5, 8)],
        "set transformer": [(9, 3)], "interface": [(3, 4, 4), ()], "vector sets": [(9, 3), (5, 3)],
    }  # fmt: skip
    arrays = tuple(torch.rand(batch, *shape) for shape in shapes.get(name, []))
    if name == "interface":
        return *arrays, torch.randint(4, (batch,))
    return arrays or (torch.randint(7, (batch, 6)),)


def results(result: Any) -> list[Tensor]:
    """The tensors of what a model returns."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in results(part)]
