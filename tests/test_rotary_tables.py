"""rotary_tables: angles against fp64, positions that restart or are times, periods, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from perceiver_kernels import rotary_tables

close = torch.testing.assert_close


def test_hand_worked() -> None:
    """Width 4: frequencies 1 and 1/100."""
    cos, sin = rotary_tables(3, 4)
    expected = [[(math.cos(t * f), math.sin(t * f)) for f in (1, 0.01)] for t in range(3)]
    close(torch.stack([cos, sin], -1), torch.tensor(expected))
    assert cos.dtype == sin.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float32], ids=str)
def test_positions_of_any_dtype_and_rank(dtype: torch.dtype) -> None:
    whole = rotary_tables(8, 6)
    for table, expected in zip(rotary_tables(torch.arange(8, dtype=dtype), 6), whole, strict=True):
        assert torch.equal(table, expected)
    for table, expected in zip(rotary_tables(torch.arange(8).view(2, 4).to(dtype), 6), whole, strict=True):
        assert torch.equal(table, expected.view(2, 4, 3))


def test_far_positions_keep_their_angle() -> None:
    """At 10^9 an fp32 angle is off by whole turns."""
    cos, sin = rotary_tables(torch.tensor([10**9]), 2)
    close(cos[0, 0].item(), math.cos(1e9), rtol=1e-6, atol=1e-6)
    close(sin[0, 0].item(), math.sin(1e9), rtol=1e-6, atol=1e-6)


def test_periods_are_inclusive() -> None:
    """A time of one period is a whole turn, of the first pair for the shortest and of the last for the longest."""
    for time, pair in ((1e-4, 0), (4.0, -1)):
        cos, sin = rotary_tables(torch.tensor([time], dtype=torch.float64), 32, periods=(1e-4, 4.0))
        close(cos[0, pair].item(), 1.0, rtol=1e-6, atol=1e-6)
        close(sin[0, pair].item(), 0.0, rtol=1e-6, atol=1e-6)
    assert rotary_tables(3, 2, periods=(2.0, 8.0))[0].shape == (3, 1)


def test_sizes_and_devices() -> None:
    assert [table.shape for table in rotary_tables(0, 2)] == [(0, 1)] * 2
    assert rotary_tables(torch.arange(3), 4, device="meta")[0].device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, 2.0), {}, TypeError, "width must be an integer, got 2.0"),
        ((3, 3), {}, ValueError, "width must be even and at least 2, got 3"),
        ((3, 0), {}, ValueError, "width must be even and at least 2, got 0"),
        ((-1, 2), {}, ValueError, "positions must be a tensor .* or a length, got -1"),
        ((2.5, 2), {}, TypeError, "positions must be a tensor .* or a length, got 2.5"),
        ((torch.zeros(2, 2, 2), 2), {}, ValueError, r"positions must be \[L\] or \[B, L\]"),
        ((torch.zeros(2, dtype=torch.bool), 2), {}, TypeError, "positions must be"),
        ((3, 2), {"base": "10"}, TypeError, "base must be a finite positive number, got '10'"),
        ((3, 2), {"base": 0}, ValueError, "base must be a finite positive number, got 0"),
        ((3, 2), {"periods": (4.0, 1.0)}, ValueError, "periods must be the shortest and the longest"),
        ((3, 2), {"periods": (1.0,)}, ValueError, "periods must be the shortest and the longest"),
        ((3, 2), {"periods": (0.0, 1.0)}, ValueError, "periods must be"),
    ],
)  # fmt: skip
def test_refusals(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rotary_tables(*arguments, **options)
