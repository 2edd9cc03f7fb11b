"""output_cross_attention: absorbed or projected, packed or not, it is the textbook's decoder, forward and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.testing import assert_as_accurate, same_bits
from perceiver_kernels.testing.targets import Target, machine, only
from tests.functional.layers import Layer, know_the_seed

OP = "attention"
# Queries and widths enough that the largest of an error's elements is a steady measure of it.
B, O, N, C, C_OUT = (2, 65, 33, 29, 18) if machine() == "interpreter" else (2, 300, 97, 109, 90)
METHODS = ("absorbed", "projected")
SHAPES = {"one head": (1, 32, 32), "d_qk != d_v": (1, 24, 43), "heads": (3, 8, 12)}


def random_layer(target: Target, shape: str = "one head", *, batch: int = B, channels: int = C, **options: Any) -> Layer:
    H, d_qk, d_v = SHAPES[shape]
    generator = torch.Generator().manual_seed(H + d_qk)
    sizes = {
        "queries": (batch, O, channels), "key": (B, H, N, d_qk), "value": (B, H, N, d_v), "w_q": (H * d_qk, channels),
        "w_o": (C_OUT, H * d_v), "b_q": (H * d_qk,), "b_o": (C_OUT,), "norm_weight": (channels,), "norm_bias": (channels,),
    }  # fmt: skip
    drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    drawn |= {name: drawn[name] * drawn[name].shape[1] ** -0.5 for name in ("w_q", "w_o")}
    # Weights about 1, as training leaves them: attention that is spread over latents.
    drawn["norm_weight"] = 1 + 0.2 * drawn["norm_weight"]
    drawn |= {name: 0.5 * drawn[name] for name in ("key", "b_q", "norm_bias")}
    return Layer.on(target, drawn, options, output_gradient)


def output_gradient(out: Tensor) -> Tensor:
    """What every run is differentiated with."""
    drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return drawn.to(out.device, out.dtype)


def largest_lse(layer: Layer) -> float:
    """The largest |lse| of the layer's attention, in fp64."""
    t = {name: tensor.double() for name, tensor in layer.tensors.items()}
    y = t["queries"]
    if layer.options.get("normalize", True):
        y = reference.layer_norm(y, t.get("norm_weight"), t.get("norm_bias"), layer.options.get("eps", 1e-5))
    query = torch.nn.functional.linear(y, t["w_q"], t.get("b_q")).unflatten(-1, (t["key"].shape[1], -1)).transpose(1, 2)
    lse = reference.attention(query.expand(B, -1, -1, -1), t["key"], t["key"], scale=layer.options.get("scale"))[1]
    return float(lse.abs().max())


def check(layer: Layer, target: Target, **more: Any) -> dict[str, Tensor]:
    judged = layer.specified()
    actual = layer.run(pk.output_cross_attention, backend=target.backend, **more)
    eager = judged.run(reference.output_cross_attention)
    oracle = judged.run(reference.output_cross_attention, torch.float64)
    # A backward recomputes weights from lse, whose rounding in fp32 comes to the four of the rule's floor.
    factor = 1 + largest_lse(layer) / 4
    for name, value in actual.items():
        terms = None if name == "out" else factor * oracle[name].abs()
        assert_as_accurate(value, eager[name], oracle[name], f"{target} {name}", terms=terms)
    assert actual.keys() == eager.keys()
    return actual


FORMS = [("one head", "absorbed"), ("d_qk != d_v", "absorbed"), ("d_qk != d_v", "projected"), ("heads", "projected")]


@pytest.mark.parametrize(("shape", "method"), FORMS)
def test_textbook(target: Target, shape: str, method: str) -> None:
    check(random_layer(target, shape), target, method=method)


SWITCHES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "no biases": (("b_q", "b_o"), {}),
    "no query bias": (("b_q",), {}),
    "no LayerNorm": (("norm_weight", "norm_bias"), {"normalize": False}),
    "LayerNorm without weights": (("norm_weight", "norm_bias"), {}),
    "no bias of scores": (("b_q", "norm_bias"), {}),
    "bare": (("b_q", "b_o", "norm_weight", "norm_bias"), {"normalize": False}),
    "eps": ((), {"eps": 0.3}),
    "scale": ((), {"scale": -0.2}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("switch", SWITCHES)
@only(torch.float32)
def test_switches(target: Target, switch: str, method: str) -> None:
    """What a switch does to the algebra shows in fp32; how it rounds in 16 bits is the textbook's test."""
    absent, options = SWITCHES[switch]
    check(random_layer(target, **options).without(*absent), target, method=method)


@pytest.mark.parametrize("channels", [46, 47, 48])
def test_ones_take_spare_channels_or_sixteen_more(target: Target, channels: int) -> None:
    """Two channels of ones fill the padding of 46, and start another 16 after 47, of which only one fits, and 48."""
    layer = random_layer(target, channels=channels)
    problem = pk.explain(pk.output_cross_attention, **layer.tensors).problem
    assert problem.channels == (48 if channels + problem.bias_channels <= 48 else 64)
    check(layer, target, method="absorbed")


def hidden(kind: str) -> dict[str, Tensor]:
    mask = torch.rand(B, N, generator=torch.Generator().manual_seed(8)) < 0.5
    mask[1] = False
    seen = torch.rand(B, O, generator=torch.Generator().manual_seed(9)) < 0.7
    return {
        "key_mask": {"key_mask": mask}, "lengths": {"lengths": torch.tensor([N - 9, 0], dtype=torch.int32)},
        "query_mask": {"query_mask": seen}, "both": {"query_mask": seen, "key_mask": mask},
    }[kind]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["key_mask", "lengths", "query_mask", "both"])
@only(torch.float32, torch.float16)
def test_hidden_rows(target: Target, kind: str, method: str) -> None:
    """A query that sees nothing gives b_o and has no gradient; what hidden rows hold, NaN included, changes no bit."""
    layer = random_layer(target, "d_qk != d_v", **hidden(kind))
    found = check(layer, target, method=method)
    keys = reference.visible_keys(N, layer.options.get("key_mask"), layer.options.get("lengths"))
    keys = torch.ones(B, N, dtype=torch.bool, device=target.device) if keys is None else keys
    rows = layer.options.get("query_mask", torch.ones(B, O, dtype=torch.bool, device=target.device))
    blind = ~(rows & keys.any(1, keepdim=True))
    assert blind.any() and (found["out"][blind] == layer.tensors["b_o"]).all() and not found["dqueries"][blind].any()
    dirty = replace(layer, tensors=dict(layer.tensors))
    dirty.tensors["queries"] = layer.tensors["queries"].masked_fill(~rows[..., None], float("nan"))
    for name in ("key", "value"):
        dirty.tensors[name] = layer.tensors[name].masked_fill(~keys[:, None, :, None], float("nan"))
    again = dirty.run(pk.output_cross_attention, backend=target.backend, method=method)
    assert [name for name in found if not same_bits(found[name], again[name])] == []


@pytest.mark.parametrize(("shape", "method"), FORMS[1:])
@only(torch.float32, torch.bfloat16)
def test_dropout_is_that_of_the_weights(target: Target, shape: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but b_o is weighted: dropped weights take their part of b_v, inside value, with them."""
    if target.backend == "sdpa":
        pytest.skip("sdpa draws its own dropout")
    know_the_seed(monkeypatch)
    check(random_layer(target, shape, dropout_p=0.3), target, method=method)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", METHODS)
@only(torch.float32)
def test_queries_shared_by_the_batch(target: Target, method: str, masked: bool) -> None:
    """Batch 1 is packed and, where it is projected, projected once; its gradient is the sum over the batch."""
    options = {} if not masked else hidden("query_mask")
    layer = random_layer(target, batch=1, **options)
    if masked:
        nowhere = ~layer.options["query_mask"].any(0)
        assert nowhere.any()
        layer.tensors["queries"][:, nowhere] = 0.0
    found = check(layer, target, method=method)
    assert found["dqueries"].shape == (1, O, C)
    if masked:
        layer.tensors["queries"][:, nowhere] = float("nan")
        again = layer.run(pk.output_cross_attention, backend=target.backend, method=method)
        assert [name for name in found if not same_bits(found[name], again[name])] == []


@pytest.mark.parametrize("kind", ["all", "query_mask"])
@pytest.mark.parametrize("method", METHODS)
@only(torch.float32, torch.bfloat16)
def test_queries_packed_once_serve_every_layer(target: Target, method: str, kind: str) -> None:
    """The same bits as packing inside the call, and the same gradient of the queries."""
    layer = random_layer(target)
    mask = None if kind == "all" else hidden("query_mask")["query_mask"].to(target.device)
    leaf = layer.tensors["queries"].detach().requires_grad_()
    packed = pk.pack_inputs(leaf, key_mask=mask, constants=2, backend=target.backend)
    assert (packed.channels, packed.constants, packed.data.shape[-1]) == (C, 2, -(-(C + 2) // 16) * 16)
    run = {"method": method, "backend": target.backend}
    out = pk.output_cross_attention(**layer.tensors | {"queries": packed}, **run)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), leaf)
    again = layer.tensors["queries"].detach().requires_grad_()
    alone = pk.output_cross_attention(**layer.tensors | {"queries": again}, query_mask=mask, **run)
    assert same_bits(alone, out)
    assert same_bits(torch.autograd.grad(alone.float().square().sum(), again)[0], gradient)


@pytest.mark.parametrize("method", METHODS)
@only(torch.float32)
def test_packed_queries_are_inputs_too(target: Target, method: str) -> None:
    """Optical flow decodes the array that it encodes: channels of ones are not seen by a layer that reads inputs."""
    x = torch.randn(B, 70, C, generator=torch.Generator().manual_seed(2)).to(target.device)
    q, w_k, w_v = (torch.randn(size, device=target.device) / size[-1] ** 0.5 for size in ((1, 1, 4, 8), (8, C), (6, C)))
    outs = [
        pk.input_cross_attention(q, pk.pack_inputs(x, constants=constants), w_k, w_v, method=method, backend=target.backend)
        for constants in (0, 2)
    ]
    torch.testing.assert_close(*outs)


@only(torch.float32, torch.bfloat16)
def test_packed_queries_without_ones_are_projected(target: Target) -> None:
    layer = random_layer(target)
    bare = layer.tensors | {"queries": pk.pack_inputs(layer.tensors["queries"], backend=target.backend)}
    assert "channels of ones" in str(pk.explain(pk.output_cross_attention, **bare))
    with pytest.raises(ValueError, match=r"method='absorbed' cannot serve .* pack_inputs\(..., constants=[12]\), got 0"):
        pk.output_cross_attention(**bare, method="absorbed", backend=target.backend)
    found, expected = (
        pk.output_cross_attention(**tensors, method=method, backend=target.backend)
        for tensors, method in ((bare, None), (layer.tensors, "projected"))
    )
    assert same_bits(found, expected)
    without = {name: tensor for name, tensor in bare.items() if name not in ("b_q", "norm_bias")}
    pk.output_cross_attention(**without, method="absorbed", backend=target.backend)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shared", [False, True])
def test_pixels_with_fourier_positions_ask(target: Target, method: str, shared: bool) -> None:
    """An image as queries, uint8, its positions computed on the way: the floats they stand for."""
    images = torch.randint(0, 256, (1 if shared else B, 3, 12, 13), dtype=torch.uint8, device=target.device)
    raw = pk.InputArray.image(images, pk.FourierPositions(6, (12.0, 13.0)), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    layer = random_layer(target, channels=raw.channels)
    tensors = layer.tensors | {"queries": raw}
    out = pk.output_cross_attention(**tensors, method=method, backend=target.backend)
    whole = raw.slice(dtype=torch.float32)
    features = reference.fourier_features(whole.positions, 6, (12.0, 13.0)).expand(len(images), -1, -1)
    queries = torch.cat([whole.content, features], -1)
    eager, oracle = (
        reference.output_cross_attention(**{n: t.to(dtype) for n, t in (tensors | {"queries": queries}).items()})
        for dtype in (target.dtype, torch.float64)
    )
    assert_as_accurate(out, eager, oracle, f"{target} out")


@only(torch.float32, torch.bfloat16)
def test_queries_of_more_channels_than_are_packed(target: Target) -> None:
    """Decoders of 1,026 channels are projected: their rows are normalised by torch."""
    layer = random_layer(target, channels=1026, **hidden("query_mask"))
    check(layer, target)
    with pytest.raises(ValueError, match="more than 1024 channels, got 1040 and 90"):
        layer.run(pk.output_cross_attention, method="absorbed", backend=target.backend)


@pytest.mark.parametrize("form", ["trained", "fourier"])
@only(torch.float32, torch.bfloat16)
def test_wide_queries_join_their_positions(target: Target, form: str) -> None:
    """What is too wide to be packed is what packing would join: pixels, and trained or computed positions."""
    fourier = pk.FourierPositions(4, (float(O),))
    layer = random_layer(target, channels=1026, **hidden("query_mask"))
    content, trained = layer.tensors["queries"].split([1026 - fourier.channels, fourier.channels], -1)
    trained = trained[0].clone().requires_grad_()
    raw = pk.InputArray.tokens(content, trained if form == "trained" else fourier)
    features = reference.fourier_features(raw.slice().positions, 4, (float(O),)) if form == "fourier" else trained.detach()
    out = pk.output_cross_attention(**layer.tensors | {"queries": raw}, **layer.options, backend=target.backend)
    layer.tensors["queries"] = torch.cat([content, features.to(content.dtype).expand(B, -1, -1)], -1)
    eager, oracle = (layer.run(reference.output_cross_attention, dtype)["out"] for dtype in (None, torch.float64))
    assert_as_accurate(out, eager, oracle, f"{target} out")
    if form == "trained":
        assert torch.autograd.grad(out.float().sum(), trained)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "method"), FORMS[1:])
def test_autocast(shape: str, method: str, dtype: torch.dtype) -> None:
    """fp32 parameters under autocast: as accurate as the textbook in autocast's dtype, gradients in fp32."""
    layer = random_layer(Target(OP, "reference", "cpu", torch.float32), shape)
    with torch.autocast("cpu", dtype=dtype):
        found = layer.run(pk.output_cross_attention, method=method)
        eager = layer.run(reference.output_cross_attention)
    oracle = layer.run(reference.output_cross_attention, torch.float64)
    assert_as_accurate(found["out"], eager["out"], oracle["out"], "out")
    assert found.pop("out").dtype == dtype
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


@pytest.mark.parametrize("mixed", ["queries", "value", "w_q", "w_o", "b_q", "b_o", "norm_weight", "norm_bias"])
def test_dtypes_may_be_mixed(mixed: str) -> None:
    """The result is in key's dtype, whatever floats the others are."""
    layer = random_layer(Target(OP, "reference", "cpu", torch.bfloat16))
    layer.tensors[mixed] = layer.tensors[mixed].float()
    for method in METHODS:
        found = layer.run(pk.output_cross_attention, method=method)
        assert found["out"].dtype == torch.bfloat16 and found[f"d{mixed}"].dtype == torch.float32


@pytest.mark.parametrize("sizes", [(0, O, N), (B, 0, N), (B, O, 0)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_do(sizes: tuple[int, int, int], method: str) -> None:
    b, o, n = sizes
    layer = random_layer(Target(OP, "reference", "cpu", torch.float32))
    layer.tensors["queries"] = layer.tensors["queries"][:b, :o]
    layer.tensors |= {name: layer.tensors[name][:b, :, :n] for name in ("key", "value")}
    found = layer.run(pk.output_cross_attention, method=method)
    assert found["out"].shape == (b, o, C_OUT) and (found["out"] == (layer.tensors["b_o"] if n == 0 else found["out"])).all()
    assert all(found[f"d{name}"].shape == tensor.shape for name, tensor in layer.tensors.items())


class TestTransforms:
    """torch.func: per-sample gradients, and a layer mapped over its weights."""

    @staticmethod
    def total(weights: dict[str, Tensor], key: Tensor, value: Tensor, queries: Tensor, method: str) -> Tensor:
        run = pk.output_cross_attention if method != "textbook" else reference.output_cross_attention
        options = {} if method == "textbook" else {"method": method}
        return run(queries, key, value, **weights, **options).square().sum()

    @pytest.mark.parametrize("method", METHODS)
    def test_gradients_of_each(self, method: str) -> None:
        layer = random_layer(Target(OP, "reference", "cpu", torch.float64))
        weights = {name: t for name, t in layer.tensors.items() if name not in ("queries", "key", "value")}
        data = [layer.tensors[name][:, None, :, :7] for name in ("key", "value")]
        queries = layer.tensors["queries"][:, None, :11]
        for dims in ((None, 0, 0, 0), (None, 0, 0, None)):
            args = (weights, *data, queries if dims[3] == 0 else queries[0])
            found, expected = (
                torch.func.vmap(torch.func.grad(lambda *a, m=m: self.total(*a, m)), dims)(*args) for m in (method, "textbook")
            )
            torch.testing.assert_close(found, expected)

    def test_second_derivative(self) -> None:
        """Composite backends are differentiated by torch, twice too."""
        layer = random_layer(Target(OP, "reference", "cpu", torch.float64))
        small = [layer.tensors["queries"][:1, :3], layer.tensors["key"][:1, :, :4], layer.tensors["w_q"], layer.tensors["b_q"]]

        def run(queries: Tensor, key: Tensor, w_q: Tensor, b_q: Tensor) -> Tensor:
            value = layer.tensors["value"][:1, :, :4]
            return pk.output_cross_attention(queries, key, value, w_q, layer.tensors["w_o"], b_q=b_q, method="absorbed")

        leaves = [tensor.detach().requires_grad_() for tensor in small]
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
