"""The Linformer: a transformer encoder whose attention costs a constant number of keys per token.

Source: Linformer: Self-Attention with Linear Complexity, arXiv 2006.04768, built as lucidrains/linformer builds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.checks import check_indices, check_tensor
from perceiver_kernels.models.model import Model
from perceiver_kernels.nn.checkpointing import run_block
from perceiver_kernels.nn.checks import check_count, check_flag, check_widths
from perceiver_kernels.nn.feed_forward import FeedForward
from perceiver_kernels.nn.linformer import LinformerAttention
from perceiver_kernels.problem import check_eps, check_key_visibility, check_probability


@dataclass(frozen=True, kw_only=True)
class LinformerConfig:
    """Sizes of a Linformer; the defaults are those of lucidrains/linformer where it has any.

    Args:
        length: tokens of the longest sequence.
        depth: layers of attention and feed-forward.
        dim: D, channels of the sequence.
        num_keys: k, keys that every token reads.
        num_heads: H.
        head_dim: d; ``dim / num_heads`` when None.
        one_kv_head: all heads share one head of keys and values.
        share_kv: values are the keys.
        dropout: of the attention weights and of the feed-forward's hidden layer.
        eps: of the LayerNorms.
        activation_checkpointing: in training, keep only the input of every layer and compute it again for its gradient.

    Source: arXiv 2006.04768, section 5.
    """

    length: int
    depth: int
    dim: int = 512
    num_keys: int = 256
    num_heads: int = 8
    head_dim: int | None = None
    one_kv_head: bool = False
    share_kv: bool = False
    dropout: float = 0.0
    eps: float = 1e-5
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "dim", "num_keys", "num_heads"):
            check_count(name, getattr(self, name))
        check_count("depth", self.depth, 0)
        if self.head_dim is None:
            check_widths(self.num_heads, dim=self.dim)
        else:
            check_count("head_dim", self.head_dim)
        for name in ("one_kv_head", "share_kv", "activation_checkpointing"):
            check_flag(name, getattr(self, name))
        check_probability("dropout", self.dropout)
        check_eps(self.eps)


class Linformer(Model):
    """A sequence in, a sequence out, at a cost proportional to its length.

        x <- x + LinformerAttention(LN(x))
        x <- x + FeedForward(LN(x))              GELU, four times as wide; ``depth`` times both

    Args:
        config: the sizes, see ``LinformerConfig``.
        device: of the parameters.
        dtype: of the parameters.

    Source: arXiv 2006.04768, section 4, pre-norm and with linear layers that start as torch's do, as in lucidrains/linformer.
    """

    def __init__(
        self,
        config: LinformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        where: dict[str, Any] = {"eps": config.eps, "device": device, "dtype": dtype}
        self.layers = nn.ModuleList()
        for _ in range(config.depth):
            attention = LinformerAttention(
                config.dim, config.length, config.num_keys, config.num_heads, head_dim=config.head_dim,
                one_kv_head=config.one_kv_head, share_kv=config.share_kv, dropout=config.dropout, **where,
            )  # fmt: skip
            feed_forward = FeedForward(config.dim, 4, hidden_dropout=config.dropout, **where)
            self.layers.append(LinformerLayer(attention, feed_forward))

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Transform sequences.

        Args:
            x: [B, N, D], N at most ``length``.
            key_mask: bool [B, N], False for tokens that no other is to read of: what they hold is never used.

        Returns:
            [B, N, D].

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        if key_mask is not None:
            check_key_visibility(key_mask, None, x.shape[0], x.shape[1], x.device)
            # Hidden tokens are queries too: their rows stay finite, or weights would get gradients of 0 * NaN.
            x = torch.where(key_mask[..., None], x, 0.0)
        for layer in self.layers:
            x = run_block(layer, x, key_mask, checkpointing=self.config.activation_checkpointing)
        return x


class LinformerLayer(nn.Module):
    """Attention, then feed-forward, each with its norm and residual."""

    def __init__(self, attention: LinformerAttention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the feed-forward's linear layers as torch does, after their own methods."""
        for linear in (self.feed_forward.up_proj, self.feed_forward.down_proj):
            nn.Linear.reset_parameters(linear)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x [B, N, D], key_mask bool [B, N] -> [B, N, D]."""
        return self.feed_forward(self.attention(x, key_mask=key_mask))


@dataclass(frozen=True, kw_only=True)
class LinformerLMConfig(LinformerConfig):
    """Sizes of a Linformer over tokens.

    Args:
        vocab_size: V, number of different tokens.

    The other fields are those of ``LinformerConfig``.
    """

    vocab_size: int

    def __post_init__(self) -> None:
        check_count("vocab_size", self.vocab_size)
        super().__post_init__()


class LinformerLM(Model):
    """Logits of every place of a token sequence; each sees the whole sequence.

        x_i = E[token_i] + P[i]
        logits = W Linformer(x) + b

    Args:
        config: the sizes, see ``LinformerLMConfig``.
        device: of the parameters.
        dtype: of the parameters.

    Source: as ``Linformer``; embeddings start standard normal.
    """

    def __init__(
        self,
        config: LinformerLMConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim, **where)
        self.position_embedding = nn.Embedding(config.length, config.dim, **where)
        self.linformer = Linformer(config, **where)
        self.head = nn.Linear(config.dim, config.vocab_size, **where)

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Read token sequences.

        Args:
            tokens: int64 or int32 [B, N], N at most ``length``.
            key_mask: bool [B, N], False for tokens that no other is to read of (padding).

        Returns:
            logits [B, N, V].

        Raises:
            TypeError, ValueError: a wrong type, shape or dtype, named.
        """
        check_tensor("tokens", tokens, "[B, N]", (None, None), dtypes=(torch.int64, torch.int32))
        if tokens.shape[1] > self.config.length:
            raise ValueError(f"tokens must have at most length={self.config.length} places, got {tokens.shape[1]}")
        check_indices("tokens", tokens, "vocab_size-1", self.config.vocab_size)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(places)
        return self.head(self.linformer(x, key_mask))
