"""Perceiver IO: an input array is read into latents, which are asked for outputs of any number and kind.

Source: Perceiver IO: A General Architecture for Structured Inputs & Outputs, arXiv 2107.14795.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from perceiver_kernels.inputs import FourierPositions
from perceiver_kernels.models.encoder import PERCEIVER_PYTORCH, EncoderConfig, PerceiverEncoder
from perceiver_kernels.models.heads import ClassHead, FlowHead, MultimodalHead, PatchHead, PlainHead, Source, TokenHead
from perceiver_kernels.models.multimodal import MultimodalPreprocessor
from perceiver_kernels.models.preprocessing import (
    ArrayPreprocessor,
    AudioPreprocessor,
    ConvPreprocessor,
    FlowPreprocessor,
    LabelPreprocessor,
    LearnedPreprocessor,
    PixelPreprocessor,
    TextPreprocessor,
    VideoPreprocessor,
)
from perceiver_kernels.models.queries import FourierQueries, GivenQueries, InputQueries, LearnedQueries, MultimodalQueries
from perceiver_kernels.nn import OutputBlock
from perceiver_kernels.nn.checks import check_choice

Like = Literal["deepmind", "transformers"]
Where = torch.device | str | None


class PerceiverIO(nn.Module):
    """Preprocess, encode, process, decode.

        x = preprocessor(inputs)                  [B, M, C]
        z = PerceiverEncoder(x)                   [B, N, D]
        y = OutputBlock(queries(x), z)            [B, O, C_q]
        outputs = head(y)

    The published models are named constructors. They differ between DeepMind's code and transformers, which runs weights
    converted from it; ``like`` chooses:

        ================================  =====================  =========================
        .                                 "deepmind"             "transformers"
        ================================  =====================  =========================
        GELU                              tanh approximation     exact
        convolutional preprocessing       56 x 56, "same"        55 x 55
        residual of the learned model's   none                   the query is added
        decoder
        masks of output queries           as ``query_mask`` says ignored there: give none
        dropout of attention weights      0                      0.1 in its configuration:
                                                                 ``attention_dropout=0.1``
        ================================  =====================  =========================

    Args:
        preprocessor: from raw inputs to the input array, with an attribute ``channels``.
        encoder: reads that array.
        queries: from the input array to output queries, with an attribute ``channels``.
        decoder: reads the latents at the queries.
        head: from what the decoder gives to outputs.
    """

    def __init__(
        self, preprocessor: nn.Module, encoder: PerceiverEncoder, queries: nn.Module, decoder: OutputBlock, head: nn.Module
    ) -> None:
        super().__init__()
        if preprocessor.channels != encoder.config.input_dim:
            raise ValueError(f"encoder must read {preprocessor.channels} channels, got input_dim={encoder.config.input_dim}")
        if queries.channels != decoder.attention.query_dim:
            raise ValueError(f"decoder must take queries of {queries.channels}, got query_dim={decoder.attention.query_dim}")
        self.preprocessor, self.encoder, self.queries = preprocessor, encoder, queries
        self.decoder, self.head = decoder, head

    def forward(
        self,
        inputs: Any,
        key_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        query_mask: Tensor | None = None,
        points: Any = None,
    ) -> Any:
        """Compute outputs.

        Args:
            inputs: what the preprocessor takes.
            key_mask: bool [B, M], True where a token of the input array is visible.
            lengths: int32 [B], visible leading tokens; excludes ``key_mask``.
            query_mask: bool [B, O], False for outputs whose queries see nothing.
            points: which outputs are wanted, int64 [n] among O (a mapping of such where there are modalities), None: all; or
                the queries themselves, float [B, O, C_q] or [O, C_q], where they are ``GivenQueries``.

        Returns:
            What the head gives.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        array = self.preprocessor(inputs)
        latents = self.encoder(array, key_mask, lengths)
        queries = self.queries(array, points)
        source = Source(array, self.preprocessor)
        if not isinstance(queries, dict):
            return self.head(self.decoder(queries, latents, None, query_mask), source)
        sizes = [part.shape[1] for part in queries.values()]
        decoded = self.decoder(torch.cat(list(queries.values()), 1), latents, None, query_mask).split(sizes, 1)
        return self.head(dict(zip(queries, decoded, strict=True)), source)

    def num_params(self) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    # ------ published models

    @classmethod
    def imagenet_fourier(
        cls, *, image_size: int = 224, num_classes: int = 1000, like: Like = "deepmind", device: Where = None,
        dtype: torch.dtype | None = None, **changes: Any,
    ) -> PerceiverIO:  # fmt: skip
        """ImageNet with Fourier features: 50,176 pixels of 261 channels, 48.4M parameters, 407 GFLOP.

        Args:
            image_size: H = W of the images for which the highest frequency is chosen; any size may be read.
            changes: other values for fields of ``EncoderConfig``.

        Source: arXiv 2107.14795, section 4.5 and appendix A.
        """
        preprocessor = PixelPreprocessor(3, FourierPositions(64, (image_size, image_size)))
        return cls._classifier(preprocessor, num_classes, True, like, device, dtype, changes)

    @classmethod
    def imagenet_learned(
        cls, *, image_size: int = 224, num_classes: int = 1000, like: Like = "deepmind", device: Where = None,
        dtype: torch.dtype | None = None, **changes: Any,
    ) -> PerceiverIO:  # fmt: skip
        """ImageNet with learned positions and no knowledge of two dimensions: 50,176 x 512, 62.3M parameters, 407 GFLOP.

        Args:
            image_size: H = W of the images, a learned position for every pixel.
            changes: other values for fields of ``EncoderConfig``.

        Source: arXiv 2107.14795, section 4.5 and appendix A.
        """
        preprocessor = LearnedPreprocessor((image_size, image_size), device=device, dtype=dtype)
        return cls._classifier(preprocessor, num_classes, like == "transformers", like, device, dtype, changes)

    @classmethod
    def imagenet_conv(
        cls, *, image_size: int = 224, num_classes: int = 1000, like: Like = "deepmind", device: Where = None,
        dtype: torch.dtype | None = None, **changes: Any,
    ) -> PerceiverIO:  # fmt: skip
        """ImageNet with convolutional preprocessing: 3,136 x 322, 48.6M parameters, 369 GFLOP.

        Args:
            image_size: H = W of the images for which the highest frequency is chosen; any size may be read.
            changes: other values for fields of ``EncoderConfig``.

        Source: arXiv 2107.14795, section 4.5 and appendix A.
        """
        size = -(-image_size // 4)
        padding: Literal["same", "transformers"] = "transformers" if like == "transformers" else "same"
        positions = FourierPositions(64, (size, size))
        preprocessor = ConvPreprocessor(3, 64, positions, padding=padding, device=device, dtype=dtype)
        return cls._classifier(preprocessor, num_classes, True, like, device, dtype, changes)

    @classmethod
    def text_classifier(
        cls, *, num_classes: int, vocab_size: int = 262, channels: int = 768, max_length: int = 2048,
        like: Like = "deepmind", device: Where = None, dtype: torch.dtype | None = None, **changes: Any,
    ) -> PerceiverIO:  # fmt: skip
        """The language model's encoder with the classification decoder, as transformers fine-tunes it.

        Args:
            channels: of the embeddings.
            changes: other values for fields of ``EncoderConfig``.

        Source: arXiv 2107.14795, section 4.1; PerceiverForSequenceClassification of transformers.
        """
        preprocessor = TextPreprocessor(vocab_size, channels, max_length, device=device, dtype=dtype)
        return cls._classifier(preprocessor, num_classes, True, like, device, dtype, {**_LANGUAGE, **changes})

    @classmethod
    def language(
        cls, *, vocab_size: int = 262, channels: int = 768, max_length: int = 2048, decoder_heads: int = 8,
        decoder_qk_channels: int = 256, like: Like = "deepmind", device: Where = None, dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> PerceiverIO:  # fmt: skip
        """Masked language modelling of bytes: 2,048 x 768, 256 latents of 1,280, 26 layers, 201M parameters, 113 GFLOP.

        As many outputs as the input has tokens; transformers always gives ``max_length``.

        Args:
            channels: of the embeddings and of the output queries.
            decoder_heads, decoder_qk_channels: of the decoder, whose values have ``channels`` channels.
            changes: other values for fields of ``EncoderConfig``.

        Source: arXiv 2107.14795, section 4.1 and appendix F.
        """
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        preprocessor = TextPreprocessor(vocab_size, channels, max_length, **where)
        encoder = _encoder(preprocessor, like, {**_LANGUAGE, **changes}, where)
        decoder = _decoder(
            encoder, channels, where, num_heads=decoder_heads, qk_channels=decoder_qk_channels, v_channels=channels
        )
        queries = LearnedQueries(max_length, channels, like_inputs=True, **where)
        return cls(preprocessor, encoder, queries, decoder, TokenHead(vocab_size, **where))

    @classmethod
    def optical_flow(
        cls, *, size: tuple[int, int] = (368, 496), like: Like = "deepmind", device: Where = None,
        dtype: torch.dtype | None = None, **changes: Any,
    ) -> PerceiverIO:  # fmt: skip
        """Optical flow between two frames: 182,528 x 322 inputs, each an output too, 2,048 latents of 512, 24 layers.

        Inputs [B, 2, 27, H, W] of ``flow_patches``. It has 41.1M parameters, as the released weights; the paper prints 27.9M.
        Larger images are computed in tiles of ``size``.

        Args:
            size: (H, W) of training, for which the highest frequency is chosen.
            changes: other values for fields of ``EncoderConfig``.

        Source: arXiv 2107.14795, section 4.2 and appendix H.
        """
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        preprocessor = FlowPreprocessor(positions=FourierPositions(64, size), **where)
        published = {"num_latents": 2048, "latent_dim": 512, "num_blocks": 1, "layers_per_block": 24, "latent_heads": 16}
        encoder = _encoder(preprocessor, like, {**published, **changes}, where)
        decoder = _decoder(encoder, preprocessor.channels, where)
        queries = InputQueries(preprocessor.channels)
        return cls(preprocessor, encoder, queries, decoder, FlowHead(preprocessor.channels, **where))

    @classmethod
    def multimodal(
        cls, *, frames: int = 16, image_size: int = 224, samples_per_frame: int = 1920, samples_per_patch: int = 16,
        num_classes: int = 700, hidden_channels: int = 512, label_query_channels: int = 1024, like: Like = "deepmind",
        device: Where = None, dtype: torch.dtype | None = None, **changes: Any,
    ) -> PerceiverIO:  # fmt: skip
        """Video, audio and label in and out, through 784 latents of 512: 52,097 x 704 inputs, 804,737 x 1,026 queries, 20.0M.

        Inputs: "audio" [B, S, 1], "image" [B, T, 3, H, W], "label" [B, num_classes]; outputs: "audio" [B, S], "image"
        [B, T * H * W, 3], "label" [B, num_classes]. The label is hidden (set ``preprocessor.mask_probs["label"]`` to 0.5 to
        train). 1,920 + 50,176 + 1 tokens are 52,097, as DeepMind's code makes them; the paper's table prints 50,657. All
        804,737 outputs at once take memory: ask for some of them with ``points``.

        Args:
            frames, image_size: T and H = W of the video, in patches of 1 x 4 x 4 pixels.
            samples_per_frame, samples_per_patch: of the audio.
            hidden_channels: of the layer between decoder and heads.
            label_query_channels: of the label's learned query.
            changes: other values for fields of ``EncoderConfig``.

        Source: arXiv 2107.14795, section 4.3 and appendix; bands as in DeepMind's code.
        """
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        samples = frames * samples_per_frame
        audio = FourierPositions(192, (samples,))
        video = FourierPositions(32, (frames, image_size, image_size))
        preprocessor = MultimodalPreprocessor(
            {
                "audio": AudioPreprocessor(samples_per_patch, audio),
                "image": VideoPreprocessor(3, (1, 4, 4), video),
                "label": LabelPreprocessor(num_classes),
            },
            4, {"audio": 0.0, "image": 0.0, "label": 1.0}, **where,
        )  # fmt: skip
        published = {"num_latents": 784, "latent_dim": 512, "num_blocks": 1, "layers_per_block": 8, "latent_heads": 8}
        encoder = _encoder(preprocessor, like, {**published, **changes}, where)
        queries = MultimodalQueries(
            {
                "audio": FourierQueries((samples // samples_per_patch,), audio),
                "image": FourierQueries((frames, image_size, image_size), video),
                "label": LearnedQueries(1, label_query_channels, **where),
            },
            2, **where,
        )  # fmt: skip
        decoder = _decoder(encoder, queries.channels, where)
        heads = {
            "audio": PatchHead(hidden_channels, samples_per_patch, flat=True, **where),
            "image": PatchHead(hidden_channels, 3, **where),
            "label": ClassHead(hidden_channels, num_classes, **where),
        }
        return cls(preprocessor, encoder, queries, decoder, MultimodalHead(queries.channels, hidden_channels, heads, **where))

    @classmethod
    def perceiver_pytorch(
        cls, *, channels: int = 32, query_channels: int = 32, out_channels: int | None = 100,
        decoder_feed_forward: bool = False, device: Where = None, dtype: torch.dtype | None = None, **changes: Any,
    ) -> PerceiverIO:  # fmt: skip
        """PerceiverIO of lucidrains/perceiver-pytorch with the sizes of its README; the queries are given as ``points``.

        Args:
            channels, query_channels: of the input array and of the queries (dim, queries_dim there).
            out_channels: of the outputs (logits_dim); None: what the decoder gives.
            decoder_feed_forward: a feed-forward layer after the decoder's attention (decoder_ff).
            changes: other values for fields of ``EncoderConfig``, of which the decoder has heads and width: depth is
                ``num_blocks``, cross_dim_head ``qk_channels / cross_heads``, latent_dim_head ``latent_qk_channels /
                latent_heads``, seq_dropout_prob ``input_dropout``, weight_tie_layers ``weight_sharing="v2"``.

        Source: README of perceiver-pytorch 0.11.0, whose inverted attention and attention residuals are not here.
        """
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        head = PlainHead() if out_channels is None else PatchHead(query_channels, out_channels, **where)
        changes = {"input_dropout": 0.2, **changes}
        preprocessor, queries = ArrayPreprocessor(channels), GivenQueries(query_channels)
        return cls._lucidrains(preprocessor, queries, head, decoder_feed_forward, changes, where)

    @classmethod
    def perceiver_pytorch_lm(
        cls, *, vocab_size: int = 20_000, channels: int = 32, max_length: int = 2048, decoder_feed_forward: bool = False,
        device: Where = None, dtype: torch.dtype | None = None, **changes: Any,
    ) -> PerceiverIO:  # fmt: skip
        """PerceiverLM of lucidrains/perceiver-pytorch with the sizes of its README: the embedded tokens are the queries.

        Args:
            channels: of the embeddings and queries (dim there).
            decoder_feed_forward, changes: see ``PerceiverIO.perceiver_pytorch``.

        Source: README of perceiver-pytorch 0.11.0.
        """
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        preprocessor = TextPreprocessor(vocab_size, channels, max_length, **where)
        head = PatchHead(channels, vocab_size, **where)
        return cls._lucidrains(preprocessor, InputQueries(channels), head, decoder_feed_forward, changes, where)

    @classmethod
    def _lucidrains(
        cls, preprocessor: Any, queries: Any, head: nn.Module, feed_forward: bool, changes: dict[str, Any],
        where: dict[str, Any],
    ) -> PerceiverIO:  # fmt: skip
        published = {**PERCEIVER_PYTORCH, "num_cross_attends": 1, "num_blocks": 6, "layers_per_block": 1}
        config = EncoderConfig(**{"input_dim": preprocessor.channels, **published, **changes})
        encoder = PerceiverEncoder(config, **where)
        decoder = _decoder(
            encoder, queries.channels, where, num_heads=config.cross_heads, qk_channels=config.qk_channels,
            qkv_bias=config.qkv_bias, widening_factor=config.cross_widening_factor, feed_forward=feed_forward,
        )  # fmt: skip
        return cls(preprocessor, encoder, queries, decoder, head)

    @classmethod
    def _classifier(
        cls, preprocessor: nn.Module, num_classes: int, residual: bool, like: Like, device: Where, dtype: torch.dtype | None,
        changes: dict[str, Any],
    ) -> PerceiverIO:  # fmt: skip
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        encoder = _encoder(preprocessor, like, changes, where)
        D = encoder.config.latent_dim
        decoder = _decoder(encoder, D, where, residual=residual)
        return cls(preprocessor, encoder, LearnedQueries(1, D, **where), decoder, ClassHead(D, num_classes, **where))


_LANGUAGE: dict[str, Any] = {
    "num_latents": 256, "latent_dim": 1280, "num_blocks": 1, "layers_per_block": 26, "cross_heads": 8, "qk_channels": 256,
    "v_channels": 1280, "latent_qk_channels": 256, "latent_v_channels": 1280,
}  # fmt: skip


def _encoder(preprocessor: Any, like: Like, changes: dict[str, Any], where: dict[str, Any]) -> PerceiverEncoder:
    """One cross-attend, then blocks that share their weights; ImageNet's sizes but for ``changes``."""
    check_choice("like", like, ("deepmind", "transformers"))
    fields: dict[str, Any] = {
        "input_dim": preprocessor.channels, "num_cross_attends": 1,
        "activation": "gelu_tanh" if like == "deepmind" else "gelu",
    }  # fmt: skip
    return PerceiverEncoder(EncoderConfig(**{**fields, **changes}), **where)


def _decoder(encoder: PerceiverEncoder, channels: int, where: dict[str, Any], **options: Any) -> OutputBlock:
    """The published decoders have one head as wide as the latents but where ``options`` say otherwise."""
    config = encoder.config
    return OutputBlock(
        channels, config.latent_dim, activation=config.activation, attention_dropout=config.attention_dropout,
        dropout=config.dropout, eps=config.eps, **options, **where,
    )  # fmt: skip
