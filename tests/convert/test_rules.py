"""Rules between state dicts: both directions, and what does not fit is listed."""

from __future__ import annotations

import pytest
import torch

from perceiver_kernels.convert.rules import (
    Rule,
    affine,
    check_shapes,
    parted,
    renamed,
    stacked,
    to_ours,
    to_theirs,
    under,
    under_each,
)

RULES = under(
    "block.",
    "layers.0.",
    [
        *affine("norm", "ln"),
        *stacked("qkv_proj", ("q", "k", "v"), (4, 4, 6), bias=False),
        *renamed("scale", "gain"),
        Rule("kernel", ("taps",), read=lambda t: t.mT, write=lambda t: t.mT),
        Rule("", ("frequencies",), value=lambda: torch.arange(3.0)),
    ],
)


OURS = {
    f"block.{name}": torch.empty(shape)
    for name, shape in {
        "norm.weight": (5,), "norm.bias": (5,), "qkv_proj.weight": (14, 5), "scale": (), "kernel": (3, 2)
    }.items()
}  # fmt: skip


def theirs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"ln.weight": (5,), "ln.bias": (5,), "q.weight": (4, 5), "k.weight": (4, 5), "v.weight": (6, 5), "gain": (),
              "taps": (2, 3)}  # fmt: skip
    return {f"layers.0.{name}": torch.randn(shape) for name, shape in shapes.items()} | {
        "layers.0.frequencies": torch.arange(3.0)
    }


def test_there_and_back() -> None:
    state = theirs()
    ours = to_ours(RULES, state, OURS)
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: tensor.shape for name, tensor in OURS.items()}
    assert torch.equal(ours["block.qkv_proj.weight"][4:8], state["layers.0.k.weight"])
    assert torch.equal(ours["block.kernel"], state["layers.0.taps"].T)
    back = to_theirs(RULES, ours)
    assert back.keys() == state.keys() and all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_a_buffer_may_be_missing_from_their_file() -> None:
    state = theirs()
    del state["layers.0.frequencies"]
    assert "block.scale" in to_ours(RULES, state, OURS)


def test_all_that_does_not_fit_is_listed() -> None:
    state = theirs()
    del state["layers.0.ln.weight"], state["layers.0.gain"]
    wrong = {"q.weight": (4, 6), "k.weight": (3, 5), "v.weight": (6,), "taps": (3, 2), "frequencies": (4,)}
    state |= {"head.weight": torch.zeros(1)} | {f"layers.0.{name}": torch.zeros(shape) for name, shape in wrong.items()}
    with pytest.raises(ValueError) as error:
        to_ours(RULES, state, OURS)
    assert str(error.value).splitlines() == [
        "the state dict does not fit the model",
        "  it lacks: layers.0.gain, layers.0.ln.weight",
        "  it has besides: head.weight",
        "  of wrong shape: layers.0.frequencies (4,) instead of (3,), layers.0.k.weight (3, 5) instead of (4, 5), "
        "layers.0.q.weight (4, 6) instead of (4, 5), layers.0.taps (3, 2) instead of (2, 3), "
        "layers.0.v.weight (6,) instead of (6, 5)",
    ]


def test_ours_that_does_not_fit_is_listed() -> None:
    ours = {name: tensor for name, tensor in OURS.items() if name != "block.scale"} | {"head": torch.zeros(1)}
    message = "our state dict does not fit theirs\n  it lacks: block.scale\n  it has besides: head"
    with pytest.raises(ValueError, match=message):
        to_theirs(RULES, ours)
    with pytest.raises(ValueError, match=message):
        to_ours(RULES, theirs(), ours)


def test_shapes_are_checked_against_the_model() -> None:
    model = {"a": torch.zeros(2), "b": torch.zeros(3, 1)}
    check_shapes({"a": torch.ones(2), "b": torch.ones(3, 1)}, model)
    with pytest.raises(ValueError, match=r"of wrong shape: a \(3,\) instead of \(2,\), b \(3,\) instead of \(3, 1\)"):
        check_shapes({"a": torch.ones(3), "b": torch.ones(3)}, model)


SHARED = under_each("block.", ("layers.1.", "layers.2."), [*parted(("k", "v"), "kv", (4, 6)), *affine("norm", "ln")])


OUR_SHARED = {
    f"block.{name}.{kind}": torch.empty(shape)
    for name, rows in (("k", 4), ("v", 6), ("norm", 5))
    for kind, shape in (("weight", (5,) if name == "norm" else (rows, 5)), ("bias", (rows,)))
}


def shared() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"kv.weight": (10, 5), "kv.bias": (10,), "ln.weight": (5,), "ln.bias": (5,)}
    layer = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {f"layers.{i}.{name}": tensor.clone() for i in (1, 2) for name, tensor in layer.items()}


def test_parts_of_one_and_weights_of_several() -> None:
    state = shared()
    ours = to_ours(SHARED, state, OUR_SHARED)
    assert set(ours) == {f"block.{name}.{kind}" for name in ("k", "v", "norm") for kind in ("weight", "bias")}
    assert torch.equal(ours["block.v.bias"], state["layers.1.kv.bias"][4:])
    for given in (state, {name: tensor for name, tensor in state.items() if "layers.1" in name}):
        back = to_theirs(SHARED, to_ours(SHARED, given, OUR_SHARED))
        assert back.keys() == state.keys() and all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_parts_and_shared_weights_that_do_not_fit_are_listed() -> None:
    state = shared() | {"layers.1.kv.weight": torch.zeros(9, 5)}
    state["layers.2.ln.bias"] += 1
    with pytest.raises(ValueError) as error:
        to_ours(SHARED, state, OUR_SHARED)
    assert str(error.value).splitlines() == [
        "the state dict does not fit the model",
        "  of wrong shape: layers.1.kv.weight (9, 5) instead of (10, 5)",
        "  of shared weights that differ: layers.2.kv.weight from layers.1.kv.weight, layers.2.ln.bias from layers.1.ln.bias",
    ]
