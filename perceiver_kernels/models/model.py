"""What all models have."""

from __future__ import annotations

from torch import nn


class Model(nn.Module):
    """A module that knows its size."""

    def num_params(self) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
