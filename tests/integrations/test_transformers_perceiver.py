"""transformers' Perceiver, every class, before and after replacement; masks, attention's weights, Fourier features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import replace_attention
from perceiver_kernels.integrations.adapter import SHADOW
from tests.convert.test_transformers import PAIRS, SIZES, TEXT, their_model
from tests.integrations.agreement import assert_replaced, assert_same, leaves_of, results

transformers = pytest.importorskip("transformers", minversion="5.0")
modeling = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")

# The model, three layers, the decoder's layer, and what makes Fourier features.
CONVERTED = {"learned": 5, "masked language": 5, "text classes": 5, "fourier": 6, "conv": 6, "flow": 7, "multimodal": 9}


def model_of(name: str) -> nn.Module:
    model = their_model(PAIRS[name])
    # Steep scores would make a rounding of one an error of the other.
    with torch.no_grad():
        for tensor in model.parameters():
            tensor *= 0.3
    return model


@pytest.mark.parametrize("name", list(PAIRS))
def test_every_class(name: str) -> None:
    pair = PAIRS[name]
    torch.manual_seed(1)
    inputs = pair.inputs()
    floats = [t for t in (inputs.values() if isinstance(inputs, dict) else [inputs]) if t.is_floating_point()]
    report = assert_replaced(
        model_of(name), lambda m: m(inputs, **pair.theirs_asked).logits, floats, converted=CONVERTED[name],
        compiles=name in ("fourier", "masked language"),
    )
    assert "transformers PerceiverLayer" in str(report)


@pytest.mark.parametrize("name", ["masked language", "fourier"])
def test_masks(name: str) -> None:
    """Padding as two axes; a mask of scores for each pair, which runs as the original does."""
    pair, generator = PAIRS[name], torch.Generator().manual_seed(5)
    inputs = pair.inputs()
    tokens = inputs.shape[1] if inputs.ndim == 2 else inputs.shape[2] * inputs.shape[3]
    padding = torch.rand(2, tokens, generator=generator) < 0.7
    padding[:, 0] = True
    scores = torch.randn(2, 1, SIZES["num_latents"], tokens, generator=generator, dtype=torch.float64)
    for mask in (padding, padding.long(), scores):
        assert_replaced(
            model_of(name), lambda m, mask=mask: m(inputs, attention_mask=mask).logits, [], converted=CONVERTED[name],
            compiles=False,
        )


def test_weights_of_attention_are_the_originals() -> None:
    pair = PAIRS["fourier"]
    model, inputs = model_of("fourier").eval(), pair.inputs()
    with torch.no_grad():
        expected = model(inputs, output_attentions=True, output_hidden_states=True)
        replace_attention(model)
        found = model(inputs, output_attentions=True, output_hidden_states=True)
        plain = model(inputs)
    for name in ("logits", "attentions", "cross_attentions", "hidden_states"):
        for a, e in zip(leaves_of(found[name]), leaves_of(expected[name]), strict=True):
            torch.testing.assert_close(a, e)
    assert plain.attentions is None


def test_dropout_reaches_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from perceiver_kernels import functional

    pair, seen = PAIRS["fourier"], []
    model = their_model(pair)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.25
    replace_attention(model)
    for name in ("attention", "input_cross_attention"):
        function = getattr(functional, name)
        monkeypatch.setattr(
            functional, name, lambda *a, function=function, **k: seen.append(k["dropout_p"]) or function(*a, **k)
        )
    model.train()(pair.inputs())
    assert set(seen) == {0.25} and len(seen) == 6
    seen.clear()
    model.eval()(pair.inputs())
    assert set(seen) == {0.0}


def test_chunked_feed_forward() -> None:
    pair = PAIRS["fourier"]
    model, inputs = model_of("fourier"), pair.inputs()
    for module in model.modules():
        if isinstance(module, modeling.PerceiverLayer):
            module.chunk_size_feed_forward = 4 if module is not model.perceiver.decoder.decoder.decoding_cross_attention else 0
    assert_replaced(model, lambda m: m(inputs).logits, [inputs], converted=6, compiles=False)


def test_features_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, made = PAIRS["fourier"], []
    model, inputs = model_of("fourier"), pair.inputs()
    original = modeling.generate_fourier_features
    monkeypatch.setattr(modeling, "generate_fourier_features", lambda *a, **k: made.append(1) or original(*a, **k))
    replace_attention(model)
    with torch.inference_mode():
        model(inputs)
    first = results(model, lambda m: m(inputs).logits, [inputs])
    assert len(made) == 1
    assert_same(results(model, lambda m: m(inputs).logits, [inputs]), first)
    model(torch.randn(2, 3, 5, 7, dtype=torch.float64))
    assert len(made) == 2
    (tables,) = (module.__dict__[SHADOW] for module in model.modules() if isinstance(module.__dict__.get(SHADOW), dict))
    for size in range(3, 20):
        model(torch.randn(1, 3, size, 4, dtype=torch.float64))
    assert len(tables) == 8


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what makes the host wait for a GPU: values that are read back."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back() -> None:
    # A mask that is chosen by what it holds waits for the GPU.
    model = transformers.PerceiverForMaskedLM(transformers.PerceiverConfig(**SIZES | TEXT)).eval()
    ids = torch.randint(0, 20, (2, 16))
    replace_attention(model)
    for options in ({}, {"attention_mask": torch.ones(2, 16)}):
        with Reads() as reads, torch.no_grad():
            model(ids, **options)
        assert reads.count == 0


class LoRA(nn.Linear):
    """Stands for an adapter, whose weight is not all of it."""


def test_layers_whose_parts_were_replaced_are_left_alone() -> None:
    pair = PAIRS["fourier"]
    model, inputs = model_of("fourier"), pair.inputs()
    own = model.perceiver.encoder.self_attends[0].attention.self
    own.query.__class__ = LoRA
    model.perceiver.encoder.self_attends[1].mlp.dense1.register_forward_hook(lambda *_: None)
    report = assert_replaced(
        model, lambda m: m(inputs).logits, [inputs], converted=4, kept=2, compiles=False
    )
    reasons = {entry.name.rsplit(".", 1)[1]: entry.reason for entry in report.kept}
    assert "attention.self.query is a LoRA" in reasons["0"] and "mlp.dense1 has hooks" in reasons["1"]


def test_parts_that_are_replaced_later_run() -> None:
    pair = PAIRS["fourier"]
    model, inputs = model_of("fourier"), pair.inputs()

    def adapt() -> None:
        for layer in (model.perceiver.encoder.cross_attention, model.perceiver.encoder.self_attends[0]):
            own = layer.attention.self
            own.value = nn.Sequential(own.value, nn.Tanh())

    replace_attention(model)
    adapt()
    found = results(model, lambda m: m(inputs).logits, [])
    model = model_of("fourier")
    adapt()
    assert_same(found, results(model, lambda m: m(inputs).logits, []))


def test_many_queries_read_few_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's layer takes the form for outputs where there are more of them than latents."""
    from perceiver_kernels import functional

    called: list[str] = []
    for name in ("input_cross_attention", "output_cross_attention"):
        function = getattr(functional, name)
        monkeypatch.setattr(
            functional, name, lambda *a, name=name, function=function, **k: called.append(name) or function(*a, **k)
        )
    model = model_of("flow")
    replace_attention(model)
    model(PAIRS["flow"].inputs())
    assert called == ["input_cross_attention", "output_cross_attention"]


@pytest.mark.gpu
def test_a_replaced_model_is_captured() -> None:
    config = transformers.PerceiverConfig(**SIZES | {"d_latents": 64, "num_latents": 64})
    torch.manual_seed(0)
    model = transformers.PerceiverForImageClassificationFourier(config).cuda().bfloat16().eval()
    images = torch.randn(2, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    replace_attention(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        expected: Tensor = model(images).logits
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        found = model(images).logits
    graph.replay()
    torch.testing.assert_close(found, expected)
