"""What all models have."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

C = TypeVar("C")


def changed(config: type[C], published: Mapping[str, Any], changes: Mapping[str, Any]) -> C:
    """The configuration of published sizes, some of them changed.

    Raises:
        TypeError: a change is no field of ``config``; the nearest fields are named.
    """
    fields = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    for name, value in changes.items():
        if name not in fields:
            near = ", ".join(difflib.get_close_matches(name, fields, cutoff=0.5) or fields)
            raise TypeError(f"changes must be fields of {config.__name__} (nearest: {near}), got {name}={value!r}")
    return config(**{**published, **changes})


class Model(nn.Module):
    """A module that knows its size."""

    def num_params(self) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
