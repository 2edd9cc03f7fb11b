"""Models built from the layers of ``perceiver_kernels.nn``."""

from perceiver_kernels.models.perceiver import Perceiver, PerceiverConfig
from perceiver_kernels.models.set_transformer import SetTransformer, SetTransformerConfig

__all__ = ["Perceiver", "PerceiverConfig", "SetTransformer", "SetTransformerConfig"]
