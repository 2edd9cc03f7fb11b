"""The decoder's attention layer: output queries that read the latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.absorption import with_zero_gradient
from perceiver_kernels.functional.common import visible
from perceiver_kernels.functional.cross_attention import Method, check_reading
from perceiver_kernels.functional.heads import split_heads
from perceiver_kernels.functional.output_attention import Kept, as_queries, compute, hide, resolve
from perceiver_kernels.inputs import InputArray, PackedInputs
from perceiver_kernels.nn.aligned import zero_padded
from perceiver_kernels.nn.attention import Linear, attend_called, called_heads
from perceiver_kernels.nn.called import is_plain, normed_tokens, parameter_of
from perceiver_kernels.nn.checks import batch_of, check_array, check_batch, check_count, check_sequence, check_widths
from perceiver_kernels.nn.linear import linear
from perceiver_kernels.nn.norms import NormKind, make_norm
from perceiver_kernels.problem import check_eps, check_key_visibility, check_probability, check_query_mask, pad_channels


@dataclass(frozen=True, eq=False)
class PreparedLatents:
    """Latents as ``OutputCrossAttention.prepare`` gives them, for any number of calls of that layer.

    Args:
        layer: that prepared them.
        key: [B, H, N, d_qk], its projections of the latents.
        value: [B, H, N, d_v].
        key_mask: bool [B, N], True where a latent is visible.
        lengths: int32 [B], visible leading latents.
        weights: of the queries and of the result, widened with zeros where kernels want it; none where modules are called.
        kept: what calls without gradients have made of all this.
    """

    layer: nn.Module
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    lengths: Tensor | None
    weights: dict[str, Any] = field(default_factory=dict, repr=False)
    kept: Kept = field(default_factory=dict, repr=False)


class OutputCrossAttention(nn.Module):
    """Output queries, any number of them, read the latents.

        q_i = W_q LN(y_i) + b_q
        k = W_k LN(latents) + b_k,   v = W_v LN(latents) + b_v
        out = W_o softmax(q k^T / sqrt(d_qk)) v + b_o  (+ queries, when ``residual``)

    With one head, queries are not projected where it is cheaper not to: W_q, W_o and the affine part of the queries'
    LayerNorm then act on the latents' keys and values, which gives the same result ("absorbed", see
    ``functional.output_cross_attention``). ``b_k`` shifts every score of a query alike, which softmax does not see: it is
    left out, and ``k_proj.bias`` has an exactly zero gradient. Queries are projected, by calling ``norm_queries``, ``q_proj``
    and ``out_proj``, where one of these is no plain layer any more: an adapter's, or one that has hooks or a quantised weight.

    Args:
        query_dim: C, channels of the queries, content and positions together.
        latent_dim: D, channels of the latents.
        num_heads: H.
        qk_channels: H * d_qk, width of all queries; ``latent_dim`` when None, as in the authors' decoders.
        v_channels: H * d_v, width of all values; ``qk_channels`` when None.
        out_channels: channels of the result; ``query_dim`` when None, as ``residual`` requires.
        bias: biases of the query, key and value projections.
        out_bias: bias of the output projection.
        norm_queries: LayerNorm on the queries.
        norm_latents: LayerNorm on the latents.
        qk_norm: "layer" or "rms", a norm over the channels of every head's queries and keys. Queries must then be a tensor.
        residual: add the queries, as they came in, to the result. They must then be a tensor. False, as in the authors'
            decoders, whose queries are positions and whose results are not.
        dropout: probability of dropping an attention weight, in training.
        out_dropout: probability of dropping a channel of the result before the residual, in training.
        eps: of both LayerNorms.
        method: "absorbed" (one head only) or "projected"; None lets the planner compare their predicted times.

    Source: Perceiver IO, arXiv 2107.14795, section 3.2; defaults as in BasicDecoder of deepmind-research/perceiver and
    PerceiverBasicDecoder of transformers.
    """

    def __init__(
        self,
        query_dim: int,
        latent_dim: int,
        *,
        num_heads: int = 1,
        qk_channels: int | None = None,
        v_channels: int | None = None,
        out_channels: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        norm_queries: bool = True,
        norm_latents: bool = True,
        qk_norm: NormKind | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        out_dropout: float = 0.0,
        eps: float = 1e-5,
        method: Method | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        qk_channels = latent_dim if qk_channels is None else qk_channels
        v_channels = qk_channels if v_channels is None else v_channels
        out_channels = query_dim if out_channels is None else out_channels
        check_count("query_dim", query_dim)
        check_count("latent_dim", latent_dim)
        check_count("out_channels", out_channels)
        check_widths(num_heads, qk_channels=qk_channels, v_channels=v_channels)
        check_probability("dropout", dropout)
        check_probability("out_dropout", out_dropout)
        if residual and out_channels != query_dim:
            raise ValueError(f"out_channels must be query_dim={query_dim} with a residual, got {out_channels}")
        check_eps(eps)
        check_reading(None, method)
        if method == "absorbed" and num_heads > 1:
            raise ValueError(f"num_heads must be 1 with method='absorbed', got {num_heads}")
        if method == "absorbed" and qk_norm is not None:
            raise ValueError(f"qk_norm must be None with method='absorbed', got {qk_norm!r}")
        self.query_dim, self.latent_dim, self.num_heads = query_dim, latent_dim, num_heads
        self.qk_channels, self.v_channels, self.out_channels = qk_channels, v_channels, out_channels
        self.residual, self.dropout, self.out_dropout = residual, dropout, out_dropout
        self.eps, self.method = eps, method
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_queries = nn.LayerNorm(query_dim, eps, **where) if norm_queries else None
        self.norm_latents = nn.LayerNorm(latent_dim, eps, **where) if norm_latents else None
        self.norm_query = make_norm(qk_norm, qk_channels // num_heads, eps, **where)
        self.norm_key = make_norm(qk_norm, qk_channels // num_heads, eps, **where)
        self.q_proj = Linear(query_dim, qk_channels, bias, **where)
        self.k_proj = Linear(latent_dim, qk_channels, bias, **where)
        self.v_proj = Linear(latent_dim, v_channels, bias, **where)
        self.out_proj = Linear(v_channels, out_channels, out_bias, **where)

    def forward(
        self,
        queries: Tensor | InputArray | PackedInputs,
        latents: Tensor | PreparedLatents,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Read ``latents`` at ``queries``.

        Args:
            queries: [B, O, C] tensor, InputArray, or PackedInputs shared by several layers; batch 1 serves the whole batch.
                Packed with ``constants=2`` they can be absorbed where there are biases.
            latents: [B, N, D], or what ``prepare`` made of them, for queries that come in many calls.
            key_mask: bool [B, N], True where a latent is visible. What hidden latents hold is never used. Prepared latents
                bring their own.
            query_mask: bool [B, O], False for queries that see nothing (b_o and the residual are then their result); not
                beside a mask of the queries' own.
            lengths: int32 [B], visible leading latents (above N all, below 0 none); excludes ``key_mask``.

        Returns:
            [B, O, out_channels].

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        check_array("queries", queries, "B, O, C", "query_dim", self.query_dim)
        if isinstance(queries, PackedInputs) and queries.normalized != (self.norm_queries is not None):
            raise ValueError(f"queries must be packed with normalize={self.norm_queries is not None}, as norm_queries says")
        if not isinstance(queries, Tensor) and (self.residual or self.norm_query is not None):
            reason = "a residual" if self.residual else "qk_norm"
            raise TypeError(f"queries must be a torch.Tensor with {reason}, got {type(queries).__name__}")
        if not isinstance(latents, PreparedLatents):
            latents = self.prepare(latents, key_mask, lengths)
        elif latents.layer is not self:
            raise ValueError("latents must have been prepared by this layer, got those of another")
        elif not (key_mask is None and lengths is None):
            raise ValueError("key_mask and lengths must be given to prepare where latents are prepared, not beside them")
        if latents.weights:
            out = self._attend(queries, latents, query_mask)
        else:
            out = self._attend_called(queries, latents, query_mask)
        if self.out_dropout:
            out = F.dropout(out, self.out_dropout, self.training)
        return queries + out if self.residual and isinstance(queries, Tensor) else out

    def prepare(self, latents: Tensor, key_mask: Tensor | None = None, lengths: Tensor | None = None) -> PreparedLatents:
        """What does not depend on the queries, for queries in many calls: ``forward`` takes it for its latents.

        Keys and values are computed here; what absorption makes of them and of the weights, in the first call without
        gradients, and in every call with them. It has to be prepared again where weights, latents or autocast change;
        gradients flow as to any tensor that several calls share.

        Args:
            latents: [B, N, D].
            key_mask: bool [B, N], True where a latent is visible.
            lengths: int32 [B], visible leading latents (above N all, below 0 none); excludes ``key_mask``.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        check_sequence("latents", latents, "B, N, D", self.latent_dim, parameter_of(self.q_proj))
        check_key_visibility(key_mask, lengths, latents.shape[0], latents.shape[1], latents.device)
        seen = visible(key_mask, lengths, latents.shape[1])
        latents = latents if seen is None else torch.where(seen[..., None], latents, 0.0)
        normed = latents if self.norm_latents is None else self.norm_latents(latents)
        if self.norm_query is not None or not is_plain(self.norm_queries, self.q_proj, self.out_proj):
            return PreparedLatents(self, *called_heads(self, normed), key_mask, lengths)
        plain = is_plain(self.k_proj, self.v_proj)
        w_q, b_q, w_k, w_v, b_v, w_o, norm_weight, norm_bias = self._weights(latents, padded=plain)
        if plain:
            key = split_heads(linear(normed, w_k, None), self.num_heads)
            value = split_heads(linear(normed, w_v, b_v), self.num_heads)
        else:
            key, value = called_heads(self, normed)
        weights = {"w_q": w_q, "w_o": w_o, "b_q": b_q, "norm_weight": norm_weight, "norm_bias": norm_bias}
        return PreparedLatents(self, key, value, key_mask, lengths, weights)

    def _attend(
        self, queries: Tensor | InputArray | PackedInputs, latents: PreparedLatents, query_mask: Tensor | None
    ) -> Tensor:
        call = resolve(
            queries, latents.key, latents.value, **latents.weights, b_o=self.out_proj.bias,
            normalize=self.norm_queries is not None, eps=self.eps, scale=(self.qk_channels // self.num_heads) ** -0.5,
            key_mask=latents.key_mask, lengths=latents.lengths, query_mask=query_mask,
            dropout_p=self.dropout if self.training else 0.0, method=self.method,
        )  # fmt: skip
        out = compute(call, None, latents.kept)
        return with_zero_gradient(out, self.k_proj.bias) if is_plain(self.k_proj, self.v_proj) else out

    def _attend_called(
        self, queries: Tensor | InputArray | PackedInputs, latents: PreparedLatents, query_mask: Tensor | None
    ) -> Tensor:
        key, value, source = latents.key, latents.value, as_queries(queries, query_mask)
        check_batch("queries", "B, O, C", batch_of(source), key.shape[0])
        check_query_mask(query_mask, "B, O", key.shape[0], source.length, "key", key)
        source, query_mask = hide(source, query_mask, key.shape[0])
        asked = visible(source.key_mask, source.lengths, source.length)
        rows = normed_tokens("queries", source, self.norm_queries, asked, parameter_of(self.q_proj))
        seen = visible(latents.key_mask, latents.lengths, key.shape[2])
        return self.out_proj(attend_called(self, rows, key, value, seen, query_mask=query_mask))

    def _weights(self, latents: Tensor, *, padded: bool) -> list[Any]:
        """Weights of q, k and v, biases of q and v, the output weight and the affine part of the queries' LayerNorm.

        One head of odd width gets zero channels on a GPU, if ``padded``; several heads lie side by side and stay as they are.
        Where keys and values are not read, theirs are None.
        """
        norm = self.norm_queries
        read: list[Any] = [self.k_proj.weight, self.v_proj.weight, self.v_proj.bias] if padded else [None, None, None]
        affine = [None, None] if norm is None else [norm.weight, norm.bias]
        tensors = [self.q_proj.weight, self.q_proj.bias, *read, self.out_proj.weight, *affine]
        if not padded or self.num_heads > 1 or not latents.is_cuda:
            return tensors
        d_k, d_v = self.qk_channels + -self.qk_channels % 8, self.v_channels + -self.v_channels % 8
        C, D = pad_channels(self.query_dim), self.latent_dim
        shapes = ((d_k, C), (d_k,), (d_k, D), (d_v, D), (d_v,), (self.out_channels, d_v), (C,), (C,))
        return zero_padded(*zip(tensors, shapes, strict=True))

    def flops(self, batch: int, O: int, N: int, *, query_batch: int | None = None, method: Method = "projected") -> int:
        """FLOPs of the matrix products of one forward, a multiply and an add counted as two.

        projected: 2bO C d_k + 2BO d_v C_out + 2BON(d_k + d_v),      b = ``query_batch`` (the batch when None)
        absorbed:  2BN(C d_k + d_v C_out) + 2BON(C + C_out)
        both:      + 2BN D(d_k + d_v),                               d_k, d_v the widths of all heads together
        """
        d_k, d_v, C, C_out = self.qk_channels, self.v_channels, self.query_dim, self.out_channels
        b = batch if query_batch is None else query_batch
        total = 2 * batch * N * self.latent_dim * (d_k + d_v)
        if method == "projected":
            return total + 2 * O * (b * C * d_k + batch * d_v * C_out) + 2 * batch * O * N * (d_k + d_v)
        return total + 2 * batch * N * (C * d_k + d_v * C_out) + 2 * batch * O * N * (C + C_out)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, residual={self.residual}, dropout={self.dropout}, method={self.method}"
