"""Blocks of a Perceiver: an attention layer and the feed-forward layer that follows it."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.inputs import InputArray, PackedInputs
from perceiver_kernels.nn.attention import CrossAttention, Linear, Method, SelfAttention
from perceiver_kernels.nn.checks import check_count, check_sequence
from perceiver_kernels.problem import check_eps, check_probability

GELU = Literal["exact", "tanh"]


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, applied to every token.

        out = W_2 gelu(W_1 LN(x) + b_1) + b_2  (+ x, when ``residual``)

    Args:
        dim: D, channels of the sequence.
        widening_factor: the hidden layer has ``widening_factor * dim`` channels.
        gelu: "exact" (x Phi(x), as transformers computes it) or "tanh" (its approximation, as DeepMind's code does).
        dropout: probability of dropping a channel of the result before the residual, in training.
        norm: LayerNorm on the sequence.
        residual: add the sequence, as it came in, to the result.
        eps: of the LayerNorm.

    Source: Perceiver, arXiv 2103.03206, section 3.1; its models have widening factor 1.
    """

    def __init__(
        self,
        dim: int,
        widening_factor: int = 1,
        *,
        gelu: GELU = "exact",
        dropout: float = 0.0,
        norm: bool = True,
        residual: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("widening_factor", widening_factor)
        if gelu not in ("exact", "tanh"):
            raise ValueError(f'gelu must be "exact" or "tanh", got {gelu!r}')
        check_probability("dropout", dropout)
        check_eps(eps)
        self.dim, self.hidden_dim = dim, widening_factor * dim
        self.gelu, self.dropout, self.residual = gelu, dropout, residual
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, eps, **where) if norm else None
        self.up_proj = Linear(dim, self.hidden_dim, **where)
        self.down_proj = Linear(self.hidden_dim, dim, **where)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        check_sequence("x", x, "B, N, D", self.dim, self.up_proj.weight)
        hidden = self.up_proj(x if self.norm is None else self.norm(x))
        out = self.down_proj(F.gelu(hidden, approximate="none" if self.gelu == "exact" else "tanh"))
        if self.dropout:
            out = F.dropout(out, self.dropout, self.training)
        return x + out if self.residual else out

    def flops(self, batch: int, N: int) -> int:
        """FLOPs of the matrix products of one forward: 4BN D D_hidden."""
        return 4 * batch * N * self.dim * self.hidden_dim

    def extra_repr(self) -> str:
        return f"gelu={self.gelu}, dropout={self.dropout}, residual={self.residual}"


class LatentBlock(nn.Module):
    """One layer of the latent transformer: self-attention and feed-forward, each pre-norm with a residual.

        y = x + SelfAttention(LN(x)),   out = y + FeedForward(LN(y))

    Args:
        dim: D, channels of the latents.
        num_heads: heads of the self-attention.
        qk_channels, v_channels: widths of all heads together, see ``SelfAttention``.
        widening_factor, gelu: see ``FeedForward``.
        attention_dropout: probability of dropping an attention weight, in training.
        dropout: dropout of the feed-forward's result.
        eps: of the LayerNorms.

    Source: Perceiver, arXiv 2103.03206, section 3.1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qk_channels: int | None = None,
        v_channels: int | None = None,
        widening_factor: int = 1,
        gelu: GELU = "exact",
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"eps": eps, "device": device, "dtype": dtype}
        self.attention = SelfAttention(
            dim, num_heads, qk_channels=qk_channels, v_channels=v_channels, dropout=attention_dropout, **where
        )
        self.feed_forward = FeedForward(dim, widening_factor, gelu=gelu, dropout=dropout, **where)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x [B, N, D], key_mask bool [B, N] -> [B, N, D]."""
        return self.feed_forward(self.attention(x, key_mask))

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
        qk_channels, v_channels: widths of all heads together; ``input_dim`` when None, see ``CrossAttention``.
        widening_factor, gelu: see ``FeedForward``.
        residual: add the latents to what they read; the feed-forward always has its residual.
        attention_dropout: probability of dropping an attention weight, in training.
        dropout: dropout of the feed-forward's result.
        eps: of the LayerNorms.
        chunk_size, method: see ``CrossAttention``.

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
        widening_factor: int = 1,
        gelu: GELU = "exact",
        residual: bool = True,
        attention_dropout: float = 0.0,
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
            latent_dim, input_dim, num_heads=num_heads, qk_channels=qk_channels, v_channels=v_channels,
            residual=residual, dropout=attention_dropout, chunk_size=chunk_size, method=method, **where,
        )  # fmt: skip
        self.feed_forward = FeedForward(latent_dim, widening_factor, gelu=gelu, dropout=dropout, **where)

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
