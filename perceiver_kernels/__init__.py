"""perceiver_kernels: fused kernels for input-to-latent cross-attention (Perceiver and relatives), for PyTorch."""

# The subpackage first: importing it later would replace the function ``backends`` by the module of the same name.
import perceiver_kernels.backends  # noqa: F401
from perceiver_kernels.dispatch import backends, use_backend
from perceiver_kernels.functional import (
    Explanation,
    attention,
    explain,
    input_cross_attention,
    output_cross_attention,
    pack_inputs,
    rotary_embedding,
    scaled_dot_product_attention,
    shared_kv_attention,
)
from perceiver_kernels.inputs import FourierPositions, InputArray, PackedInputs
from perceiver_kernels.integrations import replace_attention, sdpa_override
from perceiver_kernels.positions import rotary_tables
from perceiver_kernels.version import __version__ as __version__

__all__ = [
    "Explanation",
    "FourierPositions",
    "InputArray",
    "PackedInputs",
    "attention",
    "backends",
    "explain",
    "input_cross_attention",
    "output_cross_attention",
    "pack_inputs",
    "replace_attention",
    "rotary_embedding",
    "rotary_tables",
    "scaled_dot_product_attention",
    "sdpa_override",
    "shared_kv_attention",
    "use_backend",
]
