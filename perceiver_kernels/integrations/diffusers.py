"""diffusers: an attention processor, and IP-Adapter Plus' blocks, whose latents read an image's tokens and themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.embeddings import IPAdapterPlusImageProjectionBlock
from torch import Tensor, nn

from perceiver_kernels import functional
from perceiver_kernels.functional.heads import merge_heads, split_heads
from perceiver_kernels.integrations.adapter import Adapter, unlike
from perceiver_kernels.integrations.flamingo import attend_segments

DEFAULT_PROCESSORS = (AttnProcessor, AttnProcessor2_0)


def _masks(attn: Attention, mask: Tensor | None, batch: int, length: int) -> dict[str, Any]:
    """A processor's mask [B or B*H, ..., Lk], bool or added to the scores, as attention takes it; heads share one of B."""
    if mask is None:
        return {}
    heads = 1
    if mask.shape[0] != batch or mask.shape[-1] != length:
        heads, mask = attn.heads, attn.prepare_attention_mask(mask, length, batch)
    mask = mask.reshape(batch, heads, -1, mask.shape[-1])
    if mask.dtype == torch.bool and tuple(mask.shape[1:3]) == (1, 1):
        return {"key_mask": mask[:, 0, 0]}
    return {"attn_mask": mask}


class PerceiverKernelsAttnProcessor:
    """diffusers' default attention processor on these kernels.

    ``replace_attention`` sets it on every ``Attention`` that has the default one; by hand it is
    ``model.set_attn_processor(PerceiverKernelsAttnProcessor())``. The module's layers are called as they are, so that adapters
    on them and their hooks count.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend as ``attn`` is configured.

        Args:
            attn: the module whose layers are used.
            hidden_states: [B, Lq, D], or an image [B, D, height, width].
            encoder_hidden_states: [B, Lk, D_encoder], what is read; None: hidden_states.
            attention_mask: [B or B*H, 1 or Lq, Lk], added to the scores, or bool, True where a key is visible.
            temb: what a spatial norm reads.

        Returns:
            Of hidden_states' shape.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image = hidden_states.shape if hidden_states.ndim == 4 else None
        if image is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        read = hidden_states
        if encoder_hidden_states is not None:
            read = encoder_hidden_states
            if attn.norm_cross is not None:
                read = attn.norm_encoder_hidden_states(read)
        query, key, value = (
            split_heads(x, attn.heads) for x in (attn.to_q(hidden_states), attn.to_k(read), attn.to_v(read))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        masks = _masks(attn, attention_mask, read.shape[0], read.shape[1])
        attended = functional.attention(query, key, value, scale=attn.scale, **masks)
        out = _output(attn, merge_heads(attended))
        if image is not None:
            out = out.transpose(1, 2).reshape(out.shape[0], *image[1:])
        if attn.residual_connection:
            out = out + residual
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def _output(attn: Attention, attended: Tensor) -> Tensor:
    """Projection and dropout."""
    return attn.to_out[1](attn.to_out[0](attended))


def _refuses_attention(attn: Attention) -> str | None:
    kind = type(attn.processor)
    if kind is PerceiverKernelsAttnProcessor:
        return "converted already"
    if kind not in DEFAULT_PROCESSORS:
        return f"its processor is a {kind.__name__}, not a default one"
    if getattr(attn, "to_k", None) is None or getattr(attn, "to_out", None) is None or attn.inner_kv_dim != attn.inner_dim:
        return f"its projections are none that {kind.__name__} runs"
    if kind is AttnProcessor and attn.norm_q is not None:
        return "AttnProcessor leaves out its norms of queries and keys"
    if kind is AttnProcessor2_0 and attn.scale != (attn.inner_dim // attn.heads) ** -0.5:
        return "AttnProcessor2_0 leaves out its scale"
    return None


def _set_processor(attn: Attention) -> Callable[[], None]:
    """Returns the way back."""
    before = attn.processor
    ours: Any = PerceiverKernelsAttnProcessor()
    attn.set_processor(ours)
    return functools.partial(attn.set_processor, before)


class FusedIPAdapterBlock(IPAdapterPlusImageProjectionBlock):
    """Latents read an image's tokens and themselves, two segments of keys."""

    def forward(self, x: Tensor, latents: Tensor, residual: Tensor) -> Tensor:
        """As the original's."""
        attn = self.attn
        if type(attn.processor) not in DEFAULT_PROCESSORS:
            # Somebody has set another one since.
            return super().forward(x, latents, residual)
        context, own = self.ln0(x), self.ln1(latents)
        segments = ((attn.to_k(tokens), attn.to_v(tokens)) for tokens in (context, own))
        latents = _output(attn, attend_segments(attn.to_q(own), segments, attn.heads, attn.scale)) + residual
        return self.ff(latents) + latents


def _refuses_block(block: Any) -> str | None:
    other = unlike(
        block, ln0=nn.LayerNorm, ln1=nn.LayerNorm, attn=Attention, attn__to_q=nn.Linear, attn__to_k=nn.Linear,
        attn__to_v=nn.Linear, attn__to_out__0=nn.Linear,
    )  # fmt: skip
    if other is not None:
        return other
    attn = block.attn
    reason = _refuses_attention(attn)
    if reason is not None:
        return f"attn: {reason}"
    norms = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    if any(norm is not None for norm in norms) or attn.residual_connection or attn.rescale_output_factor != 1:
        return "attn has norms, a residual or a factor, which IP-Adapter's has not"
    return None


ADAPTERS = [
    Adapter(
        IPAdapterPlusImageProjectionBlock, FusedIPAdapterBlock,
        "fused attention over the image's tokens and latents as two segments of keys", _refuses_block,
    ),
    Adapter(
        Attention, None, "PerceiverKernelsAttnProcessor as its processor", _refuses_attention, whole=False,
        changes=_set_processor,
    ),
]  # fmt: skip
