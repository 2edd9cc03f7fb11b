"""timm: ``AttentionPoolLatent``, latents shared by a batch that read an image's tokens."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn

from perceiver_kernels import functional
from perceiver_kernels.functional.heads import merge_heads, split_heads
from perceiver_kernels.integrations.adapter import Adapter, unlike
from perceiver_kernels.integrations.assembly import heads_of
from perceiver_kernels.nn.called import is_plain
from perceiver_kernels.problem import MAX_CHANNELS


def _masks(attn_mask: Tensor | None, x: Tensor, fused: bool) -> dict[str, Any]:
    """A mask that broadcasts to [B, H, N, M] as attention takes it; one of tokens alone as a mask of keys."""
    if attn_mask is None:
        return {}
    if attn_mask.dtype != torch.bool:
        return {"attn_mask": attn_mask}
    if not fused:
        # There the original adds a boolean mask to the scores, as numbers.
        return {"attn_mask": attn_mask.to(x.dtype)}
    if attn_mask.ndim == 4 and tuple(attn_mask.shape[1:3]) == (1, 1):
        return {"key_mask": attn_mask[:, 0, 0].expand(x.shape[:2])}
    return {"attn_mask": attn_mask}


class FusedAttentionPoolLatent(AttentionPoolLatent):
    """Pooling whose latents are projected once for a batch; keys and values are not computed where that is cheaper."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """As the original's."""
        if self.pos_embed is not None:
            x = x + self.pos_embed.to(x.dtype)
        queries = self.q_norm(split_heads(self.q(self.latent), self.num_heads))  # [1, H, N, d]
        pooled = self.proj_drop(self.proj(merge_heads(self._read(queries, x, attn_mask))))
        if self.mlp is not None:
            pooled = pooled + self.mlp(self.norm(pooled))
        if self.pool == "token":
            return pooled[:, 0]
        return pooled.mean(1) if self.pool == "avg" else pooled

    def _read(self, queries: Tensor, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        """[B, H, N, d] of queries [1, H, N, d] and tokens [B, M, C]."""
        masks = _masks(attn_mask, x, self.fused_attn)
        # What has taken kv's place since may have no weight, or more than one.
        computed = type(self.k_norm) is not nn.Identity or not is_plain(self.kv)
        if "attn_mask" in masks or computed or x.shape[-1] > MAX_CHANNELS:
            key, value = heads_of(x, self.num_heads, (self.kv, 2))
            # torch's fused attention takes no queries of batch 1 beside more keys.
            queries = queries.expand(x.shape[0], -1, -1, -1)
            return functional.attention(queries, self.k_norm(key), value, scale=self.scale, **masks)
        w_k, w_v = self.kv.weight.chunk(2)
        b_k, b_v = (None, None) if self.kv.bias is None else self.kv.bias.chunk(2)
        return functional.input_cross_attention(
            queries, x, w_k, w_v, b_k=b_k, b_v=b_v, normalize=False, scale=self.scale, **masks
        )


def _refuses(module: Any) -> str | None:
    return unlike(module, q=(nn.Linear, nn.Identity), kv=nn.Linear)


ADAPTERS = [
    Adapter(
        AttentionPoolLatent, FusedAttentionPoolLatent,
        "latents projected once for a batch, fused attention, keys and values not computed where that is cheaper", _refuses,
    )
]  # fmt: skip
