"""The Recurrent Interface Network: a denoiser of images whose few latents read and write a tape of patches.

Source: Scalable Adaptive Computation for Iterative Generation, arXiv 2212.11972.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.checks import check_indices, check_tensor
from perceiver_kernels.models.model import Model, changed
from perceiver_kernels.nn.called import is_plain, parameter_of
from perceiver_kernels.nn.checkpointing import run_block
from perceiver_kernels.nn.checks import check_count, check_flag, check_input_dim, check_sequence, check_widths
from perceiver_kernels.nn.feed_forward import FeedForward
from perceiver_kernels.nn.rin import RINBlock
from perceiver_kernels.problem import check_eps, check_probability


@dataclass(frozen=True, kw_only=True)
class RINConfig:
    """Sizes of a RIN.

    Args:
        image_size: height and width of the images.
        patch_size: of the square patches, a divisor of ``image_size``.
        channels: of the images.
        num_classes: kinds of images that it is told; None for no such latent.
        num_latents: N, the latents of time and class among them.
        latent_dim: D, a multiple of 8.
        tape_dim: C, channels of a patch's token.
        layers: latent blocks of every round; its length is the number of rounds.
        latent_heads: heads of the latent blocks.
        tape_heads: heads of reading and writing.
        latent_widening_factor: of the latents' feed-forward layers.
        tape_widening_factor: of the tape's; 0: none.
        time_scale: factor on the times before their sines are taken.
        attention_dropout: of the latent blocks.
        hidden_dropout: of the latent blocks.
        drop_path: of the latent blocks.
        eps: of all LayerNorms.
        activation_checkpointing: in training, keep only the input of every round and compute it again for its gradient.

    Source: arXiv 2212.11972, section 4 and appendix B; google-research/pix2seq.
    """

    image_size: int
    patch_size: int
    channels: int = 3
    num_classes: int | None = None
    num_latents: int = 128
    latent_dim: int
    tape_dim: int
    layers: tuple[int, ...]
    latent_heads: int = 16
    tape_heads: int
    latent_widening_factor: int = 4
    tape_widening_factor: int
    time_scale: float = 1000.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    drop_path: float = 0.0
    eps: float = 1e-6
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "channels", "latent_widening_factor"):
            check_count(name, getattr(self, name))
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size={self.image_size}, got {self.patch_size}")
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes)
        check_count("num_latents", self.num_latents, 1 + self.conditions)
        check_input_dim(self.tape_dim)
        check_widths(self.latent_heads, latent_dim=self.latent_dim)
        if self.latent_dim % 8:
            raise ValueError(f"latent_dim must be a multiple of 8, got {self.latent_dim}")
        # Reading and writing have the smaller width.
        smaller = "tape_dim" if self.tape_dim <= self.latent_dim else "latent_dim"
        check_widths(self.tape_heads, **{smaller: getattr(self, smaller)})
        if not isinstance(self.layers, (tuple, list)) or not self.layers:
            raise ValueError(f"layers must hold the number of latent blocks of every round, got {self.layers!r}")
        for count in self.layers:
            check_count("layers", count)
        check_count("tape_widening_factor", self.tape_widening_factor, 0)
        if not (isinstance(self.time_scale, (int, float)) and math.isfinite(self.time_scale)):
            raise ValueError(f"time_scale must be a finite number, got {self.time_scale!r}")
        for name in ("attention_dropout", "hidden_dropout", "drop_path"):
            check_probability(name, getattr(self, name))
        check_eps(self.eps)
        check_flag("activation_checkpointing", self.activation_checkpointing)

    @property
    def conditions(self) -> int:
        """Latents that are not learned: the time, and the class."""
        return 1 if self.num_classes is None else 2


class TimeEmbedding(nn.Module):
    """Times as vectors.

        e_j = sin(s t 10000^(-2j/w)), cos(s t 10000^(-2j/w)),   j < w/2,   s the scale
        out = W_2 silu(W_1 (e - mean(e)) / std(e) + b_1) + b_2

    Args:
        dim: D, channels of the result; w is a quarter of it.
        scale: s.

    Source: google-research/pix2seq, whose times are in [0, 1].
    """

    def __init__(
        self, dim: int, scale: float, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.scale = scale
        self.up_proj = nn.Linear(dim // 4, dim, device=device, dtype=dtype)
        self.down_proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, time: Tensor) -> Tensor:
        """time [B] -> [B, D]."""
        width, weight = self.up_proj.in_features, parameter_of(self.up_proj)
        # Half precision would leave no correct bit of the phase.
        wide = torch.promote_types(weight.dtype, torch.float32)
        exponents = torch.arange(0, width, 2, device=time.device, dtype=wide) / width
        angles = time.to(wide)[:, None] * self.scale * 10_000.0**-exponents
        waves = torch.cat((angles.sin(), angles.cos()), -1)
        normed = F.layer_norm(waves, (width,), eps=0.0)
        return self.down_proj(F.silu(self.up_proj(normed.to(weight.dtype))))


class RIN(Model):
    """Noisy images in, what their denoising needs out, and the latents for the next call.

        x = LN(W patches + b) + P                                                the tape [B, M, C]
        z = [learned latents | time | class]                                     [B, N, D]
        z <- z + LN(y + FeedForward(LN(y))),   y the latents of the step before, or 0
        x, z <- RINBlock(x, z)                                                   every round
        out = W LN(x) + b                                                        patches again

    Args:
        config: the sizes, see ``RINConfig``.
        device: of the parameters.
        dtype: of the parameters.

    Source: arXiv 2212.11972, section 3; google-research/pix2seq, whose matrices start as here, Glorot's uniform, but with the
    heads of attention counted apart. The LayerNorm of the step before starts with weights of zero.
    """

    def __init__(
        self,
        config: RINConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        normed: dict[str, Any] = {"eps": config.eps, **where}
        patch_dim = config.patch_size**2 * config.channels
        self.stem = nn.Linear(patch_dim, config.tape_dim, **where)
        self.stem_norm = nn.LayerNorm(config.tape_dim, **normed)
        tokens = (config.image_size // config.patch_size) ** 2
        self.positions = nn.Parameter(torch.empty(1, tokens, config.tape_dim, **where))
        self.latents = nn.Parameter(torch.empty(1, config.num_latents - config.conditions, config.latent_dim, **where))
        self.time_embedding = TimeEmbedding(config.latent_dim, config.time_scale, **where)
        self.class_embedding = None if config.num_classes is None else nn.Linear(config.num_classes, config.latent_dim, **where)
        self.previous = FeedForward(config.latent_dim, config.latent_widening_factor, **normed)
        self.previous_norm = nn.LayerNorm(config.latent_dim, **normed)
        self.blocks = nn.ModuleList(
            RINBlock(
                config.tape_dim, config.latent_dim, count, tape_heads=config.tape_heads, latent_heads=config.latent_heads,
                tape_widening_factor=config.tape_widening_factor, latent_widening_factor=config.latent_widening_factor,
                attention_dropout=config.attention_dropout, hidden_dropout=config.hidden_dropout,
                drop_path=config.drop_path, **normed,
            )
            for count in config.layers
        )  # fmt: skip
        self.head_norm = nn.LayerNorm(config.tape_dim, **normed)
        self.head = nn.Linear(config.tape_dim, patch_dim, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in (self.positions, self.latents):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(self.previous_norm.weight)

    @classmethod
    def imagenet64(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> RIN:  # fmt: skip
        """The class-conditional model of 64 x 64 images: 64 tokens x 512, 128 latents x 768, 4 rounds of 4 layers.

        Patches of 8 pixels, reading and writing with 16 heads of 32, latents with 16 heads of 48.

        Args:
            changes: other values for fields of ``RINConfig``.

        Source: google-research/pix2seq, its configuration for ImageNet at 64.
        """
        published: dict[str, Any] = {
            "image_size": 64, "patch_size": 8, "num_classes": 1000, "latent_dim": 768, "tape_dim": 512,
            "layers": (4, 4, 4, 4), "tape_heads": 16, "tape_widening_factor": 4,
        }  # fmt: skip
        return cls(changed(RINConfig, published, changes), device=device, dtype=dtype)

    @classmethod
    def cifar10(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> RIN:  # fmt: skip
        """The class-conditional model of CIFAR-10: 256 tokens x 256, 128 latents x 512, 3 rounds of 2 layers.

        Patches of 2 pixels, reading and writing with 8 heads of 32, latents with 16 heads of 32; dropout of the hidden layers
        and stochastic depth of 0.1.

        Args:
            changes: other values for fields of ``RINConfig``.

        Source: google-research/pix2seq, its configuration for CIFAR-10.
        """
        published: dict[str, Any] = {
            "image_size": 32, "patch_size": 2, "num_classes": 10, "latent_dim": 512, "tape_dim": 256, "layers": (2, 2, 2),
            "tape_heads": 8, "tape_widening_factor": 2, "hidden_dropout": 0.1, "drop_path": 0.1,
        }  # fmt: skip
        return cls(changed(RINConfig, published, changes), device=device, dtype=dtype)

    def forward(
        self, images: Tensor, time: Tensor, labels: Tensor | None = None, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step of denoising.

        Args:
            images: [B, channels, image_size, image_size], noisy.
            time: float [B], how noisy, in [0, 1].
            labels: int64 [B], classes; where the model has classes, and only there.
            previous: [B, N, D], latents of the step before (self-conditioning); None for the first step: zeros. In training
                they come from a first pass without gradient, for a share of the batch (0.9 in the published models).

        Returns:
            the prediction (noise, in the published models) [B, channels, image_size, image_size], and the latents [B, N, D].

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        self._check(images, time, labels)
        tape, latents = self._initial_tape(images), self._initial_latents(time, labels, previous)
        for block in self.blocks:
            tape, latents = run_block(block, tape, latents, checkpointing=self.config.activation_checkpointing)
        return self._images(self.head(self.head_norm(tape))), latents

    def _check(self, images: Tensor, time: Tensor, labels: Tensor | None) -> None:
        config, size = self.config, self.config.image_size
        shape = (None, config.channels, size, size)
        check_tensor("images", images, "[B, Ch, H, W]", shape)
        B = images.shape[0]
        check_tensor("time", time, "[B]", (B,))
        if (labels is None) != (config.num_classes is None):
            raise ValueError(
                f"labels must be given if num_classes={config.num_classes} is not None, and only then, got "
                f"{None if labels is None else tuple(labels.shape)}"
            )
        if labels is not None and config.num_classes is not None:
            check_tensor("labels", labels, "[B]", (B,), dtypes=(torch.int64,))
            check_indices("labels", labels, "num_classes-1", config.num_classes)

    def _initial_tape(self, images: Tensor) -> Tensor:
        """Patches as tokens, rows of patches one after the other, channels last in each."""
        p = self.config.patch_size
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, Ch, rows, p, columns, p]
        tokens = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        check_sequence("images", tokens, "B, M, C", self.stem.in_features, parameter_of(self.stem))
        return self.stem_norm(self.stem(tokens)) + self.positions

    def _initial_latents(self, time: Tensor, labels: Tensor | None, previous: Tensor | None) -> Tensor:
        config, B = self.config, time.shape[0]
        told = [self.time_embedding(time)]
        if self.class_embedding is not None and labels is not None:
            told.append(_classes(self.class_embedding, labels))
        learned = self.latents.expand(B, -1, -1)
        latents = torch.cat((learned, torch.stack(told, 1).to(learned.dtype)), 1)  # [B, N, D]
        shape = (B, config.num_latents, config.latent_dim)
        if previous is None:
            previous = learned.new_zeros(shape)
        else:
            check_tensor("previous", previous, "[B, N, D]", shape)
        return latents + self.previous_norm(self.previous(previous))

    def _images(self, tokens: Tensor) -> Tensor:
        """Tokens as patches of images, the inverse of ``_initial_tape``."""
        config, side = self.config, self.config.image_size // self.config.patch_size
        patches = tokens.unflatten(2, (config.patch_size, config.patch_size, -1)).unflatten(1, (side, side))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _classes(embedding: nn.Linear, labels: Tensor) -> Tensor:
    """What a linear layer makes of one-hot classes [B], which are written out only where the layer has to be called."""
    if is_plain(embedding):
        return F.embedding(labels, embedding.weight.mT) + embedding.bias
    one_hot = F.one_hot(labels, embedding.in_features).to(parameter_of(embedding).dtype)
    told: Tensor = embedding(one_hot)
    return told
