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


def theirs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"ln.weight": (5,), "ln.bias": (5,), "q.weight": (4, 5), "k.weight": (4, 5), "v.weight": (6, 5), "gain": (),
              "taps": (2, 3)}  # fmt: skip
    return {f"layers.0.{name}": torch.randn(shape) for name, shape in shapes.items()} | {
        "layers.0.frequencies": torch.arange(3.0)
    }


def test_there_and_back() -> None:
    state = theirs()
    ours = to_ours(RULES, state)
    assert set(ours) == {f"block.{name}" for name in ("norm.weight", "norm.bias", "qkv_proj.weight", "scale", "kernel")}
    assert torch.equal(ours["block.qkv_proj.weight"][4:8], state["layers.0.k.weight"])
    assert torch.equal(ours["block.kernel"], state["layers.0.taps"].T)
    back = to_theirs(RULES, ours)
    assert back.keys() == state.keys() and all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_a_buffer_may_be_missing_from_their_file() -> None:
    state = theirs()
    del state["layers.0.frequencies"]
    assert "block.scale" in to_ours(RULES, state)


def test_all_that_does_not_fit_is_listed() -> None:
    state = theirs()
    del state["layers.0.ln.weight"], state["layers.0.gain"]
    state |= {"head.weight": torch.zeros(1), "layers.0.q.weight": torch.zeros(5, 5), "layers.0.k.weight": torch.zeros(3, 5)}
    with pytest.raises(ValueError) as error:
        to_ours(RULES, state)
    assert str(error.value).splitlines() == [
        "the state dict does not fit the model",
        "  it lacks: layers.0.gain, layers.0.ln.weight",
        "  it has besides: head.weight",
        "  of wrong shape: layers.0.k.weight (3, 5) instead of 4 rows, layers.0.q.weight (5, 5) instead of 4 rows",
    ]


def test_ours_that_does_not_fit_is_listed() -> None:
    ours = to_ours(RULES, theirs())
    del ours["block.scale"]
    with pytest.raises(ValueError, match="it lacks: block.scale\n  it has besides: head"):
        to_theirs(RULES, ours | {"head": torch.zeros(1)})


def test_shapes_are_checked_against_the_model() -> None:
    model = {"a": torch.zeros(2), "b": torch.zeros(3, 1)}
    check_shapes({"a": torch.ones(2), "b": torch.ones(3, 1)}, model)
    with pytest.raises(ValueError, match=r"of wrong shape: a \(3,\) instead of \(2,\), b \(3,\) instead of \(3, 1\)"):
        check_shapes({"a": torch.ones(3), "b": torch.ones(3)}, model)


SHARED = under_each("block.", ("layers.1.", "layers.2."), [*parted(("k", "v"), "kv", (4, 6)), *affine("norm", "ln")])


def shared() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"kv.weight": (10, 5), "kv.bias": (10,), "ln.weight": (5,), "ln.bias": (5,)}
    layer = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {f"layers.{i}.{name}": tensor.clone() for i in (1, 2) for name, tensor in layer.items()}


def test_parts_of_one_and_weights_of_several() -> None:
    state = shared()
    ours = to_ours(SHARED, state)
    assert set(ours) == {f"block.{name}.{kind}" for name in ("k", "v", "norm") for kind in ("weight", "bias")}
    assert torch.equal(ours["block.v.bias"], state["layers.1.kv.bias"][4:])
    for given in (state, {name: tensor for name, tensor in state.items() if "layers.1" in name}):
        back = to_theirs(SHARED, to_ours(SHARED, given))
        assert back.keys() == state.keys() and all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_parts_and_shared_weights_that_do_not_fit_are_listed() -> None:
    state = shared() | {"layers.1.kv.weight": torch.zeros(9, 5)}
    state["layers.2.ln.bias"] += 1
    with pytest.raises(ValueError) as error:
        to_ours(SHARED, state)
    assert str(error.value).splitlines() == [
        "the state dict does not fit the model",
        "  of wrong shape: layers.1.kv.weight (9, 5) instead of 10 rows",
        "  of shared weights that differ: layers.2.kv.weight from layers.1.kv.weight, layers.2.ln.bias from layers.1.ln.bias",
    ]
