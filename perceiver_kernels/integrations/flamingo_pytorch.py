"""flamingo-pytorch: attention of its resampler, and of text to media."""

from __future__ import annotations

from flamingo_pytorch.flamingo_pytorch import MaskedCrossAttention, PerceiverAttention
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

    def forward(self, x: Tensor, media: Tensor, media_locations: Tensor | None = None) -> Tensor:
        """As the original's."""
        time = None if media_locations is None else flamingo.text_time_of(media_locations, x)
        return flamingo.read_media(self, x, media, time)


ADAPTERS = [
    Adapter(PerceiverAttention, FusedPerceiverAttention, flamingo.RESAMPLES, flamingo.refuses_resampling),
    Adapter(MaskedCrossAttention, FusedMaskedCrossAttention, flamingo.READS_MEDIA, flamingo.refuses_reading),
]
