"""Dropout of attention's results: where the originals have it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from perceiver_kernels.models import EncoderConfig, Perceiver, PerceiverIO
from perceiver_kernels.nn import CrossAttention, CrossBlock, OutputBlock, OutputCrossAttention, SelfAttention

LAYERS: dict[str, Callable[..., Any]] = {
    "cross": lambda **o: (CrossAttention(16, 12, residual=False, **o), torch.randn(2, 50, 16), torch.randn(2, 9, 12)),
    "cross, qk_norm": lambda **o: (
        CrossAttention(16, 12, residual=False, qk_norm="rms", **o), torch.randn(2, 50, 16), torch.randn(2, 9, 12)
    ),
    "output": lambda **o: (OutputCrossAttention(16, 12, **o), torch.randn(2, 50, 16), torch.randn(2, 9, 12)),
    "output, qk_norm": lambda **o: (
        OutputCrossAttention(16, 12, qk_norm="rms", **o), torch.randn(2, 50, 16), torch.randn(2, 9, 12)
    ),
    "self": lambda **o: (SelfAttention(16, 2, residual=False, **o), torch.randn(2, 50, 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LAYERS))
def test_channels_of_the_result_are_dropped_in_training_alone(name: str) -> None:
    torch.manual_seed(0)
    layer, *inputs = LAYERS[name](out_dropout=0.25)
    whole = layer.eval()(*inputs)
    assert whole.count_nonzero() == whole.numel()
    dropped = layer.train()(*inputs)
    left = dropped != 0
    assert 0.7 < left.float().mean() < 0.8
    torch.testing.assert_close(dropped[left], whole[left] / 0.75)


@pytest.mark.parametrize("build", [CrossAttention, OutputCrossAttention, CrossBlock, OutputBlock])
def test_a_probability_is_meant(build: Any) -> None:
    with pytest.raises(ValueError, match=r"out_dropout must be in \[0, 1\), got 1.5"):
        build(16, 12, out_dropout=1.5)


def drops(model: nn.Module) -> set[float]:
    return {module.out_dropout for module in model.modules() if hasattr(module, "out_dropout")}


SMALL: dict[str, Any] = {"num_latents": 4, "latent_dim": 16, "num_blocks": 2, "layers_per_block": 1}


def test_it_is_where_the_originals_have_it() -> None:
    """DeepMind drops what attention gives as what the feed-forward gives; perceiver-pytorch the latter alone."""
    encoder = {"num_cross_attends": 1, **SMALL}
    assert drops(PerceiverIO.imagenet_fourier(**encoder, dropout=0.3).encoder) == {0.3}
    assert drops(PerceiverIO.imagenet_fourier(**encoder, dropout=0.3, out_dropout=0.1).encoder) == {0.1}
    # A decoder drops before its residual, where it has one.
    assert drops(PerceiverIO.imagenet_learned(**encoder, image_size=6, dropout=0.3).decoder) == {0.0}
    assert drops(PerceiverIO.mnist(**encoder, dropout=0.3)) == {0.3}
    assert drops(Perceiver.perceiver_pytorch(**{**SMALL, "num_cross_attends": 2}, dropout=0.3)) == {0.0}
    with pytest.raises(ValueError, match=r"out_dropout must be in \[0, 1\), got 1.0"):
        EncoderConfig(input_dim=16, out_dropout=1.0)
