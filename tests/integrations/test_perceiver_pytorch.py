"""replace_attention on perceiver-pytorch: the same results of every variant, its masks and options, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import replace_attention
from tests.integrations.replaced import (
    Case,
    LoRALinear,
    assert_accurate,
    assert_agree,
    assert_compiles,
    assert_copies,
    assert_drops,
    assert_reversible,
    assert_same_results,
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
IMAGE = {"data": (B, SIDE, SIDE, 3)}


def seen(entries: int = B, length: int = LENGTH) -> Tensor:
    """A third is hidden; of the last entry, all."""
    mask = torch.rand(entries, length, generator=torch.Generator().manual_seed(4)) > 0.3
    mask[-1] = False
    return mask


def perceiver(**changes: Any) -> nn.Module:
    return module.Perceiver(**{**FOURIER, **changes})


def perceiver_io(**changes: Any) -> nn.Module:
    return io_module.PerceiverIO(**{"depth": 2, "dim": 9, "queries_dim": 11, "logits_dim": 3, **SIZES, **changes})


def masked_image(model: nn.Module, data: Tensor) -> Tensor:
    return model(data, mask=seen(B, SIDE * SIDE).view(B, SIDE, SIDE))


def ask(model: nn.Module, data: Tensor, queries: Tensor) -> Tensor:
    return model(data, queries=queries)


def ask_masked(model: nn.Module, data: Tensor, queries: Tensor) -> Tensor:
    return model(data, mask=seen(), queries=queries)


def tokens(model: nn.Module) -> Tensor:
    return model(torch.randint(0, 13, (B, LENGTH), generator=torch.Generator().manual_seed(5)))


def whole(sharing_model: str, contexts: int, attentions: int) -> dict[str, int]:
    found = {sharing_model: 1, "PreNorm": contexts, "Attention": attentions}
    return {name: count for name, count in found.items() if name and count}


ASKED = {"data": (B, LENGTH, 9), "queries": (B, 10, 11)}
CASES = {
    "image": Case(perceiver, lambda m, data: m(data), IMAGE, whole("Perceiver", 2, 4)),
    "masked": Case(perceiver, masked_image, IMAGE, whole("Perceiver", 2, 4)),
    "heads, tied": Case(
        lambda **c: perceiver(cross_heads=3, weight_tie_layers=True, depth=3, **c), masked_image, IMAGE,
        whole("Perceiver", 2, 4),
    ),
    "residuals": Case(
        lambda **c: perceiver(attn_residual=True, attn_residual_rank=4, self_per_cross_attn=2, **c), lambda m, data: m(data),
        IMAGE, whole("Perceiver", 2, 6),
    ),
    "inverted": Case(
        lambda **c: perceiver(inverted_cross_attn=(True, False), **c), masked_image, IMAGE, whole("Perceiver", 2, 4)
    ),
    "more latents": Case(lambda **c: perceiver(**{"num_latents": 20, **c}), masked_image, IMAGE, whole("Perceiver", 2, 4)),
    "points": Case(
        lambda **c: perceiver(input_axis=1, input_channels=9, fourier_encode_data=False, **c), lambda m, data: m(data),
        {"data": (B, LENGTH, 9)}, whole("Perceiver", 2, 4),
    ),
    "gated": Case(
        lambda **c: gated.Perceiver(**{**FOURIER, **c}), masked_image, IMAGE, whole("Perceiver", 2, 4)
    ),
    "mixed": Case(
        lambda **c: mixed.Perceiver(**{**FOURIER, **c}), masked_image, IMAGE, whole("Perceiver", 2, 2)
    ),
    "experimental": Case(
        # Its Fourier features do not fit its own projection.
        lambda **c: experimental.Perceiver(**{**FOURIER, "input_channels": 9, "fourier_encode_data": False, **c}),
        lambda m, data: m(data), {"data": (B, SIDE, SIDE, 9)}, whole("", 4, 6),
    ),
    "io": Case(perceiver_io, ask, ASKED, whole("", 2, 4)),
    "io, masked": Case(perceiver_io, ask_masked, ASKED, whole("", 2, 4)),
    "io, one set of queries": Case(
        lambda **c: perceiver_io(decoder_ff=True, cross_heads=2, **c), ask, {**ASKED, "queries": (10, 11)}, whole("", 2, 4)
    ),
    "io, fewer queries": Case(perceiver_io, ask, {**ASKED, "queries": (B, 4, 11)}, whole("", 2, 4)),
    "language": Case(
        lambda **c: io_module.PerceiverLM(**{"depth": 1, "dim": 8, "num_tokens": 13, "max_seq_len": LENGTH, **SIZES, **c}),
        tokens, {}, whole("", 2, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_same_results(name: str, training: bool) -> None:
    report = assert_same_results(CASES[name], training=training)
    assert not report.kept


@pytest.mark.parametrize("name", CASES)
def test_way_back(name: str) -> None:
    assert_reversible(CASES[name])


@pytest.mark.parametrize("name", ["masked", "heads, tied", "io"])
def test_copies(name: str) -> None:
    assert_copies(CASES[name])


@pytest.mark.parametrize("name", ["masked", "io"])
def test_compiled(name: str) -> None:
    assert_compiles(CASES[name])


@pytest.mark.parametrize("name", ["image", "masked", "io"])
def test_fp32(name: str) -> None:
    assert_accurate(CASES[name])


@pytest.mark.parametrize("name", ["image", "masked"])
def test_autocast(name: str) -> None:
    assert_accurate(CASES[name], autocast=True)


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

    def call(model: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        return model(x, context=context, mask=seen() if masked else None)

    case = Case(
        lambda **c: module.PerceiverBlock(dim=16, cross_heads=2, queries_contribute_kv=True, **c), call,
        {"x": (B, 6, 16), "context": (B, LENGTH, 16)}, whole("", 1, 2),
    )  # fmt: skip
    assert_same_results(case, training=True)
    assert_reversible(case)


@pytest.mark.parametrize("kind", ["perceiver", "io"])
@pytest.mark.parametrize("context", [False, True])
def test_attention_alone(kind: str, context: bool) -> None:
    original = (module if kind == "perceiver" else io_module).Attention

    def call(model: nn.Module, x: Tensor, **read: Tensor) -> Tensor:
        return model(x, mask=seen(B, LENGTH if context else 6), **read)

    shapes = {"x": (B, 6, 16)} | ({"context": (B, LENGTH, 9)} if context else {})
    case = Case(lambda: original(16, 9 if context else None, heads=2, dim_head=5), call, shapes, {"Attention": 1})
    assert_same_results(case, training=False)
    assert_reversible(case)


@pytest.mark.parametrize("kind", ["perceiver", "io"])
def test_more_channels_than_are_packed(kind: str) -> None:
    library_module = module if kind == "perceiver" else io_module
    case = Case(
        lambda: library_module.PreNorm(8, library_module.Attention(8, 1100, heads=1, dim_head=4), context_dim=1100),
        lambda model, x, context: model(x, context=context), {"x": (B, 3, 8), "context": (B, 5, 1100)},
        {"PreNorm": 1, "Attention": 1},
    )  # fmt: skip
    assert_same_results(case, training=False)


def test_one_batch_entry_for_several() -> None:
    """With one head the original broadcasts a context of one entry: left to it."""
    case = Case(
        lambda: module.PreNorm(8, module.Attention(8, 9, heads=1, dim_head=4), context_dim=9),
        lambda model, x, context: model(x, context=context), {"x": (B, 3, 8), "context": (1, 5, 9)}, {},
    )  # fmt: skip
    assert_same_results(case, training=False)


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

    case = Case(lambda: Subclass(**FOURIER), lambda m, data: m(data), IMAGE, {"PreNorm": 2, "Attention": 4})
    model = case.model()
    expected = results(case, model)
    report = replace_attention(model)
    assert type(model) is Subclass and [entry.name for entry in report.kept] == [""]
    assert len(report.converted) == 6
    assert_agree(results(case, model), expected)
