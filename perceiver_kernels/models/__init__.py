"""Models built from the layers of ``perceiver_kernels.nn``."""

from perceiver_kernels.models.perceiver import Perceiver, PerceiverConfig
from perceiver_kernels.models.resampler import PerceiverResampler, PerceiverResamplerConfig

__all__ = ["Perceiver", "PerceiverConfig", "PerceiverResampler", "PerceiverResamplerConfig"]
