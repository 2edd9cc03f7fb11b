"""What replacing a model's attention did, and its way back."""

from __future__ import annotations

import warnings
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
    _undo: list[Callable[[], str | None]] = field(default_factory=list, repr=False)
    """Each puts one thing back, or returns the name of the module that it had to leave."""

    def undo(self) -> None:
        """Put everything back as it was; again, or after a dry run, it does nothing.

        A module whose class something else has changed since, as parametrizations and FSDP do, is left as it is, with a warning
        that names it: it would lose what was put there. Where that has been taken away, another ``undo`` puts it back.
        """
        left = [(back, name) for back in reversed(self._undo) if (name := back()) is not None]
        self._undo = [back for back, _ in reversed(left)]
        if left:
            names = ", ".join(name or "(the model)" for _, name in reversed(left))
            warnings.warn(f"left as they are, since something else has changed their class since: {names}", stacklevel=2)

    def __str__(self) -> str:
        if not self.converted and not self.kept:
            return "nothing to convert: the model has no attention that is known here"
        told = "would be converted" if self.dry_run else "converted"
        lines = [f"{len(self.converted)} {told}, {len(self.kept)} left alone"]
        for title, entries in ((told, self.converted), ("left alone", self.kept)):
            for (kind, reason), names in _grouped(entries).items():
                lines.append(f"{title}: {kind}: {reason}")
                lines += [f"    {name}" for name in _runs(names)]
        return "\n".join(lines)


def _runs(names: list[str]) -> list[str]:
    """Names in one line each; those that differ in a last number, which goes up by one, as "layers.0..5"."""
    found: list[tuple[str, int, int]] = []
    for name in names:
        stem, _, last = name.rpartition(".")
        number = int(last) if last.isdecimal() else -1
        if found and number > 0 and found[-1][0] == stem and found[-1][2] == number - 1:
            found[-1] = (stem, found[-1][1], number)
        else:
            found.append((stem if number >= 0 else name, number, number))
    return [
        (stem or "(the model)") if first < 0 else f"{stem}.{first}{f'..{last}' if first < last else ''}".removeprefix(".")
        for stem, first, last in found
    ]


def _grouped(entries: list[Entry]) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        groups.setdefault((entry.kind, entry.reason), []).append(entry.name)
    return groups
