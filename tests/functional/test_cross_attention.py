"""input_cross_attention: absorbed, projected, packed or chunked, it is the textbook's layer, forward and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.testing import assert_as_accurate, broadcast, same_bits
from perceiver_kernels.testing.targets import Target, machine, only
from tests.functional.layers import Layer, know_the_seed

OP = "shared_kv_attention"
# Latents enough that the largest of an error's elements is a steady measure of it.
B, N, M, C = (2, 33, 60, 61) if machine() == "interpreter" else (2, 33, 97, 117)
METHODS = ("absorbed", "projected")
SHAPES = {"one head": (1, C, C), "heads": (3, 8, 8), "d_qk != d_v": (2, 5, 12), "one head, narrow": (1, 7, 30)}


def wanted(target: Target) -> bool:
    return target.backend != "cuda"


def random_layer(target: Target, shape: str = "heads", batch: int = B, **options: Any) -> Layer:
    H, d_qk, d_v = SHAPES[shape]
    generator = torch.Generator().manual_seed(H)
    sizes = {
        "q": (batch, H, N, d_qk), "inputs": (B, M, C), "w_k": (H * d_qk, C), "w_v": (H * d_v, C), "b_k": (H * d_qk,),
        "b_v": (H * d_v,), "norm_weight": (C,), "norm_bias": (C,),
    }  # fmt: skip
    drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    for name in ("w_k", "w_v"):
        drawn[name] = drawn[name] * C**-0.5
    # Weights about 1, as training leaves them: attention that is spread over tokens.
    drawn["norm_weight"] = 1 + 0.2 * drawn["norm_weight"]
    return Layer.on(target, drawn, options, output_gradient)


def output_gradient(out: Tensor) -> Tensor:
    """What every run is differentiated with."""
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape).mul(9).cos().to(out.dtype)


def largest_lse(layer: Layer) -> float:
    """The largest |lse| of the layer's attention, in fp64."""
    t = {name: tensor.double() for name, tensor in layer.tensors.items()}
    y = t["inputs"]
    if layer.options.get("normalize", True):
        y = reference.layer_norm(y, t.get("norm_weight"), t.get("norm_bias"), layer.options.get("eps", 1e-5))
    keys = torch.nn.functional.linear(y, t["w_k"], t.get("b_k")).unflatten(-1, (t["q"].shape[1], -1)).transpose(1, 2)
    options = {name: value for name, value in layer.options.items() if name in ("scale", "key_mask", "lengths")}
    lse = reference.attention(t["q"].expand(len(y), -1, -1, -1), keys, keys, **options)[1]
    return float(lse[lse.isfinite()].abs().max())


def terms_of(layer: Layer, oracle: dict[str, Tensor]) -> dict[str, Tensor]:
    """Terms for compare: a backward recomputes weights from lse, whose rounding in fp32 comes to the four of the rule's floor.

    Rows of the output's gradient nearly cancel in db_v.
    """
    factor = 1 + largest_lse(layer) / 4
    terms = {name: factor * value.abs() for name, value in oracle.items() if name != "out"}
    if "db_v" in terms:
        rows = output_gradient(oracle["out"]).abs().transpose(-3, -2).flatten(-2).flatten(0, -2)
        terms["db_v"] = factor * rows.sum(0) / (1.0 - layer.options.get("dropout_p", 0.0))
    return terms


def check(layer: Layer, target: Target, **more: Any) -> dict[str, Tensor]:
    judged = layer.specified()
    actual = layer.run(pk.input_cross_attention, backend=target.backend, **more)
    eager = judged.run(reference.input_cross_attention)
    oracle = judged.run(reference.input_cross_attention, torch.float64)
    terms = terms_of(layer, oracle)
    for name, value in actual.items():
        if name == "db_k":
            # softmax forgets what all scores share: exactly zero, where eager has rounding errors.
            assert not value.any()
        else:
            assert_as_accurate(value, eager[name], oracle[name], f"{target} {name}", terms=terms.get(name))
    assert actual.keys() == eager.keys()
    return actual


def skip_unless_served(target: Target, method: str, **options: Any) -> None:
    """sdpa has no dropout that returns its row sums."""
    op = "shared_kv_attention" if method == "absorbed" else "attention"
    if op not in pk.dispatch.TABLE or target.backend not in pk.dispatch.TABLE[op]:
        pytest.skip(f"{target.backend} has no {op}")
    if target.backend == "sdpa" and options.get("dropout_p"):
        pytest.skip("sdpa draws its own dropout, or refuses it")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_textbook(target: Target, shape: str, method: str) -> None:
    skip_unless_served(target, method)
    check(random_layer(target, shape), target, method=method)


SWITCHES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "no biases": (("b_k", "b_v"), {}),
    "no key bias": (("b_k",), {}),
    "no LayerNorm": (("norm_weight", "norm_bias"), {"normalize": False}),
    "LayerNorm without weights": (("norm_weight", "norm_bias"), {}),
    "LayerNorm without bias": (("norm_bias",), {}),
    "eps": ((), {"eps": 0.3}),
    "scale": ((), {"scale": -0.2}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("switch", SWITCHES)
@only(torch.float32)
def test_switches(target: Target, switch: str, method: str) -> None:
    """What a switch does to the algebra shows in fp32; how it rounds in 16 bits is the textbook's test."""
    skip_unless_served(target, method)
    absent, options = SWITCHES[switch]
    check(random_layer(target, **options).without(*absent), target, method=method)


def hidden(kind: str) -> dict[str, Tensor]:
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(8)) < 0.5
    mask[1] = False
    return {"key_mask": {"key_mask": mask}, "lengths": {"lengths": torch.tensor([M - 9, 0], dtype=torch.int32)}}[kind]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["key_mask", "lengths"])
def test_hidden_tokens(target: Target, kind: str, method: str) -> None:
    """A latent that sees no token gets exactly 0: no bias reaches it."""
    skip_unless_served(target, method)
    layer = random_layer(target, "d_qk != d_v", **hidden(kind))
    found = check(layer, target, method=method)
    assert not any(found[name][1].any() for name in ("out", "dq", "dinputs"))
    visible = reference.visible_keys(M, layer.options.get("key_mask"), layer.options.get("lengths"))
    inputs = layer.tensors["inputs"].masked_fill(~visible[..., None], float("nan"))
    dirty = replace(layer, tensors=layer.tensors | {"inputs": inputs})
    again = dirty.run(pk.input_cross_attention, backend=target.backend, method=method)
    assert [name for name in found if not same_bits(found[name], again[name])] == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["one head", "d_qk != d_v"])
def test_dropout_is_that_of_the_weights(target: Target, shape: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorbed, what is dropped of the weights is dropped of both biases too (rho): the same mask gives the same layer."""
    skip_unless_served(target, method, dropout_p=0.3)
    know_the_seed(monkeypatch)
    check(random_layer(target, shape, dropout_p=0.3), target, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_latents_shared_by_the_batch(target: Target, method: str) -> None:
    """Batch 1, or batch stride 0: no copy is needed, the gradient is summed."""
    skip_unless_served(target, method)
    layer = random_layer(target, batch=1)
    found = layer.run(pk.input_cross_attention, backend=target.backend, method=method)
    layer.tensors["q"] = broadcast(layer.tensors["q"].expand(B, -1, -1, -1))
    stretched = check(layer, target, method=method)
    assert same_bits(found["out"], stretched["out"])
    # Both are sums over the tokens too, in orders of their own.
    eps = torch.finfo(target.dtype).eps
    expected = stretched["dq"].double().sum(0, keepdim=True)
    assert (found["dq"].double() - expected).abs().max() <= 16 * eps * stretched["dq"].double().abs().sum(0).max()


@pytest.mark.parametrize("kind", ["all", "key_mask", "lengths"])
@pytest.mark.parametrize("method", METHODS)
def test_inputs_packed_once_serve_every_layer(target: Target, method: str, kind: str) -> None:
    """The same bits as packing inside the call; the gradient of the inputs adds up over the layers."""
    skip_unless_served(target, method)
    options = {} if kind == "all" else {k: v.to(target.device) for k, v in hidden(kind).items()}
    layers = [random_layer(target, shape) for shape in ("heads", "one head")]
    leaf = layers[0].tensors["inputs"].detach().requires_grad_()
    packed = pk.pack_inputs(leaf, **options, backend=target.backend)
    outs = [
        pk.input_cross_attention(**{**layer.tensors, "inputs": packed}, method=method, backend=target.backend)
        for layer in layers
    ]
    (gradient,) = torch.autograd.grad([out.float().square().sum() for out in outs], leaf)
    total = torch.zeros_like(gradient, dtype=torch.float64)
    for layer, out in zip(layers, outs, strict=True):
        inputs = leaf.detach().requires_grad_()
        alone = pk.input_cross_attention(
            **{**layer.tensors, "inputs": inputs}, **options, method=method, backend=target.backend
        )
        assert same_bits(alone, out)
        total += torch.autograd.grad(alone.float().square().sum(), inputs)[0].double()
    eps = torch.finfo(target.dtype).eps
    assert (gradient.double() - total).norm() <= 16 * eps * total.norm()


def test_methods_agree_and_the_planner_takes_one_of_them(target: Target) -> None:
    skip_unless_served(target, "projected")
    layer = random_layer(target)
    by_method = {
        method: layer.run(pk.input_cross_attention, backend=target.backend, method=method)["out"] for method in METHODS
    }
    planned = layer.run(pk.input_cross_attention, backend=target.backend)["out"]
    assert any(same_bits(planned, out) for out in by_method.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, heads: int, dtype: torch.dtype) -> None:
    """fp32 parameters under autocast: the result is autocast's dtype whatever the head count, gradients are fp32."""
    target = Target(OP, "reference", "cpu", torch.float32)
    layer = random_layer(target, "one head" if heads == 1 else "d_qk != d_v")
    with torch.autocast("cpu", dtype=dtype):
        found = layer.run(pk.input_cross_attention, method=method)
    assert found.pop("out").dtype == dtype
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


def test_raw_bytes_are_normalised_as_floats(target: Target) -> None:
    """uint8 pixels with a mean and a deviation, positions computed on the way: the floats they stand for."""
    skip_unless_served(target, "absorbed")
    images = torch.randint(0, 256, (B, 3, 5, 7), dtype=torch.uint8, device=target.device)
    raw = pk.InputArray.image(images, pk.FourierPositions(4, (5.0, 7.0)), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    assert raw.content.untyped_storage().data_ptr() == images.untyped_storage().data_ptr()
    generator = torch.Generator().manual_seed(0)
    q, w_k, w_v = (
        torch.randn(size, generator=generator).to(target.device, target.dtype) for size in ((1, 2, N, 4), (8, 21), (6, 21))
    )
    w_k, w_v = w_k * 21**-0.5, w_v * 21**-0.5
    out = pk.input_cross_attention(q, raw, w_k, w_v, method="absorbed", backend=target.backend)
    whole = raw.slice(dtype=torch.float32)
    features = reference.fourier_features(whole.positions, 4, (5.0, 7.0)).expand(B, -1, -1)
    inputs = torch.cat([whole.content, features], -1)
    eager, oracle = (
        reference.input_cross_attention(q.to(dtype), inputs.to(dtype), w_k.to(dtype), w_v.to(dtype))
        for dtype in (target.dtype, torch.float64)
    )
    assert_as_accurate(out, eager, oracle, f"{target} out")
