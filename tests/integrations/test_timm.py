"""timm: AttentionPoolLatent, every option, before and after replacement."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import functional, replace_attention
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.integrations.replaced import (
    DEVICES,
    Case,
    assert_accurate_in_bfloat16,
    assert_compiles,
    assert_later_parts_run,
    assert_replaced,
)

B, M, C, H = 2, 9, 16, 4


def load() -> types.ModuleType | None:
    """Its file of this layer; without torchvision, which its packages import, and which fits one torch, they stay unread."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        return None
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name in ("timm", "timm.layers"):
                package = types.ModuleType(name)
                package.__path__ = [str(Path(spec.origin).parents[1].joinpath(*name.split(".")))]
                patch.setitem(sys.modules, name, package)
        return importlib.import_module("timm.layers.attention_pool")


library: Any = load()
pytestmark = pytest.mark.skipif(library is None, reason="timm is not installed (pip install --no-deps timm)")


ONE = {"AttentionPoolLatent": 1}


def pool(width: int = C, fused: bool = True, **options: Any) -> nn.Module:
    model = library.AttentionPoolLatent(width, **{"num_heads": H, **options})
    model.fused_attn = fused
    return model


def call(model: nn.Module, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return model(x, attn_mask=attn_mask)


def tokens(seed: int = 3) -> Tensor:
    return torch.randn(B, M, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "latents, mean": {"latent_len": 3, "pool_type": "avg"},
    "latents, all": {"latent_len": 3, "pool_type": ""},
    "norms": {"qk_norm": True, "norm_layer": nn.LayerNorm, "latent_len": 2},
    "positions": {"pos_embed": "abs", "feat_size": M},
    "no query projection": {"q_proj": False},
    "no biases": {"qkv_bias": False},
    "no output": {"out_features": 0},
    "widths": {"out_features": 10, "latent_dim": 6},
}


def masks(M: int = M, H: int = H) -> dict[str, Tensor]:
    """Of tokens, bool and added, one for a batch, and of each latent; a batch entry that sees nothing by a bool one."""
    generator = torch.Generator().manual_seed(5)
    padding = torch.rand(B, 1, 1, M, generator=generator) < 0.6
    padding[:, ..., 0] = True
    empty = padding.clone()
    empty[1] = False
    scores = torch.randn(B, H, 2, M, generator=generator, dtype=torch.float64)
    return {
        "padding": padding, "empty": empty, "shared": padding[:1], "added": torch.where(padding, 0.0, -torch.inf).double(),
        "two axes": padding[0, 0], "pairs": scores[:, :1] > 0, "scores": scores,
    }  # fmt: skip


def case_of(options: dict[str, Any], mask: str | None = None, length: int = M, **sizes: Any) -> Case:
    """Scores have gradients of their own."""
    shapes = {"x": (B, length, sizes.get("width", C))}
    arrays: dict[str, Tensor] = {}
    if mask is not None:
        made = masks(length)[mask]
        if mask == "scores":
            shapes["attn_mask"] = tuple(made.shape)
        else:
            arrays["attn_mask"] = made
    return Case(functools.partial(pool, **{**options, **sizes}), call, shapes, ONE, arrays=lambda: arrays)


LARGE = {
    name: case_of(options, length=257, width=128, **({"feat_size": 257} if "feat_size" in options else {}))
    for name, options in OPTIONS.items()
} | {f"mask: {name}": case_of({"latent_len": 2}, name, 257, width=128) for name in masks()}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, fused: bool) -> None:
    # Both of a layer's modes, without a test for each.
    case = case_of(OPTIONS[name], fused=fused)
    report = assert_replaced(case, training=fused)
    assert report.converted[0].kind == "timm AttentionPoolLatent"
    if fused:
        assert_compiles(case, training=True, gradients=name in ("plain", "norms"))


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("options", ["plain", "norms"])
def test_masks(options: str, name: str) -> None:
    case = case_of(OPTIONS[options] | {"latent_len": 2}, name)
    assert_replaced(case, training=True)
    if options == "plain" and name == "padding":
        assert_compiles(case, training=True, gradients=False)


@pytest.mark.parametrize("name", ["padding", "added"])
def test_masks_of_the_form_that_is_not_fused(name: str) -> None:
    """A boolean mask is added to the scores there, True as 1."""
    assert_replaced(case_of({}, name, fused=False), training=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LARGE)
def test_bfloat16(name: str, device: str) -> None:
    assert_accurate_in_bfloat16(LARGE[name], device)


@pytest.mark.parametrize("name", ["plain", "norms"])
def test_parts_that_are_replaced_later_run(name: str) -> None:
    assert_later_parts_run(case_of(OPTIONS[name]))


def test_dropout_still_drops() -> None:
    model, x = pool(drop=0.5).double().train(), tokens()
    replace_attention(model)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(*(model.eval()(x) for _ in range(2)))


def test_keys_may_stay_uncomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask, or with one of tokens, a planner chooses; a norm of keys, or scores that are added, need the keys."""
    called: list[str] = []
    for name in ("attention", "input_cross_attention"):
        function = getattr(functional, name)
        monkeypatch.setattr(
            functional, name, lambda *a, name=name, function=function, **k: called.append(name) or function(*a, **k)
        )
    x = tokens()
    for options, mask, expected in (
        ({}, None, "input_cross_attention"), ({}, "padding", "input_cross_attention"), ({}, "shared", "input_cross_attention"),
        ({}, "added", "attention"), (OPTIONS["norms"], None, "attention"),
    ):  # fmt: skip
        model = pool(**options).double()
        replace_attention(model)
        called.clear()
        model(x, None if mask is None else masks()[mask])
        assert called == [expected]


def test_more_channels_than_are_packed() -> None:
    assert_replaced(case_of({"num_heads": 2, "out_features": 0, "mlp_ratio": 0.1}, length=3, width=1040), training=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate(dtype: torch.dtype) -> None:
    """Over many modules: one may be right by luck."""
    compared, case = [], case_of({"latent_len": 2, "pool_type": ""})
    for seed in range(12):
        double = case.model(seed=seed)
        model = library.AttentionPoolLatent(C, num_heads=H, latent_len=2, pool_type="").to(dtype)
        model.load_state_dict(double.state_dict())
        double.load_state_dict(model.state_dict())
        x = tokens(seed).to(dtype)
        with torch.no_grad():
            eager, oracle = model(x), double(x.double())
            replace_attention(model)
            compared.append((model(x), eager, oracle))
    assert_as_accurate(*(torch.stack(each) for each in zip(*compared, strict=True)), "result")


class LoRA(nn.Linear):
    """Stands for an adapter, whose weight is not all of it."""


def test_what_is_left_alone_says_why() -> None:
    own = type("Own", (library.AttentionPoolLatent,), {})
    model = nn.ModuleDict({name: library.AttentionPoolLatent(C) for name in ("hooked", "key", "query", "plain")})
    model["own"] = own(C)
    model["hooked"].mlp.fc1.register_full_backward_hook(lambda *_: None)
    model["key"].kv.__class__ = model["query"].q.__class__ = LoRA
    report = replace_attention(model)
    assert [entry.name for entry in report.converted] == ["plain"]
    assert {entry.name: entry.reason for entry in report.kept} == {
        "hooked": "mlp.fc1 has hooks, which a replacement of the whole would not call",
        "key": "kv is a LoRA, whose weight may be no plain one, where a Linear was expected",
        "query": "q is a LoRA, whose weight may be no plain one, where a Linear or Identity was expected",
        "own": "a subclass of AttentionPoolLatent, which may compute something else",
    }
    assert type(model["own"]) is own and type(model["key"]) is library.AttentionPoolLatent
