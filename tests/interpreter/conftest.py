"""Tests of this folder need TRITON_INTERPRET=1 before Triton is imported: a process of their own (``make test``)."""

from __future__ import annotations

from pathlib import Path

import pytest

from perceiver_kernels.backends.triton import interpreted

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        # The interpreter computes on numpy arrays, whose warnings about -inf and NaN say nothing of the kernels.
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"))
        if not interpreted():
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1, in a process of its own"))
