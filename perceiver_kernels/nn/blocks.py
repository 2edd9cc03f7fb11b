"""Blocks of a Perceiver: an attention layer and the feed-forward layer that follows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.inputs import InputArray, PackedInputs
from perceiver_kernels.nn.attention import CrossAttention, Method, SelfAttention
from perceiver_kernels.nn.cache import KeyValueCache
from perceiver_kernels.nn.feed_forward import Activation, FeedForward
from perceiver_kernels.nn.norms import NormKind
from perceiver_kernels.nn.output_attention import OutputCrossAttention, PreparedLatents
from perceiver_kernels.nn.rotary import Rotary


class LatentBlock(nn.Module):
    """One layer of the latent transformer: self-attention and feed-forward, each pre-norm with a residual.

        y = x + SelfAttention(LN(x)),   out = y + FeedForward(LN(y))

    Args:
        dim: D, channels of the latents.
        num_heads: heads of the self-attention.
        qk_channels: width of queries and keys, all heads together, see ``SelfAttention``.
        v_channels: of the values, likewise.
        causal: see ``SelfAttention``.
        bias: see ``SelfAttention``; of the feed-forward too.
        norm: see ``SelfAttention``; of the feed-forward too.
        qk_norm: see ``SelfAttention``.
        qkv_bias: biases of the query, key and value projection, where they are not as ``bias`` says of the other layers.
        widening_factor: see ``FeedForward``.
        activation: see ``FeedForward``.
        attention_dropout: probability of dropping an attention weight, in training.
        out_dropout: dropout of the attention's result.
        dropout: dropout of the feed-forward's result.
        hidden_dropout: dropout of the feed-forward's hidden layer.
        drop_path: probability of dropping a batch entry's whole branch before a residual, in training.
        eps: of the norms.

    Source: Perceiver, arXiv 2103.03206, section 3.1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qk_channels: int | None = None,
        v_channels: int | None = None,
        causal: bool = False,
        bias: bool = True,
        qkv_bias: bool | None = None,
        norm: NormKind = "layer",
        qk_norm: NormKind | None = None,
        widening_factor: int = 1,
        activation: Activation = "gelu",
        attention_dropout: float = 0.0,
        out_dropout: float = 0.0,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"norm": norm, "drop_path": drop_path, "eps": eps, "device": device, "dtype": dtype}
        self.attention = SelfAttention(
            dim, num_heads, qk_channels=qk_channels, v_channels=v_channels, causal=causal,
            bias=bias if qkv_bias is None else qkv_bias, out_bias=bias, qk_norm=qk_norm, dropout=attention_dropout,
            out_dropout=out_dropout, **where,
        )  # fmt: skip
        self.feed_forward = FeedForward(
            dim, widening_factor, activation=activation, bias=bias, dropout=dropout, hidden_dropout=hidden_dropout, **where
        )

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        rotary: Rotary | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x [B, N, D], key_mask bool [B, N] -> [B, N, D]; see ``SelfAttention.forward``."""
        return self.feed_forward(self.attention(x, key_mask, rotary, cache))

    def flops(self, batch: int, N: int) -> int:
        """FLOPs of the matrix products of one forward."""
        return self.attention.flops(batch, N) + self.feed_forward.flops(batch, N)


class CrossBlock(nn.Module):
    """One cross-attend: latents read the inputs, then a feed-forward layer, each pre-norm with a residual.

        y = x + CrossAttention(LN(x), LN(inputs)),   out = y + FeedForward(LN(y))

    Args:
        latent_dim: D, channels of the latents.
        input_dim: C, channels of the inputs, content and positions together.
        num_heads: heads of the cross-attention.
        qk_channels: width of queries and keys, all heads together; ``input_dim`` when None, see ``CrossAttention``.
        v_channels: of the values, likewise.
        qkv_bias: biases of the query, key and value projections.
        widening_factor: see ``FeedForward``.
        activation: see ``FeedForward``.
        norm_inputs: LayerNorm on the inputs.
        residual: add the latents to what they read; the feed-forward always has its residual.
        attention_dropout: probability of dropping an attention weight, in training.
        out_dropout: dropout of the attention's result.
        dropout: dropout of the feed-forward's result.
        eps: of the LayerNorms.
        chunk_size: see ``CrossAttention``.
        method: see ``CrossAttention``.

    Source: Perceiver, arXiv 2103.03206, section 3.1.
    """

    def __init__(
        self,
        latent_dim: int,
        input_dim: int,
        *,
        num_heads: int = 1,
        qk_channels: int | None = None,
        v_channels: int | None = None,
        qkv_bias: bool = True,
        widening_factor: int = 1,
        activation: Activation = "gelu",
        norm_inputs: bool = True,
        residual: bool = True,
        attention_dropout: float = 0.0,
        out_dropout: float = 0.0,
        dropout: float = 0.0,
        eps: float = 1e-5,
        chunk_size: int | None = None,
        method: Method | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"eps": eps, "device": device, "dtype": dtype}
        self.attention = CrossAttention(
            latent_dim, input_dim, num_heads=num_heads, qk_channels=qk_channels, v_channels=v_channels, bias=qkv_bias,
            norm_inputs=norm_inputs, residual=residual, dropout=attention_dropout, out_dropout=out_dropout,
            chunk_size=chunk_size, method=method, **where,
        )  # fmt: skip
        self.feed_forward = FeedForward(latent_dim, widening_factor, activation=activation, dropout=dropout, **where)

    def forward(
        self,
        latents: Tensor,
        inputs: Tensor | InputArray | PackedInputs,
        key_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """latents [B or 1, N, D], inputs of [B, M, C] (see ``CrossAttention.forward``) -> [B, N, D]."""
        return self.feed_forward(self.attention(latents, inputs, key_mask, lengths))

    def flops(self, batch: int, N: int, M: int, *, latent_batch: int | None = None, method: Method = "projected") -> int:
        """FLOPs of the matrix products of one forward, see ``CrossAttention.flops``."""
        attention = self.attention.flops(batch, N, M, latent_batch=latent_batch, method=method)
        return attention + self.feed_forward.flops(batch, N)


class OutputBlock(nn.Module):
    """The decoder: output queries read the latents, then a feed-forward layer, each pre-norm.

        y = OutputCrossAttention(LN(queries), LN(latents))  (+ queries),   out = y + FeedForward(LN(y))

    Args:
        query_dim: C, channels of the queries and of the result.
        latent_dim: D, channels of the latents.
        num_heads: heads of the cross-attention.
        qk_channels: width of queries and keys, all heads together, see ``OutputCrossAttention``.
        v_channels: of the values, likewise.
        qkv_bias: biases of the query, key and value projections.
        residual: add the queries to what they read, see ``OutputCrossAttention``; the feed-forward always has its residual.
        feed_forward: False: there is none, and y is the result.
        widening_factor: see ``FeedForward``.
        activation: see ``FeedForward``.
        attention_dropout: probability of dropping an attention weight, in training.
        out_dropout: dropout of the attention's result.
        dropout: dropout of the feed-forward's result.
        eps: of the LayerNorms.
        method: see ``OutputCrossAttention``.

    Source: Perceiver IO, arXiv 2107.14795, section 3.2.
    """

    def __init__(
        self,
        query_dim: int,
        latent_dim: int,
        *,
        num_heads: int = 1,
        qk_channels: int | None = None,
        v_channels: int | None = None,
        qkv_bias: bool = True,
        residual: bool = False,
        feed_forward: bool = True,
        widening_factor: int = 1,
        activation: Activation = "gelu",
        attention_dropout: float = 0.0,
        out_dropout: float = 0.0,
        dropout: float = 0.0,
        eps: float = 1e-5,
        method: Method | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"eps": eps, "device": device, "dtype": dtype}
        self.attention = OutputCrossAttention(
            query_dim, latent_dim, num_heads=num_heads, qk_channels=qk_channels, v_channels=v_channels, bias=qkv_bias,
            residual=residual, dropout=attention_dropout, out_dropout=out_dropout, method=method, **where,
        )  # fmt: skip
        self.feed_forward = None
        if feed_forward:
            self.feed_forward = FeedForward(query_dim, widening_factor, activation=activation, dropout=dropout, **where)

    def forward(
        self,
        queries: Tensor | InputArray | PackedInputs,
        latents: Tensor | PreparedLatents,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """queries [B or 1, O, C], latents [B, N, D] -> [B, O, C]; see ``OutputCrossAttention.forward``.

        For queries in many calls ``attention.prepare`` makes the latents ready.
        """
        read = self.attention(queries, latents, key_mask, query_mask)
        return read if self.feed_forward is None else self.feed_forward(read)

    def flops(self, batch: int, O: int, N: int, *, query_batch: int | None = None, method: Method = "projected") -> int:
        """FLOPs of the matrix products of one forward, see ``OutputCrossAttention.flops``."""
        attention = self.attention.flops(batch, O, N, query_batch=query_batch, method=method)
        return attention + (0 if self.feed_forward is None else self.feed_forward.flops(batch, O))
