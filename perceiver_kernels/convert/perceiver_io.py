"""Weights of krasserm/perceiver-io: its Perceiver IO models and their encoder, and CausalSequenceModel of Perceiver AR.

Names are those of the models of version 0.11; in files of the Hugging Face hub they follow ``backend_model.``, in Lightning's
checkpoints ``model.``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from perceiver_kernels.convert.perceiver_ar_pytorch import frequencies
from perceiver_kernels.convert.rules import Rule, affine, renamed, stacked, under
from perceiver_kernels.inputs import FourierPositions
from perceiver_kernels.models import EncoderConfig, PerceiverAR, PerceiverEncoder, PerceiverIO
from perceiver_kernels.models.heads import ClassHead, FlowHead, PatchHead, TokenHead
from perceiver_kernels.models.preprocessing import FlowPreprocessor, PixelPreprocessor, TextPreprocessor
from perceiver_kernels.models.queries import InputQueries, LearnedQueries
from perceiver_kernels.nn import LatentBlock, OutputBlock

_QKV = tuple(f"attention.{name}_proj" for name in ("q", "k", "v"))


def _require(found: dict[str, tuple[Any, Any]]) -> None:
    """Raise unless, for every name, what is found is what must be; all that is not is listed."""
    wrong = [f"{name}={value!r} instead of {wanted!r}" for name, (value, wanted) in found.items() if value != wanted]
    if wrong:
        raise ValueError(f"model must be built as perceiver_io's, got {', '.join(wrong)}")


def _feed_forward(bias: bool = True) -> list[Rule]:
    names = (("up_proj", "1"), ("down_proj", "3"))
    rules = [*affine("norm", "0"), *(rule for ours, theirs in names for rule in affine(ours, theirs, bias))]
    return under("feed_forward.", "1.module.", rules)


def _cross_attention(norms: tuple[str, str], theirs: str = "0.module.") -> list[Rule]:
    """``norms`` are our names of the norms on its queries and on what is read."""
    projections = (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj"))
    rules = [rule for ours, name in projections for rule in affine(ours, f"attention.{name}")]
    return under("attention.", theirs, [*affine(norms[0], "q_norm"), *affine(norms[1], "kv_norm"), *rules])


def _latent_block(block: LatentBlock, bias: bool = True) -> list[Rule]:
    layer = block.attention
    attention = [
        *affine("norm", "norm"), *stacked("qkv_proj", _QKV, (layer.qk_channels, layer.qk_channels, layer.v_channels), bias),
        *affine("out_proj", "attention.o_proj", bias),
    ]  # fmt: skip
    return under("attention.", "0.module.", attention) + _feed_forward(bias)


def _their_schedule(config: EncoderConfig) -> tuple[tuple[str, int], ...]:
    """Kinds and weights of their steps: a cross-attend before each of the first blocks, all but the first of a kind alike."""
    cross_alike, blocks_alike = max(config.cross_weights()) == 0, max(config.block_weights(), default=0) == 0
    steps: list[tuple[str, int]] = []
    for i in range(config.num_blocks):
        if i < config.num_cross_attends:
            steps.append(("cross", 0 if cross_alike else min(i, 1)))
        steps.append(("block", 0 if blocks_alike else min(i, 1)))
    return tuple(steps)


def encoder(model: PerceiverEncoder) -> list[Rule]:
    """PerceiverEncoder but for its input adapter.

    Raises:
        ValueError: the model is not what the library's computes; all that differs is listed.
    """
    config = model.config
    _require({
        "schedule": (config.schedule(), _their_schedule(config)), "qkv_bias": (config.qkv_bias, True),
        "cross_residual": (config.cross_residual, True), "activation": (config.activation, "gelu"), "eps": (config.eps, 1e-5),
    })  # fmt: skip
    rules = [Rule("latents", ("latent_provider._query",), read=_with_batch, write=_without_batch)]
    for index, theirs in zip(range(len(model.cross_blocks)), ("cross_attn_1.", "cross_attn_n."), strict=False):
        cross = _cross_attention(("norm_latents", "norm_inputs")) + _feed_forward()
        rules += under(f"cross_blocks.{index}.", theirs, cross)
    for index, (stack, theirs) in enumerate(zip(model.latent_blocks, ("self_attn_1", "self_attn_n"), strict=False)):
        for i, block in enumerate(cast(Iterable[LatentBlock], stack)):
            rules += under(f"latent_blocks.{index}.{i}.", f"{theirs}.{i}.", _latent_block(block))
    return rules


def _with_batch(latents: Tensor) -> Tensor:
    return latents[None]


def _without_batch(latents: Tensor) -> Tensor:
    return latents[0]


def _fourier_features(positions: FourierPositions) -> Rule:
    """Their buffer of the features of a grid of the size that the frequencies are for, in fp32 as they compute it."""
    grid = [int(size) for size in positions.max_resolution]
    _require({
        "order": (positions.order, "deepmind"), "include_raw": (positions.include_raw, True),
        "max_resolution": (positions.max_resolution, tuple(grid)),
    })  # fmt: skip

    def features() -> Tensor:
        places = torch.meshgrid(*(torch.linspace(-1.0, 1.0, size) for size in grid), indexing="ij")
        bands = [torch.linspace(1.0, size / 2, positions.num_bands) for size in grid]
        angles = [math.pi * (place[..., None] * band) for place, band in zip(places, bands, strict=True)]
        waves = [wave(angle) for wave in (torch.sin, torch.cos) for angle in angles]
        return torch.cat((torch.stack(places, -1), *waves), -1).flatten(0, -2)

    return Rule("", ("position_encoding.position_encoding",), value=features)


def _preprocessor(part: nn.Module) -> list[Rule]:
    if isinstance(part, TextPreprocessor):
        return renamed("embedding.weight", "txt_embedding.weight") + renamed("positions.weight", "pos_embedding.weight")
    if isinstance(part, PixelPreprocessor):
        return [_fourier_features(part.positions)]
    if isinstance(part, FlowPreprocessor):
        return [*affine("patch_proj", "linear"), _fourier_features(part.positions)]
    raise ValueError(f"perceiver_io has no preprocessor like {type(part).__name__}")


def _queries(part: nn.Module) -> list[Rule]:
    if isinstance(part, LearnedQueries):
        return renamed("positions.weight", "_query")
    if isinstance(part, InputQueries):
        return []
    raise ValueError(f"perceiver_io has no queries like {type(part).__name__}")


def _head(part: nn.Module) -> list[Rule]:
    if isinstance(part, TokenHead):
        return renamed("bias", "bias")
    if isinstance(part, (ClassHead, FlowHead, PatchHead)):
        return affine("proj", "linear")
    raise ValueError(f"perceiver_io has no head like {type(part).__name__}")


def _decoder(decoder: OutputBlock) -> list[Rule]:
    layer, feed_forward = decoder.attention, decoder.feed_forward
    _require({
        "decoder.feed_forward": (None if feed_forward is None else feed_forward.activation, "gelu"),
        "decoder.qkv_bias": (layer.q_proj.bias is not None, True), "decoder.eps": (layer.eps, 1e-5),
    })  # fmt: skip
    attention = _cross_attention(("norm_queries", "norm_latents"), "0.module." if layer.residual else "0.")
    return attention + _feed_forward()


def perceiver_io(model: PerceiverIO) -> list[Rule]:
    """PerceiverIO: ImageClassifier, TextClassifier, MaskedLanguageModel, OpticalFlow, as its parts say.

    Raises:
        ValueError: the model is not what the library's computes; what differs is named.
    """
    return [
        *under("encoder.", "0.", encoder(model.encoder)),
        *under("preprocessor.", "0.input_adapter.", _preprocessor(model.preprocessor)),
        *under("queries.", "1.output_query_provider.", _queries(model.queries)),
        *under("decoder.", "1.cross_attn.", _decoder(model.decoder)),
        *under("head.", "1.output_adapter.", _head(model.head)),
    ]


def perceiver_ar(model: PerceiverAR) -> list[Rule]:
    """CausalSequenceModel: CausalLanguageModel, SymbolicAudioModel.

    Raises:
        ValueError: the model is not what the library's computes; all switches that differ are listed.
    """
    config = model.config
    learned = config.positions is not None
    needed: dict[str, Any] = {
        "num_perceiver_layers": 1, "head_channels": config.dim // config.num_heads, "activation": "gelu",
        "positions": "learned" if learned else None, "grid": None, "rotary_base": 10_000.0, "rotary_interleaved": True,
        "rotary_channels": config.head_channels // 2 if learned else config.head_channels, "latent_proj": False,
        "own_keys": True, "bias": False, "cross_out_bias": True, "tied_logits": True, "eps": 1e-5,
    }  # fmt: skip
    _require({name: (getattr(config, name), wanted) for name, wanted in needed.items()})
    cross = [
        *affine("norm", "q_norm"), *affine("norm_context", "kv_norm"), *affine("q_proj", _QKV[0], bias=False),
        *stacked("kv_proj", _QKV[1:], (config.num_heads * config.head_channels,) * 2, bias=False),
        *affine("out_proj", "attention.o_proj"),
    ]  # fmt: skip
    layer = under("attention.", "0.module.", cross) + _feed_forward(bias=False)
    rules = [
        *renamed("token_embedding.weight", "input_adapter.txt_embedding.weight"),
        Rule("", ("input_adapter.frq_pos_encoding.inv_freq",), value=frequencies(config.rotary_channels)),
        *under("perceiver_layers.0.", "cross_attention.", layer),
    ]
    if learned:
        rules += renamed("positions.tables.0.weight", "input_adapter.pos_embedding.weight")
    for i, block in enumerate(cast(Iterable[LatentBlock], model.latent_blocks)):
        rules += under(f"latent_blocks.{i}.", f"self_attention.{i}.", _latent_block(block, bias=False))
    if config.final_norm:
        rules += affine("norm", "out_norm")
    if config.logits_bias:
        rules += renamed("head_bias", "output_adapter.bias")
    return rules


RULES: dict[type, Callable[[Any], list[Rule]]] = {
    PerceiverAR: perceiver_ar, PerceiverEncoder: encoder, PerceiverIO: perceiver_io
}  # fmt: skip
