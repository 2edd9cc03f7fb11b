"""torch.nn: MultiheadAttention by itself and in torch's own layers; what is left alone, and the report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import perceiver_kernels
from perceiver_kernels import replace_attention
from perceiver_kernels.integrations.adapter import SHADOW
from tests.integrations.agreement import assert_replaced, randomised

B, Lq, Lk, E, H = 2, 5, 9, 16, 4


def sequences(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"kdim": 6, "vdim": 7}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str
)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(options: dict[str, Any], need_weights: bool, training: bool) -> None:
    model = randomised(nn.MultiheadAttention(E, H, batch_first=True, **options)).train(training)
    q, k, v = sequences((B, Lq, E), (B, Lk, options.get("kdim", E)), (B, Lk, options.get("vdim", E)))
    hidden = torch.zeros(B, Lk, dtype=torch.bool)
    hidden[0, 4:] = True
    report = assert_replaced(
        model, lambda m: m(q, k, v, key_padding_mask=hidden, need_weights=need_weights), [q, k, v], converted=1
    )
    assert report.converted[0].kind == "torch MultiheadAttention"


@pytest.mark.parametrize("method", [None, "absorbed", "projected"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 6}, {"bias": False, "kdim": 20, "vdim": 20}], ids=str)
def test_few_queries_read_one_long_sequence(
    options: dict[str, Any], batch_first: bool, method: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values are one tensor: their projections may be absorbed; one batch entry hides all but a token."""
    from perceiver_kernels import functional

    called, function = [], functional.input_cross_attention
    monkeypatch.setattr(
        functional, "input_cross_attention", lambda *a, **k: called.append(1) or function(*a, method=method, **k)
    )
    model, M = randomised(nn.MultiheadAttention(E, H, batch_first=batch_first, **options)), 4 * Lq
    q, x = sequences((B, Lq, E), (B, M, options.get("kdim", E)))
    hidden = torch.zeros(B, M, dtype=torch.bool)
    hidden[0, 1:] = True
    if not batch_first:
        q, x = q.transpose(0, 1), x.transpose(0, 1)
    for mask in (None, hidden):
        called.clear()
        assert_replaced(
            model, lambda m, mask=mask: m(q, x, x, key_padding_mask=mask, need_weights=False), [], converted=1, compiles=False
        )
        assert called


def test_inputs_too_wide_to_be_read_are_projected() -> None:
    q, x = sequences((1, 2, 1032), (1, 8, 1032))
    model = randomised(nn.MultiheadAttention(1032, 4, batch_first=True))
    assert_replaced(model, lambda m: m(q, x, x, need_weights=False), [q, x], converted=1, compiles=False)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_torchs_layers(kind: type[nn.Module]) -> None:
    model = randomised(kind(E, H, dim_feedforward=20, dropout=0.0, batch_first=True))  # type: ignore[call-arg]
    x, memory = sequences((B, Lq, E), (B, Lk, E))
    arguments = (x,) if kind is nn.TransformerEncoderLayer else (x, memory)
    assert_replaced(model, lambda m: m(*arguments), list(arguments), converted=len(arguments))


def test_dropout_still_drops() -> None:
    model = randomised(nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)).train()
    (x,) = sequences((B, Lk, E))
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
