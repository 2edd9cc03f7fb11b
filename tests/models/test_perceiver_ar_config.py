"""Configurations of Perceiver AR: the published ones, and wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perceiver_kernels.models import PerceiverAR, PerceiverARConfig

M, N, D = 19, 6, 32
TOKENS = torch.arange(10).view(2, 5) % 7


def tiny(**changes: Any) -> PerceiverARConfig:
    return PerceiverARConfig(**{"vocab_size": 11, "max_length": M, "num_latents": N, "dim": D, "num_heads": 4, **changes})


PUBLISHED: dict[str, tuple[int, tuple[int, ...]]] = {
    # parameters, and (tokens, latents, dim, heads, head channels, layers)
    "copy_task": (89_757_955, (131_072, 1024, 1024, 16, 64, 6)),
    "imagenet64": (770_091_267, (12_289, 1024, 1024, 16, 64, 60)),
    "perceiver_ar_pytorch": (50_908_672, (4096, 1024, 512, 8, 64, 8)),
    # krasserm/perceiver-io's own models have exactly as many; its documentation says 30.7M, 455M and ~134M.
    "clm_small": (30_563_078, (4096, 512, 512, 8, 64, 8)),
    "clm_base": (453_950_720, (1024, 512, 1280, 10, 128, 20)),
    "giantmidi": (139_558_277, (6144, 2048, 768, 8, 96, 18)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    build = getattr(PerceiverAR, name)
    model, (parameters, sizes) = build(device="meta"), PUBLISHED[name]
    config = model.config
    assert model.num_params() == parameters
    assert sizes == (
        config.max_length, config.num_latents, config.dim, config.num_heads, config.head_channels, config.num_layers
    )  # fmt: skip
    changed = build(num_layers=1, vocab_size=7, dim=64, head_dim=None, num_heads=2, rotary_width=0, dtype=torch.float64)
    assert changed(TOKENS).shape == (2, 5, 7) and changed(TOKENS).dtype == torch.float64


def test_the_papers_model() -> None:
    model = PerceiverAR.paper(259, 8192, device="meta")
    config = model.config
    assert (config.dim, config.num_heads, config.num_layers, config.num_latents) == (1024, 16, 12, 1024)
    assert (config.widening_factor, config.activation, config.dropout, config.rotary_channels) == (4, "squared_relu", 0.1, 32)
    # 13 layers of attention and feed-forward with biases and norms, the embedding, the latents' layer, norm and logits.
    layer = 4 * 1024 * 1025 + 2 * 4 * 1024**2 + 5 * 1024
    assert model.num_params() == 13 * (layer + 2 * 2048) + 2048 + 259 * 1024 + 1024 * 1025 + 2048 + 259 * 1025


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_latents": M + 1}, f"num_latents must be at most max_length={M}, got {M + 1}"),
        ({"num_heads": 3}, f"dim must be a multiple of num_heads=3 unless head_dim is given, got {D}"),
        ({"num_layers": -1}, "num_layers must be at least 0, got -1"),
        ({"activation": "fast"}, "activation must be one of 'gelu'"),
        ({"positions": "fourier"}, "positions must be one of 'learned', 'sinusoidal', got 'fourier'"),
        ({"positions": "sinusoidal", "dim": 9, "num_heads": 3}, "dim must be even and at least 4 with sinusoidal positions"),
        ({"grid": (2, 9)}, r"grid needs positions='learned', got \(2, 9\) without positions"),
        ({"grid": (2, 9), "positions": "sinusoidal"}, "grid needs learned positions, got 'sinusoidal'"),
        ({"grid": (2, 8), "positions": "learned"}, r"grid must have length - 1 = 18 elements, got \(2, 8\)"),
        ({"rotary_width": 3}, "rotary_width must be even and at most head_dim=8, got 3"),
        ({"rotary_width": 10}, "rotary_width must be even and at most head_dim=8, got 10"),
        ({"rotary_base": -1.0}, "rotary_base must be a finite positive number, got -1.0"),
        ({"num_rotary_layers": -1}, "num_rotary_layers must be at least 0, got -1"),
        ({"tied_logits": True}, "init_std must be given with tied_logits"),
        ({"prefix_dropout": 1.0}, r"prefix_dropout must be in \[0, 1\), got 1.0"),
        ({"init_std": 0.0}, "init_std must be a finite positive number, got 0.0"),
        ({"eps": -1.0}, "eps must be a finite number, at least 0, got -1.0"),
    ],
)
def test_wrong_configurations_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_latents": 2.0}, "num_latents must be an integer, got 2.0"),
        ({"grid": 18, "positions": "learned"}, "grid must be a tuple of sizes, got 18"),
        ({"rotary_width": 4.0}, "rotary_width must be an integer, got 4.0"),
    ],
)
def test_wrong_types_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tiny(**changes)
