"""Tests of this folder need TRITON_INTERPRET=1 before Triton is imported: a process of their own (``make test``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perceiver_kernels.backends.triton import interpreted

HERE = Path(__file__).parent


PATCHED: set[str] = set()


def _call_a_step(self: Any, *args: Any, **options: Any) -> Any:
    """A jit function that a kernel calls. Triton 3.6 patches its language again at each call, a third of all time.

    The launch of the kernel has patched what ours see; what functions of Triton's own modules see stays patched.
    """
    if self.fn.__module__ not in PATCHED:
        PATCHED.add(self.fn.__module__)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **options)


if interpreted():
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction

    InterpretedFunction.__call__ = _call_a_step
    # The interpreter computes whether sums overflow, another third, and without ``debug`` asserts nothing.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        # The interpreter computes on numpy arrays, whose warnings about -inf and NaN say nothing of the kernels.
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"))
        if not interpreted():
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1, in a process of its own"))
