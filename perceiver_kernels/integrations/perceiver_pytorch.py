"""perceiver-pytorch: its attention, and the context that its models' layers read, packed once for all of them."""

from __future__ import annotations

from typing import Any

import torch
from perceiver_pytorch import gated, mixed_latents, perceiver_io, perceiver_pytorch
from torch import Tensor, nn

from perceiver_kernels.functional.common import autocast_dtype
from perceiver_kernels.functional.heads import merge_heads, split_heads
from perceiver_kernels.integrations.adapter import SHADOW, Adapter, are_plain, bypassed, dropout_of, dropping, unlike
from perceiver_kernels.integrations.assembly import LinearRows, cross_attention_of, heads_of, output_attention_of
from perceiver_kernels.integrations.filled import attend_filled
from perceiver_kernels.integrations.sharing import SharedContext, packed_context
from perceiver_kernels.nn import CrossAttention, OutputCrossAttention
from perceiver_kernels.problem import MAX_CHANNELS


def _drops(attention: Any) -> float:
    """That of perceiver_io has no dropout."""
    return dropout_of(getattr(attention, "dropout", None))


def _is_plain_mask(mask: Tensor | None) -> bool:
    return mask is None or mask.dtype == torch.bool


class _Attention(nn.Module):
    """Attention alone; ``inverted_attention`` and a dropout of everything as the original has them."""

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, inverted_attention: bool = False
    ) -> Tensor:
        """As the original's."""
        own: Any = self
        read = x if context is None else context
        dropout_p = _drops(self)
        if inverted_attention or dropout_p == 1.0 or not _is_plain_mask(mask) or read.shape[0] != x.shape[0]:
            return super().forward(x, context=context, mask=mask, inverted_attention=inverted_attention)
        key: Any
        value: Any
        if read is x:
            query, key, value = heads_of(x, own.heads, (own.to_q, 1), (own.to_kv, 2))
        else:
            query = split_heads(own.to_q(x), own.heads)
            key, value = heads_of(read, own.heads, (own.to_kv, 2))
        seen = None if mask is None else mask.flatten(1).expand(x.shape[0], -1)
        if getattr(self, "queries_contribute_kv", False) and context is not None:
            own_key, own_value = heads_of(x, own.heads, (own.to_kv, 2))
            key, value = (own_key, key), (own_value, value)
            seen = None if seen is None else torch.cat((seen.new_ones(x.shape[:2]), seen), 1)
        return own.to_out(merge_heads(attend_filled(query, key, value, seen, dropout_p=dropout_p)))


class _PreNorm(nn.Module):
    """LayerNorms around attention to a context, fused with it."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """As the original's."""
        own: Any = self
        context, mask = options.get("context"), options.get("mask")
        dropout_p = _drops(own.fn)
        if (
            context is None or options.get("inverted_attention") or getattr(own.fn, "queries_contribute_kv", False)
            or dropout_p == 1.0 or context.shape[0] != x.shape[0] or not _is_plain_mask(mask)
        ):  # fmt: skip
            return super().forward(x, **options)
        layers: _Readers = self.__dict__[SHADOW]
        if layers.parts != (parts := _parts_of(self)) or not are_plain(*parts):
            # An adapter's have taken the place of some since, or hooks have come.
            return super().forward(x, **options)
        # One set of latents for the whole batch is projected once.
        shared = x.stride(0) == 0 and not (x.is_leaf and x.requires_grad)
        latents = x[:1] if shared else x
        if context.shape[1] < x.shape[1] and mask is None:
            return dropping(layers.output, dropout_p)(latents, context)
        if context.shape[1] < x.shape[1] or layers.input is None:
            return super().forward(x, **options)
        read = packed_context(
            context, mask, normalize=True, eps=layers.input.eps, dtype=autocast_dtype(x) or x.dtype
        )
        normed = own.norm(latents)
        if read.blind is not None:
            # Queries of zeros, there is no bias: what is hidden from an entry altogether is read evenly, as the original does.
            normed = torch.where(read.blind[:, None, None], 0.0, normed)
        return dropping(layers.input, dropout_p)(normed, read.packed)


class _Readers:
    """A layer for few queries of many inputs, without the norm of the queries, and one for many queries of few.

    None where the inputs have more channels than a layer reads.
    """

    def __init__(self, normed: Any) -> None:
        self.parts = _parts_of(normed)
        attention = normed.fn
        width = attention.to_q.out_features
        parts = {
            "q_proj": attention.to_q, "k_proj": LinearRows(attention.to_kv, 0, width),
            "v_proj": LinearRows(attention.to_kv, width, 2 * width), "out_proj": attention.to_out,
            "num_heads": attention.heads, "residual": False,
        }  # fmt: skip
        self.input: CrossAttention | None = None
        if attention.to_kv.in_features <= MAX_CHANNELS:
            self.input = cross_attention_of(norm_latents=None, norm_inputs=normed.norm_context, **parts)
        self.output: OutputCrossAttention = output_attention_of(
            norm_queries=normed.norm, norm_latents=normed.norm_context, **parts
        )


def _parts_of(normed: Any) -> tuple[nn.Module, ...]:
    return normed.norm, normed.norm_context, normed.fn.to_q, normed.fn.to_kv, normed.fn.to_out


class FusedAttention(_Attention, perceiver_pytorch.Attention):
    """Of Perceiver and its variants."""


class FusedIOAttention(_Attention, perceiver_io.Attention):
    """Of PerceiverIO's decoder."""


class FusedPreNorm(_PreNorm, perceiver_pytorch.PreNorm):
    """Of Perceiver and its variants."""


class FusedIOPreNorm(_PreNorm, perceiver_io.PreNorm):
    """Of PerceiverIO's decoder."""


class SharingPerceiver(SharedContext, perceiver_pytorch.Perceiver):
    """The model."""


class SharingGatedPerceiver(SharedContext, gated.Perceiver):
    """The model with gated residuals."""


class SharingMixedPerceiver(SharedContext, mixed_latents.Perceiver):
    """The model whose latents are mixed."""


def _refuses_attention(attention: Any) -> str | None:
    reason = unlike(attention, to_q=nn.Linear, to_kv=nn.Linear, to_out=nn.Linear)
    return reason or (unlike(attention, dropout=nn.Dropout) if hasattr(attention, "dropout") else None)


def _refuses_pre_norm(normed: Any) -> str | None:
    parts = {"norm": nn.LayerNorm, "norm_context": nn.LayerNorm}
    return bypassed(normed) or unlike(normed, **parts) or _refuses_attention(normed.fn)


def _reads_context(normed: Any) -> bool:
    """Its other uses hold no attention, or attention that is replaced by itself."""
    kinds = (perceiver_pytorch.Attention, perceiver_io.Attention, FusedAttention, FusedIOAttention)
    return normed.norm_context is not None and type(normed.fn) in kinds


_ATTENTION = "fused attention; the original where inverted_attention asks for it"
_CONTEXT = "LayerNorms and projections fused with attention to a context; the original where inverted_attention asks for it"
_MODEL = "the inputs packed once for all layers; Fourier features are made at every call, inside the original's forward"

ADAPTERS = [
    Adapter(perceiver_pytorch.Attention, FusedAttention, _ATTENTION, _refuses_attention),
    Adapter(perceiver_io.Attention, FusedIOAttention, _ATTENTION, _refuses_attention),
    # Attention inside is replaced by itself too: it serves what is not fused with the norms.
    *(
        Adapter(original, replacement, _CONTEXT, _refuses_pre_norm, _Readers, whole=False, concerns=_reads_context)
        for original, replacement in (
            (perceiver_pytorch.PreNorm, FusedPreNorm), (perceiver_io.PreNorm, FusedIOPreNorm),
        )
    ),
    *(
        Adapter(original, replacement, _MODEL, whole=False)
        for original, replacement in (
            (perceiver_pytorch.Perceiver, SharingPerceiver), (gated.Perceiver, SharingGatedPerceiver),
            (mixed_latents.Perceiver, SharingMixedPerceiver),
        )
    ),
]  # fmt: skip
