"""What every documented function does first: autocast, dropout seeds, key visibility."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    device_type = tensor.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Floating tensors in autocast's dtype where autocast is on (float64 stays, as in torch)."""
    dtype = autocast_dtype(tensors[0]) if isinstance(tensors[0], Tensor) else None
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device, dtype=torch.int64)


def visible(key_mask: Tensor | None, lengths: Tensor | None, M: int) -> Tensor | None:
    """Key visibility as a mask, from whichever form was given."""
    if lengths is None:
        return key_mask
    return torch.arange(M, device=lengths.device) < lengths[:, None]
