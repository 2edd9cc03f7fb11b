"""What tests do to layers and models, ours and other libraries'."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def perturbed(module: M, seed: int = 0, scale: float = 0.3) -> M:
    """The module itself with noise on every parameter: no bias is zero and no norm's weight is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return module
