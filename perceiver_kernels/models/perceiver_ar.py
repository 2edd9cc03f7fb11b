"""Perceiver AR: the last tokens of a long sequence read all of it, transform themselves, and predict what follows each.

Source: General-purpose, long-context autoregressive modeling with Perceiver AR, arXiv 2202.07765.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.checks import check_indices, check_tensor
from perceiver_kernels.models import perceiver_ar_config as published
from perceiver_kernels.models.generation import generate
from perceiver_kernels.models.model import Model, changed
from perceiver_kernels.models.perceiver_ar_config import PerceiverARConfig
from perceiver_kernels.models.sequence_positions import SequencePositions, mask_of_padding
from perceiver_kernels.nn import FeedForward, JointAttention, KeyValueCache, LatentBlock, Linear, Rotary
from perceiver_kernels.nn.checkpointing import run_block
from perceiver_kernels.nn.checks import check_count
from perceiver_kernels.positions import rotary_tables


class PerceiverLayer(nn.Module):
    """The latents read a prefix and themselves, then a feed-forward layer; in training a share of the prefix is left out.

        y = x + JointAttention(x, kept prefix),   out = y + FeedForward(y)

    Args:
        config: see ``PerceiverARConfig``.

    Source: Perceiver AR, arXiv 2202.07765, section 3.
    """

    def __init__(self, config: PerceiverARConfig, **where: Any) -> None:
        super().__init__()
        self.prefix_dropout = config.prefix_dropout
        self.attention = JointAttention(
            config.dim, config.num_heads, head_dim=config.head_channels, causal=True, own_keys=config.own_keys,
            bias=config.bias, out_bias=config.cross_out_bias, dropout=config.cross_attention_dropout,
            out_dropout=config.dropout, eps=config.eps, **where,
        )  # fmt: skip
        self.feed_forward = FeedForward(
            config.dim, config.widening_factor, activation=config.activation, bias=config.bias, dropout=config.dropout,
            hidden_dropout=config.hidden_dropout, eps=config.eps, **where,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        rotary: Rotary | None = None,
        cache: KeyValueCache | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, D], context [B, M, D] -> [B, N, D]; see ``JointAttention.forward``.

        Args:
            kept: int64 [B, K], places in the context of the tokens that are read, in ascending order; None: all.
        """
        if kept is not None:
            rotary = None if rotary is None else _turned_at(rotary, kept, context.shape[1])
            context = context.gather(1, kept[..., None].expand(-1, -1, context.shape[-1]))
            context_mask = None if context_mask is None else context_mask.gather(1, kept)
        return self.feed_forward(self.attention(x, context, context_mask, rotary, cache))

    def flops(self, batch: int, N: int, M: int) -> int:
        """FLOPs of the matrix products of one forward with M tokens of context."""
        return self.attention.flops(batch, N, M) + self.feed_forward.flops(batch, N)

    def draw(self, batch: int, prefix_length: int, context_length: int, device: torch.device) -> Tensor | None:
        """Which tokens of the context are kept, from torch's generator: int64 [B, K], or None where all are.

        Of the prefix ``prefix_length - int(prefix_length * prefix_dropout)`` tokens are kept, and all that follow it.
        """
        count = int(prefix_length * self.prefix_dropout)
        if not self.training or count == 0:
            return None
        chance = torch.rand(batch, prefix_length, device=device)
        kept = chance.topk(prefix_length - count, dim=-1).indices.sort(-1).values
        rest = torch.arange(prefix_length, context_length, device=device)
        return torch.cat((kept, rest.expand(batch, -1)), 1)


class PerceiverAR(Model):
    """A causal model of sequences whose last tokens alone, the latents, pass all layers.

        e_t = E[token_t] + position_t,   prefix = e_0 .. e_(M - N - 1),   z = W e_(M - N) .. e_(M - 1)
        z <- PerceiverLayer(z, prefix), num_perceiver_layers times: latent i reads the prefix and the latents 0..i
        z <- LatentBlock(z), num_layers times: latent i reads the latents 0..i
        logits_i = W LN(z_i) + b, of the token after latent i

    Rotary positions turn queries and keys by their places in the whole sequence.

    Args:
        config: the sizes and switches, see ``PerceiverARConfig``.
        device: of the parameters.
        dtype: of the parameters.

    Source: arXiv 2202.07765, section 3. Padding is not masked by token 0 as in the authors' code; see ``prefix_mask``.
    """

    def __init__(
        self,
        config: PerceiverARConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        dim, where = config.dim, {"device": device, "dtype": dtype}
        keywords: dict[str, Any] = where
        self.token_embedding = nn.Embedding(config.vocab_size, dim, **keywords)
        self.positions = None
        if config.positions is not None:
            self.positions = SequencePositions(config.positions, config.max_length, dim, grid=config.grid, **keywords)
        self.latent_proj = Linear(dim, dim, **keywords) if config.latent_proj else None
        self.perceiver_layers = nn.ModuleList(PerceiverLayer(config, **where) for _ in range(config.num_perceiver_layers))
        width = config.num_heads * config.head_channels
        self.latent_blocks = nn.ModuleList(
            LatentBlock(
                dim, config.num_heads, qk_channels=width, causal=True, bias=config.bias, widening_factor=config.widening_factor,
                activation=config.activation, attention_dropout=config.attention_dropout, out_dropout=config.dropout,
                dropout=config.dropout, hidden_dropout=config.hidden_dropout, eps=config.eps, **keywords,
            )
            for _ in range(config.num_layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim, config.eps, **keywords) if config.final_norm else None
        self.head = None if config.tied_logits else Linear(dim, config.vocab_size, config.logits_bias, **keywords)
        tied_bias = config.tied_logits and config.logits_bias
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size, **keywords)) if tied_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start embeddings, positions, logits and what ``init_std`` is for, after the layers' own methods."""
        tables = [self.token_embedding.weight, *(() if self.positions is None else self.positions.parameters())]
        std = self.config.init_std
        for table in tables:
            if std is None:
                nn.init.trunc_normal_(table, a=-2.0, b=2.0)
            else:
                nn.init.normal_(table, std=std)
        if std is not None:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=std)
        elif self.head is not None:
            nn.init.zeros_(self.head.weight)
        if self.head_bias is not None:
            nn.init.zeros_(self.head_bias)

    # A method, in a file of its own.
    generate = generate

    def forward(
        self, tokens: Tensor, prefix_length: int | None = None, prefix_mask: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits of the tokens that follow the latents' tokens.

        Args:
            tokens: int64 or int32 [B, M], M at most ``max_length``.
            prefix_length: tokens before the latents, of which there are 1 to ``num_latents``; None: all but the last
                ``num_latents``.
            prefix_mask: bool [B, prefix_length], True where a token of the prefix may be read.
            padding: int64 [B], how many tokens before the first of each sequence are none, at most ``prefix_length``: they
                are not read, and positions count from after them. Excludes ``prefix_mask``.

        Returns:
            [B, M - prefix_length, vocab_size].

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        return self.logits(self.encode(tokens, prefix_length, prefix_mask, padding))

    def encode(
        self, tokens: Tensor, prefix_length: int | None = None, prefix_mask: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The latents [B, N, D] after all layers; arguments as ``forward``."""
        prefix_length = self.check_tokens("tokens", tokens, prefix_length)
        B = tokens.shape[0]
        if prefix_mask is not None:
            check_tensor("prefix_mask", prefix_mask, "[B, prefix_length]", (B, prefix_length), dtypes=(torch.bool,))
        if padding is not None:
            if prefix_mask is not None:
                raise ValueError("padding and prefix_mask exclude each other: give one of them")
            prefix_mask = mask_of_padding(padding, B, prefix_length)
        return self.extend(tokens, 0, prefix_length, prefix_mask, padding=padding)

    def logits(self, latents: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, vocab_size]."""
        normed = latents if self.norm is None else self.norm(latents)
        return F.linear(normed, self.token_embedding.weight, self.head_bias) if self.head is None else self.head(normed)

    def extend(
        self, tokens: Tensor, start: int, prefix_length: int, prefix_mask: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None, padding: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The latents of tokens start, start + 1, .. of a sequence.

        Args:
            tokens: int64 or int32 [B, M].
            start: tokens before these; they must be in ``caches``.
            prefix_length: how many of these tokens are prefix, the first ones.
            prefix_mask: as in ``forward``; not beside caches.
            caches: those of ``new_caches``, to which the tokens are appended.
            padding: as in ``forward``, hidden by ``prefix_mask``; rotary positions, which are relative, need not know it.

        Returns:
            [B, M - prefix_length, D], after all layers.
        """
        embedded = self.token_embedding(tokens)
        B, M, _ = embedded.shape
        if self.positions is not None:
            embedded = embedded + self.positions(start, start + M, embedded, padding)
        latents = embedded[:, prefix_length:]
        context, context_mask = embedded[:, :prefix_length], prefix_mask
        if not self.config.own_keys:
            context = embedded
            if prefix_mask is not None:
                context_mask = torch.cat((prefix_mask, prefix_mask.new_ones(B, M - prefix_length)), 1)
        if self.latent_proj is not None:
            latents = self.latent_proj(latents)
        rotary = self._rotary(start, start + M, tokens.device)
        own = None if rotary is None else Rotary(rotary.cos[prefix_length:], rotary.sin[prefix_length:], rotary.interleaved)
        turned = self.config.num_layers if self.config.num_rotary_layers is None else self.config.num_rotary_layers
        cache = iter((None,) * (self.config.num_perceiver_layers + self.config.num_layers) if caches is None else caches)
        # A second run would append the same tokens again.
        run = functools.partial(run_block, checkpointing=self.config.activation_checkpointing and caches is None)
        layers: list[Any] = list(self.perceiver_layers)
        for layer in layers:
            kept = layer.draw(B, prefix_length, context.shape[1], tokens.device)
            latents = run(layer, latents, context, context_mask, rotary, next(cache), kept)
        for index, block in enumerate(self.latent_blocks):
            latents = run(block, latents, None, own if index < turned else None, next(cache))
        return latents

    def _rotary(self, start: int, stop: int, device: torch.device) -> Rotary | None:
        """The angles of the tokens start..stop."""
        config = self.config
        width = config.rotary_channels
        if width == 0:
            return None
        place = torch.arange(start, stop, device=device)
        if config.rotary_base is None:
            tables = rotary_tables(place, width, periods=(2 * math.pi, 2 * math.pi * config.max_length))
        else:
            tables = rotary_tables(place, width, base=config.rotary_base)
        return Rotary(*tables, interleaved=config.rotary_interleaved)

    def new_caches(self, length: int | None = None) -> list[KeyValueCache]:
        """Empty caches for ``extend``: of the perceiver layers, then of the latent blocks.

        Args:
            length: most tokens they will hold; None: ``max_length``.
        """
        config = self.config
        capacities = [config.max_length] * config.num_perceiver_layers + [config.num_latents] * config.num_layers
        return [KeyValueCache(capacity if length is None else min(capacity, length)) for capacity in capacities]

    def check_tokens(self, name: str, tokens: Tensor, prefix_length: int | None) -> int:
        """Raise unless ``tokens`` fit; the length of their prefix, the default one where it is None."""
        check_tensor(name, tokens, "[B, M]", (None, None), dtypes=(torch.int64, torch.int32))
        config, shape = self.config, tuple(tokens.shape)
        M, N = shape[1], config.num_latents
        if not 1 <= M <= config.max_length:
            raise ValueError(f"{name} must be [B, M] with M from 1 to max_length={config.max_length}, got {shape}")
        if tokens.device != self.token_embedding.weight.device:
            raise ValueError(f"{name} must be on {self.token_embedding.weight.device} as the model, got {tokens.device}")
        check_indices(name, tokens, "vocab_size-1", config.vocab_size)
        if prefix_length is None:
            return max(M - N, 0)
        check_count("prefix_length", prefix_length, 0)
        if not 1 <= M - prefix_length <= N:
            raise ValueError(f"prefix_length must leave 1 to num_latents={N} of M={M} tokens, got {prefix_length}")
        return prefix_length

    def flops(self, batch: int, M: int, N: int | None = None) -> int:
        """FLOPs of one forward over ``batch`` sequences of M tokens, the last N of them latents (``num_latents`` when None).

        Matrix products only, a multiply and an add counted as two; all keys are counted, those that causal queries do not
        see too. Embeddings are looked up and count nothing.
        """
        config = self.config
        N = min(M, config.num_latents) if N is None else N
        context = M - N if config.own_keys else M
        layers: list[Any] = list(self.perceiver_layers)
        blocks: list[Any] = list(self.latent_blocks)
        total = 2 * batch * N * config.dim * (config.vocab_size + (config.dim if config.latent_proj else 0))
        total += sum(layer.flops(batch, N, context) for layer in layers)
        return total + sum(block.flops(batch, N) for block in blocks)

    @classmethod
    def _published(cls, sizes: dict[str, Any], changes: dict[str, Any], **where: Any) -> PerceiverAR:
        return cls(changed(PerceiverARConfig, sizes, changes), **where)

    @classmethod
    def paper(
        cls, vocab_size: int, max_length: int, num_latents: int = 1024, *, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, **changes: Any,
    ) -> PerceiverAR:  # fmt: skip
        """The authors' default model: 1024 channels, 16 heads, 12 layers, rotary positions on half of the channels.

        Source: google-research/perceiver-ar, experiment.py, get_config.
        """
        sizes = {"vocab_size": vocab_size, "max_length": max_length, "num_latents": num_latents}
        return cls._published(sizes, changes, device=device, dtype=dtype)

    @classmethod
    def copy_task(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> PerceiverAR:  # fmt: skip
        """The model that copies 131,072 tokens: 1024 latents, 6 layers, sinusoidal positions, 256 bytes and 3 more tokens.

        Source: arXiv 2202.07765, section 5.1; google-research/perceiver-ar, random_mirrored_131072.
        """
        return cls._published(published.COPY_TASK, changes, device=device, dtype=dtype)

    @classmethod
    def imagenet64(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> PerceiverAR:  # fmt: skip
        """The ImageNet 64 x 64 model: 12,289 tokens, 1024 latents, 60 layers, learned positions for row, column and channel.

        Tokens: one that starts the image, then its bytes in the order row, column, channel, 3 added to each. The authors
        fill sequences up to 12,416 and mask what they added.

        Source: arXiv 2202.07765, section 5.2; google-research/perceiver-ar, imagenet_w_positions.
        """
        return cls._published(published.IMAGENET64, changes, device=device, dtype=dtype)

    @classmethod
    def perceiver_ar_pytorch(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> PerceiverAR:  # fmt: skip
        """The model of lucidrains/perceiver-ar-pytorch with the sizes of its README: 4,096 tokens, a prefix of 3,072.

        Its arguments are here: max_seq_len ``max_length``, cross_attn_seq_len ``max_length - num_latents``, dim_head
        ``head_dim``, ``rotary_width=max(32, head_dim // 2)``, depth ``num_layers``, perceive_depth ``num_perceiver_layers``,
        cross_attn_dropout ``prefix_dropout``, dropout ``cross_attention_dropout`` and ``hidden_dropout``. Its prefix has
        cross_attn_seq_len tokens in shorter sequences too, which ``prefix_length`` says here.
        """
        return cls._published(published.PERCEIVER_AR_PYTORCH, changes, device=device, dtype=dtype)

    @classmethod
    def clm_small(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> PerceiverAR:  # fmt: skip
        """The small language model of krasserm/perceiver-io: 4,096 bytes, 512 latents of 512 channels, 8 layers, 30.6M.

        Source: docs/training-examples.md there, causal language modeling, model 1.
        """
        return cls._published(published.CLM_SMALL, changes, device=device, dtype=dtype)

    @classmethod
    def clm_base(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> PerceiverAR:  # fmt: skip
        """The language model of krasserm/perceiver-io for C4: 1,024 tokens, 512 latents of 1,280 channels, 20 layers, 454M.

        Source: docs/training-examples.md there, causal language modeling, model 2.
        """
        return cls._published(published.CLM_BASE, changes, device=device, dtype=dtype)

    @classmethod
    def giantmidi(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> PerceiverAR:  # fmt: skip
        """The music model of krasserm/perceiver-io: 6,144 events, 2,048 latents of 768 channels, 18 layers.

        Source: docs/training-examples.md there, symbolic audio modeling, GiantMIDI-Piano.
        """
        return cls._published(published.GIANTMIDI, changes, device=device, dtype=dtype)


def _turned_at(rotary: Rotary, kept: Tensor, context_length: int) -> Rotary:
    """The angles of the kept tokens of the context and of all that follow it, for every batch entry."""
    rest = torch.arange(context_length, rotary.length, device=kept.device)
    places = torch.cat((kept, rest.expand(kept.shape[0], -1)), 1)
    return Rotary(rotary.cos[places], rotary.sin[places], rotary.interleaved)
