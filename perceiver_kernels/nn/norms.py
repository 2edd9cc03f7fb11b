"""The norms that layers put before their products, by name."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from perceiver_kernels.nn.checks import check_choice

NormKind = Literal["layer", "rms"]


def make_norm(kind: NormKind | None, dim: int, eps: float, **where: Any) -> nn.Module | None:
    """A norm over the last ``dim`` channels: "layer" is LayerNorm, "rms" RMSNorm (no mean, no bias), None none.

    Args:
        where: device and dtype of its parameters.

    Raises:
        ValueError: another kind.

    Source: Layer Normalization, arXiv 1607.06450; RMSNorm, arXiv 1910.07467.
    """
    if kind is None:
        return None
    check_choice("norm", kind, ("layer", "rms"))
    return nn.LayerNorm(dim, eps, **where) if kind == "layer" else nn.RMSNorm(dim, eps, **where)
