"""The Perceiver resampler: latents that read the features of images and themselves, as a fixed number of tokens for a decoder.

Source: Flamingo: a Visual Language Model for Few-Shot Learning, arXiv 2204.14198, section 3.1.1 and appendix A.1.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perceiver_kernels.checks import check_positive, check_tensor
from perceiver_kernels.models.model import Model, changed
from perceiver_kernels.nn import FeedForward, JointAttention, Linear
from perceiver_kernels.nn.checkpointing import run_block
from perceiver_kernels.nn.checks import check_choice, check_count, check_flag, check_sequence
from perceiver_kernels.nn.feed_forward import Activation, check_activation
from perceiver_kernels.nn.norms import NormKind, make_norm
from perceiver_kernels.problem import check_eps, check_is_tensor, check_probability


@dataclass(frozen=True)
class PerceiverResamplerConfig:
    """Sizes of a resampler; the defaults are OpenFlamingo's.

    Args:
        dim: D, channels of the latents.
        num_latents: N.
        depth: layers, each of attention (``nn.JointAttention``) and feed-forward.
        num_heads: H of the attention.
        head_dim: d of the attention.
        num_kv_heads: heads of keys and values, a divisor of H; H when None.
        hidden_dim: channels of the feed-forward's hidden layer; 4 D when None.
        activation: of the feed-forward, see ``nn.FeedForward``.
        norm: "layer" or "rms", all norms but those of queries and keys.
        qk_norm: "layer" or "rms", a norm over the channels of every head's queries and keys.
        eps: of all norms.
        input_dim: C, channels of media that are projected to D channels; None: media have D channels and are read as they are.
        input_hidden_dim: hidden channels of a gated SiLU layer without biases that projects them; a linear layer when None.
        output_dim: channels of the result, projected before the last norm; None: D, without a projection.
        max_media: there is a learned embedding of a medium's place in its sequence, for sequences up to this long.
        max_frames: there is a learned embedding of a frame's place in its medium, for media up to this long.
        attention_dropout: probability of dropping an attention weight, in training.
        latent_init: "normal", "scaled" (normal of variance 1/D) or "ones".
        linear_std: standard deviation of all linear layers' weights at the start; None: as ``nn.Linear`` does it.
        activation_checkpointing: layers keep their inputs only and are computed again for their gradients.
    """

    dim: int
    num_latents: int = 64
    depth: int = 6
    num_heads: int = 8
    head_dim: int = 64
    num_kv_heads: int | None = None
    hidden_dim: int | None = None
    activation: Activation = "gelu"
    norm: NormKind = "layer"
    qk_norm: NormKind | None = None
    eps: float = 1e-5
    input_dim: int | None = None
    input_hidden_dim: int | None = None
    output_dim: int | None = None
    max_media: int | None = None
    max_frames: int | None = None
    attention_dropout: float = 0.0
    latent_init: Literal["normal", "scaled", "ones"] = "normal"
    linear_std: float | None = None
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "num_latents", "num_heads", "head_dim"):
            check_count(name, getattr(self, name))
        check_count("depth", self.depth, 0)
        for name in (
            "num_kv_heads", "hidden_dim", "input_dim", "input_hidden_dim", "output_dim", "max_media", "max_frames",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.input_hidden_dim is not None and self.input_dim is None:
            raise ValueError(f"input_dim must be given with input_hidden_dim={self.input_hidden_dim}, got None")
        check_activation(self.activation)
        check_choice("norm", self.norm, ("layer", "rms"))
        if self.qk_norm is not None:
            check_choice("qk_norm", self.qk_norm, ("layer", "rms"))
        check_eps(self.eps)
        check_probability("attention_dropout", self.attention_dropout)
        check_choice("latent_init", self.latent_init, ("normal", "scaled", "ones"))
        if self.linear_std is not None:
            check_positive("linear_std", self.linear_std)
        check_flag("activation_checkpointing", self.activation_checkpointing)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def hidden_channels(self) -> int:
        """Channels of the feed-forward's hidden layer."""
        return 4 * self.dim if self.hidden_dim is None else self.hidden_dim

    @property
    def media_dim(self) -> int:
        """Channels of the media."""
        return self.dim if self.input_dim is None else self.input_dim


class ResamplerLayer(nn.Module):
    """z <- z + attention(norm(z); [norm(media); norm(z)]),   z <- z + feed_forward(norm(z)); no linear layer has a bias."""

    def __init__(self, config: PerceiverResamplerConfig, **where: Any) -> None:
        super().__init__()
        self.attention = JointAttention(
            config.dim, config.num_heads, head_dim=config.head_dim, num_kv_heads=config.kv_heads, norm=config.norm,
            norm_context=config.norm, qk_norm=config.qk_norm, dropout=config.attention_dropout, eps=config.eps, **where,
        )  # fmt: skip
        self.feed_forward = FeedForward(
            config.dim, hidden_dim=config.hidden_channels, activation=config.activation, norm=config.norm, bias=False,
            eps=config.eps, **where,
        )  # fmt: skip

    def forward(self, latents: Tensor, media: Tensor, mask: Tensor | None) -> Tensor:
        """latents [B, N, D], media [B, M, D], mask bool [B, M] -> [B, N, D]."""
        return self.feed_forward(self.attention(latents, media, mask))

    def flops(self, batch: int, N: int, M: int) -> int:
        """FLOPs of the matrix products of one forward."""
        return self.attention.flops(batch, N, M) + self.feed_forward.flops(batch, N)


class PerceiverResampler(Model):
    """Learned latents read a medium (the features of an image, or of a video's frames) and themselves.

        x = P media + e_frame + e_medium         P and the embeddings where the configuration has them
        z = learned latents [N, D]
        z <- z + Attention(norm(z); [norm(x); norm(z)]),   z <- z + FeedForward(norm(z)),   depth times
        result = norm(P_out z)

    Flamingo, IDEFICS, IDEFICS2 and IP-Adapter are this model with other widths, norms, heads and projections. Keys are two
    segments, media and latents: nothing is concatenated.

    Args:
        config: the sizes, see ``PerceiverResamplerConfig``.
        device: of the parameters.
        dtype: of the parameters.

    Source: Flamingo, arXiv 2204.14198, appendix A.1.1; the last norm is that of the public implementations, all of which
    have it. Linear layers start as ``nn.Linear`` does unless ``linear_std`` is set: flamingo-pytorch, OpenFlamingo and
    IP-Adapter leave them to torch's default.
    """

    def __init__(
        self,
        config: PerceiverResamplerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        D, C = config.dim, config.media_dim
        self.latents = nn.Parameter(torch.empty(config.num_latents, D, **where))
        self.media_embedding = _table(config.max_media, D, **where)
        self.frame_embedding = _table(config.max_frames, D, **where)
        self.input_proj: nn.Module | None = None
        if config.input_hidden_dim is not None:
            self.input_proj = FeedForward(
                C, hidden_dim=config.input_hidden_dim, out_dim=D, activation="swiglu", norm=None, bias=False, residual=False,
                **where,
            )  # fmt: skip
        elif config.input_dim is not None:
            self.input_proj = Linear(C, D, **where)
        self.layers = nn.ModuleList(ResamplerLayer(config, **where) for _ in range(config.depth))
        width = D if config.output_dim is None else config.output_dim
        self.output_proj = None if config.output_dim is None else Linear(D, width, **where)
        self.norm = make_norm(config.norm, width, config.eps, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as ``latent_init`` and ``linear_std`` say; embeddings are normal."""
        config = self.config
        if config.latent_init == "ones":
            nn.init.ones_(self.latents)
        else:
            nn.init.normal_(self.latents, std=1.0 if config.latent_init == "normal" else config.dim**-0.5)
        for table in (self.media_embedding, self.frame_embedding):
            if table is not None:
                nn.init.normal_(table)
        for module in self.modules():
            if isinstance(module, Linear):
                module.reset_parameters()
                if config.linear_std is not None:
                    nn.init.normal_(module.weight, std=config.linear_std)

    @classmethod
    def flamingo(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> PerceiverResampler:  # fmt: skip
        """flamingo-pytorch's resampler: 2 layers, 64 latents of 1024 channels, an embedding of up to 4 media of a sequence.

        Args:
            changes: other values for fields of ``PerceiverResamplerConfig``, for example ``depth=6``.

        Source: lucidrains/flamingo-pytorch, README.
        """
        published: dict[str, Any] = {"dim": 1024, "depth": 2, "max_media": 4}
        return cls(changed(PerceiverResamplerConfig, published, changes), device=device, dtype=dtype)

    @classmethod
    def open_flamingo(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> PerceiverResampler:  # fmt: skip
        """OpenFlamingo's resampler of CLIP ViT-L/14: 6 layers, 64 latents of 1024 channels, no embeddings.

        Source: mlfoundations/open_flamingo, ``PerceiverResampler(dim=1024)``.
        """
        published: dict[str, Any] = {"dim": 1024}
        return cls(changed(PerceiverResamplerConfig, published, changes), device=device, dtype=dtype)

    @classmethod
    def idefics(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> PerceiverResampler:  # fmt: skip
        """IDEFICS's resampler of CLIP ViT-H/14: 257 tokens of 1280 channels, 6 layers, 16 heads of 96, ReLU.

        ``qk_norm="layer"`` is transformers' ``qk_layer_norms_perceiver``.

        Source: transformers, ``IdeficsPerceiverResampler`` and the defaults of ``IdeficsPerceiverConfig``.
        """
        published: dict[str, Any] = {"dim": 1280, "num_heads": 16, "head_dim": 96, "activation": "relu", "linear_std": 0.02}
        return cls(changed(PerceiverResamplerConfig, published, changes), device=device, dtype=dtype)

    @classmethod
    def idefics2(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> PerceiverResampler:  # fmt: skip
        """IDEFICS2's resampler: 64 latents of 4096 channels, 3 layers, 16 heads of 96 that share 4 of keys and values.

        Its media are image features that the modality projection has brought to 4096 channels. With that projection, the
        connector: ``input_dim=1152, input_hidden_dim=14336``.

        Source: transformers, ``Idefics2PerceiverResampler`` and the defaults of ``Idefics2PerceiverConfig``.
        """
        published: dict[str, Any] = {
            "dim": 4096, "depth": 3, "num_heads": 16, "head_dim": 96, "num_kv_heads": 4, "activation": "swiglu", "norm": "rms",
            "eps": 1e-6, "latent_init": "ones", "linear_std": 0.02,
        }  # fmt: skip
        return cls(changed(PerceiverResamplerConfig, published, changes), device=device, dtype=dtype)

    @classmethod
    def ip_adapter_plus(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> PerceiverResampler:  # fmt: skip
        """IP-Adapter Plus for Stable Diffusion 1.5: 257 tokens of 1280 channels become 16 of 768, 4 layers, 12 heads of 64.

        Source: IP-Adapter, arXiv 2308.06721; tencent-ailab/IP-Adapter.
        """
        published: dict[str, Any] = {**_IP_ADAPTER, "dim": 768, "num_heads": 12, "output_dim": 768}
        return cls(changed(PerceiverResamplerConfig, published, changes), device=device, dtype=dtype)

    @classmethod
    def ip_adapter_plus_sdxl(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> PerceiverResampler:  # fmt: skip
        """IP-Adapter Plus for Stable Diffusion XL: 257 tokens of 1280 channels become 16 of 2048, 4 layers, 20 heads of 64.

        Source: IP-Adapter, arXiv 2308.06721; tencent-ailab/IP-Adapter.
        """
        published: dict[str, Any] = {**_IP_ADAPTER, "dim": 1280, "num_heads": 20, "output_dim": 2048}
        return cls(changed(PerceiverResamplerConfig, published, changes), device=device, dtype=dtype)

    def forward(self, media: Tensor, mask: Tensor | None = None) -> Tensor:
        """Resample every medium to N tokens.

        Args:
            media: [B, M, C], a medium each; [B, T, M, C], T media in sequence; or [B, T, F, M, C], of F frames each. C is
                ``input_dim``, or D. Without an axis of media or frames the embedding, where there is one, is the first.
            mask: bool, of the shape of ``media`` without its channels: True where a token may be read. What
                hidden tokens hold is never used.

        Returns:
            [B, N, D], or [B, T, N, D] where the media have an axis T; ``output_dim`` channels where it is set.

        Raises:
            TypeError, ValueError: a wrong type, shape or dtype, or more media or frames than there are embeddings.

        flamingo-pytorch gives [B, 1, N, D] for media [B, M, D].
        """
        tokens, visible = self._tokens(media, mask)
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            latents = run_block(layer, latents, tokens, visible, checkpointing=self.config.activation_checkpointing)
        if self.output_proj is not None:
            latents = self.output_proj(latents)
        if self.norm is not None:
            latents = self.norm(latents)
        return latents if media.ndim == 3 else latents.unflatten(0, media.shape[:2])

    def _tokens(self, media: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Projected media with their embeddings, [B*T, M, D] of the tokens of all frames, and their mask [B*T, M]."""
        check_is_tensor("media", media)
        C = self.config.media_dim
        if media.ndim not in (3, 4, 5) or media.shape[-1] != C:
            layouts = "[B, M, C], [B, T, M, C] or [B, T, F, M, C]"
            raise ValueError(f"media must be {layouts} with C={C}, got {tuple(media.shape)}")
        if mask is not None:
            masks = ("[B, M]", "[B, T, M]", "[B, T, F, M]")
            check_tensor("mask", mask, masks[media.ndim - 3], tuple(media.shape[:-1]), dtypes=(torch.bool,))
        B, M = media.shape[0], media.shape[-2]
        T = media.shape[1] if media.ndim > 3 else 1
        frames = media.shape[2] if media.ndim == 5 else 1
        for name, size, most in (("media", T, self.config.max_media), ("frames", frames, self.config.max_frames)):
            if most is not None and size > most:
                raise ValueError(f"media must have at most max_{name}={most} {name}, got {size}: {tuple(media.shape)}")
        tokens = media.reshape(B * T, frames * M, C)
        check_sequence("media", tokens, "B, M, C", C, self.latents)
        visible = None if mask is None else mask.reshape(B * T, frames * M)
        if visible is not None:
            tokens = torch.where(visible[..., None], tokens, 0.0)
        if self.input_proj is not None:
            tokens = self.input_proj(tokens)
        if self.frame_embedding is not None:
            tokens = (tokens.unflatten(1, (frames, M)) + self.frame_embedding[:frames, None]).flatten(1, 2)
        if self.media_embedding is not None:
            tokens = (tokens.unflatten(0, (B, T)) + self.media_embedding[:T, None]).flatten(0, 1)
        return tokens, visible

    def flops(self, batch: int, M: int) -> int:
        """FLOPs of the matrix products of one forward over ``batch`` media (B T) of M tokens, those of all frames together.

        A multiply and an add counted as two.
        """
        config = self.config
        total = sum(layer.flops(batch, config.num_latents, M) for layer in self.layers if isinstance(layer, ResamplerLayer))
        if isinstance(self.input_proj, FeedForward):
            total += self.input_proj.flops(batch, M)
        elif config.input_dim is not None:
            total += 2 * batch * M * config.input_dim * config.dim
        if config.output_dim is not None:
            total += 2 * batch * config.num_latents * config.dim * config.output_dim
        return total


_IP_ADAPTER: dict[str, Any] = {"depth": 4, "num_latents": 16, "input_dim": 1280, "latent_init": "scaled"}


def _table(length: int | None, dim: int, **where: Any) -> nn.Parameter | None:
    return None if length is None else nn.Parameter(torch.empty(length, dim, **where))
