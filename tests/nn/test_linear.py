"""The bias gradient that needs no workspace is torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from perceiver_kernels.nn.linear import _BiasGradient, linear


def with_bias(x: Any, weight: Any, bias: Any) -> Any:
    return _BiasGradient.apply(F.linear(x, weight, bias.detach()), bias)


def test_first_and_second_derivatives() -> None:
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (4,))]
    assert torch.autograd.gradcheck(with_bias, tensors)
    assert torch.autograd.gradgradcheck(with_bias, tensors)


def test_its_result_may_be_changed_in_place() -> None:
    """As torch's own: layers without a residual return it."""
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (4,)))
    gradients = [
        torch.autograd.grad(product(x, weight, bias).mul_(2.0).square().sum(), (x, weight, bias))
        for product in (with_bias, F.linear)
    ]
    torch.testing.assert_close(*gradients)


def test_no_rows() -> None:
    bias = torch.ones(4, requires_grad=True)
    with_bias(torch.zeros(2, 0, 5), torch.zeros(4, 5), bias).sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.zeros(4))


@pytest.mark.parametrize("bias", [False, True])
def test_is_torchs_linear(bias: bool) -> None:
    x, weight, b = torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(4) if bias else None
    assert torch.equal(linear(x, weight, b), F.linear(x, weight, b))


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu(autocast: bool) -> None:
    """4,096 rows of 1,024: torch's column sum took 32 MiB here."""
    dtype = torch.float32 if autocast else torch.bfloat16
    x = torch.randn(8, 512, 256, device="cuda", dtype=dtype)
    weight, bias = (torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in ((1024, 256), (1024,)))
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        out = linear(x, weight, bias)
    gradient = torch.randn_like(out)
    for _ in range(2):  # the first call allocates cuBLAS' own workspace
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        (db,) = torch.autograd.grad(out, bias, gradient, retain_graph=True)
    assert torch.cuda.max_memory_allocated() - before < 2**20
    exact = gradient.flatten(0, 1).double().sum(0)
    assert db.dtype == dtype and (db - exact).norm() <= 0.004 * exact.norm()
