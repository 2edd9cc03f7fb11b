"""torch.nn: MultiheadAttention by itself and in torch's own layers; what is left alone, and the report."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

import perceiver_kernels
from perceiver_kernels import functional, replace_attention
from perceiver_kernels.integrations.adapter import SHADOW
from tests.integrations.replaced import DEVICES, Case, assert_accurate_in_bfloat16, assert_compiles, assert_replaced

B, Lq, Lk, E, H = 2, 5, 9, 16, 4
ONE = {"MultiheadAttention": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "widths": {"kdim": 6, "vdim": 7}, "no biases": {"bias": False},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True},
}  # fmt: skip


def multihead(**changes: Any) -> nn.Module:
    return nn.MultiheadAttention(**{"embed_dim": E, "num_heads": H, "batch_first": True, **changes})


def attend(model: nn.Module, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return model(q, k, v, **options)


def read(model: nn.Module, q: Tensor, x: Tensor, hidden: Tensor | None = None) -> Any:
    """Keys and values are one tensor."""
    return model(q, x, x, key_padding_mask=hidden, need_weights=False)


def hidden(length: int, start: int) -> Tensor:
    """True where tokens are hidden: of the first entry, all from ``start`` on."""
    mask = torch.zeros(B, length, dtype=torch.bool)
    mask[0, start:] = True
    return mask


def attending(need_weights: bool, queries: int = Lq, keys: int = Lk, **options: Any) -> Case:
    width = options.get("embed_dim", E)
    shapes = {
        "q": (B, queries, width), "k": (B, keys, options.get("kdim", width)), "v": (B, keys, options.get("vdim", width))
    }  # fmt: skip
    build = functools.partial(multihead, **options)
    arrays = {"key_padding_mask": hidden(keys, 4), "need_weights": need_weights}
    return Case(build, attend, shapes, ONE, arrays=lambda: arrays)


def reading(masked: bool, queries: int = Lq, keys: int = 4 * Lq, batch_first: bool = True, **options: Any) -> Case:
    shapes = {"q": (B, queries, options.get("embed_dim", E)), "x": (B, keys, options.get("kdim", options.get("embed_dim", E)))}
    if not batch_first:
        shapes = {name: (length, entries, width) for name, (entries, length, width) in shapes.items()}
    build = functools.partial(multihead, batch_first=batch_first, **options)
    return Case(build, read, shapes, ONE, arrays=lambda: {"hidden": hidden(keys, 1)} if masked else {})


def layer(kind: type[nn.Module], width: int = E, lengths: tuple[int, int] = (Lq, Lk)) -> Case:
    """One of torch's own layers, of which the second reads another sequence too."""
    shapes = {"src": (B, lengths[0], width)}
    if kind is nn.TransformerDecoderLayer:
        shapes = {"tgt": (B, lengths[0], width), "memory": (B, lengths[1], width)}
    build = functools.partial(kind, width, H, dim_feedforward=width + 4, dropout=0.0, batch_first=True)
    kept = {"TransformerEncoderLayer": 1} if kind is nn.TransformerEncoderLayer else {}
    return Case(build, lambda model, **data: model(**data), shapes, {"MultiheadAttention": len(shapes)}, kept)


LARGE = {
    **{name: attending(False, 64, 300, embed_dim=64, **options) for name, options in OPTIONS.items()},
    "weights": attending(True, 64, 300, embed_dim=64),
    **{f"reads, {'masked' if masked else 'all'}": reading(masked, 64, 300, embed_dim=64, kdim=32, vdim=32)
       for masked in (False, True)},
    "encoder layer": layer(nn.TransformerEncoderLayer, 128, (300, 300)),
    "decoder layer": layer(nn.TransformerDecoderLayer, 128, (300, 200)),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(name: str, need_weights: bool, training: bool) -> None:
    case = attending(need_weights, **OPTIONS[name])
    report = assert_replaced(case, training=training)
    assert report.converted[0].kind == "torch MultiheadAttention"
    assert_compiles(case, training=training, gradients=(name, need_weights, training) == ("plain", False, True))


@pytest.mark.parametrize("method", [None, "absorbed", "projected"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 6}, {"bias": False, "kdim": 20, "vdim": 20}], ids=str)
def test_few_queries_read_one_long_sequence(
    options: dict[str, Any], batch_first: bool, method: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values are one tensor: their projections may be absorbed; one batch entry hides all but a token."""
    called, function = [], functional.input_cross_attention
    monkeypatch.setattr(
        functional, "input_cross_attention", lambda *a, **k: called.append(1) or function(*a, method=method, **k)
    )
    for masked in (False, True):
        called.clear()
        assert_replaced(reading(masked, batch_first=batch_first, **options), training=True)
        assert called


def test_inputs_too_wide_to_be_read_are_projected() -> None:
    assert_replaced(reading(False, 2, 8, embed_dim=1032), training=True)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_torchs_layers(kind: type[nn.Module]) -> None:
    assert_replaced(layer(kind), training=True)
    assert_compiles(layer(kind), training=True, gradients=False)


def encoder(**options: Any) -> nn.TransformerEncoder:
    given = {"dim_feedforward": 8, "dropout": 0.0, "batch_first": True} | options
    layer = nn.TransformerEncoderLayer(E, given.pop("nhead", 2), **given)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def test_torchs_encoder_that_calls_no_attention_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's operator for a whole layer in inference: the report says so, and what it names makes torch call ours."""
    model, x, calls = encoder(), torch.randn(B, Lk, E), []
    report, attention = replace_attention(model), functional.attention
    monkeypatch.setattr(functional, "attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    assert [entry.name for entry in report.converted] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert [entry.name for entry in report.kept] == ["layers.0", "layers.1"]
    assert all("torch.backends.mha.set_fastpath_enabled(False)" in entry.reason for entry in report.kept)
    with torch.no_grad():
        expected = model(x)
        assert not calls
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            actual = model(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert len(calls) == 2
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "options", [{"nhead": 1}, {"activation": torch.tanh}, {"batch_first": False}, {"bias": False}],
    ids=["one head", "tanh", "batch last", "no biases"],
)  # fmt: skip
def test_torchs_encoder_that_calls_its_attention_is_not_reported(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, attention = encoder(**options), [], functional.attention
    report = replace_attention(model)
    monkeypatch.setattr(functional, "attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    assert len(report.converted) == 2 and not report.kept
    with torch.no_grad():
        model(torch.randn(B, Lk, E))
    assert len(calls) == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LARGE)
def test_bfloat16(name: str, device: str) -> None:
    assert_accurate_in_bfloat16(LARGE[name], device)


def test_a_projection_that_is_wrapped_later_is_an_error_as_before() -> None:
    """torch's own forward reads the weight of its output projection, and so does what takes its place."""
    x = torch.randn(B, Lk, E)
    for replaced in (False, True):
        model = multihead()
        if replaced:
            replace_attention(model)
        model.out_proj = nn.Sequential(model.out_proj, nn.Tanh())
        with pytest.raises(AttributeError, match="'Sequential' object has no attribute 'weight'"):
            model(x, x, x, need_weights=False)


def test_dropout_still_drops() -> None:
    model, x = multihead(dropout=0.5).train(), torch.randn(B, Lk, E)
    replace_attention(model)
    once, again = (model(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(once, again)
    assert torch.equal(*(model.eval()(x, x, x, need_weights=False)[0] for _ in range(2)))


class Own(nn.MultiheadAttention):
    """May compute something else."""


class LoRA(nn.modules.linear.NonDynamicallyQuantizableLinear):
    """Stands for an adapter, whose weight is not all of it."""


def test_what_is_left_alone_says_why() -> None:
    model = nn.ModuleDict({name: nn.MultiheadAttention(E, H) for name in ("hooked", "adapted", "plain")})
    model["own"] = Own(E, H)
    model["hooked"].out_proj.register_forward_hook(lambda *_: None)
    model["adapted"].out_proj = LoRA(E, E)
    report = replace_attention(model)
    reasons = {entry.name: entry.reason for entry in report.kept}
    assert [entry.name for entry in report.converted] == ["plain"]
    assert reasons == {
        "own": "a subclass of MultiheadAttention, which may compute something else",
        "hooked": "out_proj has hooks, which a replacement of the whole would not call",
        "adapted": "out_proj is a LoRA, whose weight may be no plain one, where a NonDynamicallyQuantizableLinear was expected",
    }
    text = str(report)
    assert "1 converted, 3 left alone" in text and "    hooked" in text and "    plain" in text
    assert type(model["own"]) is Own and SHADOW not in model["plain"].__dict__


def test_a_module_of_two_names_is_replaced_once() -> None:
    shared = nn.MultiheadAttention(E, H)
    model = nn.ModuleList([shared, shared])
    report = replace_attention(model)
    assert [entry.name for entry in report.converted] == ["0"]
    report.undo()
    assert type(shared) is nn.MultiheadAttention


def test_undo_leaves_what_something_else_has_changed_since() -> None:
    """A parametrization lives in a class of its own, which the original would have taken the place of."""
    model, x = nn.ModuleDict({"changed": multihead(), "plain": multihead()}), torch.randn(B, Lk, E)
    before = read(model["changed"], x, x)[0]
    report = replace_attention(model)
    weight_norm(model["changed"], "in_proj_weight")
    with pytest.warns(UserWarning, match="something else has changed their class since: changed$"):
        report.undo()
    assert type(model["plain"]) is nn.MultiheadAttention and SHADOW not in model["plain"].__dict__
    torch.testing.assert_close(read(model["changed"], x, x)[0], before)
    remove_parametrizations(model["changed"], "in_proj_weight")
    report.undo()
    assert type(model["changed"]) is nn.MultiheadAttention and SHADOW not in model["changed"].__dict__
    torch.testing.assert_close(read(model["changed"], x, x)[0], before)
    report.undo()


def test_a_model_with_nothing_to_convert_is_no_error() -> None:
    report = replace_attention(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert not report.converted and not report.kept
    assert str(report) == "nothing to convert: the model has no attention that is known here"
    report.undo()


def test_dry_run_says_so() -> None:
    text = str(replace_attention(nn.MultiheadAttention(E, H), dry_run=True))
    assert text.startswith("1 would be converted, 0 left alone") and "(the model)" in text


def test_layers_of_a_list_are_one_line() -> None:
    many = nn.ModuleList(nn.MultiheadAttention(E, H) for _ in range(12))
    model = nn.ModuleDict({"many": many, "one": nn.MultiheadAttention(E, H)})
    many[5] = nn.Identity()
    lines = str(replace_attention(model)).splitlines()
    assert [line.strip() for line in lines if line.startswith("    ")] == ["many.0..4", "many.6..11", "one"]
    assert "    0..1" in str(replace_attention(nn.ModuleList(nn.MultiheadAttention(E, H) for _ in range(2)))).splitlines()


def test_only_modules() -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        perceiver_kernels.replace_attention("model")  # type: ignore[arg-type]
