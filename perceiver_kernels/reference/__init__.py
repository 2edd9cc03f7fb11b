"""The specification: every operation as its equation, in plain PyTorch.

Products run in the dtype of their operands and round as eager PyTorch does; softmax and statistics run in
fp32 or wider. Autograd of these functions defines every gradient, of any order.
"""

from perceiver_kernels.reference.attention import (
    attention,
    input_cross_attention,
    output_cross_attention,
    shared_kv_attention,
    visible_keys,
    visible_pairs,
)
from perceiver_kernels.reference.dropout import draw_seed, dropout_keep, philox
from perceiver_kernels.reference.inputs import fourier_features, layer_norm, pack_inputs
from perceiver_kernels.reference.rotary import rotary_embedding

__all__ = [
    "attention",
    "draw_seed",
    "dropout_keep",
    "fourier_features",
    "input_cross_attention",
    "layer_norm",
    "output_cross_attention",
    "pack_inputs",
    "philox",
    "rotary_embedding",
    "shared_kv_attention",
    "visible_keys",
    "visible_pairs",
]
