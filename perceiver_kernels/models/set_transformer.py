"""The Set Transformer: a set encoded by attention, pooled by a few seeds, in any order of its elements.

Source: Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks, arXiv 1810.00825.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.functional.cross_attention import check_reading
from perceiver_kernels.models.model import Model, changed
from perceiver_kernels.nn.attention import Method
from perceiver_kernels.nn.called import parameter_of
from perceiver_kernels.nn.checkpointing import run_block
from perceiver_kernels.nn.checks import check_count, check_flag, check_input_dim, check_sequence, check_widths
from perceiver_kernels.nn.set_blocks import ISAB, PMA, SAB
from perceiver_kernels.problem import check_eps, check_key_visibility, check_probability


@dataclass(frozen=True)
class SetTransformerConfig:
    """Sizes of a Set Transformer.

    Args:
        input_dim: C, channels of an element, at most 1024.
        output_dim: channels of each output.
        num_outputs: k, seeds of the pooling.
        dim: D, width of every block, at most 1024.
        num_heads: H.
        num_inducing: m, inducing points of each encoder block; None makes the encoder's blocks SABs.
        encoder_blocks: ISABs (or SABs) before pooling.
        decoder_blocks: SABs among the k outputs.
        post_norm: LayerNorms after the residuals of every block.
        pooling_feed_forward: the paper's row-wise layer before pooling, which the authors' code lacks.
        pooling_dropout: probability of dropping a channel before and after pooling, in training.
        eps: of the LayerNorms.
        method: "absorbed" or "projected" attention, None to let the planner choose.
        activation_checkpointing: in training, keep only the inputs of every block and compute it again for its gradient.

    Source: arXiv 1810.00825, section 3, with the defaults of the authors' code.
    """

    input_dim: int
    output_dim: int
    num_outputs: int = 1
    dim: int = 128
    num_heads: int = 4
    num_inducing: int | None = 32
    encoder_blocks: int = 2
    decoder_blocks: int = 2
    post_norm: bool = False
    pooling_feed_forward: bool = False
    pooling_dropout: float = 0.0
    eps: float = 1e-5
    method: Method | None = None
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_input_dim(self.input_dim)
        for name in ("output_dim", "num_outputs", "encoder_blocks"):
            check_count(name, getattr(self, name))
        check_count("decoder_blocks", self.decoder_blocks, 0)
        check_widths(self.num_heads, dim=self.dim)
        if self.num_inducing is not None:
            check_count("num_inducing", self.num_inducing)
        for name in ("post_norm", "pooling_feed_forward", "activation_checkpointing"):
            check_flag(name, getattr(self, name))
        check_probability("pooling_dropout", self.pooling_dropout)
        check_eps(self.eps)
        check_reading(None, self.method)


class SetTransformer(Model):
    """A set in, k outputs out, whatever the order of the set's elements.

        x <- ISAB(x)                     ``encoder_blocks`` times; SAB without inducing points
        z = PMA(x)                       k seeds read the set
        z <- SAB(z)                      ``decoder_blocks`` times
        out = W z + b

    Args:
        config: the sizes, see ``SetTransformerConfig``.
        device: of the parameters.
        dtype: of the parameters.

    Source: arXiv 1810.00825, equations 13 and 14. Linear layers start as torch's do. Masks are ours.
    """

    def __init__(
        self,
        config: SetTransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"post_norm": config.post_norm, "eps": config.eps, "method": config.method, **where}
        widths = [config.input_dim] + [config.dim] * (config.encoder_blocks - 1)
        self.encoder = nn.ModuleList(
            SAB(width, config.dim, config.num_heads, **options)
            if config.num_inducing is None
            else ISAB(width, config.dim, config.num_inducing, config.num_heads, **options)
            for width in widths
        )
        self.pooling = PMA(
            config.dim, config.num_outputs, config.num_heads, feed_forward=config.pooling_feed_forward, **options
        )
        self.decoder = nn.ModuleList(
            SAB(config.dim, config.dim, config.num_heads, **options) for _ in range(config.decoder_blocks)
        )
        self.head = nn.Linear(config.dim, config.output_dim, **where)

    @classmethod
    def mixture_of_gaussians(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> SetTransformer:  # fmt: skip
        """The amortised clustering model: 300 to 600 points of the plane, 4 clusters with 4 parameters each.

        2 ISABs of 32 inducing points, 4 seeds, 2 SABs, width 128, 4 heads of 32.

        Args:
            changes: other values for fields of ``SetTransformerConfig``.

        Source: arXiv 1810.00825, section 5.3; sizes as in the authors' code.
        """
        published: dict[str, Any] = {"input_dim": 2, "output_dim": 4, "num_outputs": 4}
        return cls(changed(SetTransformerConfig, published, changes), device=device, dtype=dtype)

    @classmethod
    def modelnet40(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> SetTransformer:  # fmt: skip
        """The point cloud classifier, one model for 100, 1,000 and 5,000 points: 40 logits.

        2 ISABs of 16 inducing points and one seed, width 256, 4 heads of 64, dropout 0.5 around the pooling. The authors'
        model returns [B, 40], this one [B, 1, 40].

        Source: arXiv 1810.00825, section 5.5; sizes as in the authors' code.
        """
        published: dict[str, Any] = {
            "input_dim": 3, "output_dim": 40, "dim": 256, "num_inducing": 16, "decoder_blocks": 0, "pooling_dropout": 0.5,
        }  # fmt: skip
        return cls(changed(SetTransformerConfig, published, changes), device=device, dtype=dtype)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Outputs of every set of the batch.

        Args:
            x: [B, M, C].
            key_mask: bool [B, M], True where there is an element. What hidden elements hold is never used.

        Returns:
            [B, k, output_dim].

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        config = self.config
        dropped = F.dropout(self.encode(x, key_mask), config.pooling_dropout, self.training)
        pooled = run_block(self.pooling, dropped, key_mask, checkpointing=config.activation_checkpointing)
        pooled = F.dropout(pooled, config.pooling_dropout, self.training)
        for block in self.decoder:
            pooled = run_block(block, pooled, checkpointing=config.activation_checkpointing)
        return self.head(pooled)

    def encode(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """The elements [B, M, D] after the encoder; arguments as ``forward``. Rows of hidden elements mean nothing."""
        check_sequence("x", x, "B, M, C", self.config.input_dim, parameter_of(self.head))
        if key_mask is not None:
            check_key_visibility(key_mask, None, x.shape[0], x.shape[1], x.device)
            # Hidden elements are queries too: their rows stay finite, or weights would get gradients of 0 * NaN.
            x = torch.where(key_mask[..., None], x, 0.0)
        for block in self.encoder:
            x = run_block(block, x, key_mask, checkpointing=self.config.activation_checkpointing)
        return x
