"""Models built from the layers of ``perceiver_kernels.nn``."""

from perceiver_kernels.models.encoder import EncoderConfig, PerceiverEncoder
from perceiver_kernels.models.generation import CachedDecoder, LatentWindow, filter_logits
from perceiver_kernels.models.heads import ClassHead, FlowHead, MultimodalHead, PatchHead, PlainHead, Source, TokenHead
from perceiver_kernels.models.linformer import Linformer, LinformerConfig, LinformerLM, LinformerLMConfig
from perceiver_kernels.models.multimodal import MultimodalPreprocessor
from perceiver_kernels.models.perceiver import Perceiver, PerceiverConfig
from perceiver_kernels.models.perceiver_ar import PerceiverAR
from perceiver_kernels.models.perceiver_ar_config import PerceiverARConfig
from perceiver_kernels.models.perceiver_io import Encoded, PerceiverIO
from perceiver_kernels.models.preprocessing import (
    ArrayPreprocessor,
    AudioPreprocessor,
    ConvPreprocessor,
    FlowPreprocessor,
    LabelPreprocessor,
    LearnedPreprocessor,
    PixelPreprocessor,
    PointPreprocessor,
    TextPreprocessor,
    VideoPreprocessor,
    flow_patches,
)
from perceiver_kernels.models.queries import FourierQueries, GivenQueries, InputQueries, LearnedQueries, MultimodalQueries
from perceiver_kernels.models.resampler import PerceiverResampler, PerceiverResamplerConfig
from perceiver_kernels.models.rin import RIN, RINConfig
from perceiver_kernels.models.sequence_positions import SequencePositions
from perceiver_kernels.models.set_transformer import SetTransformer, SetTransformerConfig
from perceiver_kernels.models.vecset import LatentDistribution, VecSetAutoencoder, VecSetConfig

__all__ = [
    "ArrayPreprocessor",
    "AudioPreprocessor",
    "CachedDecoder",
    "ClassHead",
    "ConvPreprocessor",
    "Encoded",
    "EncoderConfig",
    "FlowHead",
    "FlowPreprocessor",
    "FourierQueries",
    "GivenQueries",
    "InputQueries",
    "LabelPreprocessor",
    "LatentDistribution",
    "LatentWindow",
    "LearnedPreprocessor",
    "LearnedQueries",
    "Linformer",
    "LinformerConfig",
    "LinformerLM",
    "LinformerLMConfig",
    "MultimodalHead",
    "MultimodalPreprocessor",
    "MultimodalQueries",
    "PatchHead",
    "Perceiver",
    "PerceiverAR",
    "PerceiverARConfig",
    "PerceiverConfig",
    "PerceiverEncoder",
    "PerceiverIO",
    "PerceiverResampler",
    "PerceiverResamplerConfig",
    "PixelPreprocessor",
    "PlainHead",
    "PointPreprocessor",
    "RIN",
    "RINConfig",
    "SequencePositions",
    "SetTransformer",
    "SetTransformerConfig",
    "Source",
    "TextPreprocessor",
    "TokenHead",
    "VecSetAutoencoder",
    "VecSetConfig",
    "VideoPreprocessor",
    "filter_logits",
    "flow_patches",
]
