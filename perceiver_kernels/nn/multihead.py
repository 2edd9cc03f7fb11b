"""torch's multi-head attention layer, parameter for parameter, over this package's attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from perceiver_kernels import functional
from perceiver_kernels.functional.common import autocast_dtype
from perceiver_kernels.nn.checks import check_count, check_sequence, check_widths
from perceiver_kernels.nn.linear import linear
from perceiver_kernels.problem import MAX_CHANNELS, check_device, check_is_tensor, check_probability, check_shape


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of torch's, where True hides, as what is added to the scores; one that is added already stays."""
    if hidden.dtype != torch.bool:
        return hidden
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, -math.inf)


def _merged_masks(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, num_heads: int, extra_keys: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """torch's masks [B, Lk] and [Lq, Lk] or [B*H, Lq, Lk] as ``functional.attention``'s ``key_mask`` and ``attn_mask``.

    Padding alone stays a mask of keys. Both together take [B, 1, Lq, Lk], not a copy for each head.
    """
    padding = None if key_padding_mask is None else key_padding_mask[:, None, None]
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unflatten(0, (attn_mask.shape[0] // num_heads, num_heads))
    if extra_keys:
        # Keys that the layer itself appends are visible: False, or 0.
        padding, attn_mask = (None if mask is None else pad(mask, (0, extra_keys)) for mask in (padding, attn_mask))
    if padding is None:
        return None, attn_mask if attn_mask is None or attn_mask.dtype != torch.bool else ~attn_mask
    if attn_mask is None:
        return (~padding[:, 0, 0], None) if padding.dtype == torch.bool else (None, padding)
    if padding.dtype == attn_mask.dtype == torch.bool:
        return None, ~(attn_mask | padding)
    return None, _additive(attn_mask, dtype) + _additive(padding, dtype)


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``: its arguments, parameters, initialisation and state dict, on this package's kernels.

        q = W_q query + b_q,   k_j = W_k key_j + b_k,   v_j = W_v value_j + b_v
        out = W_o softmax(q k^T / sqrt(d) + mask) v + b_o

    ``need_weights=False`` never holds the weights, nor a mask for each head where keys are all that a mask hides, and where few
    queries read many tokens, it may absorb the projections of these, as ``CrossAttention`` does. With ``need_weights=True``,
    the default as in torch, torch's own forward runs, which holds them.

    Args:
        embed_dim: channels of query and result.
        num_heads: H, a divisor of ``embed_dim``; d is their ratio.
        dropout: probability in [0, 1) of dropping an attention weight, in training.
        bias: biases of all four projections.
        add_bias_kv: append a learned key and value to the projected ones.
        add_zero_attn: append a key and value of zeros.
        kdim: channels of key; ``embed_dim`` when None.
        vdim: channels of value; ``embed_dim`` when None.
        batch_first: sequences are [B, L, channels], not [L, B, channels].

    Source: Vaswani et al., arXiv 1706.03762, section 3.2.2; torch.nn.MultiheadAttention.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_widths(num_heads, embed_dim=embed_dim)
        check_probability("dropout", dropout)
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None:
                check_count(name, width)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )

    def reset_parameters(self) -> None:
        """Start as torch's layer does, after ``out_proj``'s own method."""
        self._reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``; one product projects those of them that are the same tensor.

        Args:
            query: [Lq, B, embed_dim], [B, Lq, embed_dim] with ``batch_first``, or [Lq, embed_dim].
            key: likewise [Lk, B, kdim].
            value: likewise [Lk, B, vdim].
            key_padding_mask: [B, Lk] (or [Lk]), bool, **True where a key is hidden**, or float, added to the scores.
                Hidden keys must be finite in training: weights would get gradients of 0 * NaN.
            need_weights: also return the weights of attention.
            attn_mask: [Lq, Lk] or [B*H, Lq, Lk], bool, **True where a key is hidden**, or float, added to the scores.
            average_attn_weights: average the weights over the heads.
            is_causal: says that ``attn_mask``, which it needs, is causal. Without ``key_padding_mask`` and weights it is
                then not read, and hides the keys that the layer appends, as in torch.

        Returns:
            The result, of query's shape, and the weights [B, Lq, Lk], [B, H, Lq, Lk] without average, or None. A query
            that sees no key gets the output bias alone; with ``need_weights``, NaN, as in torch.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        nested = isinstance(query, Tensor) and query.is_nested
        if not nested:
            self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        if need_weights or nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if self._reads_many(query, key, value, key_padding_mask, attn_mask):
            return self._read(query, key, key_padding_mask), None
        q, k, v = self._projected(query, key, value)
        batch_axis = 0 if self.batch_first else 1
        unbatched = query.ndim == 2
        if unbatched:
            q, k, v = (x.unsqueeze(batch_axis) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).movedim(batch_axis, 0).transpose(1, 2) for x in (q, k, v))
        # [B, H, Lk + extra_keys, d]
        k, v = self._with_extra_tokens(k, self.bias_k), self._with_extra_tokens(v, self.bias_v)
        causal = is_causal and key_padding_mask is None
        if causal:
            attn_mask = None
        extra_keys = (self.bias_k is not None) + self.add_zero_attn
        key_mask, attn_mask = _merged_masks(key_padding_mask, attn_mask, self.num_heads, extra_keys, q.dtype)
        dropout_p = self.dropout if self.training else 0.0
        attended = functional.attention(
            q, k, v, key_mask=key_mask, attn_mask=attn_mask, is_causal=causal, dropout_p=dropout_p
        )
        merged = attended.transpose(1, 2).movedim(0, batch_axis).flatten(-2)  # [Lq, B, embed_dim] or [B, Lq, embed_dim]
        out = linear(merged, self.out_proj.weight, self.out_proj.bias)
        return (out.squeeze(batch_axis) if unbatched else out), None

    def _reads_many(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> bool:
        """Whether few queries read one longer sequence, of which no mask but a bool one of its tokens hides any."""
        length_axis = 1 if self.batch_first else 0
        plain = key_padding_mask is None or key_padding_mask.dtype == torch.bool
        return (
            key is value and query.ndim == 3 and key.shape[length_axis] >= 4 * query.shape[length_axis] and plain
            and attn_mask is None and self.bias_k is None and not self.add_zero_attn and self.kdim == self.vdim <= MAX_CHANNELS
        )  # fmt: skip

    def _read(self, query: Tensor, inputs: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """The result where keys and values are one tensor; their projections may then be absorbed by the queries."""
        if not self.batch_first:
            query, inputs = query.transpose(0, 1), inputs.transpose(0, 1)
        E, bias = self.embed_dim, self.in_proj_bias
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
        weight = self.in_proj_weight
        w_q, w_k, w_v = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.split(E)
        )
        attended = functional.input_cross_attention(
            linear(query, w_q, b_q).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2), inputs, w_k, w_v,
            b_k=b_k, b_v=b_v, normalize=False, key_mask=None if key_padding_mask is None else ~key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        out = linear(attended.transpose(1, 2).flatten(-2), self.out_proj.weight, self.out_proj.bias)
        return out if self.batch_first else out.transpose(0, 1)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of all heads, [..., embed_dim]."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return linear(query, weight, bias).chunk(3, -1)
        elif key is value:
            E = self.embed_dim
            both = linear(key, weight[E:], None if bias is None else bias[E:])
            return linear(query, weight[:E], biases[0]), *both.chunk(2, -1)
        else:
            weights = weight.chunk(3)
        return tuple(linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _with_extra_tokens(self, x: Tensor, learned: Tensor | None) -> Tensor:
        """Keys or values [B, H, Lk, d] with the learned one and the one of zeros appended, where there are such."""
        if learned is not None:
            x = torch.cat((x, learned.view(1, self.num_heads, 1, self.head_dim).expand(x.shape[0], -1, -1, -1)), 2)
        return pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:  # fmt: skip
        check_is_tensor("query", query)
        if query.ndim not in (2, 3):
            raise ValueError(f"query must be a sequence [Lq, embed_dim] or a batch of them, got {tuple(query.shape)}")
        batched = query.ndim == 3
        axes = ("B, {}, {}" if self.batch_first else "{}, B, {}") if batched else "{}, {}"
        weight = self.out_proj.weight
        check_sequence("query", query, axes.format("Lq", "embed_dim"), self.embed_dim, weight)
        check_sequence("key", key, axes.format("Lk", "kdim"), self.kdim, weight)
        check_sequence("value", value, axes.format("Lk", "vdim"), self.vdim, weight)
        length_axis = 1 if batched and self.batch_first else 0
        B = query.shape[1 - length_axis] if batched else 1
        Lq, Lk = query.shape[length_axis], key.shape[length_axis]
        sizes = ((B, Lk) if self.batch_first else (Lk, B)) if batched else (Lk,)
        check_shape("key", key, axes.format("Lk", "kdim"), (*sizes, self.kdim))
        check_shape("value", value, axes.format("Lk", "vdim"), (*sizes, self.vdim))
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is None:
                continue
            check_is_tensor(name, mask)
            check_device(name, mask, "query", query)
            if mask.dtype not in (torch.bool, torch.float32, query.dtype, autocast_dtype(query)):
                raise TypeError(f"{name} must be bool, float32 or query's dtype {query.dtype}, got {mask.dtype}")
        if key_padding_mask is not None:
            check_shape("key_padding_mask", key_padding_mask, "B, Lk" if batched else "Lk", (B, Lk) if batched else (Lk,))
        if attn_mask is not None and tuple(attn_mask.shape) not in ((Lq, Lk), (B * self.num_heads, Lq, Lk)):
            allowed = f"[Lq, Lk] = {(Lq, Lk)} or [B*H, Lq, Lk] = {(B * self.num_heads, Lq, Lk)}"
            raise ValueError(f"attn_mask must be {allowed}, got {tuple(attn_mask.shape)}")
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal, which says that it is causal, got None")
