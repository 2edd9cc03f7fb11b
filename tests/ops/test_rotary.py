"""The operator of rotary embedding under autograd, functorch and torch.compile: its gradient is itself, turned back."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.ops import rotary as rotary_op
from perceiver_kernels.testing import same_bits
from perceiver_kernels.testing.targets import Target, only

OP = "rotary_embedding"
V, B, H, L, D, WIDTH = 4, 2, 3, 5, 10, 6
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def randn(target: Target, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(target.device)


def tables(target: Target, *batch: int) -> tuple[Tensor, Tensor]:
    times = torch.rand(*batch, L, generator=torch.Generator().manual_seed(1)).flatten(0, -2) if batch else torch.arange(L)
    cos, sin = (table.to(target.device) for table in pk.rotary_tables(9 * times, WIDTH))
    return (cos.unflatten(0, batch), sin.unflatten(0, batch)) if batch else (cos, sin)


def turn(target: Target, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotary_op.rotary_embedding(x, cos, sin, True, False, target.backend)


def specified(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return reference.rotary_embedding(x, cos.unsqueeze(-3), sin.unsqueeze(-3), interleaved=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck(interleaved: bool, inverse: bool) -> None:
    """In fp64: the operator and its autograd.Function, and the public function with trained tables, to second order."""
    cos, sin = (table.double() for table in pk.rotary_tables(torch.rand(2, 2), 4))
    x = torch.randn(2, 1, 2, 5, dtype=torch.float64, requires_grad=True)
    function = partial(rotary_op.rotary_embedding, interleaved=interleaved, inverse=inverse, backend="reference")
    assert gradcheck(function, (x, cos, sin)) and gradgradcheck(function, (x, cos, sin))
    trained = x, cos.requires_grad_(), sin.requires_grad_()
    function = partial(pk.rotary_embedding, interleaved=interleaved, inverse=inverse)
    assert gradcheck(function, trained) and gradgradcheck(function, trained)


@only(torch.float32)
def test_second_derivative(target: Target) -> None:
    """A penalty on a gradient is trained through kernels too: nothing is refused."""
    x, weight = randn(target, B, H, L, D).requires_grad_(), randn(target, B, H, L, D)

    def derivatives(function: Any) -> list[Tensor]:
        loss = (function(x, *tables(target)) * weight).pow(3).sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return [first.detach(), *torch.autograd.grad(first.square().sum(), x)]

    for found, expected in zip(derivatives(partial(turn, target)), derivatives(specified), strict=True):
        close(found, expected, rtol=1e-4, atol=1e-4)


@only(torch.float32)
@pytest.mark.parametrize("needed", [False, True])
def test_backward_is_one_call_where_it_is_needed(target: Target, needed: bool) -> None:
    x = randn(target, B, H, L, D).requires_grad_(needed)
    with FlopCounterMode(display=False) as counter:
        out = turn(target, x, *tables(target))
        if needed:
            out.sum().backward()
    assert out.requires_grad == needed
    assert counter.get_total_flops() == (1 + needed) * 6 * B * H * L * WIDTH // 2


@only(torch.float32)
@pytest.mark.parametrize("dims", [(0, None, None), (3, None, None), (None, 0, 0), (1, 0, 1), (0, 0, None)], ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["shared", "batched"])
def test_vmap(target: Target, dims: tuple[int | None, ...], batched: bool) -> None:
    """Any of the three mapped, along any axis: values and gradients as of a loop."""
    plain = [randn(target, V, B, H, L, D), *tables(target, *((V, B) if batched else (V,)))]
    given = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(plain, dims, strict=True)]
    entries = [[t if dim is None else t.select(dim, v) for t, dim in zip(given, dims, strict=True)] for v in range(V)]
    close(torch.func.vmap(partial(turn, target), dims)(*given), torch.stack([specified(*entry) for entry in entries]))

    def loss(function: Any, *tensors: Tensor) -> Tensor:
        return function(*tensors).pow(3).sum()

    actual, expected = (torch.func.grad(partial(loss, function)) for function in (partial(turn, target), specified))
    close(torch.func.vmap(actual, dims)(*given), torch.stack([expected(*entry) for entry in entries]))


@only(torch.float32)
def test_vmap_of_nothing(target: Target) -> None:
    x = randn(target, V, 0, H, L, D)
    assert torch.func.vmap(partial(turn, target), (0, None, None))(x, *tables(target)).shape == x.shape


@only(torch.float32)
def test_jacobian_and_hessian(target: Target) -> None:
    x, (cos, sin) = randn(target, 1, 1, L, D), tables(target)
    close(torch.func.jacrev(partial(turn, target))(x, cos, sin), torch.func.jacrev(specified)(x, cos, sin))
    hessians = [
        torch.func.jacrev(torch.func.grad(lambda x, function=function: function(x, cos, sin).pow(3).sum()))(x)
        for function in (partial(turn, target), specified)
    ]
    close(*hessians)


@only(torch.float32)
def test_checkpoint(target: Target) -> None:
    x = randn(target, B, H, L, D).requires_grad_()
    function = partial(pk.rotary_embedding, backend=target.backend)
    found, expected = (
        torch.autograd.grad(out.pow(3).sum(), x)[0]
        for out in (checkpoint(function, x, *tables(target), use_reentrant=False), function(x, *tables(target)))
    )
    assert same_bits(found, expected)


@only(torch.float32)
def test_autocast_leaves_it_alone(target: Target) -> None:
    """As torch leaves pointwise operations: what is turned keeps its dtype, and attention casts it."""
    x = randn(target, B, H, L, D)
    with torch.autocast(target.device, dtype=torch.float16):
        out = pk.rotary_embedding(x, *tables(target), backend=target.backend)
    assert same_bits(out, pk.rotary_embedding(x, *tables(target), backend=target.backend))


@only(torch.float32)
@pytest.mark.parametrize("form", ["half-split", "interleaved, heads inside rows"])
def test_one_graph_for_every_length(target: Target, form: str) -> None:
    """fullgraph, tables included, forward, backward and the backward of the backward."""

    def function(x: Tensor) -> Tensor:
        cos, sin = pk.rotary_tables(x.shape[1], WIDTH, device=x.device)
        heads = x.unflatten(-1, (H, D)).transpose(1, 2)
        heads = heads if form.endswith("rows") else heads.contiguous()
        out = pk.rotary_embedding(heads, cos, sin, interleaved=form.startswith("inter"), backend=target.backend)
        return out.transpose(1, 2).flatten(2).pow(3)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    torch._dynamo.reset()
    for length in (7, 12, 3, 31):
        x = randn(target, B, length, H * D).requires_grad_()
        torch._dynamo.mark_dynamic(x, 1)
        outputs = compiled(x), function(x)
        gradients = [torch.autograd.grad(out.sum(), x)[0] for out in outputs]
        close(*outputs)
        close(*gradients)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@only(torch.float32)
def test_export_keeps_the_operator(target: Target) -> None:
    class Turn(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return pk.rotary_embedding(x, *pk.rotary_tables(x.shape[2], WIDTH, device=x.device), backend=target.backend)

    x = randn(target, B, H, 12, D)
    program = torch.export.export(Turn(), (x,), dynamic_shapes=({2: torch.export.Dim("L", min=2, max=4096)},))
    assert not target.is_kernel or "perceiver_kernels" in str(program.graph)
    for length in (12, 5, 40):
        x = randn(target, B, H, length, D)
        close(program.module()(x), Turn()(x))
