"""Blocks of the Set Transformer: attention between sets, within a set, through inducing points, and pooling.

Unlike the Perceiver's layers they have no norm before attention, their residual is the projected query, and their scores are
divided by the root of the full width rather than of a head's.

Source: Set Transformer, arXiv 1810.00825, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels import functional
from perceiver_kernels.functional.cross_attention import Method, as_source, check_reading
from perceiver_kernels.functional.heads import merge_heads, split_heads
from perceiver_kernels.nn.called import is_plain, normed_tokens, parameter_of
from perceiver_kernels.nn.checks import check_batch, check_count, check_flag, check_input_dim, check_sequence, check_widths
from perceiver_kernels.nn.feed_forward import FeedForward
from perceiver_kernels.problem import check_eps


class MAB(nn.Module):
    """Multihead attention block: a set of queries reads a set of inputs.

        q = W_q y + b_q,   k = W_k x + b_k,   v = W_v x + b_v
        h = norm(q + softmax(q k^T / sqrt(D)) v)
        out = norm(h + relu(W_o h + b_o))

    Keys and values are not computed where it is cheaper not to, as in ``CrossAttention``.

    Args:
        query_dim: channels of the queries.
        input_dim: channels of the inputs, at most 1024.
        dim: D, width of all heads together and of the result.
        num_heads: H, a divisor of D.
        post_norm: the two LayerNorms, after both residuals.
        eps: of the LayerNorms.
        method: "absorbed" or "projected"; None lets the planner compare their predicted times.

    Source: arXiv 1810.00825, equations 6 and 7, with the residual of the projected query, the scale 1/sqrt(D) and the start
    of torch's linear layers as in the authors' code. Masks are ours.
    """

    def __init__(
        self,
        query_dim: int,
        input_dim: int,
        dim: int,
        num_heads: int = 4,
        *,
        post_norm: bool = False,
        eps: float = 1e-5,
        method: Method | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("query_dim", query_dim)
        check_input_dim(input_dim)
        check_widths(num_heads, dim=dim)
        check_flag("post_norm", post_norm)
        check_eps(eps)
        check_reading(None, method)
        self.query_dim, self.input_dim, self.dim, self.num_heads, self.method = query_dim, input_dim, dim, num_heads, method
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(query_dim, dim, **where)
        self.k_proj = nn.Linear(input_dim, dim, **where)
        self.v_proj = nn.Linear(input_dim, dim, **where)
        self.norm_attention = nn.LayerNorm(dim, eps, **where) if post_norm else None
        self.out_proj = nn.Linear(dim, dim, **where)
        self.norm_out = nn.LayerNorm(dim, eps, **where) if post_norm else None

    def forward(self, queries: Tensor, inputs: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Read ``inputs`` at ``queries``.

        Args:
            queries: [B, N, query_dim], or batch 1 to share one set over the batch (it is then projected once).
            inputs: [B, M, input_dim].
            key_mask: bool [B, M], True where an element may be read. A query that may read none keeps only itself.

        Returns:
            [B, N, D].

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        check_sequence("queries", queries, "B, N, C", self.query_dim, parameter_of(self.q_proj))
        check_sequence("inputs", inputs, "B, M, C", self.input_dim, parameter_of(self.q_proj))
        check_batch("queries", "B, N, C", queries.shape[0], inputs.shape[0])
        query = self.q_proj(queries)
        hidden = query + merge_heads(self._attended(split_heads(query, self.num_heads), inputs, key_mask))
        hidden = hidden if self.norm_attention is None else self.norm_attention(hidden)
        out = hidden + F.relu(self.out_proj(hidden))
        return out if self.norm_out is None else self.norm_out(out)

    def _attended(self, query: Tensor, inputs: Tensor, key_mask: Tensor | None) -> Tensor:
        """[B or 1, H, N, D / H], [B, M, C] -> [B, H, N, D / H]; keys and values are called for where they have to be."""
        scale = self.dim**-0.5
        if is_plain(self.k_proj, self.v_proj):
            return functional.input_cross_attention(
                query, inputs, self.k_proj.weight, self.v_proj.weight, b_k=self.k_proj.bias, b_v=self.v_proj.bias,
                normalize=False, scale=scale, key_mask=key_mask, method=self.method,
            )  # fmt: skip
        source = as_source(inputs, key_mask, None)
        rows = normed_tokens("inputs", source, None, source.key_mask, parameter_of(self.q_proj))
        key, value = (split_heads(project(rows), self.num_heads) for project in (self.k_proj, self.v_proj))
        query = query.expand(inputs.shape[0], -1, -1, -1)
        return functional.attention(query, key, value, key_mask=key_mask, scale=scale)

    def flops(self, batch: int, N: int, M: int, *, query_batch: int | None = None, method: Method = "projected") -> int:
        """FLOPs of the matrix products of one forward, a multiply and an add counted as two.

        projected: 4BMCD + 4BNMD
        absorbed:  4BNCD + 4BHNMC
        both:      + 2bN C_q D + 2BND^2,      b = ``query_batch`` (the batch when None)
        """
        C, D, b = self.input_dim, self.dim, batch if query_batch is None else query_batch
        total = 2 * b * N * self.query_dim * D + 2 * batch * N * D * D
        if method == "projected":
            return total + 4 * batch * M * C * D + 4 * batch * N * M * D
        return total + 2 * (b + batch) * N * C * D + 4 * batch * self.num_heads * N * M * C

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, post_norm={self.norm_out is not None}"


class SAB(nn.Module):
    """Set attention block: every element of a set reads the set.

        out = MAB(x, x)

    Args:
        input_dim: C, channels of the elements, at most 1024.
        dim: D, channels of the result.
        num_heads: see ``MAB``.
        **options: see ``MAB``.

    Source: arXiv 1810.00825, equation 8.
    """

    def __init__(self, input_dim: int, dim: int, num_heads: int = 4, **options: Any) -> None:
        super().__init__()
        self.attention = MAB(input_dim, input_dim, dim, num_heads, **options)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x [B, M, C], key_mask bool [B, M] -> [B, M, D]; rows of hidden elements follow from what these hold.

        In training that must be finite, or weights would get gradients of 0 * NaN.
        """
        return self.attention(x, x, key_mask)


class ISAB(nn.Module):
    """Induced set attention block: a set reads itself through m inducing points, at a cost proportional to its size.

        h = MAB(I, x)          [B, m, D], I learned
        out = MAB(x, h)

    Args:
        input_dim: C, channels of the elements, at most 1024.
        dim: D, channels of the result.
        num_inducing: m.
        num_heads: see ``MAB``.
        **options: see ``MAB``.

    Source: arXiv 1810.00825, equations 9 and 10.
    """

    def __init__(self, input_dim: int, dim: int, num_inducing: int, num_heads: int = 4, **options: Any) -> None:
        super().__init__()
        check_count("num_inducing", num_inducing)
        self.read = MAB(dim, input_dim, dim, num_heads, **options)
        self.write = MAB(input_dim, dim, dim, num_heads, **options)
        self.inducing = nn.Parameter(self.read.q_proj.weight.new_empty(1, num_inducing, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the inducing points, Xavier's uniform as in the authors' code; layers have a method of their own."""
        nn.init.xavier_uniform_(self.inducing)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x [B, M, C], key_mask bool [B, M] -> [B, M, D]; rows of hidden elements follow from what these hold, see ``SAB``."""
        return self.write(x, self.read(self.inducing, x, key_mask))

    def extra_repr(self) -> str:
        return f"num_inducing={self.inducing.shape[1]}"


class PMA(nn.Module):
    """Pooling by multihead attention: k seeds read a set.

        out = MAB(S, x)          [B, k, D], S learned; MAB(S, rFF(x)) with ``feed_forward``

    Args:
        dim: D, channels of the elements and of the result, at most 1024.
        num_seeds: k.
        num_heads: see ``MAB``.
        feed_forward: the paper's row-wise layer before pooling, two linear layers with a ReLU between them. The authors'
            code has none.
        **options: see ``MAB``.

    Source: arXiv 1810.00825, equation 11.
    """

    def __init__(
        self, dim: int, num_seeds: int = 1, num_heads: int = 4, *, feed_forward: bool = False, **options: Any
    ) -> None:
        super().__init__()
        check_count("num_seeds", num_seeds)
        check_flag("feed_forward", feed_forward)
        self.attention = MAB(dim, dim, dim, num_heads, **options)
        where: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        self.feed_forward = FeedForward(dim, activation="relu", norm=None, residual=False, **where) if feed_forward else None
        self.seeds = nn.Parameter(self.attention.q_proj.weight.new_empty(1, num_seeds, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the seeds, Xavier's uniform as in the authors' code; layers have a method of their own."""
        nn.init.xavier_uniform_(self.seeds)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x [B, M, D], key_mask bool [B, M] -> [B, k, D]; hidden elements must be finite in training with ``feed_forward``."""
        return self.attention(self.seeds, x if self.feed_forward is None else self.feed_forward(x), key_mask)

    def extra_repr(self) -> str:
        return f"num_seeds={self.seeds.shape[1]}"
