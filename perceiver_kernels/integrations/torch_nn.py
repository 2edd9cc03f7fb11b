"""torch.nn: MultiheadAttention."""

from __future__ import annotations

from torch import nn

from perceiver_kernels.integrations.adapter import Adapter, unlike
from perceiver_kernels.nn import MultiheadAttention


def _refuses(module: nn.MultiheadAttention) -> str | None:
    return unlike(module, out_proj=nn.modules.linear.NonDynamicallyQuantizableLinear)


ADAPTERS = [
    Adapter(
        nn.MultiheadAttention,
        MultiheadAttention,
        "fused attention where need_weights=False; torch's own forward, which holds the weights, where they are asked for",
        _refuses,
    )
]
