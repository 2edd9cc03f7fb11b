"""Zero-padded parameters: values, gradients and what passes through."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from perceiver_kernels.nn.aligned import zero_padded


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 7), (5,), (3, 4))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


SHAPES = ((8, 16), (8,), (3, 8))


def test_corner_is_the_tensor_and_the_rest_is_zero() -> None:
    for tensor, shape, padded in zip(
        parameters(), SHAPES, zero_padded(*zip(parameters(), SHAPES, strict=True)), strict=True
    ):
        expected = torch.zeros(shape, dtype=tensor.dtype)
        expected[tuple(slice(n) for n in tensor.shape)] = tensor.detach()
        assert torch.equal(padded, expected)
        assert padded.is_contiguous()


def test_gradients_are_the_corners() -> None:
    assert gradcheck(lambda *tensors: tuple(zero_padded(*zip(tensors, SHAPES, strict=True))), parameters())


def test_none_and_fitting_tensors_pass_through() -> None:
    weight, _, other = parameters()
    padded = zero_padded((weight, (5, 7)), (None, (8,)), (other, (4, 4)))
    assert padded[0] is weight
    assert padded[1] is None
    assert padded[2].shape == (4, 4)


def test_dtypes_may_differ() -> None:
    weight = torch.randn(5, 7, dtype=torch.bfloat16)
    norm = torch.randn(7)
    padded = zero_padded((weight, (8, 8)), (norm, (8,)))
    assert [t.dtype for t in padded] == [torch.bfloat16, torch.float32]
    assert torch.equal(padded[1], F.pad(norm, (0, 1)))


def test_under_function_transforms() -> None:
    weight, bias, _ = parameters()

    def loss(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        w, b = zero_padded((w, (8, 16)), (b, (8,)))
        return (w.square().sum() + b.sum()) * 0.5

    gradients = torch.func.grad(loss, argnums=(0, 1))(weight.detach(), bias.detach())
    assert torch.equal(gradients[0], weight.detach())
    assert torch.equal(gradients[1], torch.full_like(bias, 0.5))
