"""The products that move projections to the latent side: as exact under autocast as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perceiver_kernels.absorption import _ScaledProduct, absorb_queries, fold_norm, project_values
from perceiver_kernels.testing import same_bits

H, N, D_QK, C = 2, 6, 16, 64


def test_autocast_does_not_round_what_is_folded() -> None:
    """q' and the shift of a projection are sums in fp32, rounded once; autocast would round their terms first."""
    q, w_k = torch.randn(1, H, N, D_QK), torch.randn(H * D_QK, C) / 8
    weight, bias = torch.rand(C) + 0.5, torch.randn(C)
    plain = absorb_queries(q, w_k, weight, C, torch.bfloat16), *fold_norm(w_k, None, weight, bias, C, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = absorb_queries(q, w_k, weight, C, torch.bfloat16), *fold_norm(w_k, None, weight, bias, C, torch.float32)
    assert all(map(same_bits, cast, plain))
    exact = absorb_queries(q.double(), w_k.double(), weight.double(), C, torch.float64)
    assert (cast[0].double() - exact).norm() <= 2 * (exact.bfloat16().double() - exact).norm()


def values(heads: int, dtype: torch.dtype, device: str) -> list[Any]:
    """z, w_v, b_v, norm weight and bias; the rows of z are nearly equal, as attention that is nearly uniform makes them."""
    wide = torch.promote_types(dtype, torch.float32)
    z = torch.randn(1, 1, C, dtype=wide) + torch.randn(4, heads * 256, C, dtype=wide) / 1000
    w_v, b_v = torch.randn(heads * D_QK, C) / 8, torch.randn(heads * D_QK)
    norm = torch.rand(C) + 0.5, torch.randn(C)
    return [t.to(device).requires_grad_() for t in (z, w_v.to(dtype), b_v.to(dtype), *norm)]


@pytest.mark.parametrize("heads", [1, 3])
def test_projected_values_are_the_formula(heads: int) -> None:
    z, w_v, b_v, weight, bias = values(heads, torch.float64, "cpu")
    full = project_values(z, None, heads, w_v, b_v, weight, bias)
    weighted = project_values(z, torch.ones(z.shape[:2]), heads, w_v, b_v, weight, bias)
    torch.testing.assert_close(full, weighted, rtol=1e-6, atol=1e-6)
    small = [z[:, :: 64].detach().requires_grad_(), w_v, b_v, weight.detach().double(), bias.detach().double()]
    small[3:] = [t.requires_grad_() for t in small[3:]]

    def call(z: Any, w_v: Any, b_v: Any, weight: Any, bias: Any) -> Any:
        return project_values(z, None, heads, w_v, b_v, weight, bias)

    assert torch.autograd.gradcheck(call, small, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, small, fast_mode=True)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_the_norm_add_up_unrounded(heads: int, device: str) -> None:
    """Thousands of rounded products with nearly equal factors would leave an error of 1e-3 of the terms' norm."""
    leaves = values(heads, torch.bfloat16, device)
    out = project_values(leaves[0], None, heads, *leaves[1:])
    gradient = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves[3:], gradient)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch.autograd.grad(project_values(exact[0], None, heads, *exact[1:]), exact[3:], gradient.double())
    for mine, oracle in zip(actual, truth, strict=True):
        assert (mine - oracle).norm() <= 1e-5 * oracle.norm()


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_product_of_one_head_has_second_derivatives(device: str) -> None:
    """Layers of one head take it on a GPU, the reference's too; torch's own product with an out_dtype has no derivative."""

    def second(leaves: list[Any], product: Any) -> tuple[Any, ...]:
        first = torch.autograd.grad(product(*leaves).float().square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), leaves)

    sizes = (N, D_QK), (D_QK, C), (C,)
    leaves = [torch.randn(size).bfloat16().to(device).requires_grad_() for size in sizes]
    actual = second(leaves, _ScaledProduct.apply)
    assert [each.shape for each in actual] == [leaf.shape for leaf in leaves]
    if device == "meta":
        return
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for mine, oracle in zip(actual, second(exact, lambda a, b, g: (a @ b) * g), strict=True):
        assert (mine - oracle).norm() <= 2**-5 * oracle.norm()
