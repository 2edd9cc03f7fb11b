"""Sizes and switches of a Perceiver AR, and the published ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perceiver_kernels.checks import check_positive
from perceiver_kernels.models.sequence_positions import PositionKind, check_positions
from perceiver_kernels.nn.checks import check_count, check_flag
from perceiver_kernels.nn.feed_forward import Activation, check_activation
from perceiver_kernels.problem import check_eps, check_probability


@dataclass(frozen=True)
class PerceiverARConfig:
    """Sizes of a Perceiver AR; the defaults are those of the authors' code, but for the first three.

    Args:
        vocab_size: tokens there are.
        max_length: M, most tokens of a sequence, prefix and latents together.
        num_latents: N, most latents.
        dim: D.
        num_heads: H, of all attention layers.
        head_dim: d, of all attention layers; ``dim / num_heads`` when None.
        num_layers: latent blocks.
        num_perceiver_layers: layers before them that read the prefix, each for itself.
        widening_factor: of all feed-forward layers, see ``nn.FeedForward``.
        activation: likewise.
        positions: vectors added to the embeddings, "learned" or "sinusoidal", see ``SequencePositions``; None: none.
        grid: sizes of the grid of learned positions, see ``SequencePositions``.
        rotary_width: channels of every head that are turned by their positions; None: half of them, 0: none.
        rotary_base: frequencies are base^(-2 i / width) as in RoFormer; None: from 1 to 1 / max_length in even steps of their
            logarithm, both included, as in the authors' code.
        rotary_interleaved: pairs are neighbouring channels.
        num_rotary_layers: the first latent blocks have rotary positions, all of them when None.
        latent_proj: a linear layer between the embeddings of the latents' tokens and the first layer.
        own_keys: a latent's own key is made from its state, by the layer's norm of the sequence; False: from its token's
            embedding, as those of the prefix.
        final_norm: LayerNorm before the logits.
        bias: biases of queries, keys, values, feed-forward layers and of the latent blocks' attention results.
        cross_out_bias: bias of the perceiver layers' attention results.
        logits_bias: bias of the logits.
        tied_logits: the logits' weights are those of the embedding.
        prefix_dropout: share of the prefix that every perceiver layer leaves out in training: ``int(length * share)`` tokens,
            others for every sequence.
        cross_attention_dropout: dropout of the attention weights of perceiver layers.
        attention_dropout: dropout of the attention weights of latent blocks.
        dropout: dropout of the results of attention and feed-forward layers.
        hidden_dropout: dropout of the feed-forward layers' hidden channels.
        init_std: weights and embeddings start normal with this deviation; None: as in the authors' code, logits zero.
        eps: of every LayerNorm.
        activation_checkpointing: in training, layers are computed again in the backward pass instead of kept.

    Source: arXiv 2202.07765, section 3 and appendix; google-research/perceiver-ar, experiment.py.
    """

    vocab_size: int
    max_length: int
    num_latents: int
    dim: int = 1024
    num_heads: int = 16
    head_dim: int | None = None
    num_layers: int = 12
    num_perceiver_layers: int = 1
    widening_factor: int = 4
    activation: Activation = "squared_relu"
    positions: PositionKind | None = None
    grid: Sequence[int] | None = None
    rotary_width: int | None = None
    rotary_base: float | None = None
    rotary_interleaved: bool = True
    num_rotary_layers: int | None = None
    latent_proj: bool = True
    own_keys: bool = False
    final_norm: bool = True
    bias: bool = True
    cross_out_bias: bool = True
    logits_bias: bool = True
    tied_logits: bool = False
    prefix_dropout: float = 0.0
    cross_attention_dropout: float = 0.0
    attention_dropout: float = 0.0
    dropout: float = 0.1
    hidden_dropout: float = 0.0
    init_std: float | None = None
    eps: float = 1e-5
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "max_length", "num_latents", "dim", "num_heads", "num_perceiver_layers", "widening_factor",
        ):  # fmt: skip
            check_count(name, getattr(self, name))
        check_count("num_layers", self.num_layers, 0)
        if self.num_latents > self.max_length:
            raise ValueError(f"num_latents must be at most max_length={self.max_length}, got {self.num_latents}")
        if self.head_dim is not None:
            check_count("head_dim", self.head_dim)
        elif self.dim % self.num_heads:
            raise ValueError(f"dim must be a multiple of num_heads={self.num_heads} unless head_dim is given, got {self.dim}")
        check_activation(self.activation)
        if self.positions is not None:
            check_positions(self.positions, self.max_length, self.dim, self.grid)
        elif self.grid is not None:
            raise ValueError(f"grid needs positions='learned', got {self.grid!r} without positions")
        self._check_rotary()
        if self.tied_logits and self.init_std is None:
            raise ValueError("init_std must be given with tied_logits: the authors' zeros would be the embedding's, got None")
        for name in ("prefix_dropout", "cross_attention_dropout", "attention_dropout", "dropout", "hidden_dropout"):
            check_probability(name, getattr(self, name))
        check_flag("activation_checkpointing", self.activation_checkpointing)
        if self.init_std is not None:
            check_positive("init_std", self.init_std)
        check_eps(self.eps)

    def _check_rotary(self) -> None:
        if self.rotary_width is not None:
            check_count("rotary_width", self.rotary_width, 0)
            if self.rotary_width % 2 or self.rotary_width > self.head_channels:
                limit = f"even and at most head_dim={self.head_channels}"
                raise ValueError(f"rotary_width must be {limit}, got {self.rotary_width}")
        if self.rotary_base is not None:
            check_positive("rotary_base", self.rotary_base)
        if self.num_rotary_layers is not None:
            check_count("num_rotary_layers", self.num_rotary_layers, 0)

    @property
    def head_channels(self) -> int:
        """d, channels of a head."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that are turned."""
        return self.head_channels // 4 * 2 if self.rotary_width is None else self.rotary_width

    @property
    def max_prefix(self) -> int:
        """Most tokens of a prefix, so that all latents fit after it."""
        return self.max_length - self.num_latents


COPY_TASK: dict[str, Any] = {
    "vocab_size": 259, "max_length": 131_072, "num_latents": 1024, "num_layers": 6, "positions": "sinusoidal",
    "rotary_width": 0,
}  # fmt: skip

IMAGENET64: dict[str, Any] = {
    "vocab_size": 259, "max_length": 64 * 64 * 3 + 1, "num_latents": 1024, "num_layers": 60, "positions": "learned",
    "grid": (64, 64, 3), "rotary_width": 0,
}  # fmt: skip

_LUCIDRAINS: dict[str, Any] = {
    "activation": "gelu", "positions": "learned", "rotary_base": 10_000.0, "latent_proj": False, "own_keys": True,
    "bias": False, "dropout": 0.0,
}  # fmt: skip

PERCEIVER_AR_PYTORCH: dict[str, Any] = {
    **_LUCIDRAINS, "vocab_size": 20_000, "max_length": 4096, "num_latents": 1024, "dim": 512, "num_heads": 8, "head_dim": 64,
    "num_layers": 8, "rotary_width": 32, "rotary_interleaved": False, "final_norm": False, "logits_bias": False,
    "prefix_dropout": 0.5,
}  # fmt: skip

_KRASSERM: dict[str, Any] = {
    **_LUCIDRAINS, "num_rotary_layers": 1, "final_norm": False, "tied_logits": True, "init_std": 0.02,
}  # fmt: skip

CLM_SMALL: dict[str, Any] = {
    **_KRASSERM, "vocab_size": 262, "max_length": 4096, "num_latents": 512, "dim": 512, "num_heads": 8, "num_layers": 8,
    "prefix_dropout": 0.5,
}  # fmt: skip

CLM_BASE: dict[str, Any] = {
    **_KRASSERM, "vocab_size": 32_000, "max_length": 1024, "num_latents": 512, "dim": 1280, "num_heads": 10, "num_layers": 20,
    "positions": None, "rotary_width": 128, "final_norm": True, "logits_bias": False,
}  # fmt: skip

GIANTMIDI: dict[str, Any] = {
    **_KRASSERM, "vocab_size": 389, "max_length": 6144, "num_latents": 2048, "dim": 768, "num_heads": 8, "num_layers": 18,
    "prefix_dropout": 0.1, "cross_attention_dropout": 0.1, "attention_dropout": 0.1, "dropout": 0.1,
}  # fmt: skip
