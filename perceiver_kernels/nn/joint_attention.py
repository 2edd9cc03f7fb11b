"""The attention layer of resamplers and of Perceiver AR: a sequence reads a context and itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels import functional
from perceiver_kernels.checks import check_tensor
from perceiver_kernels.functional.heads import merge_heads, split_heads, split_projection
from perceiver_kernels.nn.attention import Linear
from perceiver_kernels.nn.cache import KeyValueCache
from perceiver_kernels.nn.called import parameter_of
from perceiver_kernels.nn.checks import check_batch, check_count, check_sequence
from perceiver_kernels.nn.norms import NormKind, make_norm
from perceiver_kernels.nn.rotary import Rotary
from perceiver_kernels.problem import check_eps, check_probability


class JointAttention(nn.Module):
    """Every token of a sequence reads a context and, after it, the sequence.

        q = W_q norm(x)
        [k | v] = W_kv [norm_context(context); norm(x)]
        out = W_o softmax(q k^T / sqrt(d)) v  (+ x, when ``residual``)

    Context and sequence are two segments of keys: nothing is concatenated.

    Args:
        dim: D, channels of the sequence and of the context.
        num_heads: H.
        head_dim: d; ``dim / num_heads`` when None.
        num_kv_heads: heads of keys and values, a divisor of H; H when None.
        causal: token i of the sequence reads the whole context and the sequence up to itself.
        own_keys: the sequence's tokens are keys after those of the context. False: the context alone is read; its last N
            tokens are then the sequence's own, in another form, and causal layers read it up to them.
        norm: "layer", "rms" or None, the norm on the sequence.
        norm_context: likewise, on the context.
        qk_norm: "layer" or "rms", a norm over the channels of every head's queries and keys, before rotary positions.
        bias: biases of the query, key and value projections.
        out_bias: bias of the output projection.
        residual: add the sequence, as it came in, to the result.
        dropout: probability of dropping an attention weight, in training.
        out_dropout: probability of dropping a channel of the result before the residual, in training.
        eps: of all norms.

    Source: Flamingo, arXiv 2204.14198, appendix A.1.1; Perceiver AR, arXiv 2202.07765, section 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        causal: bool = False,
        own_keys: bool = True,
        norm: NormKind | None = "layer",
        norm_context: NormKind | None = "layer",
        qk_norm: NormKind | None = None,
        bias: bool = False,
        out_bias: bool = False,
        residual: bool = True,
        dropout: float = 0.0,
        out_dropout: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_count("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}")
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(f"dim must be a multiple of num_heads={num_heads} unless head_dim is given, got {dim}")
            head_dim = dim // num_heads
        check_count("head_dim", head_dim)
        check_probability("dropout", dropout)
        check_probability("out_dropout", out_dropout)
        check_eps(eps)
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim = dim, num_heads, num_kv_heads, head_dim
        self.causal, self.own_keys, self.residual = causal, own_keys, residual
        self.dropout, self.out_dropout = dropout, out_dropout
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = make_norm(norm, dim, eps, **where)
        self.norm_context = make_norm(norm_context, dim, eps, **where)
        self.norm_query = make_norm(qk_norm, head_dim, eps, **where)
        self.norm_key = make_norm(qk_norm, head_dim, eps, **where)
        self.q_proj = Linear(dim, num_heads * head_dim, bias, **where)
        self.kv_proj = Linear(dim, 2 * num_kv_heads * head_dim, bias, **where)
        self.out_proj = Linear(num_heads * head_dim, dim, out_bias, **where)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        rotary: Rotary | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attend over context and sequence.

        Args:
            x: [B, N, D].
            context: [B, M, D]; M may be 0, and is at least N without ``own_keys``.
            context_mask: bool [B, M], True where a token of the context may be read; not beside a cache. Hidden tokens must be
                finite in training: norm and projection see them, whose weights would get gradients of 0 * NaN.
            rotary: positions of the M + N tokens, context first; of the M without ``own_keys``.
            cache: tokens that came before all of these, which read them too and are appended; ``causal`` layers only.

        Returns:
            [B, N, D].

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        check_sequence("x", x, "B, N, D", self.dim, parameter_of(self.q_proj))
        check_sequence("context", context, "B, M, D", self.dim, parameter_of(self.q_proj))
        B, N, M = x.shape[0], x.shape[1], context.shape[1]
        check_batch("context", "B, M, D", context.shape[0], B, shared=False)
        length = M + N if self.own_keys else M
        if length < N:
            raise ValueError(f"context must hold the sequence's N={N} tokens without own_keys, got M={M}")
        if rotary is not None and rotary.length != length:
            axes = "M + N" if self.own_keys else "M"
            raise ValueError(f"rotary must hold the positions of {axes}={length} tokens, got {rotary.length}")
        normed = x if self.norm is None else self.norm(x)
        query = split_heads(self.q_proj(normed), self.num_heads)
        if self.norm_query is not None:
            query = self.norm_query(query)
        if rotary is not None:
            query = rotary.turn(query, length - N)
        segments = []
        if M or not self.own_keys:
            normed_context = context if self.norm_context is None else self.norm_context(context)
            segments.append(self._keys_values(normed_context, 0, rotary))
        if self.own_keys:
            segments.append(self._keys_values(normed, M, rotary))
        key_mask = None
        if context_mask is not None:
            check_tensor("context_mask", context_mask, "[B, M]", (B, M), dtypes=(torch.bool,))
            key_mask = torch.cat((context_mask, context_mask.new_ones(B, length - M)), 1)
        if cache is not None:
            if not self.causal or context_mask is not None:
                raise ValueError(f"cache needs causal=True and no context_mask, got causal={self.causal}")
            if len(segments) == 2 and torch.is_grad_enabled():
                # At once: the gradient does not pass to what was appended before.
                joined = [torch.cat(parts, 2) for parts in zip(*segments, strict=True)]
                segments = [(joined[0], joined[1])]
            for key, value in segments:
                keys_values = cache.append(key, value)
            segments = [keys_values]
        # One segment is plain tensors, two are pairs.
        keys, values = segments[0] if len(segments) == 1 else zip(*segments, strict=True)
        attended = functional.attention(
            query, keys, values, key_mask=key_mask, is_causal=self.causal, causal_alignment="bottom_right",
            dropout_p=self.dropout if self.training else 0.0, enable_gqa=self.num_kv_heads != self.num_heads,
        )  # fmt: skip
        out = self.out_proj(merge_heads(attended))
        if self.out_dropout:
            out = F.dropout(out, self.out_dropout, self.training)
        return x + out if self.residual else out

    def _keys_values(self, normed: Tensor, start: int, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H_kv, L, d] of tokens whose first is ``start`` of context and sequence together."""
        key, value = split_projection(self.kv_proj(normed), 2 * [self.num_kv_heads * self.head_dim], self.num_kv_heads)
        if self.norm_key is not None:
            key = self.norm_key(key)
        return key if rotary is None else rotary.turn(key, start), value

    def flops(self, batch: int, N: int, M: int) -> int:
        """FLOPs of the matrix products of one forward: 4BND Hd + 4BL D H_kv d + 4BNL Hd, L = M + N, or M without ``own_keys``.

        All keys are counted, those that causal queries do not see too.
        """
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        length = M + N if self.own_keys else M
        return 4 * batch * (N * self.dim * width + length * self.dim * kv_width + N * length * width)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, causal={self.causal}, "
            f"residual={self.residual}, dropout={self.dropout}"
        )
