"""Attention whose keys and values are a few learned mixtures of the sequence's tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels import functional
from perceiver_kernels.functional.heads import merge_heads, split_heads
from perceiver_kernels.nn.called import parameter_of
from perceiver_kernels.nn.checks import check_count, check_flag, check_sequence, check_widths
from perceiver_kernels.nn.norms import NormKind, make_norm
from perceiver_kernels.problem import check_eps, check_key_visibility, check_probability


class LinformerAttention(nn.Module):
    """Every token reads k keys and values, each a learned combination of all tokens.

        q = W_q norm(x)
        keys = E^T norm(x) W_k^T,   values = F^T norm(x) W_v^T          E, F [length, k], learned
        out = W_o softmax(q keys^T / sqrt(d)) values + b_o  (+ x, when ``residual``)

    A sequence of L < length tokens uses the first L rows of E and F. The products over tokens and over channels are done in
    the order that takes fewer operations: mixing tokens first, keys and values of the whole sequence never exist.

    Args:
        dim: D, channels of the sequence.
        length: tokens of the longest sequence.
        num_keys: k.
        num_heads: H.
        head_dim: d; ``dim / num_heads`` when None.
        one_kv_head: all heads share one head of keys and values.
        share_kv: values are the keys, and F is E.
        norm: "layer", "rms" or None, the norm on the sequence.
        residual: add the sequence, as it came in, to the result.
        dropout: probability of dropping an attention weight, in training.
        eps: of the norm.

    Source: Linformer, arXiv 2006.04768, section 4; options, and the start of all weights, as in lucidrains/linformer, whose
    sequences have no masks. Its E and F are shared by the heads, the paper's "headwise sharing".
    """

    def __init__(
        self,
        dim: int,
        length: int,
        num_keys: int = 256,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        one_kv_head: bool = False,
        share_kv: bool = False,
        norm: NormKind | None = "layer",
        residual: bool = True,
        dropout: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, count in (("dim", dim), ("length", length), ("num_keys", num_keys)):
            check_count(name, count)
        if head_dim is None:
            check_widths(num_heads, dim=dim)
            head_dim = dim // num_heads
        check_count("num_heads", num_heads)
        check_count("head_dim", head_dim)
        check_flag("one_kv_head", one_kv_head)
        check_flag("share_kv", share_kv)
        check_probability("dropout", dropout)
        check_eps(eps)
        self.dim, self.length, self.num_keys, self.num_heads = dim, length, num_keys, num_heads
        self.num_kv_heads, self.head_dim = 1 if one_kv_head else num_heads, head_dim
        self.share_kv, self.residual, self.dropout = share_kv, residual, dropout
        kv_width = self.num_kv_heads * head_dim
        self.mixes_first = num_keys * dim + num_keys * dim * kv_width / length < kv_width * (dim + num_keys)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = make_norm(norm, dim, eps, **where)
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False, **where)
        self.k_proj = nn.Linear(dim, kv_width, bias=False, **where)
        self.mix_keys = nn.Parameter(torch.empty(length, num_keys, **where))
        self.v_proj = None if share_kv else nn.Linear(dim, kv_width, bias=False, **where)
        self.mix_values = None if share_kv else nn.Parameter(torch.empty(length, num_keys, **where))
        self.out_proj = nn.Linear(num_heads * head_dim, dim, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start E and F; layers have a method of their own."""
        for mix in (self.mix_keys, self.mix_values):
            if mix is not None:
                nn.init.uniform_(mix, -(self.num_keys**-0.5), self.num_keys**-0.5)

    def forward(self, x: Tensor, context: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """Attend over the sequence, or over a context in its place.

        Args:
            x: [B, N, D].
            context: [B, L, D] that keys and values are made of, without a norm; the normed sequence when None. L is at most
                ``length``.
            key_mask: bool [B, L], False for tokens that keys and values are to contain nothing of. Hidden at the end of a
                sequence, they might as well not be there.

        Returns:
            [B, N, D].

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        check_sequence("x", x, "B, N, D", self.dim, parameter_of(self.q_proj))
        name, source = ("x", x) if context is None else ("context", context)
        if context is not None:
            check_sequence("context", context, "B, L, D", self.dim, parameter_of(self.q_proj))
        if source.shape[1] > self.length:
            raise ValueError(f"{name} must have at most length={self.length} tokens, got {source.shape[1]}")
        normed = x if self.norm is None else self.norm(x)
        tokens = normed if context is None else context
        if key_mask is not None:
            check_key_visibility(key_mask, None, tokens.shape[0], tokens.shape[1], tokens.device)
            tokens = torch.where(key_mask[..., None], tokens, 0.0)
        key = self._mixed(tokens, self.k_proj, self.mix_keys)  # [B, H_kv, k, d]
        value = key
        if self.v_proj is not None and self.mix_values is not None:
            value = self._mixed(tokens, self.v_proj, self.mix_values)
        attended = functional.attention(
            split_heads(self.q_proj(normed), self.num_heads), key, value, dropout_p=self.dropout if self.training else 0.0
        )
        out = self.out_proj(merge_heads(attended))
        return x + out if self.residual else out

    def _mixed(self, tokens: Tensor, projection: nn.Linear, mix: Tensor) -> Tensor:
        """mix^T tokens W^T, [B, H_kv, k, d]."""
        # A plain product of [k, L] and [B, L, D] would copy the tokens to fold the batch into the columns.
        rows = mix[: tokens.shape[1]].mT.expand(tokens.shape[0], -1, -1)
        if self.mixes_first:
            return split_heads(projection(torch.bmm(rows, tokens)), self.num_kv_heads)
        return split_heads(torch.bmm(rows, projection(tokens)), self.num_kv_heads)

    def flops(self, batch: int, N: int) -> int:
        """FLOPs of the matrix products of one forward over sequences of N tokens, a multiply and an add counted as two.

        4BND Hd + 4BNkHd + s (2BNkD + 2BkD H_kv d), or s (2BND H_kv d + 2BNk H_kv d) if that is the order; s is 1 with
        ``share_kv``, else 2.
        """
        k, width, kv_width = self.num_keys, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mixed = N * k * self.dim + k * self.dim * kv_width if self.mixes_first else N * kv_width * (self.dim + k)
        return 2 * batch * (2 * N * self.dim * width + 2 * N * k * width + (1 if self.share_kv else 2) * mixed)

    def extra_repr(self) -> str:
        return (
            f"length={self.length}, num_keys={self.num_keys}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"share_kv={self.share_kv}, residual={self.residual}, dropout={self.dropout}"
        )
