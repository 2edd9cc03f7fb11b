"""Models built from the layers of ``perceiver_kernels.nn``."""

from perceiver_kernels.models.linformer import Linformer, LinformerConfig, LinformerLM, LinformerLMConfig
from perceiver_kernels.models.perceiver import Perceiver, PerceiverConfig
from perceiver_kernels.models.rin import RIN, RINConfig
from perceiver_kernels.models.set_transformer import SetTransformer, SetTransformerConfig
from perceiver_kernels.models.vecset import LatentDistribution, VecSetAutoencoder, VecSetConfig

__all__ = [
    "RIN",
    "LatentDistribution",
    "Linformer",
    "LinformerConfig",
    "LinformerLM",
    "LinformerLMConfig",
    "Perceiver",
    "PerceiverConfig",
    "RINConfig",
    "SetTransformer",
    "SetTransformerConfig",
    "VecSetAutoencoder",
    "VecSetConfig",
]
