"""What all problems share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar


@dataclass(frozen=True)
class Problem:
    """Base of all problems; ``SIZES`` names the fields that vary between calls of the same compiled model."""

    OP: ClassVar[str] = ""
    SIZES: ClassVar[tuple[str, ...]] = ()
    FIELDS: ClassVar[tuple[str, ...]] = ()

    def static_values(self) -> tuple[Any, ...]:
        """The field values with every size replaced by -1: what choosing a backend may depend on."""
        sizes = self.SIZES
        return tuple([-1 if name in sizes else getattr(self, name) for name in self.FIELDS])

    def with_sizes(self, **sizes: int) -> Any:
        return replace(self, **sizes)
