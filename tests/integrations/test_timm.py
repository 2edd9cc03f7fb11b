"""timm: AttentionPoolLatent, every option, before and after replacement."""

from __future__ import annotations

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
from tests.integrations.agreement import assert_replaced, randomised

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


def pool(**options: Any) -> nn.Module:
    return randomised(library.AttentionPoolLatent(C, num_heads=H, **options))


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


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, fused: bool) -> None:
    model, x = pool(**OPTIONS[name]), tokens()
    model.fused_attn = fused
    # Both of a layer's modes, without a test for each.
    model.train(fused)
    report = assert_replaced(model, lambda m: m(x), [x], converted=1, compiles=fused)
    assert report.converted[0].kind == "timm AttentionPoolLatent"


def masks() -> dict[str, Tensor]:
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


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("options", ["plain", "norms"])
def test_masks(options: str, name: str) -> None:
    model, x, mask = pool(**OPTIONS[options] | {"latent_len": 2}), tokens(), masks()[name]
    learned = [mask] if name == "scores" else []
    assert_replaced(
        model, lambda m: m(x, attn_mask=mask), [x, *learned], converted=1, compiles=options == "plain" and name == "padding"
    )


@pytest.mark.parametrize("name", ["padding", "added"])
def test_masks_of_the_form_that_is_not_fused(name: str) -> None:
    """A boolean mask is added to the scores there, True as 1."""
    model, x, mask = pool(), tokens(), masks()[name]
    model.fused_attn = False
    assert_replaced(model, lambda m: m(x, attn_mask=mask), [x], converted=1, compiles=False)


def test_dropout_still_drops() -> None:
    model, x = pool(drop=0.5).train(), tokens()
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
        model = pool(**options)
        replace_attention(model)
        called.clear()
        model(x, None if mask is None else masks()[mask])
        assert called == [expected]


def test_more_channels_than_are_packed() -> None:
    model = randomised(library.AttentionPoolLatent(1040, num_heads=2, out_features=0))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor *= 0.1
    x = torch.randn(B, 3, 1040, dtype=torch.float64)
    assert_replaced(model, lambda m: m(x), [x], converted=1, compiles=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate(dtype: torch.dtype) -> None:
    """Over many modules: one may be right by luck."""
    compared = []
    for seed in range(12):
        double = randomised(library.AttentionPoolLatent(C, num_heads=H, latent_len=2, pool_type=""), seed)
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
