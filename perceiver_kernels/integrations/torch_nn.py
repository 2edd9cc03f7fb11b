"""torch.nn: MultiheadAttention, and the encoder layer that does not always call it."""

from __future__ import annotations

from torch import nn

from perceiver_kernels.integrations.adapter import Adapter, unlike
from perceiver_kernels.nn import MultiheadAttention

BYPASS = (
    "in eval() without gradients or autocast torch runs the whole layer as one operator of its own, which does not call "
    "self_attn; torch.backends.mha.set_fastpath_enabled(False) makes it call it"
)


def _refuses(module: nn.MultiheadAttention) -> str | None:
    return unlike(module, out_proj=nn.modules.linear.NonDynamicallyQuantizableLinear)


def _may_bypass(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether torch may run a layer as one operator of its own in inference, by what the layer's forward asks of itself."""
    attention = layer.self_attn
    plain = isinstance(attention, nn.MultiheadAttention) and attention.batch_first and attention.in_proj_bias is not None
    return bool(
        plain and attention._qkv_same_embed_dim and attention.num_heads % 2 == 0 and layer.activation_relu_or_gelu
        and layer.norm1.eps == layer.norm2.eps
    )  # fmt: skip


ADAPTERS = [
    Adapter(
        nn.MultiheadAttention,
        MultiheadAttention,
        "fused attention where need_weights=False; torch's own forward, which holds the weights, where they are asked for",
        _refuses,
    ),
    Adapter(
        nn.TransformerEncoderLayer,
        None,
        "",
        lambda layer: BYPASS,
        concerns=_may_bypass,
    ),
]
