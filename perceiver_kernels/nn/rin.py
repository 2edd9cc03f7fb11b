"""The block of a Recurrent Interface Network: latents read a tape of tokens, process, and write back to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.nn.blocks import CrossBlock, LatentBlock
from perceiver_kernels.nn.checks import check_count
from perceiver_kernels.nn.feed_forward import FeedForward
from perceiver_kernels.nn.output_attention import OutputCrossAttention


class RINBlock(nn.Module):
    """One round of reading, processing and writing back.

        z <- z + Attention(LN(z), x),   z <- z + FeedForward(LN(z))              read the tape
        z <- LatentBlock(z)                                                      ``num_layers`` times
        x <- x + Attention(LN(x), z),   x <- x + FeedForward(LN(x))              write to the tape

    Args:
        tape_dim: C, channels of the tape's tokens, at most 1024.
        latent_dim: D, channels of the latents.
        num_layers: latent blocks.
        tape_heads: heads of reading and writing, whose width is the smaller of C and D.
        latent_heads: heads of the latent blocks.
        tape_widening_factor: of the tape's feed-forward layer; 0: none after writing.
        latent_widening_factor: of the latents' feed-forward layers.
        norm_read: LayerNorm on the tape where it is read. The published models have none.
        norm_written: LayerNorm on the latents where they are read back. The published models have none.
        attention_dropout: of the latent blocks.
        hidden_dropout: of the latent blocks.
        drop_path: of the latent blocks.
        eps: of all LayerNorms.

    Source: RIN, arXiv 2212.11972, section 3.1; norms, widths and exact GELU as in google-research/pix2seq.
    """

    def __init__(
        self,
        tape_dim: int,
        latent_dim: int,
        num_layers: int,
        *,
        tape_heads: int = 16,
        latent_heads: int = 16,
        tape_widening_factor: int = 4,
        latent_widening_factor: int = 4,
        norm_read: bool = False,
        norm_written: bool = False,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("tape_dim", tape_dim)
        check_count("latent_dim", latent_dim)
        check_count("num_layers", num_layers, 0)
        check_count("tape_widening_factor", tape_widening_factor, 0)
        width = min(tape_dim, latent_dim)
        where: dict[str, Any] = {"eps": eps, "device": device, "dtype": dtype}
        self.read = CrossBlock(
            latent_dim, tape_dim, num_heads=tape_heads, qk_channels=width, widening_factor=latent_widening_factor,
            norm_inputs=norm_read, **where,
        )  # fmt: skip
        self.process = nn.ModuleList(
            LatentBlock(
                latent_dim, latent_heads, widening_factor=latent_widening_factor, attention_dropout=attention_dropout,
                hidden_dropout=hidden_dropout, drop_path=drop_path, **where,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        self.write = OutputCrossAttention(
            tape_dim, latent_dim, num_heads=tape_heads, qk_channels=width, norm_latents=norm_written, residual=True, **where
        )
        self.feed_forward = FeedForward(tape_dim, tape_widening_factor, **where) if tape_widening_factor else None

    def forward(self, tape: Tensor, latents: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One round.

        Args:
            tape: [B, M, C].
            latents: [B, N, D].
            key_mask: bool [B, M], True for tokens of the tape that the latents may read.

        Returns:
            the tape [B, M, C] and the latents [B, N, D].

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        latents = self.read(latents, tape, key_mask)
        for layer in self.process:
            latents = layer(latents)
        tape = self.write(tape, latents)
        return tape if self.feed_forward is None else self.feed_forward(tape), latents

    def flops(self, batch: int, N: int, M: int) -> int:
        """FLOPs of the matrix products of one forward, keys and values projected, a multiply and an add counted as two."""
        layers: Any = self.process
        total = self.read.flops(batch, N, M) + sum(layer.flops(batch, N) for layer in layers) + self.write.flops(batch, M, N)
        return total if self.feed_forward is None else total + self.feed_forward.flops(batch, M)
