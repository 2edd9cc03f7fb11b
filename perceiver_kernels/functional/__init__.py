"""The documented functions. One call goes problem (checks) -> select (which backend) -> op or composition -> kernel."""

from perceiver_kernels.functional.attention import attention, shared_kv_attention
from perceiver_kernels.functional.cross_attention import input_cross_attention
from perceiver_kernels.functional.explanation import Explanation, explain
from perceiver_kernels.functional.output_attention import output_cross_attention
from perceiver_kernels.functional.packing import pack_inputs
from perceiver_kernels.functional.rotary import rotary_embedding
from perceiver_kernels.functional.sdpa import scaled_dot_product_attention

__all__ = [
    "Explanation",
    "attention",
    "explain",
    "input_cross_attention",
    "output_cross_attention",
    "pack_inputs",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "shared_kv_attention",
]
