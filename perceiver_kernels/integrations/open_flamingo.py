"""OpenFlamingo's helpers: attention of its resampler, and of text to media."""

from __future__ import annotations

import torch
from open_flamingo.src.helpers import MaskedCrossAttention, PerceiverAttention
from torch import Tensor

from perceiver_kernels.integrations import flamingo
from perceiver_kernels.integrations.adapter import Adapter


class FusedPerceiverAttention(PerceiverAttention):
    """Latents read media and themselves, two segments of keys."""

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """As the original's."""
        return flamingo.resample(self, x, latents)


class FusedMaskedCrossAttention(MaskedCrossAttention):
    """Text reads the media that came before it."""

    def forward(
        self, x: Tensor, media: Tensor, media_locations: Tensor | None = None, use_cached_media: bool = False
    ) -> Tensor:
        """As the original's."""
        if media_locations is None and not use_cached_media:
            raise ValueError("media_locations must be given without use_cached_media, got None")
        time: Tensor | None = None
        if media_locations is not None and use_cached_media:
            # All of this text comes after the last medium.
            time = torch.count_nonzero(media_locations, dim=1)[:, None].expand(x.shape[:2])
        elif media_locations is not None:
            time = flamingo.text_time_of(media_locations, x)
        return flamingo.read_media(self, x, media, time)


ADAPTERS = [
    Adapter(PerceiverAttention, FusedPerceiverAttention, flamingo.RESAMPLES, flamingo.refuses_resampling),
    Adapter(MaskedCrossAttention, FusedMaskedCrossAttention, flamingo.READS_MEDIA, flamingo.refuses_reading),
]
