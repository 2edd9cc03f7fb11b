"""Rotary embedding: pairs of channels turned by an angle that depends on the position."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.reference.inputs import widen


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False) -> Tensor:
    """Pairs of the first r channels turned by their token's angles; the other channels as they are.

    y1 = x1 cos - x2 sin,   y2 = x1 sin + x2 cos;   inverse: sin -> -sin, the transposed matrix

    Args:
        x: float [..., L, d].
        cos, sin: float, broadcastable to [..., L, r / 2], with 2 <= r <= d.
        interleaved: pair i is channels (2 i, 2 i + 1), not (i, i + r / 2).
        inverse: turn back.

    Returns:
        [..., L, d] in x's dtype, computed in fp32 (fp64 for fp64 x) and rounded once.

    Source: RoFormer, arXiv 2104.09864, section 3.4.2, equation 34; pairs (i, i + r / 2) as in GPT-NeoX.
    """
    width = 2 * cos.shape[-1]
    turned = widen(x[..., :width])
    cos, sin = cos.to(turned.dtype), sin.to(turned.dtype)
    sin = -sin if inverse else sin
    x1, x2 = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pairs = x1 * cos - x2 * sin, x1 * sin + x2 * cos
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([turned.to(x.dtype), x[..., width:]], -1)
