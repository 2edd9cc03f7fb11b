"""Perceiver IO: an input array is read into latents, which are asked for outputs of any number and kind.

Source: Perceiver IO: A General Architecture for Structured Inputs & Outputs, arXiv 2107.14795.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models import perceiver_io_libraries as libraries
from perceiver_kernels.models.encoder import PerceiverEncoder
from perceiver_kernels.models.heads import ClassHead, FlowHead, MultimodalHead, PatchHead, Source, TokenHead
from perceiver_kernels.models.model import Model
from perceiver_kernels.models.multimodal import MultimodalPreprocessor
from perceiver_kernels.models.perceiver_io_parts import LANGUAGE, Like, Where, decoder_of, encoder_of
from perceiver_kernels.models.preprocessing import (
    AudioPreprocessor,
    ConvPreprocessor,
    FlowPreprocessor,
    LabelPreprocessor,
    LearnedPreprocessor,
    PixelPreprocessor,
    TextPreprocessor,
    VideoPreprocessor,
)
from perceiver_kernels.models.queries import FourierQueries, InputQueries, LearnedQueries, MultimodalQueries
from perceiver_kernels.nn import OutputBlock
from perceiver_kernels.nn.checkpointing import run_block
from perceiver_kernels.nn.checks import check_count
from perceiver_kernels.nn.output_attention import PreparedLatents


@dataclass(frozen=True, eq=False)
class Encoded:
    """Inputs that a model has read.

    Args:
        array: what its preprocessor made of them, of which queries may be made.
        latents: [B, N, D], or prepared for many queries.
    """

    array: Tensor | InputArray
    latents: Tensor | PreparedLatents


class PerceiverIO(Model):
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
        """Compute outputs: ``decode(encode(inputs, key_mask, lengths), query_mask, points)``.

        Args:
            inputs: see ``encode``.
            key_mask: see ``encode``.
            lengths: see ``encode``.
            query_mask: see ``decode``.
            points: see ``decode``.

        Returns:
            What the head gives.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        return self.decode(self.encode(inputs, key_mask, lengths), query_mask, points)

    def encode(self, inputs: Any, key_mask: Tensor | None = None, lengths: Tensor | None = None) -> Encoded:
        """Read the inputs, once for outputs that are decoded a part at a time.

        Args:
            inputs: what the preprocessor takes.
            key_mask: bool [B, M], True where a token of the input array is visible.
            lengths: int32 [B], visible leading tokens; excludes ``key_mask``.
        """
        array = self.preprocessor(inputs)
        seen = array
        if isinstance(array, InputArray) and (key_mask is not None or lengths is not None):
            seen, key_mask, lengths = replace(array, key_mask=key_mask, lengths=lengths), None, None
        return Encoded(array, self.encoder(seen, key_mask, lengths))

    def prepare(self, encoded: Encoded) -> Encoded:
        """The same for many calls of ``decode``: what does not depend on the queries is computed once.

        See ``OutputCrossAttention.prepare``.
        """
        if isinstance(encoded.latents, PreparedLatents):
            return encoded
        return replace(encoded, latents=self.decoder.attention.prepare(encoded.latents))

    def decode(self, encoded: Encoded, query_mask: Tensor | None = None, points: Any = None) -> Any:
        """Outputs of what ``encode`` read, all of them or some.

        Args:
            encoded: of ``encode`` or ``prepare``.
            query_mask: bool [B, O], False for outputs whose queries see nothing.
            points: which outputs are wanted, int64 [n] among O or a slice of consecutive ones (a mapping of such where there
                are modalities), None: all; or the queries themselves, float [B, O, C_q] or [O, C_q], where they are
                ``GivenQueries``. A slice gives what it is of all outputs; picked places of a grid lie elsewhere, as in
                the originals, see ``FourierQueries``.

        Returns:
            What the head gives.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        if not isinstance(encoded, Encoded):
            raise TypeError(f"encoded must be what encode or prepare gave, got {type(encoded).__name__}")
        array, latents = encoded.array, encoded.latents
        queries = self.queries(array, points)
        source = Source(array, self.preprocessor, points is None)
        whole = torch.cat(list(queries.values()), 1) if isinstance(queries, dict) else queries
        checkpointing = self.encoder.config.activation_checkpointing
        read = run_block(self.decoder, whole, latents, None, query_mask, checkpointing=checkpointing)
        if not isinstance(queries, dict):
            return self.head(read, source)
        decoded = read.split([part.shape[1] for part in queries.values()], 1)
        return self.head(dict(zip(queries, decoded, strict=True)), source)

    # ------ published models

    @classmethod
    def imagenet_fourier(
        cls, *, image_size: int = 224, num_classes: int = 1000, like: Like = "deepmind", device: Where = None,
        dtype: torch.dtype | None = None, **changes: Any,
    ) -> PerceiverIO:  # fmt: skip
        """ImageNet with Fourier features: 50,176 pixels of 261 channels, 48.4M parameters, 407 GFLOP.

        Args:
            image_size: H = W of the images for which the highest frequency is chosen; any size may be read.
            num_classes: logits.
            like: "deepmind" or "transformers", see the class.
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
        """ImageNet with learned positions and no knowledge of two dimensions: 50,176 x 512, 62.3M parameters, 478 GFLOP.

        The paper prints 407, those of its input of 261 channels.

        Args:
            image_size: H = W of the images, a learned position for every pixel.
            num_classes: logits.
            like: "deepmind" or "transformers", see the class.
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
            num_classes: logits.
            like: "deepmind" or "transformers", see the class.
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
            num_classes: logits.
            vocab_size: ids there are.
            channels: of the embeddings.
            max_length: places with a learned position.
            like: "deepmind" or "transformers", see the class.
            changes: other values for fields of ``EncoderConfig``.

        Source: arXiv 2107.14795, section 4.1; PerceiverForSequenceClassification of transformers.
        """
        preprocessor = TextPreprocessor(vocab_size, channels, max_length, device=device, dtype=dtype)
        return cls._classifier(preprocessor, num_classes, True, like, device, dtype, {**LANGUAGE, **changes})

    @classmethod
    def language(
        cls, *, vocab_size: int = 262, channels: int = 768, max_length: int = 2048, decoder_heads: int = 8,
        decoder_qk_channels: int = 256, like: Like = "deepmind", device: Where = None, dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> PerceiverIO:  # fmt: skip
        """Masked language modelling of bytes: 2,048 x 768, 256 latents of 1,280, 26 layers, 201M parameters, 121 GFLOP.

        The paper prints 113.

        As many outputs as the input has tokens; transformers always gives ``max_length``.

        Args:
            vocab_size: ids there are, and logits.
            channels: of the embeddings and of the output queries.
            max_length: places with a learned position, and with a learned query.
            decoder_heads: H of the decoder.
            decoder_qk_channels: width of its queries and keys; its values have ``channels`` channels.
            like: "deepmind" or "transformers", see the class.
            changes: other values for fields of ``EncoderConfig``.

        Source: arXiv 2107.14795, section 4.1 and appendix F.
        """
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        preprocessor = TextPreprocessor(vocab_size, channels, max_length, **where)
        encoder = encoder_of(preprocessor, like, {**LANGUAGE, **changes}, where)
        decoder = decoder_of(
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
        Images of other sizes are read as they are; DeepMind's code cuts larger ones into tiles of ``size``, which is left to
        the caller.

        Args:
            size: (H, W) of training, for which the highest frequency is chosen.
            like: "deepmind" or "transformers", see the class.
            changes: other values for fields of ``EncoderConfig``.

        Source: arXiv 2107.14795, section 4.2 and appendix H.
        """
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        preprocessor = FlowPreprocessor(positions=FourierPositions(64, size), **where)
        published = {"num_latents": 2048, "latent_dim": 512, "num_blocks": 1, "layers_per_block": 24, "latent_heads": 16}
        encoder = encoder_of(preprocessor, like, {**published, **changes}, where)
        decoder = decoder_of(encoder, preprocessor.channels, where)
        queries = InputQueries(preprocessor.channels)
        return cls(preprocessor, encoder, queries, decoder, FlowHead(preprocessor.channels, **where))

    @classmethod
    def multimodal(
        cls, *, frames: int = 16, image_size: int = 224, samples_per_frame: int = 1920, samples_per_patch: int = 16,
        num_classes: int = 700, hidden_channels: int = 512, label_query_channels: int = 1024, like: Like = "deepmind",
        device: Where = None, dtype: torch.dtype | None = None, **changes: Any,
    ) -> PerceiverIO:  # fmt: skip
        """Video, audio and label in and out, through 784 latents of 512: 52,097 x 704 inputs, 804,737 x 1,026 queries, 19.9M.

        Inputs: "audio" [B, S, 1], "image" [B, T, 3, H, W], "label" [B, num_classes]; outputs: "audio" [B, S], "image"
        [B, T * H * W, 3], "label" [B, num_classes]. The label is hidden (set ``preprocessor.mask_probs["label"]`` to 0.5 to
        train). 1,920 + 50,176 + 1 tokens are 52,097, as DeepMind's code makes them; the paper's table prints 50,657. All
        804,737 outputs at once take memory: ask for some of them with ``points``.

        Args:
            frames: T of the video.
            image_size: H = W of the video, in patches of 1 x 4 x 4 pixels.
            samples_per_frame: of the audio.
            samples_per_patch: of the audio.
            num_classes: of the label.
            hidden_channels: of the layer between decoder and heads.
            label_query_channels: of the label's learned query.
            like: "deepmind" or "transformers", see the class.
            changes: other values for fields of ``EncoderConfig``.

        Source: arXiv 2107.14795, section 4.3 and appendix; bands as in DeepMind's code.
        """
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        samples = frames * samples_per_frame
        check_count("image_size", image_size)
        if image_size % 4:
            raise ValueError(f"image_size must be a multiple of the patches' 4 pixels, got {image_size}")
        audio = FourierPositions(192, (samples,))
        # The highest frequency is that of the patches, for pixels that are asked for too: so it is in the released weights.
        video = FourierPositions(32, (frames, image_size // 4, image_size // 4))
        preprocessor = MultimodalPreprocessor(
            {
                "audio": AudioPreprocessor(samples_per_patch, audio),
                "image": VideoPreprocessor(3, (1, 4, 4), video),
                "label": LabelPreprocessor(num_classes),
            },
            4, {"audio": 0.0, "image": 0.0, "label": 1.0}, **where,
        )  # fmt: skip
        published = {"num_latents": 784, "latent_dim": 512, "num_blocks": 1, "layers_per_block": 8, "latent_heads": 8}
        encoder = encoder_of(preprocessor, like, {**published, **changes}, where)
        queries = MultimodalQueries(
            {
                "audio": FourierQueries((samples // samples_per_patch,), audio),
                "image": FourierQueries((frames, image_size, image_size), video),
                "label": LearnedQueries(1, label_query_channels, **where),
            },
            2, **where,
        )  # fmt: skip
        decoder = decoder_of(encoder, queries.channels, where)
        heads = {
            "audio": PatchHead(hidden_channels, samples_per_patch, flat=True, **where),
            "image": PatchHead(hidden_channels, 3, **where),
            "label": ClassHead(hidden_channels, num_classes, **where),
        }
        return cls(preprocessor, encoder, queries, decoder, MultimodalHead(queries.channels, hidden_channels, heads, **where))

    # Those of other libraries are methods in a file of their own.
    perceiver_pytorch = classmethod(libraries.perceiver_pytorch)
    perceiver_pytorch_lm = classmethod(libraries.perceiver_pytorch_lm)
    mnist = classmethod(libraries.mnist)
    imdb = classmethod(libraries.imdb)

    @classmethod
    def _classifier(
        cls, preprocessor: nn.Module, num_classes: int, residual: bool, like: Like, device: Where, dtype: torch.dtype | None,
        changes: dict[str, Any],
    ) -> PerceiverIO:  # fmt: skip
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        encoder = encoder_of(preprocessor, like, changes, where)
        D = encoder.config.latent_dim
        decoder = decoder_of(encoder, D, where, residual=residual)
        return cls(preprocessor, encoder, LearnedQueries(1, D, **where), decoder, ClassHead(D, num_classes, **where))
