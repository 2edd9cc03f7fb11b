"""Submodules that are no plain layers any more are called: adapters, hooks, pruned weights, other norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from perceiver_kernels import functional
from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models import PerceiverIO
from perceiver_kernels.nn import MAB, CrossAttention, OutputCrossAttention
from perceiver_kernels.nn.called import is_plain
from tests.models.test_graphs import FAMILY, leaves

B, N, M, C, D = 2, 5, 11, 7, 12
DOUBLE: Any = {"dtype": torch.float64}
LAYERS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "cross": (
        lambda: CrossAttention(D, C, num_heads=2, qk_channels=8, v_channels=6, **DOUBLE),
        ("norm_latents", "norm_inputs", "q_proj", "k_proj", "v_proj", "out_proj"),
    ),
    "cross, one head": (
        lambda: CrossAttention(D, C, method="absorbed", **DOUBLE),
        ("norm_latents", "norm_inputs", "q_proj", "k_proj", "v_proj", "out_proj"),
    ),
    "output": (
        lambda: OutputCrossAttention(D, C, residual=True, **DOUBLE),
        ("norm_queries", "norm_latents", "q_proj", "k_proj", "v_proj", "out_proj"),
    ),
    "output, heads": (
        lambda: OutputCrossAttention(D, C, num_heads=2, qk_channels=8, residual=True, **DOUBLE),
        ("norm_queries", "norm_latents", "q_proj", "k_proj", "v_proj", "out_proj"),
    ),
    "set": (lambda: MAB(D, C, 8, 2, **DOUBLE), ("q_proj", "k_proj", "v_proj", "out_proj")),
}  # fmt: skip
CHILDREN = [(name, child) for name, (_, children) in LAYERS.items() for child in children]


class Adapted(nn.Module):
    """A layer and what is added to it; it has no weight of its own."""

    def __init__(self, base: nn.Module, width: int, out: int) -> None:
        super().__init__()
        self.base, self.added = base, nn.Linear(width, out, bias=False, **DOUBLE)
        self.in_features, self.out_features = width, out

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.added(x)


def layer_of(name: str) -> Any:
    torch.manual_seed(0)
    layer = LAYERS[name][0]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def arrays() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    seen = torch.rand(B, M) < 0.7
    seen[:, 0] = True
    return torch.randn(B, N, D, **DOUBLE), torch.randn(B, M, C, **DOUBLE), seen


def written(layer: Any, queries: Tensor, inputs: Tensor, seen: Tensor) -> Tensor:
    """A layer as its equations have it, every module called."""
    is_set = isinstance(layer, MAB)
    names = ("norm_latents", "norm_inputs") if isinstance(layer, CrossAttention) else ("norm_queries", "norm_latents")
    asks, reads = (nn.Identity(), nn.Identity()) if is_set else (getattr(layer, name) for name in names)
    rows = reads(torch.where(seen[..., None], inputs, 0.0))
    projected = layer.q_proj(asks(queries)), layer.k_proj(rows), layer.v_proj(rows)
    q, k, v = (x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in projected)
    scale = layer.dim**-0.5 if is_set else q.shape[-1] ** -0.5
    scores = (scale * q @ k.mT).masked_fill(~seen[:, None, None], -torch.inf)
    attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    if not is_set:
        return queries + layer.out_proj(attended)
    hidden = projected[0] + attended
    return hidden + layer.out_proj(hidden).relu()


def results(layer: Any, call: Callable[..., Tensor]) -> list[Tensor | None]:
    queries, inputs, seen = arrays()
    leaves = [queries.requires_grad_(), inputs.requires_grad_(), *layer.parameters()]
    out = call(queries, inputs, seen)
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(-1), allow_unused=True)
    return [out, *gradients]


def assert_as_written(layer: Any) -> None:
    for actual, expected in zip(
        results(layer, layer), results(layer, lambda *given: written(layer, *given)), strict=True
    ):
        assert (actual is None) == (expected is None)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "child"), [each for each in CHILDREN if "norm" not in each[1]])
def test_an_adapter_is_called(name: str, child: str) -> None:
    layer = layer_of(name)
    base = getattr(layer, child)
    setattr(layer, child, Adapted(base, base.in_features, base.out_features))
    assert_as_written(layer)
    assert results(layer, layer)[-1] is not None


@pytest.mark.parametrize(("name", "child"), CHILDREN)
def test_hooks_are_called(name: str, child: str) -> None:
    layer, seen = layer_of(name), []
    handles = [
        getattr(layer, child).register_forward_hook(lambda module, given, out: seen.append(child) or 1.5 * out),
        getattr(layer, child).register_full_backward_hook(lambda *_: seen.append("back")),
    ]
    assert_as_written(layer)
    assert seen == 2 * [child, "back"]
    for handle in handles:
        handle.remove()
    assert_as_written(layer)
    assert len(seen) == 4


@pytest.mark.parametrize(("name", "child"), [each for each in CHILDREN if "norm" not in each[1]])
@pytest.mark.parametrize("how", ["prune", "weight_norm", "spectral_norm", "parametrization"])
def test_weights_that_are_made_before_every_call(name: str, child: str, how: str) -> None:
    layer = layer_of(name).eval()
    module = getattr(layer, child)
    if how == "prune":
        prune.random_unstructured(module, "weight", 0.5)
    elif how == "weight_norm":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(module)
    elif how == "spectral_norm":
        nn.utils.spectral_norm(module)
    else:
        parametrizations.weight_norm(module)
    for _ in range(2):
        assert_as_written(layer)


@pytest.mark.parametrize(("name", "child"), [each for each in CHILDREN if "norm" in each[1]])
@pytest.mark.parametrize("norm", [nn.Identity, nn.RMSNorm])
def test_another_norm(name: str, child: str, norm: type[nn.Module]) -> None:
    layer = layer_of(name)
    width = getattr(layer, child).normalized_shape
    setattr(layer, child, norm() if norm is nn.Identity else norm(width, **DOUBLE))
    assert_as_written(layer)


@pytest.mark.parametrize("child", ["norm_inputs", "q_proj", "k_proj", "out_proj"])
@pytest.mark.parametrize("packed", [False, True])
def test_inputs_in_their_other_forms(child: str, packed: bool) -> None:
    positions = FourierPositions(2, (4, 4))
    image = torch.randn(B, 3, 4, 4, **DOUBLE)
    array = dataclasses.replace(InputArray.image(image, positions), key_mask=torch.rand(B, 16) < 0.6)
    torch.manual_seed(0)
    layer = CrossAttention(D, array.channels, **DOUBLE)
    given: Any = functional.pack_inputs(array, dtype=torch.float64) if packed else array
    latents = torch.randn(B, N, D, **DOUBLE)
    expected = layer(latents, given)
    getattr(layer, child).register_forward_hook(lambda *_: None)
    if packed and child == "norm_inputs":
        with pytest.raises(TypeError, match="inputs must not be packed where their norm is no plain LayerNorm"):
            layer(latents, given)
        return
    torch.testing.assert_close(layer(latents, given), expected)


@pytest.mark.parametrize("child", ["norm_queries", "q_proj", "v_proj", "out_proj"])
@pytest.mark.parametrize("masked", ["queries", "call", ""])
def test_queries_in_their_other_forms(child: str, masked: str) -> None:
    mask = torch.rand(B, 16) < 0.6
    array = InputArray.image(torch.randn(B, 3, 4, 4, **DOUBLE), FourierPositions(2, (4, 4)))
    array = dataclasses.replace(array, key_mask=mask if masked == "queries" else None)
    torch.manual_seed(0)
    layer = OutputCrossAttention(array.channels, D, num_heads=1, residual=False, **DOUBLE)
    latents, given = torch.randn(B, N, D, **DOUBLE), {"query_mask": mask} if masked == "call" else {}
    packed = functional.pack_inputs(array, dtype=torch.float64)
    expected = layer(array, latents, **given)
    getattr(layer, child).register_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer(array, latents, **given), expected)
    if child != "norm_queries":
        torch.testing.assert_close(layer(packed, latents, **given), expected)
    prepared = layer.prepare(latents)
    torch.testing.assert_close(layer(array, prepared, **given), expected)


@pytest.mark.parametrize("name", FAMILY)
def test_every_linear_layer_and_norm_of_a_model_is_called(name: str) -> None:
    """With hooks on all of them, as tools that capture activations set them, and nothing else changes."""
    build, inputs_of = FAMILY[name]
    torch.manual_seed(0)
    model, inputs = build().eval(), inputs_of()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        expected = leaves(model(*inputs))
        called: set[str] = set()
        hooked = {each for each, module in model.named_modules() if isinstance(module, (nn.Linear, nn.LayerNorm))}
        for each in hooked:
            model.get_submodule(each).register_forward_hook(lambda *_, each=each: called.add(each))
        found = leaves(model(*inputs))
    assert called == hooked
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["set transformer", "linformer", "interface", "vector sets"])
def test_dynamically_quantised_layers_are_called(name: str) -> None:
    """They have no parameters that would tell a dtype, and their weight is a method."""
    build, inputs_of = FAMILY[name]
    model, inputs = build().eval(), inputs_of()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with torch.no_grad():
        for found, exact in zip(leaves(quantised(*inputs)), leaves(model(*inputs)), strict=True):
            assert found.isfinite().all() and found.shape == exact.shape and not torch.equal(found, exact)


def test_adapters_of_a_whole_model_train() -> None:
    torch.manual_seed(0)
    model: Any = PerceiverIO.imagenet_fourier(
        image_size=8, num_classes=5, num_latents=6, latent_dim=16, num_blocks=1, layers_per_block=1, latent_heads=2
    ).double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Adapted(module, module.in_features, module.out_features))
    out = model(torch.randn(2, 3, 8, 8, **DOUBLE))
    (out * torch.arange(5)).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) >= 12 and all(gradient is not None for gradient in trained.values())


def test_which_layers_are_plain() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    class Named(nn.Linear):
        """A subclass that computes what the class does."""

    hooked, patched = nn.Linear(2, 2), nn.Linear(2, 2)
    hooked.register_forward_pre_hook(lambda *_: None)
    patched.forward = lambda input: input  # type: ignore[method-assign]
    assert is_plain(nn.Linear(2, 2), nn.LayerNorm(2), Named(2, 2), None)
    assert not any(map(is_plain, (Own(2, 2), hooked, patched, nn.RMSNorm(2), nn.Identity())))
