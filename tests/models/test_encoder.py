"""The encoder of the family: what its configuration refuses, and dropout of input tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from perceiver_kernels import functional
from perceiver_kernels.models import EncoderConfig, PerceiverEncoder
from tests.modules import perturbed

B, M, C = 2, 40, 13


def tiny(**changes: Any) -> EncoderConfig:
    sizes: dict[str, Any] = {
        "input_dim": C, "num_latents": 6, "latent_dim": 16, "num_cross_attends": 3, "num_blocks": 4, "layers_per_block": 2,
        "latent_heads": 4,
    }  # fmt: skip
    return EncoderConfig(**{**sizes, **changes})


def randomised(config: EncoderConfig) -> PerceiverEncoder:
    return perturbed(PerceiverEncoder(config, dtype=torch.float64), scale=0.2)


def tokens() -> Tensor:
    return torch.randn(B, M, C, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("masked", [False, True])
def test_dropped_inputs_are_not_read(masked: bool) -> None:
    """A quarter of the visible tokens is read; gradients say which, and the rest may hold anything."""
    model = randomised(tiny(input_dropout=0.75, num_cross_attends=2)).train()
    visible = torch.arange(M) < torch.tensor([[M], [9]]) if masked else None
    x = tokens().requires_grad_()
    torch.manual_seed(0)
    latents = model(x, visible)
    latents.sum().backward()
    read = x.grad.any(-1)
    assert read.sum(1).tolist() == [10, 3 if masked else 10]
    if visible is not None:
        assert not (read & ~visible).any()
    torch.manual_seed(0)
    torch.testing.assert_close(model(torch.where(read[..., None], x, 7.0), visible), latents)
    torch.testing.assert_close(model.eval()(x, read), latents)
    packed = functional.pack_inputs(x, key_mask=visible, dtype=torch.float64)
    torch.manual_seed(0)
    torch.testing.assert_close(model.train()(packed), latents)


def test_one_input_remains_and_none_is_none() -> None:
    model = randomised(tiny(input_dropout=0.9)).train()
    x = tokens()[:, :5].requires_grad_()
    model(x).sum().backward()
    assert x.grad.any(-1).sum(1).tolist() == [1, 1]
    assert model(tokens()[:, :0]).shape == (B, 6, 16)


def test_dropped_inputs_compile_as_one_graph() -> None:
    model, x = randomised(tiny(input_dropout=0.5)).train(), tokens()
    torch._dynamo.reset()
    latents = torch.compile(model, fullgraph=True, backend="aot_eager")(x, torch.rand(B, M) < 0.8)
    assert latents.shape == (B, 6, 16) and latents.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_latents": 0}, "num_latents must be at least 1, got 0"),
        ({"num_blocks": -1}, "num_blocks must be at least 0, got -1"),
        ({"num_cross_attends": 5}, "num_cross_attends must be at most num_blocks=4 when interleaved, got 5"),
        ({"num_cross_attends": 5, "cross_attends": "leading"}, "num_cross_attends must be at most num_blocks=4 when leading"),
        ({"cross_attends": "end"}, "cross_attends must be one of 'interleaved', 'leading', 'start', got 'end'"),
        ({"weight_sharing": "v3"}, "weight_sharing must be one of 'v1', 'v2', 'none', got 'v3'"),
        ({"cross_weight_sharing": "v3"}, "cross_weight_sharing must be one of 'v1', 'v2', 'none', got 'v3'"),
        ({"input_dropout": 1.0}, r"input_dropout must be in \[0, 1\), got 1.0"),
        ({"input_dropout": 0.1, "chunk_size": 4}, "input_dropout must be 0 with chunk_size=4, got 0.1"),
        ({"activation": "fast"}, "activation must be one of 'gelu', .* got 'fast'"),
        ({"method": "fused"}, "method must be 'absorbed', 'projected' or None"),
        ({"cross_heads": 2}, "qk_channels must be a positive multiple of num_heads=2, got 13"),
        ({"latent_heads": 3}, "latent_dim must be a positive multiple of num_heads=3, got 16"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"eps": -1.0}, "eps must be a finite number, at least 0, got -1.0"),
        ({"chunk_size": 0}, "chunk_size must be a positive number of tokens, got 0"),
        ({"chunk_size": 4, "method": "projected"}, "chunk_size needs method='absorbed' or None"),
    ],
)
def test_wrong_configurations_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("name", ["qkv_bias", "cross_residual", "activation_checkpointing"])
def test_flags_are_bools(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a bool, got 1"):
        tiny(**{name: 1})
