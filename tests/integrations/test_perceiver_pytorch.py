"""replace_attention on perceiver-pytorch: the same results of every variant, its masks and options, and what is left alone."""

from __future__ import annotations

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
    kept_reasons,
    results,
)

library = pytest.importorskip("perceiver_pytorch", reason="perceiver-pytorch is not installed")
module = pytest.importorskip("perceiver_pytorch.perceiver_pytorch", reason="perceiver-pytorch is not installed")
io_module = pytest.importorskip("perceiver_pytorch.perceiver_io", reason="perceiver-pytorch is not installed")
gated = pytest.importorskip("perceiver_pytorch.gated", reason="perceiver-pytorch is not installed")
mixed = pytest.importorskip("perceiver_pytorch.mixed_latents", reason="perceiver-pytorch is not installed")
experimental = pytest.importorskip("perceiver_pytorch.experimental", reason="perceiver-pytorch is not installed")

B, SIDE, LENGTH = 2, 4, 12
SIZES: dict[str, Any] = {
    "num_latents": 6, "latent_dim": 16, "cross_heads": 1, "cross_dim_head": 7, "latent_heads": 4, "latent_dim_head": 5,
}  # fmt: skip
FOURIER: dict[str, Any] = {"num_freq_bands": 3, "max_freq": 10.0, "depth": 2, "num_classes": 5, **SIZES}


def seen(*shape: int) -> Tensor:
    """A third is hidden; of the last entry, all."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(4)) > 0.3
    mask[-1] = False
    return mask


def perceiver(**changes: Any) -> nn.Module:
    return module.Perceiver(**{**FOURIER, **changes})


def gated_perceiver(**changes: Any) -> nn.Module:
    return gated.Perceiver(**{**FOURIER, **changes})


def mixed_perceiver(**changes: Any) -> nn.Module:
    return mixed.Perceiver(**{**FOURIER, **changes})


def experimental_perceiver(**changes: Any) -> nn.Module:
    return experimental.Perceiver(**{**FOURIER, **changes})


def perceiver_io(**changes: Any) -> nn.Module:
    return io_module.PerceiverIO(**{"depth": 2, "dim": 9, "queries_dim": 11, "logits_dim": 3, **SIZES, **changes})


def language_model(**changes: Any) -> nn.Module:
    return io_module.PerceiverLM(**{"depth": 1, "dim": 8, "num_tokens": 13, **SIZES, **changes})


def on_data(model: nn.Module, data: Tensor, **options: Tensor) -> Tensor:
    return model(data, **options)


def on_context(model: nn.Module, x: Tensor, **options: Tensor) -> Tensor:
    return model(x, **options)


def whole(sharing_model: str, contexts: int, attentions: int) -> dict[str, int]:
    found = {sharing_model: 1, "PreNorm": contexts, "Attention": attentions}
    return {name: count for name, count in found.items() if name and count}


def cases(side: int, length: int, queries: int, classes: int, **sizes: int) -> dict[str, Case]:
    """Every variant and option, over images of side x side pixels, and sequences."""
    image, points = {"data": (B, side, side, 3)}, {"data": (B, length, 9)}
    asked = points | {"queries": (B, queries, 11)}

    def of(build: Any, **options: Any) -> Any:
        return functools.partial(build, **{**sizes, **options})

    def on_images(build: Any, *layers: int, masked: bool = True, **options: Any) -> Case:
        mask = {"mask": seen(B, side, side)} if masked else {}
        # These make their Fourier features in fp32, whatever the inputs are.
        bfloat16 = build not in (gated_perceiver, mixed_perceiver)
        build = of(build, num_classes=classes, **options)
        return Case(build, on_data, image, whole("Perceiver", *layers), arrays=lambda: mask, bfloat16=bfloat16)

    def on_sequences(build: Any, shapes: dict[str, tuple[int, ...]], masked: bool = False, **options: Any) -> Case:
        mask = {"mask": seen(B, length)} if masked else {}
        return Case(of(build, logits_dim=classes, **options), on_data, shapes, whole("", 2, 4), arrays=lambda: mask)

    return {
        "image": on_images(perceiver, 2, 4, masked=False),
        "masked": on_images(perceiver, 2, 4),
        "heads, tied": on_images(perceiver, 2, 4, cross_heads=3, weight_tie_layers=True, depth=3),
        "residuals": on_images(
            perceiver, 2, 6, masked=False, attn_residual=True, attn_residual_rank=4, self_per_cross_attn=2
        ),
        "inverted": on_images(perceiver, 2, 4, inverted_cross_attn=(True, False)),
        "more latents": on_images(perceiver, 2, 4, num_latents=side * side + 4),
        "points": Case(
            of(perceiver, input_axis=1, input_channels=9, fourier_encode_data=False, num_classes=classes), on_data, points,
            whole("Perceiver", 2, 4),
        ),
        "gated": on_images(gated_perceiver, 2, 4),
        "mixed": on_images(mixed_perceiver, 2, 2),
        "experimental": Case(
            # Its Fourier features do not fit its own projection.
            of(experimental_perceiver, input_channels=9, fourier_encode_data=False, num_classes=classes), on_data,
            {"data": (B, side, side, 9)}, whole("", 4, 6),
        ),
        "io": on_sequences(perceiver_io, asked),
        "io, masked": on_sequences(perceiver_io, asked, masked=True),
        "io, one set of queries": on_sequences(
            perceiver_io, {**asked, "queries": (queries, 11)}, decoder_ff=True, cross_heads=2
        ),
        "io, fewer queries": on_sequences(perceiver_io, {**asked, "queries": (B, 4, 11)}),
        "language": Case(
            of(language_model, max_seq_len=length), on_data, {}, whole("", 2, 3),
            arrays=lambda: {"data": torch.randint(0, 13, (B, length), generator=torch.Generator().manual_seed(5))},
        ),
    }  # fmt: skip


CASES = cases(SIDE, LENGTH, queries=10, classes=5)
LARGE = cases(
    16, 300, queries=200, classes=32, num_latents=64, latent_dim=64, cross_dim_head=32, latent_heads=4, latent_dim_head=16
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_replaced(name: str, training: bool) -> None:
    assert_replaced(CASES[name], training=training)


@pytest.mark.parametrize("name", ["masked", "io"])
def test_compiled(name: str) -> None:
    assert_compiles(CASES[name], depth=1)


@pytest.mark.parametrize("name", ["image", "masked", "io"])
def test_fp32(name: str) -> None:
    assert_accurate(CASES[name])


@pytest.mark.parametrize("name", ["image", "masked"])
def test_autocast(name: str) -> None:
    assert_accurate(CASES[name], autocast=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LARGE)
def test_bfloat16(name: str, device: str) -> None:
    assert_accurate_in_bfloat16(LARGE[name], device)


@pytest.mark.parametrize("name", ["heads, tied", "gated", "io, one set of queries"])
def test_parts_that_are_replaced_later_run(name: str) -> None:
    assert_later_parts_run(CASES[name], depth=1)


def test_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_drops(CASES["image"], monkeypatch, 0.25, attn_dropout=0.25)


def test_everything_dropped() -> None:
    """A probability of 1, which these kernels do not take, is left to the original, call by call."""
    case = CASES["image"]
    model = case.model(attn_dropout=0.5)
    replace_attention(model)
    model.train()
    model.layers[0].cross_attn.fn.dropout.p = 1.0
    block = model.layers[0].cross_attn
    out = block(torch.randn(B, 6, 16).double(), context=torch.randn(B, LENGTH, 17).double())
    torch.testing.assert_close(out, block.fn.to_out.bias.expand_as(out))


@pytest.mark.parametrize("masked", [False, True])
def test_queries_among_the_keys(masked: bool) -> None:
    """``queries_contribute_kv``: latents read the context and themselves."""
    case = Case(
        lambda **c: module.PerceiverBlock(dim=16, cross_heads=2, queries_contribute_kv=True, **c), on_context,
        {"x": (B, 6, 16), "context": (B, LENGTH, 16)}, whole("", 1, 2),
        arrays=lambda: {"mask": seen(B, LENGTH)} if masked else {},
    )  # fmt: skip
    assert_replaced(case, training=True)


@pytest.mark.parametrize("kind", ["perceiver", "io"])
@pytest.mark.parametrize("context", [False, True])
def test_attention_alone(kind: str, context: bool) -> None:
    original = (module if kind == "perceiver" else io_module).Attention
    shapes = {"x": (B, 6, 16)} | ({"context": (B, LENGTH, 9)} if context else {})
    case = Case(
        lambda: original(16, 9 if context else None, heads=2, dim_head=5), on_context, shapes, {"Attention": 1},
        arrays=lambda: {"mask": seen(B, LENGTH if context else 6)},
    )  # fmt: skip
    assert_replaced(case)


@pytest.mark.parametrize("kind", ["perceiver", "io"])
def test_more_channels_than_are_packed(kind: str) -> None:
    library_module = module if kind == "perceiver" else io_module
    case = Case(
        lambda: library_module.PreNorm(8, library_module.Attention(8, 1100, heads=1, dim_head=4), context_dim=1100),
        on_context, {"x": (B, 3, 8), "context": (B, 5, 1100)}, whole("", 1, 1),
    )  # fmt: skip
    assert_replaced(case)


def test_one_batch_entry_for_several() -> None:
    """With one head the original broadcasts a context of one entry: left to it."""
    case = Case(
        lambda: module.PreNorm(8, module.Attention(8, 9, heads=1, dim_head=4), context_dim=9),
        on_context, {"x": (B, 3, 8), "context": (1, 5, 9)}, whole("", 1, 1),
    )  # fmt: skip
    assert_replaced(case)


def test_no_context_where_one_is_due() -> None:
    """The original's error."""
    normed = module.PreNorm(8, module.Attention(8, 9), context_dim=9)
    replace_attention(normed)
    with pytest.raises(KeyError, match="context"):
        normed(torch.randn(B, 3, 8))


def test_latents_that_want_a_gradient_of_every_entry() -> None:
    """Expanded latents that are leaves: the gradient of each entry is its own."""
    case = Case(lambda: module.PreNorm(8, module.Attention(8, 9, heads=1, dim_head=4), context_dim=9), lambda m: m, {}, {})
    model, context = case.model(), torch.randn(B, 5, 9).double()
    x = torch.randn(1, 3, 8).double().expand(B, -1, -1).requires_grad_()
    (expected,) = torch.autograd.grad(model(x, context=context).square().sum(), x)
    replace_attention(model)
    (actual,) = torch.autograd.grad(model(x, context=context).square().sum(), x)
    torch.testing.assert_close(actual, expected)


class Own(nn.Module):
    """Classes of the library inside others."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_left_alone() -> None:
    class Subclass(module.Attention):
        pass

    def normed(attention: nn.Module) -> nn.Module:
        return module.PreNorm(8, attention, context_dim=9)

    lora, hooked, patched, subclass = (normed(kind(8, 9)) for kind in (*[module.Attention] * 3, Subclass))
    lora.fn.to_kv = LoRALinear(lora.fn.to_kv)
    hooked.norm_context.register_forward_hook(lambda *args: None)
    patched.fn.forward = patched.fn.forward
    model = Own(
        lora=lora, hooked=hooked, patched=patched, subclass=subclass, feed=module.PreNorm(8, module.FeedForward(8))
    )  # fmt: skip
    read = {"x": torch.randn(B, 3, 8), "context": torch.randn(B, 5, 9)}
    before = {name: part(**read) for name, part in model.named_children() if name != "feed"}
    kept = kept_reasons(model)
    assert {type(part) for part in model.children()} == {module.PreNorm}
    assert "LoRALinear" in kept["lora"] and "LoRALinear" in kept["lora.fn"]
    assert "norm_context has hooks" in kept["hooked"] and "hooked.fn" not in kept
    assert "fn has a forward of its own" in kept["patched"] and "forward of its own" in kept["patched.fn"]
    assert "subclass of Attention" in kept["subclass.fn"] and "feed" not in kept
    assert len(kept) == 6
    for name, expected in before.items():
        torch.testing.assert_close(getattr(model, name)(**read), expected)


def test_subclass_of_a_model() -> None:
    """Its layers are converted, its forward is its own."""

    class Subclass(module.Perceiver):
        pass

    case = Case(lambda: Subclass(**FOURIER), on_data, {"data": (B, SIDE, SIDE, 3)}, whole("", 2, 4))
    model = case.model()
    expected = results(case, model)
    report = replace_attention(model)
    assert type(model) is Subclass and [entry.name for entry in report.kept] == [""]
    assert len(report.converted) == 6
    assert_agree(results(case, model), expected)
