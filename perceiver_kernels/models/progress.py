"""Telling how far a long computation is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], object] | bool | None
"""Called with what is done and what there is in all; True shows a bar by the package rich; None and False say nothing."""


@contextmanager
def reporting(progress: Progress, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function of what is done, which reports it as ``progress`` says.

    Raises:
        TypeError: ``progress`` is neither callable nor a bool nor None.
        ImportError: a bar is wanted and rich is not installed.
    """
    if progress is None or progress is False:
        yield lambda done: None
    elif progress is True:
        try:
            from rich.progress import Progress as Bar
        except ImportError as error:
            raise ImportError("progress=True needs rich: pip install perceiver-kernels[cli]") from error
        with Bar(transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
    elif callable(progress):
        report = progress

        def tell(done: int) -> None:
            report(done, total)

        yield tell
    else:
        raise TypeError(f"progress must be callable with (done, total), a bool or None, got {progress!r}")
