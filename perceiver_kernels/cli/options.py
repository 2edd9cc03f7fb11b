"""Types of the options: each reads the text of one and raises a CommandError that says which rule it breaks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from typing import Any

from perceiver_kernels.cli.report import CommandError, unknown_name
from perceiver_kernels.cli.stock import Peer

LONGEST_SECONDS = 3600.0
"""A longer sample of one implementation is a slip of the keyboard; the samples are limited too."""

LARGEST_SIZE = 2**30
"""More inputs than this no device holds, and the chunks of fake ones alone take minutes to count."""


class Merged(argparse.Action):
    """The action of a list: given again it adds to what was given before, each value once; numbers stay sorted."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        given = before is not self.default
        if given and bool(before) != bool(values):
            raise argparse.ArgumentError(self, f"'none' must stand alone, got {','.join([*before, *values])} too")
        merged = list(dict.fromkeys([*(before if given else ()), *values]))
        setattr(namespace, self.dest, sorted(merged) if self.type is sizes else merged)


class Once(argparse.Action):
    """The action of a file to write: given again it is refused, as one of the two would not be written."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        if before is not self.default:
            raise argparse.ArgumentError(self, f"must be given once, got {before} and {values}")
        setattr(namespace, self.dest, values)


def name_of(kind: str, known: Collection[str]) -> Callable[[str], str]:
    """Return the type of one name."""

    def read(text: str) -> str:
        if text not in known:
            raise unknown_name(kind, text, known)
        return text

    return read


def names_of(kind: str, known: Collection[str]) -> Callable[[str], list[str]]:
    """Return the type of names separated by commas."""
    read = name_of(kind, known)
    return lambda text: [read(name) for name in _split(text)]


def names(text: str) -> list[str]:
    """Read names separated by commas, which are known to what takes them."""
    return _split(text)


def peers(text: str) -> list[str]:
    """Read names of stock implementations; 'none' is the empty list."""
    return [Peer.parse(name).name for name in names_or_none(text)]


def names_or_none(text: str) -> list[str]:
    """Read names; 'none' is the empty list."""
    found = _split(text)
    if "none" in found and len(found) > 1:
        raise CommandError(f"'none' must stand alone, got {text!r}")
    return [] if found == ["none"] else found


def count(text: str) -> int:
    """Read a whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise CommandError(f"must be a whole number, at least 1, got {text!r}")
    return number


def seconds(text: str) -> float:
    """Read a duration."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= LONGEST_SECONDS:
        raise CommandError(f"must be above 0 and at most {LONGEST_SECONDS:.0f}, got {text!r}")
    return number


def sizes(text: str) -> list[int]:
    """Read whole numbers separated by commas, each with K (2^10), M (2^20) or G (2^30) where wanted: sorted, each once."""
    factors = {"K": 2**10, "M": 2**20, "G": 2**30}
    try:
        numbers = [
            int(part[:-1]) * factors[part[-1]] if part[-1] in factors else int(part) for part in text.upper().split(",")
        ]
    except (ValueError, IndexError):
        raise CommandError(f"must be numbers like 1024,64K,1M, got {text!r}") from None
    if min(numbers) < 1:
        raise CommandError(f"must be at least 1, got {text!r}")
    if max(numbers) > LARGEST_SIZE:
        raise CommandError(f"must be at most {LARGEST_SIZE:,} (1G), got {text!r}")
    return sorted(set(numbers))


def percent(text: str) -> float:
    """Read a percentage from 0 on."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise CommandError(f"must be a percentage, at least 0, got {text!r}")
    return number


def file(text: str) -> str:
    """Read the name of a file, which stdout is none of."""
    if text == "-":
        raise CommandError("must name a file, got '-'")
    return path(text)


def path(text: str) -> str:
    """Read the name of a file or folder."""
    if not text:
        raise CommandError(f"must name a file or folder, got {text!r}")
    return text


def _split(text: str) -> list[str]:
    """The names, each once."""
    found = list(dict.fromkeys(text.split(",")))
    if "" in found and len(found) > 1:
        raise CommandError(f"must be names with one comma between two of them, got {text!r}")
    return found
