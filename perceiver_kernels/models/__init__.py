"""Models built from the layers of ``perceiver_kernels.nn``."""

from perceiver_kernels.models.encoder import EncoderConfig, PerceiverEncoder
from perceiver_kernels.models.perceiver import Perceiver, PerceiverConfig

__all__ = ["EncoderConfig", "Perceiver", "PerceiverConfig", "PerceiverEncoder"]
