"""transformers' Perceiver and our layers give the same result with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models import EncoderConfig, PerceiverEncoder
from perceiver_kernels.nn import CrossAttention, CrossBlock, LatentBlock
from perceiver_kernels.testing.accuracy import assert_as_accurate

transformers = pytest.importorskip("transformers", minversion="5.0")

CHANNELS = 261  # 3 colours and 2 coordinates with 64 sines and cosines each
METHODS = ("absorbed", "projected")


def their_model(**sizes: int) -> nn.Module:
    """PerceiverForImageClassificationFourier with random weights, no bias zero and no LayerNorm weight one."""
    torch.manual_seed(0)
    config = transformers.PerceiverConfig(
        num_cross_attention_heads=1, cross_attention_shape_for_attention="kv", num_labels=10, **sizes
    )
    model = transformers.PerceiverForImageClassificationFourier(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return their_model(
        num_latents=24, d_latents=64, num_blocks=2, num_self_attends_per_block=2, num_self_attention_heads=4,
        self_attention_widening_factor=2, cross_attention_widening_factor=3,
    )  # fmt: skip


def attention_weights(theirs: Any) -> dict[str, nn.Module]:
    """Our names for the modules of transformers' PerceiverAttention."""
    return {
        "norm_latents": theirs.self.layernorm1, "norm_inputs": theirs.self.layernorm2, "q_proj": theirs.self.query,
        "k_proj": theirs.self.key, "v_proj": theirs.self.value, "out_proj": theirs.output.dense,
    }  # fmt: skip


def renamed(modules: dict[str, nn.Module], prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{name}.{kind}": tensor for name, module in modules.items() for kind, tensor in module.state_dict().items()
    }


def feed_forward_weights(theirs: Any) -> dict[str, Tensor]:
    modules = {"norm": theirs.layernorm, "up_proj": theirs.mlp.dense1, "down_proj": theirs.mlp.dense2}
    return renamed(modules, "feed_forward.")


def cross_block_weights(theirs: Any) -> dict[str, Tensor]:
    return renamed(attention_weights(theirs.attention), "attention.") | feed_forward_weights(theirs)


def latent_block_weights(theirs: Any) -> dict[str, Tensor]:
    """Queries, keys and values are one projection here."""
    layer = theirs.attention
    weights = renamed({"norm": layer.self.layernorm1, "out_proj": layer.output.dense}, "attention.")
    for kind in ("weight", "bias"):
        parts = [getattr(projection, kind) for projection in (layer.self.query, layer.self.key, layer.self.value)]
        weights[f"attention.qkv_proj.{kind}"] = torch.cat(parts)
    return weights | feed_forward_weights(theirs)


def our_attention(theirs: nn.Module, **keywords: Any) -> CrossAttention:
    attention = theirs.perceiver.encoder.cross_attention.attention
    ours = CrossAttention(theirs.config.d_latents, CHANNELS, dtype=theirs.dtype, **keywords)
    ours.load_state_dict(renamed(attention_weights(attention)))
    return ours


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@dataclass
class Tokens:
    """Latents and preprocessed inputs as transformers feeds its encoder, and one upstream gradient."""

    latents: Tensor
    inputs: Tensor
    upstream: Tensor

    @classmethod
    def of(cls, theirs: nn.Module, pixels: Tensor) -> Tokens:
        with torch.no_grad():
            inputs, _, _ = theirs.perceiver.input_preprocessor(pixels)
            latents = theirs.perceiver.embeddings(batch_size=pixels.shape[0]).clone()
        upstream = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)).to(latents)
        return cls(latents, inputs, upstream)

    def double(self) -> Tokens:
        return Tokens(self.latents.double(), self.inputs.double(), self.upstream.double())


def run(layer: Any, modules: dict[str, nn.Module], tokens: Tokens) -> dict[str, Tensor]:
    """Output and every gradient of a layer, under our names."""
    leaves = {"latents": tokens.latents.clone().requires_grad_(), "inputs": tokens.inputs.clone().requires_grad_()}
    leaves |= {f"{name}.{kind}": parameter for name, module in modules.items() for kind, parameter in module.named_parameters()}
    out = layer(leaves["latents"], leaves["inputs"])
    gradients = torch.autograd.grad(out, list(leaves.values()), tokens.upstream)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def run_theirs(theirs: nn.Module, tokens: Tokens) -> dict[str, Tensor]:
    attention = theirs.perceiver.encoder.cross_attention.attention
    return run(lambda z, x: attention(z, inputs=x)[0], attention_weights(attention), tokens)


def run_ours(ours: CrossAttention, tokens: Tokens) -> dict[str, Tensor]:
    return run(ours, dict(ours.named_children()), tokens)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", METHODS)
def test_cross_attention_is_the_same_function(small: nn.Module, method: str) -> None:
    """fp64: output and gradients of latents, inputs and all twelve parameters agree to rounding."""
    theirs = copy.deepcopy(small).double()
    tokens = Tokens.of(theirs, images(12).double())
    expected = run_theirs(theirs, tokens)
    actual = run_ours(our_attention(theirs, method=method), tokens)
    assert actual.keys() == expected.keys() and len(actual) == 15
    for name in actual.keys() - {"k_proj.bias"}:
        assert relative_error(actual[name], expected[name]) < 1000 * torch.finfo(torch.float64).eps, name
    # The key bias does not move the softmax; its gradient is rounding in theirs.
    assert actual["k_proj.bias"].abs().max() < 1e-12 * expected["k_proj.weight"].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_cross_attention_is_as_accurate_as_theirs(small: nn.Module, method: str, dtype: torch.dtype) -> None:
    """Error against fp64 at most twice that of transformers in the same dtype, for the output and every gradient."""
    theirs = copy.deepcopy(small).to(dtype)
    tokens = Tokens.of(theirs, images(16).to(dtype))
    eager, actual = run_theirs(theirs, tokens), run_ours(our_attention(theirs, method=method), tokens)
    oracle = run_theirs(copy.deepcopy(theirs).double(), tokens.double())
    for name in actual.keys() - {"k_proj.bias"}:
        assert_as_accurate(actual[name], eager[name], oracle[name], name)


def test_latents_shared_over_the_batch_give_the_same(small: nn.Module) -> None:
    """transformers expands the latents before the first projection; we project one set."""
    tokens = Tokens.of(small, images(8, batch=3))
    expected = small.perceiver.encoder.cross_attention.attention(tokens.latents, inputs=tokens.inputs)[0]
    torch.testing.assert_close(our_attention(small)(tokens.latents[:1], tokens.inputs), expected)


@pytest.mark.parametrize("method", METHODS)
def test_key_mask_gives_the_same(small: nn.Module, method: str) -> None:
    """transformers adds finfo.min to the scores of hidden tokens."""
    tokens = Tokens.of(small, images(8))
    visible = torch.rand(2, 64, generator=torch.Generator().manual_seed(3)) < 0.5
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None, None, :]
    attention = small.perceiver.encoder.cross_attention.attention
    expected = attention(tokens.latents, inputs=tokens.inputs, inputs_mask=additive)[0]
    torch.testing.assert_close(our_attention(small, method=method)(tokens.latents, tokens.inputs, visible), expected)


@pytest.mark.parametrize("chunk_size", [None, 50])
def test_positions_made_while_packing_are_theirs(small: nn.Module, chunk_size: int | None) -> None:
    """From pixels: the channels that their preprocessor builds are never stored here."""
    pixels = images(12)
    tokens = Tokens.of(small, pixels)
    array = InputArray.image(pixels, FourierPositions(64, (224.0, 224.0)))
    expected = small.perceiver.encoder.cross_attention.attention(tokens.latents, inputs=tokens.inputs)[0]
    actual = our_attention(small, chunk_size=chunk_size)(tokens.latents, array)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_blocks_give_the_same(small: nn.Module) -> None:
    encoder, tokens = small.perceiver.encoder, Tokens.of(small, images(8))
    cross = CrossBlock(64, CHANNELS, widening_factor=3)
    cross.load_state_dict(cross_block_weights(encoder.cross_attention))
    torch.testing.assert_close(
        cross(tokens.latents, tokens.inputs), encoder.cross_attention(tokens.latents, inputs=tokens.inputs)[0]
    )
    latent = LatentBlock(64, 4, widening_factor=2)
    latent.load_state_dict(latent_block_weights(encoder.self_attends[1]))
    torch.testing.assert_close(latent(tokens.latents), encoder.self_attends[1](tokens.latents)[0])


def our_encoder(theirs: nn.Module) -> PerceiverEncoder:
    """One cross-attend and shared latent blocks: the encoder of Perceiver IO."""
    config, encoder = theirs.config, theirs.perceiver.encoder
    ours = PerceiverEncoder(
        EncoderConfig(
            input_dim=CHANNELS, num_latents=config.num_latents, latent_dim=config.d_latents, num_cross_attends=1,
            num_blocks=config.num_blocks, layers_per_block=config.num_self_attends_per_block,
            latent_heads=config.num_self_attention_heads,
            cross_widening_factor=config.cross_attention_widening_factor,
            latent_widening_factor=config.self_attention_widening_factor,
        )
    )  # fmt: skip
    ours.latents.data = theirs.perceiver.embeddings.latents.data[None]
    ours.cross_blocks[0].load_state_dict(cross_block_weights(encoder.cross_attention))
    for block, their_block in zip(ours.latent_blocks[0], encoder.self_attends, strict=True):
        block.load_state_dict(latent_block_weights(their_block))
    return ours


def test_whole_encoder_gives_the_same_latents(small: nn.Module) -> None:
    pixels = images(12)
    array = InputArray.image(pixels, FourierPositions(64, (224.0, 224.0)))
    with torch.no_grad():
        expected = small.perceiver(pixels).last_hidden_state
        torch.testing.assert_close(our_encoder(small).encode(array), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def full() -> Iterator[nn.Module]:
    """The published sizes, 48.4M parameters."""
    yield their_model(num_latents=512, d_latents=1024, num_blocks=8, num_self_attends_per_block=6, num_self_attention_heads=8)


def test_full_size_image(full: nn.Module) -> None:
    """224 x 224 pixels, 50,176 tokens of 261 channels, 512 latents: fp32 forward."""
    pixels = images(224, batch=1)
    with torch.no_grad():
        tokens = Tokens.of(full, pixels)
        expected = full.perceiver.encoder.cross_attention.attention(tokens.latents, inputs=tokens.inputs)[0]
        actual = our_attention(full, method="absorbed")(tokens.latents, InputArray.image(pixels))
    assert tokens.inputs.shape == (1, 224 * 224, CHANNELS)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
