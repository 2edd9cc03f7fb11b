"""What every documented function does first: autocast, dropout seeds, key visibility."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.checks import autocasts
from perceiver_kernels.inputs import InputArray


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast, where it is on, makes of ``tensor``; float64 stays, as in torch."""
    if tensor.dtype == torch.float64 or not autocasts(tensor.device):
        return None
    return torch.get_autocast_dtype(tensor.device.type)


def cast_for_autocast(first: Any, *others: Any) -> tuple[Any, ...]:
    """Floating tensors in autocast's dtype where autocast is on for the device of the first; what is no tensor stays."""
    tensors = first, *others
    if not isinstance(first, Tensor) or not autocasts(first.device):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def float_dtype(source: InputArray, dtype: torch.dtype) -> torch.dtype | None:
    """What raw tokens become before their statistics are taken: floats stay (None), bytes turn float32, or float64."""
    if source.content.is_floating_point():
        return None
    return torch.float64 if dtype == torch.float64 else torch.float32


def dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device, dtype=torch.int64)


def visible(key_mask: Tensor | None, lengths: Tensor | None, M: int) -> Tensor | None:
    """Key visibility as a mask, from whichever form was given."""
    if lengths is None:
        return key_mask
    return torch.arange(M, device=lengths.device) < lengths[:, None]
