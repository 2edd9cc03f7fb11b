"""replace_attention on perceiver-ar-pytorch: its models, masks and positions, and the part of the prefix that it leaves out."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import replace_attention
from tests.integrations.replaced import (
    DEVICES,
    Case,
    LoRALinear,
    assert_accurate,
    assert_accurate_in_bfloat16,
    assert_agree,
    assert_compiles,
    assert_drops,
    assert_later_parts_run,
    assert_replaced,
    dropout_seen,
    kept_reasons,
    results,
)

library = pytest.importorskip(
    "perceiver_ar_pytorch.perceiver_ar_pytorch", reason="perceiver-ar-pytorch is not installed"
)
wrapper = pytest.importorskip(
    "perceiver_ar_pytorch.autoregressive_wrapper", reason="perceiver-ar-pytorch is not installed"
)

B, N, M, DIM, HEADS, WIDTH = 2, 8, 16, 24, 2, 32
SIZES = {"dim": DIM, "dim_head": WIDTH, "heads": HEADS}


def perceiver_ar(prefix: int = M, length: int = M + N, **changes: Any) -> nn.Module:
    sizes = {"num_tokens": 13, "max_seq_len": length, "cross_attn_seq_len": prefix, "depth": 2, "perceive_depth": 2, **SIZES}
    return library.PerceiverAR(**{**sizes, **changes})


def tokens(length: int = M + N) -> Tensor:
    return torch.randint(0, 13, (B, length), generator=torch.Generator().manual_seed(5))


def seen(length: int = M) -> Tensor:
    """A third is hidden; of the last entry, all."""
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(4)) > 0.3
    mask[-1] = False
    return mask


def angles(length: int, width: int = WIDTH) -> Tensor:
    return library.RotaryEmbedding(width).double()(length, device="cpu")


def prefix_attention(**changes: Any) -> nn.Module:
    return library.CausalPrefixAttention(**{**SIZES, **changes})


def attention(**changes: Any) -> nn.Module:
    return library.CausalAttention(**{**SIZES, **changes})


def on_all(model: nn.Module, x: Tensor, *more: Tensor, **options: Any) -> Tensor:
    return model(x, *more, **options)


def cases(N: int, M: int, **sizes: int) -> dict[str, Case]:
    """The model, and both kinds of attention, with every form of mask and positions; N tokens after a prefix of M."""
    dim = sizes.get("dim", DIM)

    def of_model(make: Any, **options: int) -> Case:
        build = functools.partial(perceiver_ar, M, M + N, **{**sizes, **options})
        return Case(build, on_all, {}, {"CausalPrefixAttention": 2, "CausalAttention": 2}, arrays=make)

    def of_prefix(context: int = M, make: Any = dict, **options: int) -> Case:
        build = functools.partial(prefix_attention, **{**sizes, **options})
        shapes = {"x": (B, N, dim), "context": (B, context, dim)}
        return Case(build, on_all, shapes, {"CausalPrefixAttention": 1}, arrays=make)

    def of_self(make: Any = dict) -> Case:
        return Case(
            functools.partial(attention, **sizes), on_all, {"x": (B, N, dim)}, {"CausalAttention": 1}, arrays=make
        )

    def turned(angles: Tensor, **more: Tensor) -> Any:
        return lambda: {"rotary_pos_emb": angles, **more}

    return {
        "model": of_model(lambda: {"x": tokens(M + N)}),
        "short": of_model(lambda: {"x": tokens(M + 1)}),
        "loss": of_model(
            lambda: {"x": tokens(M + N), "prefix_mask": seen(M), "labels": tokens(M + N)}, dim_head=40, heads=3
        ),
        "prefix": of_prefix(),
        "rotated": of_prefix(make=turned(angles(M + N), context_mask=seen(M)), heads=3),
        "short mask": of_prefix(make=turned(angles(M + N, 16), context_mask=seen(M - 3))),
        "mask of all": of_prefix(make=lambda: {"context_mask": seen(M + N)}),
        "angles for each entry": of_prefix(make=turned(angles(M + N).expand(B, 1, -1, -1))),
        "more angles": of_prefix(make=turned(angles(M + N + 3))),
        "no prefix": of_prefix(0, turned(angles(N))),
        "self": of_self(),
        "self, rotated": of_self(turned(angles(M + N))),
        "self, angles for each entry": of_self(turned(angles(N).expand(B, 1, -1, -1))),
    }


CASES = cases(N, M)
LARGE = cases(200, 256, dim=64, dim_head=32, heads=4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_replaced(name: str, training: bool) -> None:
    assert_replaced(CASES[name], training=training)


@pytest.mark.parametrize("name", ["rotated", "self, rotated"])
def test_compiled(name: str) -> None:
    assert_compiles(CASES[name])


@pytest.mark.parametrize("name", ["model", "loss"])
def test_fp32(name: str) -> None:
    assert_accurate(CASES[name])


# A loss is one number, and one number is right by luck.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name for name in LARGE if name != "loss"])
def test_bfloat16(name: str, device: str) -> None:
    assert_accurate_in_bfloat16(LARGE[name], device)


@pytest.mark.parametrize("name", ["loss", "rotated", "self, rotated"])
def test_parts_that_are_replaced_later_run(name: str) -> None:
    assert_later_parts_run(CASES[name])


def test_autocast() -> None:
    """The original cannot fill 16-bit scores with fp32's lowest number; its replacement fills nothing."""
    case = CASES["model"]
    model = case.model(torch.float32)
    expected = case.on(model)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="overflow"):
            case.on(model)
        replace_attention(model)
        out = case.on(model)
    assert (out - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("name", ["prefix", "self"])
def test_dropout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_drops(CASES[name], monkeypatch, 0.25, dropout=0.25)


@pytest.mark.parametrize("name", ["prefix", "self"])
def test_everything_dropped(name: str) -> None:
    """A probability of 1, which these kernels do not take, is left to the original."""
    case = CASES[name]
    model = case.model(dropout=1.0).train()
    expected = results(case, model)
    assert replace_attention(model).converted
    assert_agree(results(case, model), expected)


@pytest.mark.parametrize("name", ["model", "prefix", "rotated"])
def test_parts_of_the_prefix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one seed the original and its replacement leave out the same tokens, and neither does in evaluation."""
    case = CASES[name]
    model = case.model(cross_attn_dropout=0.4).train()
    if name == "prefix":
        # The original's prefix dropout takes positions for granted: angles of 0 turn nothing.
        case = dataclasses.replace(case, arrays=lambda: {"rotary_pos_emb": torch.zeros(M + N, WIDTH)})
    expected = results(case, model)
    replace_attention(model)
    lengths = dropout_seen(monkeypatch)
    assert_agree(results(case, model), expected)
    assert lengths, "the original's attention ran"
    assert not torch.allclose(results(case, model, seed=8)["out 0"], expected["out 0"])
    model.eval()
    assert torch.equal(results(case, model)["out 0"], results(case, model, seed=8)["out 0"])


def test_mask_that_does_not_fit_the_prefix() -> None:
    """Where parts of the prefix are left out, the original's error."""
    model = prefix_attention(cross_attn_dropout=0.4).double().train()
    replace_attention(model)
    arrays = (torch.randn(B, N, DIM).double(), torch.randn(B, M, DIM).double())
    with pytest.raises(IndexError, match="does not match"):
        model(*arrays, context_mask=seen(M - 3), rotary_pos_emb=angles(M + N))


def test_generation() -> None:
    """The library's wrapper draws the same tokens from the same seed."""
    model = wrapper.AutoregressiveWrapper(perceiver_ar().double())

    def run() -> Tensor:
        torch.manual_seed(3)
        return model.generate(tokens(M + 1), 4)

    expected = run()
    assert len(replace_attention(model).converted) == 4
    assert torch.equal(run(), expected)


def test_left_alone() -> None:
    class Subclass(library.CausalAttention):
        pass

    parts = {
        "lora": attention(), "hooked": attention(), "patched": attention(), "subclass": Subclass(**SIZES),
        "prefix": prefix_attention(),
    }  # fmt: skip
    parts["lora"].to_qkv = LoRALinear(parts["lora"].to_qkv)
    parts["hooked"].norm.register_full_backward_hook(lambda *args: None)
    parts["patched"].to_out.forward = parts["patched"].to_out.forward
    parts["prefix"].to_kv = LoRALinear(parts["prefix"].to_kv)
    model = nn.ModuleDict(parts)

    def call(model: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        return sum(m(x) for name, m in model.items() if name != "prefix") + model["prefix"](x, context)

    case = Case(lambda: model, call, CASES["prefix"].shapes, {})
    case.model()
    expected = results(case, model)
    kept = kept_reasons(model)
    assert set(kept) == set(parts) and not replace_attention(model).converted
    assert "to_qkv is a LoRALinear" in kept["lora"] and "to_kv is a LoRALinear" in kept["prefix"]
    assert "norm has hooks" in kept["hooked"] and "to_out has a forward of its own" in kept["patched"]
    assert "subclass of CausalAttention" in kept["subclass"]
    assert_agree(results(case, model), expected)
