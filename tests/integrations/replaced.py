"""What is asked of every library's models: the same results after a replacement, and a way back."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels import functional, replace_attention
from perceiver_kernels.integrations import Report
from perceiver_kernels.testing.accuracy import assert_as_accurate, compare


@dataclass(frozen=True)
class Case:
    """A model and a call of it.

    Args:
        build: makes the model; keyword arguments change its settings.
        call: runs it on float inputs, by name, and returns one tensor.
        shapes: of these inputs.
        converted: classes that run on these kernels afterwards, each as often as it does.
    """

    build: Callable[..., nn.Module]
    call: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    converted: dict[str, int]

    def model(self, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
        """In evaluation mode, noise on every parameter: no bias is zero and no norm's weight is one."""
        torch.manual_seed(0)
        model = self.build(**changes)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model.to(dtype).eval()

    def data(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(2)
        return {name: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for name, s in self.shapes.items()}


def results(case: Case, model: nn.Module, data: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The output, and the gradients of float inputs and of all parameters."""
    given = case.data(next(model.parameters()).dtype) if data is None else data
    leaves = {name: each.clone().requires_grad_() for name, each in given.items()}
    out = case.call(model, **leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out)
    wanted = leaves | dict(model.named_parameters())
    found = torch.autograd.grad(out, list(wanted.values()), upstream, allow_unused=True)
    zeros = (torch.zeros_like(each) if grad is None else grad for each, grad in zip(wanted.values(), found, strict=True))
    return {"out": out.detach(), **dict(zip(wanted, zeros, strict=True))}


def assert_agree(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """fp64 results agree to rounding, relative to the largest element of each tensor.

    Gradients that cancel to nothing (keys' biases) are rounding of what the largest gradient sums.
    """
    assert actual.keys() == expected.keys()
    expected = {name: each.detach() for name, each in expected.items()}
    largest = max(float(each.abs().max()) for each in expected.values() if each.numel())
    for name, wanted in expected.items():
        scale = max(float(wanted.abs().max()) if wanted.numel() else 0.0, 1e-3 * largest)
        atol = 4096 * torch.finfo(torch.float64).eps * scale
        torch.testing.assert_close(actual[name], wanted, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_results(case: Case, *, training: bool, **changes: Any) -> Report:
    """In fp64, before and after the replacement."""
    model = case.model(**changes).train(training)
    expected = results(case, model)
    report = replace_attention(model)
    assert_agree(results(case, model), expected)
    return report


def assert_accurate(case: Case, dtype: torch.dtype = torch.float32, autocast: bool = False, **changes: Any) -> None:
    """In fp32, or under autocast, the replaced model is as accurate as the original."""
    oracle = results(case, case.model(torch.float32, **changes).double(), {k: v.double() for k, v in case.data(dtype).items()})
    model = case.model(dtype, **changes)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager = results(case, model)
        replace_attention(model)
        actual = results(case, model)
    assert_as_accurate(actual.pop("out"), eager.pop("out"), oracle.pop("out"), "out")
    # Of a model that rounds in every layer, single small gradients are luck: all of them count as one, in the L2 norm.
    largest = max(float(each.norm()) for each in oracle.values())
    scale = {name: each.norm() for name, each in oracle.items() if each.norm() > 1e-6 * largest}
    total, _ = compare(*(_joined(found, scale) for found in (actual, eager, oracle)))
    assert total.passes, f"gradients: {total}"


def _joined(found: dict[str, Tensor], scale: dict[str, Tensor]) -> Tensor:
    return torch.cat([(found[name] / norm.to(found[name].dtype)).flatten() for name, norm in scale.items()])


def _photograph(model: nn.Module) -> dict[str, tuple[type, list[str]]]:
    return {name: (type(module), list(module.__dict__)) for name, module in model.named_modules()}


def _named(report: Report) -> dict[str, int]:
    kinds = [entry.kind.split()[-1] for entry in report.converted]
    return {kind: kinds.count(kind) for kind in kinds}


def assert_reversible(case: Case, **changes: Any) -> None:
    """Nothing but classes changes, a dry run and a second replacement change nothing, and the way back leads to the start."""
    model = case.model(**changes)
    before, photograph = case.call(model, **case.data()), _photograph(model)
    state = {name: each.clone() for name, each in model.state_dict().items()}

    dry = replace_attention(model, dry_run=True)
    assert _photograph(model) == photograph
    report = replace_attention(model)
    assert dry.converted == report.converted and dry.kept == report.kept
    assert _named(report) == case.converted

    changed = {name for name, now in _photograph(model).items() if now != photograph[name]}
    assert changed == {entry.name for entry in report.converted}
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())

    replaced, once = case.call(model, **case.data()), _photograph(model)
    again = replace_attention(model)
    assert not again.converted and {entry.reason for entry in again.kept} == {"converted already"}
    again.undo()
    assert _photograph(model) == once and torch.equal(case.call(model, **case.data()), replaced)

    report.undo()
    assert _photograph(model) == photograph
    assert torch.equal(case.call(model, **case.data()), before)
    report.undo()
    assert _photograph(model) == photograph


def assert_copies(case: Case, **changes: Any) -> None:
    """A replaced model can be copied, and its weights saved and loaded; a copy has parameters of its own."""
    model = case.model(**changes)
    replace_attention(model)
    before = case.call(model, **case.data())
    copied = copy.deepcopy(model)
    assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(case.call(copied, **case.data()), before)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    changed = case.call(copied, **case.data())
    assert torch.equal(case.call(model, **case.data()), before) and not torch.allclose(changed, before)

    file = io.BytesIO()
    torch.save(copied.state_dict(), file)
    file.seek(0)
    loaded = case.model(**changes)
    loaded.load_state_dict(torch.load(file))
    replace_attention(loaded)
    assert torch.equal(case.call(loaded, **case.data()), changed)


def assert_compiles(case: Case, **changes: Any) -> None:
    """Compiled as one graph, without a code generator, the replaced model gives the same; again, nothing is compiled anew."""
    torch.compiler.reset()
    model = case.model(**changes)
    expected = results(case, model)
    expected = {name if name in ("out", *case.shapes) else f"_orig_mod.{name}": each for name, each in expected.items()}
    replace_attention(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_agree(results(case, compiled), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_agree(results(case, compiled), expected)


def dropout_seen(monkeypatch: Any) -> list[float]:
    """Probabilities with which attention is called from here on."""
    seen: list[float] = []

    def recorded(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen.append(options["dropout_p"])
            return original(*args, **options)

        return call

    for name in ("attention", "input_cross_attention", "output_cross_attention"):
        monkeypatch.setattr(functional, name, recorded(getattr(functional, name)))
    return seen


def assert_drops(case: Case, monkeypatch: Any, p: float, **changes: Any) -> None:
    """In training, and only then, weights are dropped with the original's probability, and runs differ."""
    model = case.model(**changes)
    replace_attention(model)
    seen = dropout_seen(monkeypatch)
    quiet = case.call(model, **case.data())
    assert seen and set(seen) == {0.0}
    seen.clear()
    model.train()
    first, second = case.call(model, **case.data()), case.call(model, **case.data())
    assert p in seen and set(seen) <= {0.0, p}
    assert not torch.allclose(first, second) and not torch.allclose(first, quiet)


def kept_reasons(model: nn.Module) -> dict[str, str]:
    """Why attention is left alone, by the module's name."""
    return {entry.name: entry.reason for entry in replace_attention(model).kept}


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank addition."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, dtype=base.weight.dtype)
        self.load_state_dict(base.state_dict())
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (W + up down)^T + b."""
        return super().forward(x) + x @ self.down.mT @ self.up.mT
