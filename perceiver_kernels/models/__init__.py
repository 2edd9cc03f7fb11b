"""Models built from the layers of ``perceiver_kernels.nn``."""

from perceiver_kernels.models.generation import CachedDecoder, LatentWindow, filter_logits
from perceiver_kernels.models.perceiver import Perceiver, PerceiverConfig
from perceiver_kernels.models.perceiver_ar import PerceiverAR
from perceiver_kernels.models.perceiver_ar_config import PerceiverARConfig
from perceiver_kernels.models.sequence_positions import SequencePositions

__all__ = [
    "CachedDecoder",
    "LatentWindow",
    "Perceiver",
    "PerceiverAR",
    "PerceiverARConfig",
    "PerceiverConfig",
    "SequencePositions",
    "filter_logits",
]
