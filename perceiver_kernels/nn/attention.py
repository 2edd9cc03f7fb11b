"""Attention layers: latents that read an input array, and latents that read each other.

Every layer is pre-norm and owns its norms and its residual, so a block is a plain sequence of layers.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels import functional
from perceiver_kernels.functional.common import visible
from perceiver_kernels.functional.cross_attention import Method, as_source, check_reading
from perceiver_kernels.functional.heads import merge_heads, split_heads, split_projection
from perceiver_kernels.inputs import InputArray, PackedInputs
from perceiver_kernels.nn.aligned import zero_padded
from perceiver_kernels.nn.cache import KeyValueCache
from perceiver_kernels.nn.called import is_plain, normed_tokens, parameter_of
from perceiver_kernels.nn.checks import (
    batch_of,
    check_array,
    check_batch,
    check_count,
    check_input_dim,
    check_sequence,
    check_widths,
)
from perceiver_kernels.nn.drop_path import drop_path
from perceiver_kernels.nn.linear import linear
from perceiver_kernels.nn.norms import NormKind, make_norm
from perceiver_kernels.nn.rotary import Rotary
from perceiver_kernels.problem import check_eps, check_probability, pad_channels


class Linear(nn.Linear):
    """``torch.nn.Linear`` with the initialisation of the Perceiver: weights truncated normal, biases zero.

    w ~ N(0, 1/in_features), cut at two standard deviations and rescaled to keep that variance.

    Source: deepmind-research/perceiver (variance scaling over the fan-in, scale 1).
    """

    def reset_parameters(self) -> None:
        # 0.8796... is the standard deviation of a unit normal cut at +-2.
        std = self.in_features**-0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def called_heads(layer: Any, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, H, Lk, d_qk], after their norm if any, and values [B, H, Lk, d_v] that a layer makes of [B, Lk, ...]."""
    key = split_heads(layer.k_proj(keys), layer.num_heads)
    key = key if layer.norm_key is None else layer.norm_key(key)
    return key, split_heads(layer.v_proj(keys), layer.num_heads)


def attend_called(layer: Any, queries: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, **masks: Any) -> Tensor:
    """Attention of a layer whose modules are called: with ``qk_norm``, between projections and scores, nothing is absorbed.

    Args:
        layer: has q_proj, norm_query, num_heads, dropout and training.
        queries: [B or 1, Lq, ...], after their norm.
        key, value: of ``called_heads``.
        seen: bool [B, Lk], False for keys that are hidden.

    Returns:
        [B, Lq, H*d_v], heads merged.
    """
    query = split_heads(layer.q_proj(queries), layer.num_heads)
    query = (query if layer.norm_query is None else layer.norm_query(query)).expand(key.shape[0], -1, -1, -1)
    dropout_p = layer.dropout if layer.training else 0.0
    return merge_heads(functional.attention(query, key, value, key_mask=seen, dropout_p=dropout_p, **masks))


class CrossAttention(nn.Module):
    """Latents read an input array of any length.

        q = W_q LN(latents) + b_q
        k_j = W_k LN(x_j) + b_k,   v_j = W_v LN(x_j) + b_v
        out = W_o softmax(q k^T / sqrt(d_qk)) v + b_o  (+ latents, when ``residual``)

    Keys and values are not computed when it is cheaper not to: W_k, W_v and the affine part of the inputs' LayerNorm
    then act on the latent side, which gives the same result ("absorbed", see ``functional.input_cross_attention``).
    In that form ``b_k`` and the LayerNorm's bias drop out of the scores, so ``k_proj.bias`` has an exactly zero gradient.
    They are computed, by calling ``norm_inputs``, ``k_proj`` and ``v_proj``, where one of these is no plain layer any more: an
    adapter's, or one that has hooks or a quantised weight.

    Args:
        latent_dim: D, channels of the latents.
        input_dim: C, channels of the inputs, content and positions together, at most 1024.
        num_heads: H.
        qk_channels: H * d_qk, width of all queries; ``input_dim`` when None.
        v_channels: H * d_v, width of all values; ``qk_channels`` when None.
        out_channels: channels of the result; ``latent_dim`` when None, as ``residual`` requires.
        bias: biases of the query, key and value projections.
        out_bias: bias of the output projection.
        norm_latents: LayerNorm on the latents.
        norm_inputs: LayerNorm on the inputs.
        qk_norm: "layer" or "rms", a norm over the channels of every head's queries and keys. Inputs must then be a tensor,
            and keys are always computed.
        residual: add the latents, as they came in, to the result.
        dropout: probability of dropping an attention weight, in training.
        out_dropout: probability of dropping a channel of the result before the residual, in training.
        eps: of both LayerNorms.
        chunk_size: inputs are packed and read this many tokens at a time, so that memory does not grow with M.
        method: "absorbed" or "projected"; None lets the planner compare their predicted times.

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
        out_channels: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        norm_latents: bool = True,
        norm_inputs: bool = True,
        qk_norm: NormKind | None = None,
        residual: bool = True,
        dropout: float = 0.0,
        out_dropout: float = 0.0,
        eps: float = 1e-5,
        chunk_size: int | None = None,
        method: Method | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        qk_channels = input_dim if qk_channels is None else qk_channels
        v_channels = qk_channels if v_channels is None else v_channels
        out_channels = latent_dim if out_channels is None else out_channels
        check_count("latent_dim", latent_dim)
        check_count("out_channels", out_channels)
        check_input_dim(input_dim)
        check_widths(num_heads, qk_channels=qk_channels, v_channels=v_channels)
        check_probability("dropout", dropout)
        check_probability("out_dropout", out_dropout)
        if residual and out_channels != latent_dim:
            raise ValueError(f"out_channels must be latent_dim={latent_dim} with a residual, got {out_channels}")
        check_eps(eps)
        check_reading(chunk_size, method)
        if qk_norm is not None and (chunk_size is not None or method == "absorbed"):
            raise ValueError(f"qk_norm must be None with chunk_size or method='absorbed', got {qk_norm!r}")
        self.latent_dim, self.input_dim, self.num_heads = latent_dim, input_dim, num_heads
        self.qk_channels, self.v_channels, self.out_channels = qk_channels, v_channels, out_channels
        self.residual, self.dropout, self.out_dropout, self.eps = residual, dropout, out_dropout, eps
        self.chunk_size, self.method = chunk_size, method
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_latents = nn.LayerNorm(latent_dim, eps, **where) if norm_latents else None
        self.norm_inputs = nn.LayerNorm(input_dim, eps, **where) if norm_inputs else None
        self.norm_query = make_norm(qk_norm, qk_channels // num_heads, eps, **where)
        self.norm_key = make_norm(qk_norm, qk_channels // num_heads, eps, **where)
        self.q_proj = Linear(latent_dim, qk_channels, bias, **where)
        self.k_proj = Linear(input_dim, qk_channels, bias, **where)
        self.v_proj = Linear(input_dim, v_channels, bias, **where)
        self.out_proj = Linear(v_channels, out_channels, out_bias, **where)

    def forward(
        self,
        latents: Tensor,
        inputs: Tensor | InputArray | PackedInputs,
        key_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Read ``inputs`` into ``latents``.

        Args:
            latents: [B, N, D], or [1, N, D] to share one set over the batch (its query is then projected once).
            inputs: [B, M, C] tensor, InputArray, or PackedInputs shared by several layers.
            key_mask: bool [B, M], True where a token is visible; for inputs that do not bring their own.
            lengths: int32 [B], visible leading tokens (above M all, below 0 none); excludes ``key_mask``.

        Returns:
            [B, N, out_channels].

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        check_sequence("latents", latents, "B, N, D", self.latent_dim, parameter_of(self.q_proj))
        check_array("inputs", inputs, "B, M, C", "input_dim", self.input_dim)
        check_batch("latents", "B, N, D", latents.shape[0], batch_of(inputs))
        if isinstance(inputs, PackedInputs) and inputs.normalized != (self.norm_inputs is not None):
            raise ValueError(f"inputs must be packed with normalize={self.norm_inputs is not None}, as norm_inputs says")
        normed = latents if self.norm_latents is None else self.norm_latents(latents)
        if self.norm_query is not None or not is_plain(self.norm_inputs, self.k_proj, self.v_proj):
            return self._result(self.out_proj(self._attend_called(normed, inputs, key_mask, lengths)), latents)
        plain = is_plain(self.q_proj, self.out_proj)
        w_q, b_q, w_k, b_k, w_v, b_v, w_o, norm_weight, norm_bias = self._weights(latents, padded=plain)
        query = linear(normed, w_q, b_q) if plain else self.q_proj(normed)
        attended = functional.input_cross_attention(
            split_heads(query, self.num_heads),  # [B or 1, H, N, d_qk]
            inputs,
            w_k,
            w_v,
            b_k=b_k,
            b_v=b_v,
            scale=(self.qk_channels // self.num_heads) ** -0.5,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            normalize=self.norm_inputs is not None,
            eps=self.eps,
            key_mask=key_mask,
            lengths=lengths,
            dropout_p=self.dropout if self.training else 0.0,
            chunk_size=self.chunk_size,
            method=self.method,
        )
        merged = merge_heads(attended)
        return self._result(linear(merged, w_o, self.out_proj.bias) if plain else self.out_proj(merged), latents)

    def _result(self, out: Tensor, latents: Tensor) -> Tensor:
        if self.out_dropout:
            out = F.dropout(out, self.out_dropout, self.training)
        return latents + out if self.residual else out

    def _attend_called(
        self, normed: Tensor, inputs: Tensor | InputArray | PackedInputs, key_mask: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        if self.norm_query is not None and not isinstance(inputs, Tensor):
            raise TypeError(f"inputs must be a torch.Tensor with qk_norm, got {type(inputs).__name__}")
        source = as_source(inputs, key_mask, lengths)
        seen = visible(source.key_mask, source.lengths, source.length)
        rows = normed_tokens("inputs", source, self.norm_inputs, seen, parameter_of(self.q_proj))
        return attend_called(self, normed, *called_heads(self, rows), seen)

    def _weights(self, latents: Tensor, *, padded: bool) -> list[Any]:
        """Weights and biases of q, k and v, the output weight and the affine part of the inputs' LayerNorm.

        One head of odd width gets zero channels on a GPU, if ``padded``; several heads lie side by side and stay as they are.
        Where q and the output are not read, they are None.
        """
        norm = self.norm_inputs
        read: list[Any] = [self.k_proj.weight, self.k_proj.bias, self.v_proj.weight, self.v_proj.bias]
        affine = [None, None] if norm is None else [norm.weight, norm.bias]
        if not padded:
            return [None, None, *read, None, *affine]
        tensors = [self.q_proj.weight, self.q_proj.bias, *read, self.out_proj.weight, *affine]
        if self.num_heads > 1 or not latents.is_cuda:
            return tensors
        d_k, d_v = self.qk_channels + -self.qk_channels % 8, self.v_channels + -self.v_channels % 8
        C = pad_channels(self.input_dim)
        shapes = (
            (d_k, self.latent_dim), (d_k,), (d_k, C), (d_k,), (d_v, C), (d_v,), (self.out_channels, d_v), (C,), (C,)
        )  # fmt: skip
        return zero_padded(*zip(tensors, shapes, strict=True))

    def flops(self, batch: int, N: int, M: int, *, latent_batch: int | None = None, method: Method = "projected") -> int:
        """FLOPs of the matrix products of one forward, a multiply and an add counted as two.

        projected: 2BM C(d_k + d_v) + 2BNM(d_k + d_v),      d_k, d_v the widths of all heads together
        absorbed:  2BN C(d_k + d_v) + 4BHNM C
        both:      + 2bND d_k + 2BN d_v D_out,               b = ``latent_batch`` (the batch when None)
        """
        d_k, d_v, C = self.qk_channels, self.v_channels, self.input_dim
        b = batch if latent_batch is None else latent_batch
        total = 2 * b * N * self.latent_dim * d_k + 2 * batch * N * d_v * self.out_channels
        if method == "projected":
            return total + 2 * batch * M * C * (d_k + d_v) + 2 * batch * N * M * (d_k + d_v)
        return total + 2 * N * C * (b * d_k + batch * d_v) + 4 * batch * self.num_heads * N * M * C

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, residual={self.residual}, dropout={self.dropout}, "
            f"chunk_size={self.chunk_size}, method={self.method}"
        )


class SelfAttention(nn.Module):
    """Every token of a sequence reads all of them.

        q, k, v = W_qkv LN(x) + b_qkv
        out = W_o softmax(q k^T / sqrt(d_qk)) v + b_o  (+ x, when ``residual``)

    Args:
        dim: D, channels of the sequence.
        num_heads: H.
        qk_channels: H * d_qk; ``dim`` when None.
        v_channels: H * d_v; ``qk_channels`` when None.
        causal: token i reads tokens 0..i.
        bias: bias of the query, key and value projection, which is one matrix of rows [q | k | v].
        out_bias: bias of the output projection.
        norm: "layer", "rms" or None, the norm on the sequence.
        qk_norm: "layer" or "rms", a norm over the channels of every head's queries and keys, before rotary positions.
        residual: add the sequence, as it came in, to the result.
        dropout: probability of dropping an attention weight, in training.
        out_dropout: probability of dropping a channel of the result before the residual, in training.
        drop_path: probability of dropping a batch entry's whole result before the residual, in training.
        eps: of the norms.

    Source: Perceiver, arXiv 2103.03206, section 3.1; Attention Is All You Need, arXiv 1706.03762.
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
        out_bias: bool = True,
        norm: NormKind | None = "layer",
        qk_norm: NormKind | None = None,
        residual: bool = True,
        dropout: float = 0.0,
        out_dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        qk_channels = dim if qk_channels is None else qk_channels
        v_channels = qk_channels if v_channels is None else v_channels
        check_count("dim", dim)
        check_widths(num_heads, qk_channels=qk_channels, v_channels=v_channels)
        check_probability("dropout", dropout)
        check_probability("out_dropout", out_dropout)
        check_probability("drop_path", drop_path)
        check_eps(eps)
        self.dim, self.num_heads, self.residual, self.dropout = dim, num_heads, residual, dropout
        self.out_dropout, self.drop_path = out_dropout, drop_path
        self.qk_channels, self.v_channels, self.causal = qk_channels, v_channels, causal
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = make_norm(norm, dim, eps, **where)
        self.norm_query = make_norm(qk_norm, qk_channels // num_heads, eps, **where)
        self.norm_key = make_norm(qk_norm, qk_channels // num_heads, eps, **where)
        self.qkv_proj = Linear(dim, 2 * qk_channels + v_channels, bias, **where)
        self.out_proj = Linear(v_channels, dim, out_bias, **where)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        rotary: Rotary | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attend over a sequence.

        Args:
            x: [B, N, D].
            key_mask: bool [B, N], True where a token may be read; not beside a cache. Hidden tokens must be finite in training:
                they are queries too, and weights would get gradients of 0 * NaN.
            rotary: positions of the N tokens.
            cache: tokens that came before these, which read them too and are appended; ``causal`` layers only.

        Returns:
            [B, N, D].
        """
        check_sequence("x", x, "B, N, D", self.dim, parameter_of(self.qkv_proj))
        qkv = self.qkv_proj(x if self.norm is None else self.norm(x))
        widths = self.qk_channels, self.qk_channels, self.v_channels
        query, key, value = split_projection(qkv, widths, self.num_heads)
        if self.norm_query is not None and self.norm_key is not None:
            query, key = self.norm_query(query), self.norm_key(key)
        if rotary is not None:
            if rotary.length != x.shape[1]:
                raise ValueError(f"rotary must hold the positions of N={x.shape[1]} tokens, got {rotary.length}")
            query, key = rotary.turn(query, 0), rotary.turn(key, 0)
        if cache is not None:
            if not self.causal or key_mask is not None:
                raise ValueError(f"cache needs causal=True and no key_mask, got causal={self.causal}")
            key, value = cache.append(key, value)
        alignment: Literal["upper_left", "bottom_right"] = "upper_left" if cache is None else "bottom_right"
        attended = functional.attention(
            query, key, value, key_mask=key_mask, is_causal=self.causal, causal_alignment=alignment,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        out = self.out_proj(merge_heads(attended))
        if self.out_dropout:
            out = F.dropout(out, self.out_dropout, self.training)
        out = drop_path(out, self.drop_path, self.training)
        return x + out if self.residual else out

    def flops(self, batch: int, N: int) -> int:
        """FLOPs of the matrix products of one forward: 2BND(2 d_k + 2 d_v) + 2BN^2(d_k + d_v)."""
        d_k, d_v = self.qk_channels, self.v_channels
        return 4 * batch * N * self.dim * (d_k + d_v) + 2 * batch * N * N * (d_k + d_v)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, causal={self.causal}, residual={self.residual}, dropout={self.dropout}"
