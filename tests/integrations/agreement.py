"""What every replacement is held to: the same results and gradients, the same state dict, and a way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels import replace_attention
from perceiver_kernels.integrations import Report

Run = Callable[[nn.Module], Any]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In fp64, with noise on every parameter: no bias is zero and no norm's weight is one."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return model


def leaves_of(outputs: Any) -> list[Tensor]:
    """Every floating-point tensor of a result, in order."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        outputs = [outputs[name] for name in sorted(outputs)]
    return [leaf for each in outputs or () for leaf in leaves_of(each)] if isinstance(outputs, (list, tuple)) else []


def results(model: nn.Module, run: Run, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Outputs of a call, and gradients of every parameter and of inputs under random weights."""
    for tensor in inputs:
        tensor.requires_grad_()
    torch.manual_seed(7)
    outputs = leaves_of(run(model))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    named = dict(model.named_parameters()) | {f"input {i}": tensor for i, tensor in enumerate(inputs)}
    gradients = torch.autograd.grad(outputs, list(named.values()), weights, allow_unused=True)
    found = {f"out {i}": out.detach() for i, out in enumerate(outputs)}
    return found | {name: g for name, g in zip(named, gradients, strict=True) if g is not None and g.any()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Every tensor to ``tolerance`` of its largest entry; what rounding alone makes of a gradient that is zero counts as zero."""
    scale = max(tensor.abs().max().item() for tensor in expected.values())
    for name in actual.keys() | expected.keys():
        a, e = actual.get(name), expected.get(name)
        a, e = (torch.zeros_like(e) if a is None else a), (torch.zeros_like(a) if e is None else e)
        bound = tolerance * max(e.abs().max().item(), 1e-3 * scale)
        assert (a - e).abs().max().item() <= bound, f"{name}: {(a - e).abs().max().item()} beside {bound}"


def assert_replaced(
    model: nn.Module, run: Run, inputs: list[Tensor], *, converted: int, kept: int = 0, compiles: bool = True
) -> Report:
    """Replace, compare, copy, compile and undo; the report of the replacement.

    Args:
        model: in fp64, without dropout.
        run: calls a model.
        inputs: float tensors that the call reads.
        converted: entries of the report; kept: likewise.
        compiles: compare the compiled model too.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    expected = results(model, run, inputs)

    dry = replace_attention(model, dry_run=True)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    dry.undo()
    report = replace_attention(model)
    assert (len(report.converted), len(report.kept)) == (converted, kept), str(report)
    assert (report.converted, report.kept) == (dry.converted, dry.kept)
    assert_same(results(model, run, inputs), expected)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)

    # A copy computes the same, with parameters of its own.
    again = copy.deepcopy(model)
    assert_same(results(again, run, inputs), expected)
    with torch.no_grad():
        for tensor in again.parameters():
            tensor.zero_()
    assert_same(results(model, run, inputs), expected)
    # Parameters that are loaded into a replaced model are those that it uses.
    again.load_state_dict(before)
    assert_same(results(again, run, inputs), expected)

    twice = replace_attention(model)
    assert not twice.converted
    if compiles:
        torch._dynamo.reset()
        # A copy: torch notes on modules that it compiled them.
        compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
        with torch.no_grad():
            for a, e in zip(leaves_of(run(compiled)), leaves_of(run(model)), strict=True):
                torch.testing.assert_close(a, e)
        torch._dynamo.reset()
    report.undo()
    report.undo()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    restored = results(model, run, inputs)
    assert restored.keys() == expected.keys() and all(torch.equal(restored[name], expected[name]) for name in expected)
    return report
