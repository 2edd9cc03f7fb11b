"""transformers' Perceiver, every class, before and after replacement; masks, attention's weights, Fourier features."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import functional, replace_attention
from perceiver_kernels.integrations.adapter import SHADOW
from perceiver_kernels.nn import output_attention
from tests.convert.test_transformers import PAIRS, SIZES, TEXT
from tests.integrations.replaced import (
    DEVICES,
    Case,
    assert_accurate_in_bfloat16,
    assert_agree,
    assert_compiles,
    assert_later_parts_run,
    assert_replaced,
    dropout_seen,
    leaves_of,
    outputs_of,
    results,
)

transformers = pytest.importorskip("transformers", minversion="5.0")
modeling = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")

# The model, three layers, the decoder's layer, and what makes Fourier features.
CONVERTED = {"learned": 5, "masked language": 5, "text classes": 5, "fourier": 6, "conv": 6, "flow": 7, "multimodal": 9}
FEATURES = {"fourier": 1, "conv": 1, "flow": 2, "multimodal": 4}


def perceiver(name: str, **changes: Any) -> nn.Module:
    """Of random running statistics, where it has such."""
    pair = PAIRS[name]
    model = getattr(transformers, pair.theirs)(transformers.PerceiverConfig(**{**pair.sizes, **changes}))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand_like(buffer), alpha=0.2)
    return model


def call(model: nn.Module, points: Any = None, attention_mask: Tensor | None = None, **inputs: Tensor) -> Any:
    asked = {} if points is None else {"subsampled_output_points": points}
    return model(inputs.get("inputs", inputs), attention_mask=attention_mask, **asked).logits


def case_of(name: str, shape: tuple[int, ...] = (), masks: dict[str, Tensor] | None = None, **sizes: Any) -> Case:
    """One of transformers' classes, on inputs of another shape or as they are."""
    pair = PAIRS[name]
    torch.manual_seed(1)
    inputs = pair.inputs()
    inputs = inputs if isinstance(inputs, dict) else {"inputs": inputs}
    if shape:
        like = inputs["inputs"]
        inputs = {"inputs": torch.randn(shape) if like.is_floating_point() else torch.randint(0, 20, shape)}
    floats = {key: tuple(each.shape) for key, each in inputs.items() if each.is_floating_point()}
    others = {key: each for key, each in inputs.items() if key not in floats} | {"points": pair.points} | (masks or {})
    features = FEATURES.get(name, 0)
    found = {"PerceiverLayer": CONVERTED[name] - 1 - features, "PerceiverModel": 1}
    if features:
        found["PerceiverFourierPositionEncoding"] = features
    return Case(
        functools.partial(perceiver, name, **sizes), call, floats, found, arrays=lambda: others,
        # It joins its modalities with positions in fp32.
        bfloat16=name != "multimodal",
    )  # fmt: skip


CASES = {name: case_of(name) for name in PAIRS}
LATENTS = {"num_latents": 64, "d_latents": 64, "num_labels": 32}
WORDS: dict[str, int] = {
    "max_position_embeddings": 256, "d_model": 64, "qk_channels": 64, "v_channels": 64, "num_cross_attention_heads": 4,
    "num_self_attention_heads": 4, **LATENTS,
}  # fmt: skip
PADDING = torch.arange(256) < torch.tensor([[256], [150]])
LARGE = {
    "fourier": case_of("fourier", (2, 3, 16, 16), **LATENTS),
    "learned": case_of("learned", (2, 3, 16, 16), image_size=16, **LATENTS),
    "conv": case_of("conv", (2, 3, 64, 64), **LATENTS),
    "flow": case_of("flow", (2, 2, 27, 16, 16), train_size=[16, 16], **LATENTS),
    "masked language": case_of("masked language", (2, 256), **WORDS),
    "padded language": case_of("masked language", (2, 256), {"attention_mask": PADDING}, **WORDS),
    "text classes": case_of("text classes", (2, 200), **WORDS),
    "multimodal": case_of("multimodal", num_latents=64, d_latents=64),
}


ONE_LAYER = {"num_blocks": 1, "num_self_attends_per_block": 1}


@pytest.mark.parametrize("name", CASES)
def test_every_class(name: str) -> None:
    assert "transformers PerceiverLayer" in str(assert_replaced(CASES[name]))


@pytest.mark.parametrize("name", ["fourier", "masked language"])
def test_compiled(name: str) -> None:
    # The original computes the number of an image's tokens with numpy, which breaks the graph.
    assert_compiles(CASES[name], fullgraph=name != "fourier", gradients=name != "fourier", **ONE_LAYER)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LARGE)
def test_bfloat16(name: str, device: str) -> None:
    assert_accurate_in_bfloat16(LARGE[name], device)


@pytest.mark.parametrize("name", ["fourier", "masked language", "flow"])
def test_parts_that_are_replaced_later_run(name: str) -> None:
    assert_later_parts_run(CASES[name], **ONE_LAYER)


def tokens_of(name: str) -> int:
    inputs = PAIRS[name].inputs()
    return inputs.shape[1] if inputs.ndim == 2 else inputs.shape[2] * inputs.shape[3]


@pytest.mark.parametrize("kind", ["bool", "integers", "scores"])
@pytest.mark.parametrize("name", ["masked language", "fourier"])
def test_masks(name: str, kind: str) -> None:
    """Padding as two axes; a mask of scores for each pair, which runs as the original does."""
    tokens, generator = tokens_of(name), torch.Generator().manual_seed(5)
    mask = torch.rand(2, tokens, generator=generator) < 0.7
    mask[:, 0] = True
    if kind == "integers":
        mask = mask.long()
    elif kind == "scores":
        mask = torch.randn(2, 1, SIZES["num_latents"], tokens, generator=generator, dtype=torch.float64)
    assert_replaced(case_of(name, masks={"attention_mask": mask}))


@pytest.mark.parametrize("name", ["masked language", "fourier"])
def test_an_entry_that_sees_nothing_reads_all_evenly(name: str) -> None:
    """As in the original, whose lowest number, added to scores, leaves nothing of them."""
    mask = torch.ones(2, tokens_of(name), dtype=torch.bool)
    mask[0, 3:] = mask[1] = False
    case = case_of(name, masks={"attention_mask": mask})
    model = case.model()
    (expected,) = outputs_of(case, model)
    replace_attention(model)
    (found,) = outputs_of(case, model)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert found[1].any()


def layer_of(N: int, M: int | None, channels: int = 24) -> Case:
    """One layer of N latents, which read M inputs, or themselves."""
    sizes = {"q_dim": 16, "num_heads": 2, "qk_channels": 16, "v_channels": 16}
    shapes = {"x": (2, N, 16)} | ({} if M is None else {"read": (2, M, channels)})

    def build() -> nn.Module:
        config = transformers.PerceiverConfig(**SIZES)
        return modeling.PerceiverLayer(config, M is not None, kv_dim=16 if M is None else channels, **sizes)

    def call(model: nn.Module, x: Tensor, mask: Tensor | None = None, read: Tensor | None = None) -> Tensor:
        return model(x, mask, read, mask)[0]

    return Case(build, call, shapes, {"PerceiverLayer": 1})


@pytest.mark.parametrize("sizes", [(4, 7), (7, 4), (2, 3, 1032), (5, None)], ids=["few", "many", "wide", "self"])
def test_layers_that_see_nothing(sizes: Any) -> None:
    """Gradients are those of the mean: the original's own, of scores that were rounded away, are of another function."""
    hidden = torch.zeros(2, 1, 1, sizes[1] or sizes[0], dtype=torch.float64)
    hidden[0, ..., 2:] = hidden[1] = torch.finfo(torch.float64).min
    case = layer_of(*sizes)
    assert_replaced(case)
    case = dataclasses.replace(case, arrays=lambda: {"mask": hidden})
    model, data = case.model(), case.data()
    expected = case.on(model)
    replace_attention(model)
    torch.testing.assert_close(case.on(model), expected, rtol=1e-10, atol=1e-10)

    def of_inputs(*floats: Tensor) -> Tensor:
        return case.call(model, **{**data, **dict(zip(case.shapes, floats, strict=True))})

    leaves = [data[name].requires_grad_() for name in case.shapes]
    assert torch.autograd.gradcheck(of_inputs, leaves, fast_mode=True)


def test_weights_of_attention_are_the_originals() -> None:
    model, inputs = CASES["fourier"].model(), CASES["fourier"].data()["inputs"]
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
    model, inputs = CASES["fourier"].model(), CASES["fourier"].data()["inputs"]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.25
    replace_attention(model)
    seen = dropout_seen(monkeypatch)
    model.train()(inputs)
    assert set(seen) == {0.25} and len(seen) == 6
    seen.clear()
    model.eval()(inputs)
    assert set(seen) == {0.0}


def test_dropout_may_change_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its probability, and whether it drops at all: layers keep neither."""
    model, inputs = CASES["fourier"].model().train(), CASES["fourier"].data()["inputs"]
    replace_attention(model)
    seen, dropouts = dropout_seen(monkeypatch), [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for p in (0.25, 1.0):
        for dropout in dropouts:
            dropout.p = p
        model(inputs)
        assert seen == (6 * [p] if p < 1.0 else [])
        seen.clear()
    for dropout in dropouts:
        dropout.eval()
    model(inputs)
    assert seen == 6 * [0.0]


def test_chunked_feed_forward() -> None:
    def build() -> nn.Module:
        model = perceiver("fourier")
        for module in (model.perceiver.encoder.cross_attention, *model.perceiver.encoder.self_attends):
            module.chunk_size_feed_forward = 4
        return model

    assert_replaced(dataclasses.replace(CASES["fourier"], build=build))


def test_features_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = CASES["fourier"], []
    model, inputs = case.model(), case.data()["inputs"]
    original = modeling.generate_fourier_features
    monkeypatch.setattr(modeling, "generate_fourier_features", lambda *a, **k: made.append(1) or original(*a, **k))
    replace_attention(model)
    with torch.inference_mode():
        model(inputs)
    first = results(case, model)
    assert len(made) == 1
    assert_agree(results(case, model), first)
    model(torch.randn(2, 3, 5, 7, dtype=torch.float64))
    assert len(made) == 2
    (tables,) = (module.__dict__[SHADOW] for module in model.modules() if isinstance(module.__dict__.get(SHADOW), dict))
    for size in range(3, 20):
        model(torch.randn(1, 3, size, 4, dtype=torch.float64))
    assert len(tables) == 8
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {} in [module.__dict__.get(SHADOW) for module in each.modules()]
        torch.testing.assert_close(each(inputs).logits, model(inputs).logits)


def test_features_are_a_constant_of_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    case, made, traced = CASES["fourier"], [], []
    model, inputs = case.model(**ONE_LAYER), case.data()["inputs"]
    expected = model(inputs).logits
    original = modeling.generate_fourier_features
    monkeypatch.setattr(modeling, "generate_fourier_features", lambda *a, **k: made.append(1) or original(*a, **k))
    replace_attention(model)

    def recording(graph: torch.fx.GraphModule, _: Any) -> Any:
        traced.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=recording)
    for _ in range(2):
        torch.testing.assert_close(compiled(inputs).logits, expected)
    assert len(made) == 1 and not {torch.sin, torch.linspace} & set(traced)
    other = torch.randn(1, 3, 5, 7, dtype=inputs.dtype)
    torch.testing.assert_close(compiled(other).logits, model(other).logits)
    torch.compiler.reset()


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
    for options in ({}, {"attention_mask": torch.ones(2, 16)}, {"attention_mask": torch.zeros(2, 16)}):
        with Reads() as reads, torch.no_grad():
            model(ids, **options)
        assert reads.count == 0


class LoRA(nn.Linear):
    """Stands for an adapter, whose weight is not all of it."""


def test_layers_whose_parts_were_replaced_are_left_alone() -> None:
    def build() -> nn.Module:
        model = perceiver("fourier")
        adapted, hooked = model.perceiver.encoder.self_attends
        adapted.attention.self.query.__class__ = LoRA
        hooked.mlp.dense1.register_forward_hook(lambda *_: None)
        return model

    case = CASES["fourier"]
    converted = {**case.converted, "PerceiverLayer": case.converted["PerceiverLayer"] - 2}
    report = assert_replaced(dataclasses.replace(case, build=build, converted=converted, kept={"PerceiverLayer": 2}))
    reasons = {entry.name.rsplit(".", 1)[1]: entry.reason for entry in report.kept}
    assert "attention.self.query is a LoRA" in reasons["0"] and "mlp.dense1 has hooks" in reasons["1"]


def test_many_queries_read_few_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's layer takes the form for outputs where there are more of them than latents."""
    called: list[str] = []
    for module, name in ((functional, "input_cross_attention"), (output_attention, "compute")):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, name=name, function=function, **k: called.append(name) or function(*a, **k)
        )
    model = CASES["flow"].model()
    replace_attention(model)
    CASES["flow"].on(model)
    assert called == ["input_cross_attention", "compute"]


@pytest.fixture
def on_gpu() -> tuple[Any, Tensor]:
    """A replaced model, and images."""
    config = transformers.PerceiverConfig(**SIZES | {"d_latents": 64, "num_latents": 64})
    torch.manual_seed(0)
    model = transformers.PerceiverForImageClassificationFourier(config).cuda().bfloat16().eval()
    replace_attention(model)
    return model, torch.randn(2, 3, 32, 32, device="cuda", dtype=torch.bfloat16)


@pytest.mark.gpu
def test_a_replaced_model_is_captured(on_gpu: tuple[Any, Tensor]) -> None:
    model, images = on_gpu
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


@pytest.mark.gpu
def test_a_replaced_model_trains_as_graphs(on_gpu: tuple[Any, Tensor]) -> None:
    model, images = on_gpu
    before = _gradients(model, model, images)
    graphed = torch.cuda.make_graphed_callables(model, (torch.randn_like(images),))
    after = _gradients(model, graphed, images)
    assert set(after) == set(before) and before
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, msg=name)


def _gradients(model: torch.nn.Module, call: Any, images: Tensor) -> dict[str, Tensor]:
    """Of one step, on a stream of its own, as captures want it."""
    model.zero_grad(set_to_none=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(images).logits.square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
