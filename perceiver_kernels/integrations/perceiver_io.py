"""krasserm's perceiver-io: attention with its rotary positions, causal order and cache, and cross-attention with its norms."""

from __future__ import annotations

from typing import Any

import torch
from perceiver.model.core.modules import CrossAttention, KVCache, MultiHeadAttention, PerceiverEncoder
from perceiver.model.core.position import RotaryPositionEmbedding
from perceiver.model.core.utils import ModuleOutput
from torch import Tensor, nn

from perceiver_kernels import functional
from perceiver_kernels import nn as ours
from perceiver_kernels.functional.common import autocast_dtype
from perceiver_kernels.functional.heads import merge_heads, split_heads
from perceiver_kernels.inputs import PackedInputs
from perceiver_kernels.integrations.adapter import SHADOW, Adapter, bypassed, dropout_of, dropping, unlike
from perceiver_kernels.integrations.assembly import Readers, heads_of
from perceiver_kernels.integrations.filled import attend_filled
from perceiver_kernels.integrations.sharing import SharedContext, packed_context


def _turned(x: Tensor, rotary: RotaryPositionEmbedding | None) -> Tensor:
    """x [B, H, L, d], turned as ``rotary.rotate`` does, whose neighbouring channels have one frequency."""
    if rotary is None:
        return x
    length, angles = x.shape[2], rotary.frq_pos_enc
    if type(rotary) is not RotaryPositionEmbedding or angles.shape[2] < length or angles.shape[0] not in (1, x.shape[0]):
        return rotary.rotate(x)
    angles = angles[:, 0, angles.shape[2] - length :] if rotary.right_align else angles[:, 0, :length]
    angles = angles[..., ::2]
    return functional.rotary_embedding(x, angles.cos(), angles.sin(), interleaved=True)


class FusedMultiHeadAttention(MultiHeadAttention):
    """Every option of the original: padding, causal order, rotary positions, keys and values of earlier tokens."""

    def forward(
        self,
        x_q: Tensor,
        x_kv: Tensor,
        pad_mask: Tensor | None = None,
        rot_pos_emb_q: RotaryPositionEmbedding | None = None,
        rot_pos_emb_k: RotaryPositionEmbedding | None = None,
        kv_cache: KVCache | None = None,
    ) -> ModuleOutput:
        """As the original's."""
        dropout_p = dropout_of(self.dropout)
        count = x_kv.shape[1] + (0 if kv_cache is None else kv_cache[0].shape[1])
        if (
            dropout_p == 1.0 or (self.causal_attention and count < x_q.shape[1])
            or (pad_mask is not None and pad_mask.dtype != torch.bool)
        ):  # fmt: skip
            return super().forward(x_q, x_kv, pad_mask, rot_pos_emb_q, rot_pos_emb_k, kv_cache)
        if x_q is x_kv and kv_cache is None:
            query, key, value = heads_of(x_q, self.num_heads, (self.q_proj, 1), (self.k_proj, 1), (self.v_proj, 1))
        else:
            query, key, value = self.q_proj(x_q), self.k_proj(x_kv), self.v_proj(x_kv)
            if kv_cache is not None:
                kv_cache = key, value = torch.cat((kv_cache[0], key), 1), torch.cat((kv_cache[1], value), 1)
            query, key, value = (split_heads(part, self.num_heads) for part in (query, key, value))
        attended = attend_filled(
            _turned(query, rot_pos_emb_q), _turned(key, rot_pos_emb_k), value,
            None if pad_mask is None else (~pad_mask).expand(max(len(query), len(key)), -1),
            causal=self.causal_attention, dropout_p=dropout_p,
        )  # fmt: skip
        return ModuleOutput(last_hidden_state=self.o_proj(merge_heads(attended)), kv_cache=kv_cache)


class FusedCrossAttention(CrossAttention):
    """Norms and projections fused where all of another array is read; else the original around its fused attention."""

    def forward(
        self,
        x_q: Tensor,
        x_kv: Tensor | None = None,
        x_kv_prefix: Tensor | None = None,
        pad_mask: Tensor | None = None,
        rot_pos_emb_q: RotaryPositionEmbedding | None = None,
        rot_pos_emb_k: RotaryPositionEmbedding | None = None,
        kv_cache: KVCache | None = None,
    ) -> ModuleOutput:
        """As the original's."""
        dropout_p = dropout_of(self.attention.dropout)
        options = (pad_mask, rot_pos_emb_q, rot_pos_emb_k, kv_cache)
        if (
            x_kv is None or any(option is not None for option in options) or self.attention.causal_attention
            or dropout_p == 1.0 or x_q.shape[0] not in (1, x_kv.shape[0])
        ):  # fmt: skip
            return super().forward(x_q, x_kv, x_kv_prefix, *options)
        readers, own = self.__dict__[SHADOW], self.attention
        if not readers.are_of(self.q_norm, self.kv_norm, own.q_proj, own.k_proj, own.v_proj, own.o_proj):
            return super().forward(x_q, x_kv, x_kv_prefix, *options)
        layer = readers.of(x_q.shape[1], x_kv.shape[1])
        read: Tensor | PackedInputs = x_kv
        if isinstance(layer, ours.CrossAttention):
            dtype = autocast_dtype(x_q) or x_q.dtype
            read = packed_context(x_kv, None, normalize=True, eps=layer.eps, dtype=dtype).packed
        return ModuleOutput(last_hidden_state=dropping(layer, dropout_p)(x_q, read), kv_cache=None)


class SharingPerceiverEncoder(SharedContext, PerceiverEncoder):
    """The encoder, several of whose layers read the input."""


def _readers(layer: Any) -> Readers:
    own = layer.attention
    return Readers(
        norm_queries=layer.q_norm, norm_inputs=layer.kv_norm, q_proj=own.q_proj, k_proj=own.k_proj, v_proj=own.v_proj,
        out_proj=own.o_proj, num_heads=own.num_heads, residual=False,
    )  # fmt: skip


def _refuses_attention(attention: Any) -> str | None:
    return unlike(
        attention, q_proj=nn.Linear, k_proj=nn.Linear, v_proj=nn.Linear, o_proj=nn.Linear, dropout=nn.Dropout
    )  # fmt: skip


def _refuses_cross_attention(layer: Any) -> str | None:
    kinds = (MultiHeadAttention, FusedMultiHeadAttention)
    reason = bypassed(layer) or unlike(layer, q_norm=nn.LayerNorm, kv_norm=nn.LayerNorm, attention=kinds)
    return reason or _refuses_attention(layer.attention)


ADAPTERS = [
    Adapter(
        MultiHeadAttention, FusedMultiHeadAttention, "fused attention and rotary positions, with the original's cache",
        _refuses_attention,
    ),
    # Attention inside is replaced by itself too: it serves what is not fused with the norms.
    Adapter(
        CrossAttention, FusedCrossAttention,
        "LayerNorms and projections fused with attention where there is no mask, no order, no position and no cache",
        _refuses_cross_attention, _readers, whole=False,
    ),
    Adapter(
        PerceiverEncoder, SharingPerceiverEncoder, "the inputs packed once for all layers that read them", whole=False,
        concerns=lambda encoder: encoder.num_cross_attention_layers > 1,
    ),
]  # fmt: skip
