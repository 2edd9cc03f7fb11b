"""The input array: layer normalisation, Fourier features, packing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Layer normalisation over the last axis.

    y = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(mean((x - mean)^2) + eps)

    Args:
        x: float [..., C].
        weight, bias: float [C], or None for 1 and 0.
        eps: added to the variance.

    Returns:
        [..., C] in x's dtype.

    Source: Ba, Kiros, Hinton, arXiv 1607.06450, equation 4, with eps as torch.nn.LayerNorm has it.
    """
    normalized, _ = _standardize(widen(x), eps)
    if weight is not None:
        normalized = normalized * weight
    if bias is not None:
        normalized = normalized + bias
    return normalized.to(x.dtype)


def fourier_features(
    coordinates: Tensor,
    num_bands: int,
    max_resolution: Sequence[float],
    include_raw: bool = True,
    order: Literal["deepmind", "perceiver-pytorch"] = "deepmind",
) -> Tensor:
    """Fourier position features: sines and cosines of every coordinate at num_bands frequencies.

    x_a, sin(pi * f_ab * x_a), cos(pi * f_ab * x_a),   f_ab = linspace(1, max_resolution[a] / 2, num_bands)[b]

    Args:
        coordinates: float [..., axes], usually in [-1, 1].
        num_bands: frequencies for each axis.
        max_resolution: one number for each axis.
        include_raw: whether the coordinates themselves are features too.
        order: "deepmind": [raw | sin by axis | cos by axis]; "perceiver-pytorch": by axis [sin | cos | raw].

    Returns:
        [..., axes * (2 * num_bands + include_raw)], fp64 for fp64 coordinates and fp32 otherwise.

    Source: Perceiver, arXiv 2103.03206, section 3.2. Frequencies are fp32 values, as in DeepMind's code.
    """
    x = widen(coordinates)
    bands = [torch.linspace(1, top / 2, num_bands, dtype=torch.float64) for top in max_resolution]
    phase = math.pi * (x[..., None] * torch.stack(bands).to(x.device, torch.float32))
    if order == "deepmind":
        waves = [phase.sin().flatten(-2), phase.cos().flatten(-2)]
        return torch.cat([x, *waves] if include_raw else waves, -1)
    by_axis = [phase.sin(), phase.cos(), x[..., None]] if include_raw else [phase.sin(), phase.cos()]
    return torch.cat(by_axis, -1).flatten(-2)


def pack_inputs(
    content: Tensor,
    positions: Tensor | None = None,
    fourier: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-5,
    channels_multiple: int = 16,
    constants: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Content and positions side by side, normalised without affine part, padded with zero channels and cast.

    x = [content | positions];   packed = [(x - mean) * rstd | 1 | 0],   mean and rstd over the C real channels

    Args:
        content: float [B, M, C_content]; C_content may be 0.
        positions: float [M, P] or [B, M, P]: position channels, or coordinates when fourier is given.
        fourier: fp32 [3, F], axis a, frequency f and kind of each feature: x_a (0), sin(pi * x_a * f) (1) or
            cos(pi * x_a * f) (2).
        key_mask: bool [B, M], True = visible. Other tokens become zeros, whatever they hold; so does rstd.
        normalize: whether to normalise; False only concatenates, pads and casts.
        eps: added to the variance.
        channels_multiple: C_padded is C + constants rounded up to it.
        constants: channels of ones after the C real ones.
        dtype: of packed; content's when None.

    Returns:
        packed [B, M, C_padded] and rstd [B, M] (fp32, fp64 for fp64 content; [0] without normalize).

    Source: the input array of Perceiver, arXiv 2103.03206, sections 3.1 and 3.2; layer_norm's equation.
    """
    hidden = None if key_mask is None else ~key_mask[..., None]
    x = widen(content)
    if positions is not None:
        positions = positions.to(x.dtype).expand(*x.shape[:2], -1)
    if hidden is not None:
        # Before any arithmetic: 0 * NaN would bring a hidden token's content back.
        x = x.masked_fill(hidden, 0)
        positions = None if positions is None else positions.masked_fill(hidden, 0)
    if positions is not None and fourier is not None:
        axis, frequency, kind = fourier[0].long(), fourier[1].to(x.dtype), fourier[2]
        raw = positions[..., axis]
        phase = math.pi * (raw * frequency)
        positions = torch.where(kind == 0, raw, torch.where(kind == 1, phase.sin(), phase.cos()))
    if positions is not None:
        x = torch.cat([x, positions], -1)
    rstd = x.new_empty(0)
    if normalize:
        x, rstd = _standardize(x, eps)
        rstd = rstd[..., 0] if hidden is None else rstd.masked_fill(hidden, 0)[..., 0]
    if constants:
        x = pad(x, (0, constants), value=1.0)
    if hidden is not None:
        x = x.masked_fill(hidden, 0)
    return pad(x, (0, -x.shape[-1] % channels_multiple)).to(dtype or content.dtype), rstd


def widen(x: Tensor) -> Tensor:
    """x in the dtype that sums and exponentials are taken in: fp64 for fp64, fp32 otherwise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centered = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    return centered * rstd, rstd
