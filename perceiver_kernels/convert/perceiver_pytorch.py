"""Weights of lucidrains/perceiver-pytorch: ``Perceiver``, with or without its classifier, ``PerceiverIO``, ``PerceiverLM``.

Layers whose weights are shared stand in its state dicts once for every place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch import Tensor

from perceiver_kernels.convert.rules import Rule, affine, parted, renamed, stacked, under, under_each
from perceiver_kernels.models import EncoderConfig, Perceiver, PerceiverEncoder, PerceiverIO
from perceiver_kernels.models.heads import PatchHead, PlainHead
from perceiver_kernels.models.preprocessing import ArrayPreprocessor, TextPreprocessor
from perceiver_kernels.models.queries import GivenQueries, InputQueries
from perceiver_kernels.nn import LatentBlock, OutputBlock

# What its blocks are, whatever their sizes.
_FIXED: dict[str, Any] = {
    "qkv_bias": False, "cross_residual": True, "cross_widening_factor": 4, "latent_widening_factor": 4,
    "activation": "geglu", "eps": 1e-5,
}  # fmt: skip


def _require(config: EncoderConfig, **fields: Any) -> None:
    """Raise unless the configuration is one that the library's model can have; all fields that are not are listed."""
    qk_channels, latent_qk_channels = _widths(config)
    needed = {
        **_FIXED, **fields, "v_channels": (None, qk_channels), "latent_v_channels": (None, latent_qk_channels)
    }  # fmt: skip
    _complain("model", config, needed)


def _complain(what: str, found: object, needed: dict[str, Any]) -> None:
    wrong = []
    for name, wanted in needed.items():
        allowed, value = wanted if isinstance(wanted, tuple) else (wanted,), getattr(found, name)
        if value not in allowed:
            wrong.append(f"{name}={value!r} instead of {allowed[-1]!r}")
    if wrong:
        raise ValueError(f"{what} must be built as perceiver_pytorch's, got {', '.join(wrong)}")


def _widths(config: EncoderConfig) -> tuple[int, int]:
    """Of the queries of cross-attention and of self-attention, all heads together."""
    return (
        config.input_dim if config.qk_channels is None else config.qk_channels,
        config.latent_dim if config.latent_qk_channels is None else config.latent_qk_channels,
    )


def _feed_forward(theirs: str) -> list[Rule]:
    rules = [*affine("norm", "norm"), *affine("up_proj", "fn.net.0"), *affine("down_proj", "fn.net.2")]
    return under("feed_forward.", theirs, rules)


def _cross_attention(norms: tuple[str, str], width: int) -> list[Rule]:
    """``norms`` are our names of the norms on its queries and on what is read."""
    return [
        *affine(norms[0], "norm"), *affine(norms[1], "norm_context"), *affine("q_proj", "fn.to_q", bias=False),
        *parted(("k_proj", "v_proj"), "fn.to_kv", (width, width), bias=False), *affine("out_proj", "fn.to_out"),
    ]  # fmt: skip


def _cross_block(width: int) -> list[Rule]:
    attention = _cross_attention(("norm_latents", "norm_inputs"), width)
    return under("attention.", "cross_attn.", attention) + _feed_forward("cross_ff.")


def _latent_block(block: LatentBlock) -> list[Rule]:
    width = block.attention.qk_channels
    attention = [
        *affine("norm", "norm"), *stacked("qkv_proj", ("fn.to_q", "fn.to_kv"), (width, 2 * width), bias=False),
        *affine("out_proj", "fn.to_out"),
    ]  # fmt: skip
    return under("attention.", "0.", attention) + _feed_forward("1.")


def _places(weights: Sequence[int], index: int) -> list[str]:
    """Prefixes of their layers that have the weights of our module ``index``."""
    return [f"layers.{step}." for step, used in enumerate(weights) if used == index]


def _latents() -> list[Rule]:
    return [Rule("latents", ("latents",), read=_with_batch, write=_without_batch)]


def _with_batch(latents: Tensor) -> Tensor:
    return latents[None]


def _without_batch(latents: Tensor) -> Tensor:
    return latents[0]


def _latent_blocks(model: PerceiverEncoder) -> list[Rule]:
    rules = []
    for index, stack in enumerate(model.latent_blocks):
        places = _places(model.config.block_weights(), index)
        for i, block in enumerate(cast(Iterable[LatentBlock], stack)):
            ours = f"latent_blocks.{index}.{i}."
            rules += under_each(ours, [f"{place}self_attns.{i}." for place in places], _latent_block(block))
    return rules


def encoder(model: PerceiverEncoder) -> list[Rule]:
    """Perceiver without final_classifier_head.

    Raises:
        ValueError: the model is not what the library's computes; all that differs is listed.
    """
    config = model.config
    _require(config, cross_attends="interleaved", num_cross_attends=config.num_blocks)
    rules = _latents()
    for index in range(len(model.cross_blocks)):
        places = _places(config.cross_weights(), index)
        rules += under_each(f"cross_blocks.{index}.", places, _cross_block(_widths(config)[0]))
    return rules + _latent_blocks(model)


def perceiver(model: Perceiver) -> list[Rule]:
    """Perceiver with its classifier; raises as ``encoder`` does."""
    if model.head_norm is None:
        raise ValueError("model must be built as perceiver_pytorch's, got head_norm=False instead of True")
    return encoder(model) + affine("head_norm", "to_logits.1") + affine("head", "to_logits.2")


def perceiver_io(model: PerceiverIO) -> list[Rule]:
    """PerceiverIO, or PerceiverLM where the model embeds tokens.

    Raises:
        ValueError: the model is not what the library's computes; what differs is named.
    """
    preprocessor, queries, head = model.preprocessor, model.queries, model.head
    linear = isinstance(head, PatchHead) and not head.flat
    language = isinstance(preprocessor, TextPreprocessor) and isinstance(queries, InputQueries) and linear
    given = isinstance(preprocessor, ArrayPreprocessor) and isinstance(queries, GivenQueries)
    if not language and not (given and (linear or isinstance(head, PlainHead))):
        names = ", ".join(type(part).__name__ for part in (preprocessor, queries, head))
        raise ValueError(f"model must be built as perceiver_pytorch's, got {names}")
    config = model.encoder.config
    _require(config, num_cross_attends=1, layers_per_block=1)
    cross = under("cross_blocks.0.", "cross_attend_block.", _cross_block(_widths(config)[0]))
    encoder_rules = [*_latents(), *cross, *_latent_blocks(model.encoder)]
    rules = under("encoder.", "", encoder_rules) + under("decoder.", "", _decoder(model.decoder, config))
    if linear:
        rules += affine("head.proj", "to_logits")
    if not language:
        return rules
    tables = [*renamed("embedding.weight", "token_emb.weight"), *renamed("positions.weight", "pos_emb.weight")]
    return under("preprocessor.", "", tables) + under("", "perceiver_io.", rules)


def _decoder(decoder: OutputBlock, config: EncoderConfig) -> list[Rule]:
    layer, feed_forward, width = decoder.attention, decoder.feed_forward, _widths(config)[0]
    needed = {"residual": False, "num_heads": config.cross_heads, "qk_channels": width, "v_channels": width, "eps": 1e-5}
    _complain("decoder", layer, needed)
    if layer.q_proj.bias is not None:
        raise ValueError("decoder must be built as perceiver_pytorch's, got qkv_bias=True instead of False")
    rules = under("attention.", "decoder_cross_attn.", _cross_attention(("norm_queries", "norm_latents"), width))
    if feed_forward is None:
        return rules
    _complain("decoder", feed_forward, {"activation": "geglu", "hidden_dim": 4 * layer.query_dim})
    return rules + _feed_forward("decoder_ff.")


RULES: dict[type, Callable[[Any], list[Rule]]] = {
    Perceiver: perceiver, PerceiverEncoder: encoder, PerceiverIO: perceiver_io
}  # fmt: skip
