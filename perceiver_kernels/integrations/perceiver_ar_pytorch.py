"""perceiver-ar-pytorch: attention of a sequence to a prefix and itself, and to itself, in order, with rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from perceiver_ar_pytorch.perceiver_ar_pytorch import CausalAttention, CausalPrefixAttention
from torch import Tensor, nn

from perceiver_kernels.integrations.adapter import SHADOW, Adapter, dropout_of, dropping, is_still_of, unlike
from perceiver_kernels.nn import JointAttention, Rotary, SelfAttention


def _is_table(positions: Tensor | None, channels: int) -> bool:
    """Whether rotary positions are none, or angles [L, r] of no more channels than a head has."""
    return positions is None or (positions.ndim == 2 and positions.shape[1] <= channels)


def _rotary(angles: Tensor | None) -> Rotary | None:
    """Tables of angles [L, r] or [B, L, r], whose halves are the same."""
    if angles is None:
        return None
    half = angles[..., : angles.shape[-1] // 2]
    return Rotary(half.cos(), half.sin())


class FusedCausalAttention(CausalAttention):
    """LayerNorm, one projection and attention in order."""

    def forward(self, x: Tensor, rotary_pos_emb: Tensor | None = None) -> Tensor:
        """As the original's."""
        layer, dropout_p, length = self.__dict__[SHADOW], dropout_of(self.dropout), x.shape[1]
        short = rotary_pos_emb is not None and rotary_pos_emb.shape[0] < length
        if (
            dropout_p == 1.0 or short or not _is_table(rotary_pos_emb, layer.qk_channels // layer.num_heads)
            or not is_still_of(layer, norm=self.norm, qkv_proj=self.to_qkv, out_proj=self.to_out)
        ):  # fmt: skip
            return super().forward(x, rotary_pos_emb)
        # The sequence is the last of all that the positions are of.
        angles = None if rotary_pos_emb is None else rotary_pos_emb[rotary_pos_emb.shape[0] - length :]
        return dropping(layer, dropout_p)(x, rotary=_rotary(angles))


class FusedCausalPrefixAttention(CausalPrefixAttention):
    """Prefix and sequence are two segments of keys; in training a part of the prefix is left out as the original does."""

    def forward(
        self, x: Tensor, context: Tensor, context_mask: Tensor | None = None, rotary_pos_emb: Tensor | None = None
    ) -> Tensor:
        """As the original's."""
        layer, dropout_p, M = self.__dict__[SHADOW], dropout_of(self.dropout), context.shape[1]
        leaves_out = self.training and self.cross_attn_dropout > 0.0
        length = None if rotary_pos_emb is None else rotary_pos_emb.shape[0]
        if (
            dropout_p == 1.0 or not _is_table(rotary_pos_emb, layer.head_dim) or length not in (None, M + x.shape[1])
            or not self._serves(context_mask, M, leaves_out) or not is_still_of(layer, **_parts_of(self))
        ):  # fmt: skip
            return super().forward(x, context, context_mask, rotary_pos_emb)
        if context_mask is not None and context_mask.shape[1] < M:
            context_mask = F.pad(context_mask, (0, M - context_mask.shape[1]), value=True)
        if leaves_out:
            context, context_mask, rotary_pos_emb = self._some(context, context_mask, rotary_pos_emb)
        return dropping(layer, dropout_p)(x, context, context_mask, _rotary(rotary_pos_emb))

    @staticmethod
    def _serves(mask: Tensor | None, M: int, leaves_out: bool) -> bool:
        """Whether a mask is one of the prefix; a longer one hides the sequence's own tokens too."""
        if mask is None:
            return True
        return mask.dtype == torch.bool and mask.ndim == 2 and (mask.shape[1] == M or (mask.shape[1] < M and not leaves_out))

    def _some(
        self, context: Tensor, mask: Tensor | None, angles: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The tokens of the prefix that are kept, drawn from each entry anew, with their mask and everybody's angles."""
        B, M, _ = context.shape
        count = M - int(M * self.cross_attn_dropout)
        kept = torch.rand(B, M, device=context.device).topk(count, dim=-1).indices.sort().values
        context = context.gather(1, kept[..., None].expand(-1, -1, context.shape[2]))
        mask = None if mask is None else mask.gather(1, kept)
        if angles is not None:
            angles = torch.cat((angles[kept], angles[M:].expand(B, -1, -1)), 1)
        return context, mask, angles


def _self_attention(own: Any) -> SelfAttention:
    width, dim = own.to_out.in_features, own.to_out.out_features
    layer = SelfAttention(dim, own.heads, qk_channels=width, causal=True, residual=False, device="meta")
    layer.norm, layer.qkv_proj, layer.out_proj = own.norm, own.to_qkv, own.to_out
    return layer


def _joint_attention(own: Any) -> JointAttention:
    head_dim = own.to_q.out_features // own.heads
    layer = JointAttention(own.to_q.in_features, own.heads, head_dim=head_dim, causal=True, residual=False, device="meta")
    for name, part in _parts_of(own).items():
        setattr(layer, name, part)
    return layer


def _parts_of(own: Any) -> dict[str, nn.Module]:
    """Of attention to a prefix, by our layer's names."""
    return {
        "norm": own.norm, "norm_context": own.context_norm, "q_proj": own.to_q, "kv_proj": own.to_kv, "out_proj": own.to_out,
    }  # fmt: skip


def _refuses(own: nn.Module) -> str | None:
    return unlike(own, norm=nn.LayerNorm, to_qkv=nn.Linear, to_out=nn.Linear, dropout=nn.Dropout)


def _refuses_prefix(own: nn.Module) -> str | None:
    return unlike(
        own, norm=nn.LayerNorm, context_norm=nn.LayerNorm, to_q=nn.Linear, to_kv=nn.Linear, to_out=nn.Linear,
        dropout=nn.Dropout,
    )  # fmt: skip


ADAPTERS = [
    Adapter(
        CausalAttention, FusedCausalAttention, "fused causal attention and rotary positions", _refuses, _self_attention
    ),
    Adapter(
        CausalPrefixAttention, FusedCausalPrefixAttention,
        "fused causal attention to prefix and sequence as two segments, all heads at once, and rotary positions",
        _refuses_prefix, _joint_attention,
    ),
]  # fmt: skip
