"""What flamingo-pytorch and OpenFlamingo share: latents that read media and themselves, and text that reads the media."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels import functional
from perceiver_kernels.functional.heads import merge_heads, split_heads
from perceiver_kernels.integrations.adapter import unlike
from perceiver_kernels.integrations.assembly import heads_of

RESAMPLES = "fused attention over media and latents as two segments of keys"
READS_MEDIA = "fused attention of text to media, no scores and no mask for each head"


def attend_segments(
    queries: Tensor, segments: Iterable[Sequence[Tensor]], num_heads: int, scale: float | None = None
) -> Tensor:
    """Attention over segments of keys and values as if they were concatenated.

    Args:
        queries: [B, N, H*d].
        segments: keys and values of two, [B, L, H*d] each.
        num_heads: H.
        scale: factor on the scores; 1/sqrt(d) when None.

    Returns:
        [B, N, H*d].
    """
    keys, values = zip(*([split_heads(part, num_heads) for part in pair] for pair in segments), strict=True)
    return merge_heads(functional.attention(split_heads(queries, num_heads), keys, values, scale=scale))


def resample(module: Any, media: Tensor, latents: Tensor) -> Tensor:
    """``PerceiverAttention`` of these libraries: latents read media and, after them, themselves.

    Args:
        module: has norm_media, norm_latents, to_q, to_kv, to_out, heads and scale.
        media: [B, T, M, D].
        latents: [B, T, N, D].

    Returns:
        [B, T, N, D].

    Raises:
        ValueError: other axes.
    """
    for name, tensor, axes in (("x", media, "[B, T, M, D]"), ("latents", latents, "[B, T, N, D]")):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be {axes}, got {tuple(tensor.shape)}")
    if media.shape[:2] != latents.shape[:2]:
        raise ValueError(f"latents must have x's [B, T]={tuple(media.shape[:2])}, got {tuple(latents.shape[:2])}")
    context, own = module.norm_media(media).flatten(0, 1), module.norm_latents(latents).flatten(0, 1)
    segments = (module.to_kv(tokens).chunk(2, -1) for tokens in (context, own))
    attended = attend_segments(module.to_q(own), segments, module.heads, module.scale)
    return module.to_out(attended).unflatten(0, latents.shape[:2])


def read_media(module: Any, text: Tensor, media: Tensor, text_time: Tensor | None) -> Tensor:
    """``MaskedCrossAttention`` of these libraries: every token of a text reads the last medium before it, or all before it.

    Args:
        module: has norm, to_q, to_kv, to_out, heads, scale and only_attend_immediate_media.
        text: [B, L, D].
        media: [B, T, M, D_media].
        text_time: integers [B, L], media that came up to a token, itself included; None: every token reads all media.

    Returns:
        [B, L, D].
    """
    if media.ndim != 4:
        raise ValueError(f"media must be [B, T, M, D], got {tuple(media.shape)}")
    queries = split_heads(module.to_q(module.norm(text)), module.heads)
    keys, values = heads_of(media.flatten(1, 2), module.heads, (module.to_kv, 2))
    masks: dict[str, Any] = {}
    if text_time is not None:
        immediate = module.only_attend_immediate_media
        # The originals' masked scores of such a token are all the same number: it reads the mean of all values.
        reads_mean = text_time > media.shape[1] if immediate else text_time == 0
        queries = queries.masked_fill(reads_mean[:, None, :, None], 0.0)
        masks = _masks(text_time, reads_mean, media.shape[1], media.shape[2], immediate)
    attended = functional.attention(queries, keys, values, scale=module.scale, **masks)
    return module.to_out(merge_heads(attended))


def _masks(text_time: Tensor, reads_mean: Tensor, T: int, M: int, immediate: bool) -> dict[str, Any]:
    """Which of T x M tokens of media the tokens of a text see; none where they read the last medium and none came."""
    if T == 1:
        # All tokens of the one medium alike: nothing is held for each pair.
        return {"query_mask": text_time > 0} if immediate else {}
    media_time = torch.arange(T * M, device=text_time.device) // M + 1
    time = text_time[..., None]
    seen = time == media_time if immediate else time >= media_time  # [B, L, T*M]
    return {"attn_mask": (seen | reads_mean[..., None])[:, None]}


def text_time_of(media_locations: Tensor, text: Tensor) -> Tensor:
    """How many media came up to each token of a text [B, L, D], for bool ``media_locations`` [B or 1, L] where they come."""
    B, L = text.shape[:2]
    if tuple(media_locations.shape) not in ((B, L), (1, L)):
        raise ValueError(f"media_locations must be [B, L] with B={B} or 1, L={L}, got {tuple(media_locations.shape)}")
    return media_locations.cumsum(-1).expand(B, L)


def refuses_resampling(module: Any) -> str | None:
    """Why a ``PerceiverAttention`` is left alone, or None."""
    return unlike(
        module, norm_media=nn.LayerNorm, norm_latents=nn.LayerNorm, to_q=nn.Linear, to_kv=nn.Linear, to_out=nn.Linear
    )


def refuses_reading(module: Any) -> str | None:
    """Why a ``MaskedCrossAttention`` is left alone, or None."""
    return unlike(module, norm=nn.LayerNorm, to_q=nn.Linear, to_kv=nn.Linear, to_out=nn.Linear)
