"""What replacing a model's attention did, and its way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One module, or one setting of a model.

    Args:
        name: of the module within the model; "" is the model itself.
        kind: its class.
        reason: what it runs now, or why it was left alone.
    """

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """What was converted, what was not, and why; ``print(report)`` shows both.

    Args:
        converted: what runs on this package now, or would after a dry run.
        kept: attention that was left as it is.
        dry_run: nothing was changed.
    """

    converted: list[Entry] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)
    dry_run: bool = False
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put everything back as it was; again, or after a dry run, it does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        if not self.converted and not self.kept:
            return "nothing to convert: the model has no attention that is known here"
        told = "would be converted" if self.dry_run else "converted"
        lines = [f"{len(self.converted)} {told}, {len(self.kept)} left alone"]
        for title, entries in ((told, self.converted), ("left alone", self.kept)):
            for (kind, reason), names in _grouped(entries).items():
                lines.append(f"{title}: {kind}: {reason}")
                lines += [f"    {name or '(the model)'}" for name in names]
        return "\n".join(lines)


def _grouped(entries: list[Entry]) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        groups.setdefault((entry.kind, entry.reason), []).append(entry.name)
    return groups
