"""What is asked of every library's models: the same results after a replacement, and a way back."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from perceiver_kernels import functional, replace_attention
from perceiver_kernels.integrations import Entry, Report
from perceiver_kernels.nn import output_attention
from perceiver_kernels.testing.accuracy import assert_as_accurate, compare

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Where accuracy in 16 bits is asked for: the same test, the kernels on a GPU, PyTorch's operations elsewhere."""


@dataclass(frozen=True)
class Case:
    """A model and a call of it.

    Args:
        build: makes the model; keyword arguments change its settings.
        call: runs it on all inputs, by name, and returns tensors, in tuples or dictionaries or alone.
        shapes: of the float inputs, whose gradients count.
        converted: classes that run on these kernels afterwards, each as often as it does.
        kept: classes that are left alone, likewise.
        arrays: makes the other inputs: masks, ids, positions, alone or in tuples and dictionaries.
        bfloat16: False where the original cannot run in it.
    """

    build: Callable[..., nn.Module]
    call: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    converted: dict[str, int]
    kept: dict[str, int] = field(default_factory=dict)
    arrays: Callable[[], dict[str, Any]] = dict
    bfloat16: bool = True

    def model(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", noise: float = 0.2, seed: int = 0, **changes: Any
    ) -> nn.Module:
        """In evaluation mode, noise on every parameter: no bias is zero and no norm's weight is one."""
        torch.manual_seed(seed)
        model = self.build(**changes)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = min(noise, parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0)
                if not name.endswith(("weight", "bias")):
                    # Latents and queries: small ones would soon be alike, and their differences rounding.
                    scale = 1.0
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        return model.to(device, dtype).eval()

    def data(self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 2) -> dict[str, Any]:
        """All inputs, floats in ``dtype``."""
        generator = torch.Generator().manual_seed(seed)
        floats = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in self.shapes.items()}
        return moved({**self.arrays(), **floats}, dtype, device)

    def on(self, model: nn.Module) -> Any:
        """What the model makes of the inputs, in its dtype and on its device."""
        like = next(model.parameters())
        return self.call(model, **self.data(like.dtype, like.device))


def moved(value: Any, dtype: torch.dtype | None = None, device: Any = None) -> Any:
    """Every tensor of a structure on a device, floats in a dtype."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {name: moved(each, dtype, device) for name, each in value.items()}
    return type(value)(moved(each, dtype, device) for each in value) if isinstance(value, (list, tuple)) else value


def leaves_of(outputs: Any) -> list[Tensor]:
    """Every floating-point tensor of a result, in order."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        outputs = [outputs[name] for name in sorted(outputs)]
    return [leaf for each in outputs or () for leaf in leaves_of(each)] if isinstance(outputs, (list, tuple)) else []


def outputs_of(case: Case, model: nn.Module) -> list[Tensor]:
    return leaves_of(case.on(model))


def results(case: Case, model: nn.Module, data: dict[str, Any] | None = None, seed: int = 7) -> dict[str, Tensor]:
    """The outputs, and the gradients of float inputs and of all parameters under random weights."""
    like = next(model.parameters())
    given = case.data(like.dtype, like.device) if data is None else data
    leaves = {name: given[name].clone().requires_grad_() for name in case.shapes}
    torch.manual_seed(seed)
    outputs = leaves_of(case.call(model, **{**given, **leaves}))
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs]
    wanted = {f"input {name}": leaf for name, leaf in leaves.items()} | dict(model.named_parameters())
    found = torch.autograd.grad(outputs, list(wanted.values()), upstream, allow_unused=True)
    zeros = (torch.zeros_like(each) if grad is None else grad for each, grad in zip(wanted.values(), found, strict=True))
    return {f"out {i}": out.detach() for i, out in enumerate(outputs)} | dict(zip(wanted, zeros, strict=True))


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


def assert_equal(actual: dict[str, Tensor] | list[Tensor], expected: dict[str, Tensor] | list[Tensor]) -> None:
    """Bit for bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_repeated(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Outputs bit for bit, gradients to rounding."""
    assert_agree(actual, expected)
    assert all(torch.equal(each, expected[name]) for name, each in actual.items() if name.startswith("out "))


def _photograph(model: nn.Module) -> dict[str, tuple[type, list[tuple[str, type]]]]:
    """Every module's class and attributes, and of these the classes: diffusers' processors are attributes."""
    return {
        name: (type(module), [(key, type(value)) for key, value in module.__dict__.items()])
        for name, module in model.named_modules()
    }


def _classes(entries: list[Entry]) -> dict[str, int]:
    kinds = [entry.kind.split()[-1] for entry in entries]
    return {kind: kinds.count(kind) for kind in kinds}


def assert_replaced(case: Case, *, training: bool = False, **changes: Any) -> Report:
    """In fp64 a replaced model and its copies give the same, a second replacement changes nothing, the way back leads home."""
    model = case.model(**changes).train(training)
    photograph, expected = _photograph(model), results(case, model)
    state = {name: each.clone() for name, each in model.state_dict().items()}

    dry = replace_attention(model, dry_run=True)
    assert _photograph(model) == photograph
    dry.undo()
    report = replace_attention(model)
    assert (dry.converted, dry.kept) == (report.converted, report.kept)
    assert (_classes(report.converted), _classes(report.kept)) == (case.converted, case.kept), str(report)
    changed = {name for name, now in _photograph(model).items() if now != photograph[name]}
    # What transformers' models choose their attention by is a name in their configuration.
    assert changed == {entry.name for entry in report.converted if "attn_implementation" not in entry.reason}
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
    replaced = results(case, model)
    assert_agree(replaced, expected)

    once, again = _photograph(model), replace_attention(model)
    assert not again.converted
    converted, kept = ({entry.name for entry in entries} for entries in (report.converted, report.kept))
    assert {entry.name for entry in again.kept} == converted | kept
    assert all(entry.reason == "converted already" for entry in again.kept if entry.name in converted)
    again.undo()
    assert _photograph(model) == once
    _assert_copies(case, model, replaced, **changes)
    for _ in range(2):
        report.undo()
        assert _photograph(model) == photograph
    assert_equal(results(case, model), expected)
    return report


def _assert_copies(case: Case, model: nn.Module, replaced: dict[str, Tensor], **changes: Any) -> None:
    """A replaced model can be copied, and its weights saved and loaded; a copy has parameters of its own."""
    state = {name: each.clone() for name, each in model.state_dict().items()}
    copied = copy.deepcopy(model)
    assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
    assert_repeated(results(case, copied), replaced)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    different = outputs_of(case, copied)
    assert not all(torch.allclose(each, replaced[f"out {i}"]) for i, each in enumerate(different))
    assert_repeated(results(case, model), replaced)

    file = io.BytesIO()
    torch.save(copied.state_dict(), file)
    file.seek(0)
    # Into a model that is replaced already, and into one that is replaced afterwards.
    fresh = case.model(**changes).train(model.training)
    fresh.load_state_dict(torch.load(file))
    replace_attention(fresh)
    assert_equal(outputs_of(case, fresh), different)
    copied.load_state_dict(state)
    assert_repeated(results(case, copied), replaced)


def assert_compiles(
    case: Case, *, training: bool = False, fullgraph: bool = True, gradients: bool = True, **changes: Any
) -> None:
    """Compiled without a code generator, the replaced model gives the same; again, nothing is compiled anew.

    Args:
        fullgraph: as one graph.
        gradients: compile the backward pass too.
    """
    torch.compiler.reset()
    model = case.model(**changes).train(training)
    expected = results(case, model)
    replace_attention(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    for again in (False, True):
        with torch._dynamo.config.patch(error_on_recompile=again):
            if gradients:
                found = {name.removeprefix("_orig_mod."): each for name, each in results(case, compiled).items()}
            else:
                with torch.no_grad():
                    found = {f"out {i}": out for i, out in enumerate(outputs_of(case, compiled))}
        assert_agree(found, {name: each for name, each in expected.items() if gradients or name.startswith("out ")})
    torch.compiler.reset()


@contextlib.contextmanager
def _written_out() -> Iterator[None]:
    """torch's own attention as operations one by one, in the tensors' dtype: its fused kernels have errors of their own."""
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


def assert_accurate(
    case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", autocast: bool = False, **changes: Any
) -> None:
    """In a dtype, or under autocast, the replaced model is as accurate as the original in it; the original in fp64 judges."""
    data = case.data(dtype, device)
    oracle = results(case, case.model(dtype, device, **changes).double(), moved(data, torch.float64))
    model = case.model(dtype, device, **changes)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        with _written_out():
            eager = results(case, model, data)
        assert replace_attention(model).converted
        actual = results(case, model, data)
    outputs = [name for name in oracle if name.startswith("out ")]
    for name in outputs:
        assert_as_accurate(actual[name], eager[name], oracle[name], name)
    # Of a model that rounds in every layer, single small gradients are luck: all of them count as one, in the L2 norm.
    scale = {name: each.norm() for name, each in oracle.items() if name not in outputs}
    largest = max(scale.values())
    scale = {name: norm for name, norm in scale.items() if norm > 1e-6 * largest}
    total, _ = compare(*(_joined(found, scale) for found in (actual, eager, oracle)))
    assert total.passes, f"gradients: {total}"


def _joined(found: dict[str, Tensor], scale: dict[str, Tensor]) -> Tensor:
    return torch.cat([(found[name] / norm.to(found[name].dtype)).flatten() for name, norm in scale.items()])


def assert_accurate_in_bfloat16(case: Case, device: str) -> None:
    """Or in fp32, where the original has only that; with little noise: a steep model makes luck of every rounding."""
    dtype = torch.bfloat16 if case.bfloat16 else torch.float32
    if not case.bfloat16:
        with pytest.raises(RuntimeError):
            outputs_of(case, case.model(torch.bfloat16, device))
    assert_accurate(case, dtype, device, noise=0.05)


@contextlib.contextmanager
def _wrapped(model: nn.Module, path: str) -> Iterator[None]:
    """Inside the block, another layer is run after a part of the model, as adapters that take its place do."""
    parent, _, name = path.rpartition(".")
    part = model.get_submodule(path)
    setattr(model.get_submodule(parent), name, nn.Sequential(part, nn.Tanh()))
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), name, part)


def assert_later_parts_run(case: Case, **changes: Any) -> None:
    """What takes the place of a projection or a norm after a replacement is what runs, as in the original; one at a time."""
    original, model = case.model(**changes), case.model(**changes)
    names = [entry.name for entry in replace_attention(model).converted]
    paths = [
        path for path, part in original.named_modules()
        if isinstance(part, (nn.Linear, nn.LayerNorm)) and any(path.startswith(f"{name}." if name else "") for name in names)
    ]  # fmt: skip
    unwrapped, differing = results(case, original), 0
    for path in paths:
        with _wrapped(original, path), _wrapped(model, path):
            try:
                expected = results(case, original)
            except (AssertionError, AttributeError, RuntimeError) as error:
                # It asks for the part's class, weight or dtype, or writes to what Tanh keeps.
                with pytest.raises(type(error)):
                    results(case, model)
                continue
            assert_agree(results(case, model), expected)
        differing += not torch.equal(expected["out 0"], unwrapped["out 0"])
    assert differing
    _assert_later_hooks_run(case, original, model, paths)


def _assert_later_hooks_run(case: Case, original: nn.Module, model: nn.Module, paths: list[str]) -> None:
    """A hook that comes after a replacement is called where the original calls it; one at a time."""
    for path in paths:
        found, called = zip(*(_with_a_hook(case, each, path) for each in (original, model)), strict=True)
        assert_agree(found[1], found[0])
        assert bool(called[0]) == bool(called[1]), path


def _with_a_hook(case: Case, model: nn.Module, path: str) -> tuple[dict[str, Tensor], list[str]]:
    """Results where a hook halves what a part gives, and its calls."""
    called: list[str] = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, given, out: called.append(path) or 0.5 * out)
    found = results(case, model)
    handle.remove()
    return found, called


def dropout_seen(monkeypatch: Any) -> list[float]:
    """Probabilities with which attention is called from here on."""
    seen: list[float] = []

    def recorded(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen.append(options["dropout_p"])
            return original(*args, **options)

        return call

    for module, name in ((functional, "attention"), (functional, "input_cross_attention"), (output_attention, "resolve")):
        monkeypatch.setattr(module, name, recorded(getattr(module, name)))
    return seen


def assert_drops(case: Case, monkeypatch: Any, p: float, **changes: Any) -> None:
    """In training, and only then, weights are dropped with the original's probability, and runs differ."""
    model = case.model(**changes)
    replace_attention(model)
    seen = dropout_seen(monkeypatch)
    (quiet,) = outputs_of(case, model)
    assert seen and set(seen) == {0.0}
    seen.clear()
    model.train()
    (first,), (second,) = outputs_of(case, model), outputs_of(case, model)
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
