"""Perceiver IO as other libraries have it: constructors of the class, for lucidrains' and krasserm's models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perceiver_kernels.inputs import FourierPositions
from perceiver_kernels.models.encoder import PERCEIVER_PYTORCH, EncoderConfig, PerceiverEncoder
from perceiver_kernels.models.heads import ClassHead, PatchHead, PlainHead
from perceiver_kernels.models.model import changed
from perceiver_kernels.models.perceiver_io_parts import LANGUAGE, Where, decoder_of, encoder_of
from perceiver_kernels.models.preprocessing import ArrayPreprocessor, PixelPreprocessor, TextPreprocessor
from perceiver_kernels.models.queries import GivenQueries, InputQueries, LearnedQueries

if TYPE_CHECKING:
    from perceiver_kernels.models.perceiver_io import PerceiverIO


def perceiver_pytorch(
    cls: type[PerceiverIO], *, channels: int = 32, query_channels: int = 32, out_channels: int | None = 100,
    decoder_feed_forward: bool = False, device: Where = None, dtype: torch.dtype | None = None, **changes: Any,
) -> PerceiverIO:  # fmt: skip
    """PerceiverIO of lucidrains/perceiver-pytorch with the sizes of its README; the queries are given as ``points``.

    Args:
        channels: of the input array (dim there).
        query_channels: of the queries (queries_dim).
        out_channels: of the outputs (logits_dim); None: what the decoder gives.
        decoder_feed_forward: a feed-forward layer after the decoder's attention (decoder_ff).
        changes: other values for fields of ``EncoderConfig``, of which the decoder has heads and width: depth is
            ``num_blocks``, cross_dim_head ``qk_channels / cross_heads``, latent_dim_head ``latent_qk_channels /
            latent_heads``, seq_dropout_prob ``input_dropout``, weight_tie_layers ``weight_sharing="v2"``.

    Source: README of perceiver-pytorch 0.11.0, whose inverted attention and attention residuals are not here.
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    head = PlainHead() if out_channels is None else PatchHead(query_channels, out_channels, **where)
    preprocessor, queries = ArrayPreprocessor(channels), GivenQueries(query_channels)
    return _lucidrains(cls, preprocessor, queries, head, decoder_feed_forward, {"input_dropout": 0.2, **changes}, where)


def perceiver_pytorch_lm(
    cls: type[PerceiverIO], *, vocab_size: int = 20_000, channels: int = 32, max_length: int = 2048,
    decoder_feed_forward: bool = False, device: Where = None, dtype: torch.dtype | None = None, **changes: Any,
) -> PerceiverIO:  # fmt: skip
    """PerceiverLM of lucidrains/perceiver-pytorch with the sizes of its README: the embedded tokens are the queries.

    Args:
        vocab_size: ids there are, and logits (num_tokens there).
        channels: of the embeddings and queries (dim).
        max_length: places with a learned position (max_seq_len).
        decoder_feed_forward: see ``PerceiverIO.perceiver_pytorch``.
        changes: likewise.

    Source: README of perceiver-pytorch 0.11.0.
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    preprocessor = TextPreprocessor(vocab_size, channels, max_length, **where)
    head = PatchHead(channels, vocab_size, **where)
    return _lucidrains(cls, preprocessor, InputQueries(channels), head, decoder_feed_forward, changes, where)


def _lucidrains(
    cls: type[PerceiverIO], preprocessor: Any, queries: Any, head: nn.Module, feed_forward: bool, changes: dict[str, Any],
    where: dict[str, Any],
) -> PerceiverIO:  # fmt: skip
    published = {**PERCEIVER_PYTORCH, "num_cross_attends": 1, "num_blocks": 6, "layers_per_block": 1}
    config = changed(EncoderConfig, {"input_dim": preprocessor.channels, **published}, changes)
    encoder = PerceiverEncoder(config, **where)
    decoder = decoder_of(
        encoder, queries.channels, where, num_heads=config.cross_heads, qk_channels=config.qk_channels,
        qkv_bias=config.qkv_bias, widening_factor=config.cross_widening_factor, feed_forward=feed_forward,
    )  # fmt: skip
    return cls(preprocessor, encoder, queries, decoder, head)


def mnist(
    cls: type[PerceiverIO], *, image_size: tuple[int, int] = (28, 28), in_channels: int = 1, num_bands: int = 32,
    num_classes: int = 10, query_channels: int = 128, decoder_heads: int = 1, device: Where = None,
    dtype: torch.dtype | None = None, **changes: Any,
) -> PerceiverIO:  # fmt: skip
    """The image classifier of krasserm/perceiver-io for MNIST: 784 pixels of 131 channels, 2 cross-attends, 907K parameters.

    Args:
        image_size: (H, W) of the images for which the highest frequencies are chosen; any size may be read.
        in_channels: Ch of the images.
        num_bands: frequencies of the positions, of each axis.
        num_classes: logits.
        query_channels: of the decoder, whose attention is as wide as its query.
        decoder_heads: H of the decoder.
        changes: other values for fields of ``EncoderConfig``.

    Source: docs/training-examples.md there, image classification; weights start as in the paper.
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    height, width = image_size
    preprocessor = PixelPreprocessor(in_channels, FourierPositions(num_bands, (height, width)))
    published = {
        "num_latents": 32, "latent_dim": 128, "num_cross_attends": 2, "cross_attends": "leading", "num_blocks": 3,
        "layers_per_block": 3, "weight_sharing": "v1", "attention_dropout": 0.1,
    }  # fmt: skip
    encoder = encoder_of(preprocessor, "transformers", {**published, **changes}, where)
    return _krasserm_classifier(cls, preprocessor, encoder, num_classes, query_channels, decoder_heads, where)


def imdb(
    cls: type[PerceiverIO], *, vocab_size: int = 262, channels: int = 768, max_length: int = 2048, num_classes: int = 2,
    query_channels: int = 768, decoder_heads: int = 1, device: Where = None, dtype: torch.dtype | None = None, **changes: Any,
) -> PerceiverIO:  # fmt: skip
    """The text classifier of krasserm/perceiver-io for IMDb: the language model's encoder, a decoder of one query of 768.

    Args:
        vocab_size: ids there are.
        channels: of the embeddings.
        max_length: places with a learned position.
        num_classes: logits.
        query_channels: see ``PerceiverIO.mnist``.
        decoder_heads: likewise.
        changes: likewise.

    Source: docs/training-examples.md there, sentiment analysis; weights start as in the paper.
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    preprocessor = TextPreprocessor(vocab_size, channels, max_length, **where)
    encoder = encoder_of(preprocessor, "transformers", {**LANGUAGE, "attention_dropout": 0.1, **changes}, where)
    return _krasserm_classifier(cls, preprocessor, encoder, num_classes, query_channels, decoder_heads, where)


def _krasserm_classifier(
    cls: type[PerceiverIO], preprocessor: nn.Module, encoder: PerceiverEncoder, num_classes: int, channels: int, heads: int,
    where: dict[str, Any],
) -> PerceiverIO:  # fmt: skip
    decoder = decoder_of(encoder, channels, where, num_heads=heads, qk_channels=channels, residual=True)
    head = ClassHead(channels, num_classes, **where)
    return cls(preprocessor, encoder, LearnedQueries(1, channels, **where), decoder, head)
