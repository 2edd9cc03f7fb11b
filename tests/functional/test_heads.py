"""Heads of projections: views, and gradients that are joined without a copy where they lie side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from perceiver_kernels.functional.heads import merge_heads, split_heads, split_projection
from perceiver_kernels.layouts import empty_beside, heads_of_rows, rows_of_heads

pytestmark = pytest.mark.usefixtures("joined")
B, L = 2, 5
HEADS = ((2, 8), (2, 8), (2, 16))
WIDTHS = [H * d for H, d in HEADS]


def rows_of(**options: Any) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(B, L, sum(WIDTHS), dtype=torch.float64, **options)


def composed(rows: Tensor) -> list[Tensor]:
    return [split_heads(part, H) for part, (H, _) in zip(rows.split(WIDTHS, -1), HEADS, strict=True)]


def gradients_of(split: Any, weights: Any, rows: Tensor) -> Tensor:
    rows = rows.detach().requires_grad_()
    loss = sum((part * weight).sum() for part, weight in zip(split(rows), weights, strict=True) if weight is not None)
    return torch.autograd.grad(loss, rows)[0]


def split(rows: Tensor) -> tuple[Tensor, ...]:
    return split_projection(rows, WIDTHS, 2)


def test_parts_are_views() -> None:
    rows = rows_of()
    for found, expected in zip(split(rows), composed(rows), strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride() and found.data_ptr() == expected.data_ptr()


@pytest.mark.parametrize("missing", [(), (0,), (0, 1), (2,)], ids=str)
def test_gradients_are_those_of_the_composition(missing: tuple[int, ...]) -> None:
    rows = rows_of()
    weights = [None if i in missing else torch.randn(B, H, L, d, dtype=torch.float64) for i, (H, d) in enumerate(HEADS)]
    assert torch.equal(gradients_of(split, weights, rows), gradients_of(composed, weights, rows))


def test_second_gradients() -> None:
    torch.autograd.gradgradcheck(lambda rows: [part.sin() for part in split(rows)], rows_of(requires_grad=True))


def test_transforms() -> None:
    rows = rows_of()
    found = torch.func.vmap(torch.func.grad(lambda one: sum((part**2).sum() for part in split(one[None]))))(rows)
    torch.testing.assert_close(found, 2 * rows)


class _Beside(torch.autograd.Function):
    """Takes three parts; its gradients are views of one buffer, or not."""

    @staticmethod
    def forward(ctx: Any, beside: bool, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.beside = beside
        return parts[0].sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        parts = ctx.saved_tensors
        fresh = empty_beside(*parts) if ctx.beside else [torch.empty_like(part) for part in parts]
        for i, part in enumerate(fresh):
            part.fill_(i + 1.0)
        _Beside.buffer = fresh[0].data_ptr()
        return None, *fresh


@pytest.mark.parametrize("beside", [True, False])
def test_gradients_side_by_side_are_not_copied(beside: bool) -> None:
    rows = rows_of(requires_grad=True)
    (gradient,) = torch.autograd.grad(_Beside.apply(beside, *split(rows)), rows)
    expected = torch.cat([torch.full((B, L, width), i + 1.0) for i, width in enumerate(WIDTHS)], -1)
    assert torch.equal(gradient, expected.double()) and gradient.is_contiguous()
    assert (gradient.data_ptr() == _Beside.buffer) == beside


def described(tensors: Any) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype) for t in tensors]


def test_fresh_tensors_lie_as_their_likes() -> None:
    parts = heads_of_rows(rows_of(), HEADS)
    for likes, joined in ((parts, 3), (parts[:2], 2), ((parts[0].clone(), *parts[1:]), 2), ((parts[1], *parts[1:]), 2)):
        fresh = empty_beside(*likes)
        assert fresh is not None and described(fresh) == described(likes)
        beside = fresh[-joined:]
        rows, heads = rows_of_heads(beside), [(t.shape[1], t.shape[3]) for t in beside]
        assert rows is not None and rows.shape[-1] == sum(H * d for H, d in heads)
        for part, again in zip(beside, heads_of_rows(rows, heads), strict=True):
            assert part.data_ptr() == again.data_ptr() and part.stride() == again.stride()


@pytest.mark.parametrize(
    "likes",
    [
        lambda a, b, c: (a.contiguous(), b.contiguous(), c.contiguous()),
        lambda a, b, c: (a, c, b),
        lambda a, b, c: (a, b[:, :, 1:], c[:, :, 1:].clone()),
        lambda a, b, c: (a[..., :4], b[..., :4], c[..., :4]),
        lambda a, b, c: (a[:0], b[:0], c[:0]),
        lambda a, b, c: (a, b.float(), c.half()),
        lambda a, b, c: (a[:1].expand(2, -1, -1, -1), b[:1].expand(2, -1, -1, -1), c[:1].expand(2, -1, -1, -1)),
    ],
    ids=["copies", "another order", "other lengths", "some channels", "empty", "other dtypes", "repeated"],
)
def test_what_lies_apart_stays_apart(likes: Any) -> None:
    tensors = likes(*heads_of_rows(rows_of(), HEADS))
    assert empty_beside(*tensors) is None and rows_of_heads(tensors) is None


def test_neighbours_in_two_storages_are_no_rows() -> None:
    """One row each: addresses alone would make two tensors one."""
    whole = torch.arange(8.0)
    first, second = whole[:4].view(1, 1, 1, 4), torch.from_numpy(whole.numpy()[4:]).view(1, 1, 1, 4)
    assert second.data_ptr() == first.data_ptr() + 16
    assert rows_of_heads([first, second]) is None
    assert torch.equal(merge_heads(first), whole[None, None, :4])
