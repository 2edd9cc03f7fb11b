"""Models built from the layers of ``perceiver_kernels.nn``."""

from perceiver_kernels.models.encoder import EncoderConfig, PerceiverEncoder
from perceiver_kernels.models.perceiver import Perceiver, PerceiverConfig
from perceiver_kernels.models.perceiver_io import PerceiverIO
from perceiver_kernels.models.preprocessing import flow_patches
from perceiver_kernels.models.resampler import PerceiverResampler, PerceiverResamplerConfig

__all__ = [
    "EncoderConfig",
    "Perceiver",
    "PerceiverConfig",
    "PerceiverEncoder",
    "PerceiverIO",
    "PerceiverResampler",
    "PerceiverResamplerConfig",
    "flow_patches",
]
