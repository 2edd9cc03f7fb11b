"""Awkward tensors: equal values, the promised strides, poison where it belongs, and state put back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from perceiver_kernels.testing import (
    LAYOUTS,
    broadcast,
    column_major,
    gapped_rows,
    misaligned,
    nan_tail,
    permuted,
    poisoned_memory,
    same_bits,
)

X = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))


def whole_storage(x: Tensor) -> Tensor:
    return torch.as_strided(x.detach(), (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (3, 5, 16), (2, 0, 5, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_layouts_keep_values_and_last_stride(
    layout: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = (10 * torch.rand(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    y = layout(x)
    assert same_bits(x, y) and y.stride(-1) == 1


@pytest.mark.parametrize("layout", [permuted, gapped_rows, nan_tail, misaligned, column_major, broadcast])
def test_layouts_keep_requires_grad(layout: Callable[[Tensor], Tensor]) -> None:
    y = layout(X.clone().requires_grad_())
    assert y.requires_grad and not layout(X).requires_grad


def test_strides() -> None:
    assert permuted(X).stride() == (240, 16, 48, 1)
    assert gapped_rows(X).stride() == (360, 120, 24, 1)
    assert nan_tail(X).stride() == (3 * 135 * 16, 135 * 16, 16, 1)
    assert misaligned(X).is_contiguous() and misaligned(X).data_ptr() % 16 == 4
    assert column_major(X).stride() == (240, 80, 1, 5) and torch.equal(column_major(X), X)


def test_broadcast_repeats_the_first_entry_without_memory() -> None:
    for axis in (0, 1):
        y = broadcast(X, axis)
        assert y.shape == X.shape and y.stride(axis) == 0
        assert torch.equal(y, X.narrow(axis, 0, 1).expand(X.shape))
    assert broadcast(X[:0]).shape == (0, 3, 5, 16)


@pytest.mark.parametrize(
    ("make", "count"), [(nan_tail, 2 * 3 * 130 * 16), (gapped_rows, 2 * 3 * 5 * 8), (misaligned, 1)]
)
def test_what_surrounds_the_values_is_poison(make: Callable[[Tensor], Tensor], count: int) -> None:
    assert int(whole_storage(make(X)).isnan().sum()) == count
    assert int((whole_storage(make(X.mul(0).byte())) == 255).sum()) == count


def test_poisoned_memory() -> None:
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
        assert X.new_empty(7, 3).isnan().all() and torch.empty_like(X).isnan().all()
        assert (torch.empty(10, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_poisoned_memory_puts_the_settings_back_after_an_error() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with pytest.raises(KeyError), poisoned_memory():
            raise KeyError
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_same_bits() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone()) and same_bits(X, permuted(X))
    assert not same_bits(torch.zeros(2), -torch.zeros(2))
    assert not same_bits(torch.zeros(2), torch.zeros(2, 1)) and not same_bits(
        torch.zeros(2), torch.zeros(2).int()
    )
    assert not same_bits(nan, torch.tensor([float("nan"), 1.0 + 2**-23]))
    assert same_bits(torch.tensor([True]), torch.tensor([True])) and same_bits(
        torch.tensor(1.5), torch.tensor(1.5)
    )
