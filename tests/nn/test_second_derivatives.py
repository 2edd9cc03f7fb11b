"""What the refusal of a second derivative advises works: the reference backend, twice backward and forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradgradcheck
from torch.func import jvp, vjp

from perceiver_kernels import use_backend
from perceiver_kernels.nn import MAB, CrossAttention, LinformerAttention, OutputCrossAttention, SelfAttention
from tests.modules import randomised

LAYERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "absorbed": (lambda: CrossAttention(6, 4, method="absorbed"), [(2, 3, 6), (2, 5, 4)]),
    "projected": (lambda: CrossAttention(6, 4, num_heads=2, method="projected"), [(2, 3, 6), (2, 5, 4)]),
    "self": (lambda: SelfAttention(6, 2), [(2, 3, 6)]),
    "output": (lambda: OutputCrossAttention(6, 6), [(2, 5, 6), (2, 3, 6)]),
    "mab": (lambda: MAB(6, 4, 6, 2), [(2, 3, 6), (2, 5, 4)]),
    "linformer": (lambda: LinformerAttention(6, 5, 3, 2), [(2, 5, 6)]),
}


def layer_of(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    build, shapes = LAYERS[name]
    return randomised(build().double()), tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("name", list(LAYERS))
def test_twice_backward(name: str) -> None:
    layer, given = layer_of(name)
    with use_backend("reference"):
        assert gradgradcheck(layer, tuple(each.requires_grad_() for each in given))


@pytest.mark.parametrize("name", list(LAYERS))
def test_forward(name: str) -> None:
    """u^T (J v) = (J^T u)^T v."""
    layer, given = layer_of(name)
    directions = tuple(torch.randn_like(each) for each in given)
    with use_backend("reference"):
        result, along = jvp(layer, given, directions)
        u = torch.randn_like(result)
        gradients = vjp(layer, *given)[1](u)
    expected = torch.stack([(gradient * v).sum() for gradient, v in zip(gradients, directions, strict=True)]).sum()
    torch.testing.assert_close((u * along).sum(), expected)


@pytest.mark.parametrize("width", [4, 5])
def test_dual_numbers(width: int) -> None:
    """torch's own forward mode, below torch.func's: of an odd width too, whose parameters are padded."""
    layer = randomised(CrossAttention(6, width, qk_channels=6, method="absorbed").double())
    given = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 6), (2, 5, width))]
    directions = [torch.randn_like(each) for each in given]
    with use_backend("reference"):
        _, expected = jvp(layer, tuple(given), tuple(directions))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(each, direction) for each, direction in zip(given, directions, strict=True)]
            found = forward_ad.unpack_dual(layer(*duals)).tangent
    torch.testing.assert_close(found, expected)


def test_a_penalty_on_a_gradient_in_single_precision() -> None:
    """Where torch's own attention, which serves a CPU by default, has no second derivative."""
    layer, x = CrossAttention(6, 4), torch.randn(2, 5, 4, requires_grad=True)
    with use_backend("reference"):
        (gradient,) = torch.autograd.grad(layer(torch.randn(2, 3, 6), x).square().sum(), x, create_graph=True)
        gradient.norm().backward()
    assert layer.v_proj.weight.grad is not None and layer.v_proj.weight.grad.isfinite().all()
