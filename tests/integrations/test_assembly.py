"""Several projections of one sequence: one product where that is all they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from perceiver_kernels.functional.heads import split_heads
from perceiver_kernels.integrations.assembly import heads_of

H = 2


class Counted(TorchDispatchMode):
    """Counts matrix products, and copies side by side."""

    products = copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.copies += func is torch.ops.aten.cat.default
        return func(*args, **(kwargs or {}))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def linears(bias: bool = True) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(6, width, bias, dtype=torch.float64) for width in (8, 8, 24)]


def hooked() -> list[nn.Module]:
    modules = linears()
    modules[1].register_forward_hook(lambda module, args, out: 3 * out)
    return modules


def with_own_forward() -> list[nn.Module]:
    modules = linears()
    forward = modules[0].forward
    modules[0].forward = lambda x: -forward(x)  # type: ignore[method-assign]
    return modules


class Quantised(Tensor):
    """Stands for a weight that knows one product, and no copy."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch.cat
        return super().__torch_function__(func, types, args, kwargs or {})


def quantised() -> list[nn.Module]:
    modules = linears()
    weight = modules[0].weight.detach().as_subclass(Quantised)
    modules[0].weight = nn.Parameter(weight, requires_grad=False)
    return modules


def expected_of(modules: list[nn.Module], x: Tensor) -> list[Tensor]:
    q, k, (v, w) = modules[0](x), modules[1](x), modules[2](x).chunk(2, -1)
    return [split_heads(part, H) for part in (q, k, v, w)]


@pytest.mark.parametrize(
    ("build", "products"),
    [
        (linears, 1), (lambda: linears(bias=False), 1), (hooked, 3), (with_own_forward, 3),
        (lambda: [*linears()[:2], Scaled(6, 24, dtype=torch.float64)], 3),
        (lambda: [nn.Sequential(linears()[0], nn.Tanh()), *linears()[1:]], 3),
        (lambda: [*linears()[:2], *linears(bias=False)[2:]], 3),
    ],
    ids=["plain", "no biases", "hook", "own forward", "subclass", "wrapped", "some biases"],
)  # fmt: skip
def test_one_product_or_the_modules(build: Callable[[], list[nn.Module]], products: int) -> None:
    modules = build()
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    with Counted() as counted:
        found = heads_of(x, H, *zip(modules, (1, 1, 2), strict=True))
    assert counted.products == products and (products == 1) == bool(counted.copies)
    expected = expected_of(modules, x)
    wanted = [x, *(p for module in modules for p in module.parameters())]
    weights = [torch.randn_like(part) for part in expected]
    gradients = [
        torch.autograd.grad(sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)), wanted)
        for parts in (found, expected)
    ]
    torch.testing.assert_close([*found], expected)
    torch.testing.assert_close(*gradients)


def test_under_autocast_the_modules_are_called() -> None:
    """Autocast keeps the cast weight of a parameter, not that of a copy."""
    modules = [module.float() for module in linears()]
    with torch.autocast("cpu", torch.bfloat16), Counted() as counted:
        found = heads_of(torch.randn(3, 5, 6), H, *zip(modules, (1, 1, 2), strict=True))
    assert counted.products == 3 and not counted.copies and {part.dtype for part in found} == {torch.bfloat16}


def test_one_projection_is_not_copied() -> None:
    (linear,) = linears()[2:]
    with Counted() as counted:
        heads_of(torch.randn(3, 5, 6, dtype=torch.float64), H, (linear, 2))
    assert (counted.products, counted.copies) == (1, 0)


def test_a_weight_of_another_class_is_left_to_its_module() -> None:
    modules, x = quantised(), torch.randn(3, 5, 6, dtype=torch.float64)
    assert type(modules[0].weight) is not nn.Parameter
    for found, expected in zip(heads_of(x, H, *zip(modules, (1, 1, 2), strict=True)), expected_of(modules, x), strict=True):
        assert torch.equal(found, expected)
