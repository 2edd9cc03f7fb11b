"""Operators in graphs: torch.compile without graph breaks, one graph for every input length, torch.export."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import perceiver_kernels as pk
from perceiver_kernels.ops import pack as pack_op
from perceiver_kernels.ops import shared_kv as shared_op
from perceiver_kernels.testing import same_bits
from perceiver_kernels.testing.targets import Target

OP = "shared_kv_attention"
B, R, C = 2, 5, 32
LENGTHS = (40, 33, 17, 64, 97)
FOURIER = pk.FourierPositions(3, (8.0,))


def wanted(target: Target) -> bool:
    return (target.is_kernel or target.backend == "reference") and target.dtype == torch.float32


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attend_op(target: Target) -> Callable[[Tensor, Tensor], Any]:
    return lambda q, x: shared_op.shared_kv_attention(q, x, None, None, None, 0.2, 0.0, target.passes)


def attend(target: Target) -> Callable[[Tensor, Tensor], Any]:
    return lambda q, x: pk.shared_kv_attention(q, x, scale=0.2, return_lse=True, backend=target.backend)


def attend_masked(target: Target) -> Callable[[Tensor, Tensor], Any]:
    return lambda q, x: pk.shared_kv_attention(q, x, key_mask=x[..., 0] > 0, scale=0.2, backend=target.backend)


def attend_dropped(target: Target) -> Callable[[Tensor, Tensor], Any]:
    return lambda q, x: pk.shared_kv_attention(q, x, scale=0.2, dropout_p=0.25, backend=target.backend).square()


def pack(target: Target) -> Callable[[Tensor, Tensor], Any]:
    return lambda q, x: pack_op.pack_inputs(x[..., :7], None, None, None, True, 1e-5, x.dtype, (target.backend,) * 2)[0]


def pack_grid(target: Target) -> Callable[[Tensor, Tensor], Any]:
    return lambda q, x: pk.pack_inputs(x[..., :7], FOURIER, backend=target.backend).data


def cross(target: Target, **options: Any) -> Callable[[Tensor, Tensor], Any]:
    generator = torch.Generator().manual_seed(1)
    w_k, w_v = (torch.randn(rows, C, generator=generator).to(target.device, target.dtype) for rows in (8, 12))
    weight, bias = (torch.randn(size, generator=generator).to(target.device, target.dtype) for size in (C, 12))
    return lambda q, x: pk.input_cross_attention(
        q[..., :4].unflatten(1, (1, R)).expand(-1, 2, -1, -1), x, w_k, w_v, norm_weight=weight, b_v=bias,
        backend=target.backend if options.get("method") == "absorbed" else None, **options,
    )  # fmt: skip


FUNCTIONS: dict[str, Callable[[Target], Callable[[Tensor, Tensor], Any]]] = {
    "operator": attend_op,
    "shared_kv_attention": attend,
    "key_mask": attend_masked,
    "dropout": attend_dropped,
    "pack operator": pack,
    "pack_inputs": pack_grid,
    "absorbed": lambda target: cross(target, method="absorbed"),
    "projected": lambda target: cross(target, method="projected"),
    "planned": cross,
}


def chunked(target: Target, form: str) -> Callable[[Tensor, Tensor], Any]:
    """x in chunks of 16 tokens: as it is, with a mask and dropout, or with positions of a grid."""
    function = cross(target, method="absorbed", chunk_size=16, dropout_p=0.25 if form == "mask and dropout" else 0.0)
    read: dict[str, Callable[[Tensor], Any]] = {
        "tensor": lambda x: x,
        "mask and dropout": lambda x: pk.InputArray.tokens(x, key_mask=x[..., 0] > 0),
        "positions": lambda x: pk.InputArray.tokens(x[..., FOURIER.channels :], FOURIER),
    }
    return lambda q, x: function(q, read[form](x))


def inputs(target: Target, M: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(M)
    q, x = (torch.randn(B, rows, C, generator=generator).to(target.device, target.dtype) for rows in (R, M))
    return q.requires_grad_(), x.requires_grad_()


def evaluated(function: Callable[..., Any], q: Tensor, x: Tensor) -> list[Tensor]:
    """Results and gradients, from a fixed state of the generators."""
    torch.manual_seed(11)
    out = function(q, x)
    outputs = [value for value in (out if isinstance(out, tuple) else (out,)) if value.requires_grad]
    gradients = torch.autograd.grad([value.sum() for value in outputs], (q, x), allow_unused=True)
    return [*(value.detach() for value in outputs), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_for_every_length(target: Target, name: str) -> None:
    """fullgraph, forward and backward: the tokens of a sequence are a symbol, not a constant."""
    function = FUNCTIONS[name](target)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for M in LENGTHS:
        q, x = inputs(target, M)
        torch._dynamo.mark_dynamic(x, 1)
        found, expected = evaluated(compiled, q, x), evaluated(function, *inputs(target, M))
        assert len(found) == len(expected) >= 2
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    # A plan compares estimated times: one graph for each of its regimes that the lengths meet on this device.
    assert counter.frame_count == 1 or (name == "planned" and target.device == "cuda" and counter.frame_count <= 3)


@pytest.mark.parametrize("form", ["tensor", "mask and dropout", "positions"])
def test_chunks(target: Target, form: str) -> None:
    """fullgraph, forward and backward, but the loop over chunks is unrolled: a graph for each length."""
    function = chunked(target, form)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for M in LENGTHS[:3]:
        found, expected = evaluated(compiled, *inputs(target, M)), evaluated(function, *inputs(target, M))
        assert len(found) == len(expected) == 3
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    if form != "mask and dropout":
        with torch.inference_mode():
            torch.testing.assert_close(compiled(*inputs(target, 20)), function(*inputs(target, 20)))


def test_kernels_are_not_specialised_on_the_choice_of_a_backend(target: Target) -> None:
    """use_backend is part of what a graph depends on: another choice compiles again and takes effect."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, x: pk.shared_kv_attention(q, x), fullgraph=True, backend=counter)
    q, x = (tensor.detach() for tensor in inputs(target, 40))
    for name in (target.backend, "reference", target.backend):
        with pk.use_backend(name):
            assert same_bits(compiled(q, x), pk.shared_kv_attention(q, x))
    assert counter.frame_count == len({target.backend, "reference"})


def test_a_backend_is_chosen_inside_of_compiled_code(target: Target) -> None:
    def function(q: Tensor, x: Tensor) -> Tensor:
        with pk.use_backend("reference"):
            return pk.shared_kv_attention(q, x)

    q, x = (tensor.detach() for tensor in inputs(target, 40))
    assert same_bits(torch.compile(function, fullgraph=True, backend="aot_eager")(q, x), function(q, x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU, and there is no g++")
def test_inductor(target: Target) -> None:
    function = FUNCTIONS["absorbed"](target)
    compiled = torch.compile(function, fullgraph=True)
    for M in (40, 33):
        q, x = inputs(target, M)
        torch._dynamo.mark_dynamic(x, 1)
        for a, b in zip(evaluated(compiled, q, x), evaluated(function, *inputs(target, M)), strict=True):
            assert (a - b).norm() <= 3e-6 * b.norm()


def test_dynamic_true(target: Target) -> None:
    """torch.compile(dynamic=True) makes a symbol of every size, channels too: those are looked at, and become constants."""
    function = FUNCTIONS["absorbed"](target)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for a, b in zip(evaluated(compiled, *inputs(target, 40)), evaluated(function, *inputs(target, 40)), strict=True):
        torch.testing.assert_close(a, b)


class Encoder(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, x: Tensor) -> Any:
        return self.function(q, x)


@pytest.mark.parametrize("name", ["operator", "shared_kv_attention", "key_mask", "absorbed", "pack_inputs"])
def test_export(target: Target, name: str) -> None:
    """An exported program keeps the operator and runs at another length."""
    module = Encoder(FUNCTIONS[name](target))
    q, x = (tensor.detach() for tensor in inputs(target, 40))
    program = torch.export.export(module, (q, x), dynamic_shapes=({}, {1: torch.export.Dim("M", min=2, max=4096)}))
    if target.is_kernel or name == "operator":
        assert "perceiver_kernels" in str(program.graph)
    for M in LENGTHS:
        q, x = (tensor.detach() for tensor in inputs(target, M))
        found, expected = program.module()(q, x), module(q, x)
        for a, b in zip(*(value if isinstance(value, tuple) else (value,) for value in (found, expected)), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_inside_a_graph(target: Target) -> None:
    def function(q: Tensor, x: Tensor) -> Tensor:
        with torch.autocast(target.device, dtype=torch.float16):
            return pk.shared_kv_attention(q, x, scale=0.2, backend=target.backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    q, x = (tensor.detach() for tensor in inputs(target, 40))
    assert compiled(q, x).dtype == torch.float16 and torch.equal(compiled(q, x), function(q, x))
