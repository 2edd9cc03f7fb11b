"""diffusers: IP-Adapter Plus' resampler and Attention's processors, before and after replacement."""

from __future__ import annotations

import copy
import dataclasses
import functools
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

library = pytest.importorskip("diffusers.models.attention_processor", reason="diffusers is not installed")
embeddings = pytest.importorskip("diffusers.models.embeddings", reason="diffusers is not installed")
layers = pytest.importorskip("diffusers.models.attention", reason="diffusers is not installed")
ours = pytest.importorskip("perceiver_kernels.integrations.diffusers")

B, Lq, Lk, D, D_READ, H, d = 2, 6, 5, 12, 10, 2, 6
CROSS = {"cross_attention_dim": D_READ}
SIZES = {"heads": H, "dim_head": d}
ONE = {"Attention": 1}


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def projection(**changes: int) -> nn.Module:
    sizes = {"embed_dims": 10, "output_dims": 14, "hidden_dims": D, "depth": 2, "num_queries": 4, **SIZES, **changes}
    return embeddings.IPAdapterPlusImageProjection(**sizes)


def attention(width: int = D, **changes: Any) -> nn.Module:
    return library.Attention(width, **{**SIZES, **changes})


def on_all(model: nn.Module, x: Tensor, *more: Tensor, **options: Any) -> Tensor:
    return model(x, *more, **options)


def read(model: nn.Module, x: Tensor, read: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(x, read, attention_mask=mask)


def projecting(tokens: int = 7, **sizes: int) -> Case:
    return Case(
        functools.partial(projection, **sizes), on_all, {"x": (B, tokens, 10)}, {"IPAdapterPlusImageProjectionBlock": 2}
    )


@pytest.mark.parametrize("training", [False, True])
def test_ip_adapter_plus(training: bool) -> None:
    report = assert_replaced(projecting(), training=training)
    assert report.converted[0].kind == "diffusers IPAdapterPlusImageProjectionBlock"


def test_ip_adapter_plus_compiled() -> None:
    assert_compiles(projecting(depth=1), training=True)


def test_a_block_adds_the_residual_that_it_is_given() -> None:
    shapes = {"x": (B, 7, D), "latents": (B, 4, D), "residual": (B, 4, D)}
    case = Case(lambda: projection().layers[0], on_all, shapes, {"IPAdapterPlusImageProjectionBlock": 1})
    assert_replaced(case, training=True)


def test_tokens_and_latents_are_two_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    model, keys = projection(depth=1).double(), []
    original = functional.attention
    monkeypatch.setattr(functional, "attention", lambda q, k, v, **o: keys.extend(k) or original(q, k, v, **o))
    replace_attention(model)
    model(*tensors((B, 7, 10)))
    assert [tuple(key.shape) for key in keys] == [(B, H, 7, d), (B, H, 4, d)]


SELF: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": True},
    "no output bias": {"out_bias": False},
    "norms of queries and keys": {"qk_norm": "layer_norm"},
    "output width": {"out_dim": 18},
    "factor": {"rescale_output_factor": 2.0, "residual_connection": True},
    "old processor": {"processor": library.AttnProcessor()},
    "no scale": {"scale_qk": False},
}


def of_self(name: str, length: int = Lq, width: int = D, **sizes: int) -> Case:
    # The width of the result is not changed with the others.
    options = SELF[name] if width == D or "out_dim" not in SELF[name] else {"out_dim": 2 * width}
    return Case(functools.partial(attention, width, **options, **sizes), on_all, {"x": (B, length, width)}, ONE)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SELF)
def test_self_attention(name: str, training: bool) -> None:
    report = assert_replaced(of_self(name), training=training)
    assert report.converted[0].reason == "PerceiverKernelsAttnProcessor as its processor"
    if name in ("plain", "old processor"):
        assert_compiles(of_self(name), training=training, gradients=name == "plain" and training)


def masks(Lq: int = Lq, Lk: int = Lk, H: int = H) -> dict[str, Tensor]:
    """Padding as UNets make it, scores for each pair, for each head; the last two also as batches that lie outside heads."""
    generator = torch.Generator().manual_seed(5)
    padding = torch.rand(B, 1, Lk, generator=generator) < 0.6
    padding[1] = False
    scores = torch.randn(B * H, Lq, Lk, generator=generator, dtype=torch.float64)
    return {
        "padding": (1 - padding.double()) * -10000.0, "two axes": (1 - padding.double())[:, 0] * -10000.0, "bool": padding,
        "bool pairs": scores[:B] > 0, "pairs": scores[:B], "heads": scores, "heads, padding": scores[:, :1],
    }  # fmt: skip


def of_cross(mask: str | None = None, x: tuple[int, int] = (Lq, D), keys: int = Lk, **options: Any) -> Case:
    """Scores for pairs and for heads have gradients of their own."""
    shapes = {"x": (B, *x), "read": (B, keys, D_READ)}
    arrays: dict[str, Any] = {}
    if mask is not None:
        made = masks(x[0], keys, options.get("heads", H))[mask]
        if mask in ("pairs", "heads"):
            shapes["mask"] = tuple(made.shape)
        else:
            arrays["mask"] = made
    return Case(functools.partial(attention, x[1], **CROSS, **options), read, shapes, ONE, arrays=lambda: arrays)


@pytest.mark.parametrize("norm", [None, "layer_norm", "group_norm"])
def test_cross_attention(norm: str | None) -> None:
    case = of_cross(cross_attention_norm=norm, cross_attention_norm_num_groups=5)
    assert_replaced(case, training=True)
    if norm is None:
        assert_compiles(case, training=True, gradients=False)


# Masks that are bool or have two axes AttnProcessor itself does not take.
MASKED = [(name, "AttnProcessor2_0") for name in masks()]
MASKED += [(name, "AttnProcessor") for name in ("padding", "pairs", "heads", "heads, padding")]


@pytest.mark.parametrize(("name", "processor"), MASKED)
def test_masks(name: str, processor: str) -> None:
    case = of_cross(name, processor=getattr(library, processor)())
    assert_replaced(case, training=True)
    if name in ("bool", "heads"):
        assert_compiles(case, training=True, gradients=name == "heads" and processor == "AttnProcessor2_0")


LARGE = {
    "IP-Adapter": projecting(257, hidden_dims=128, num_queries=64, heads=4, dim_head=32),
    **{name: of_self(name, 256, 128, heads=4, dim_head=32) for name in SELF},
    **{f"mask: {name}": of_cross(name, (128, 64), 200, heads=4, dim_head=16) for name in masks()},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LARGE)
def test_bfloat16(name: str, device: str) -> None:
    assert_accurate_in_bfloat16(LARGE[name], device)


def test_parts_that_are_replaced_later_run() -> None:
    assert_later_parts_run(projecting(depth=1))
    for name in ("norms of queries and keys", "old processor"):
        assert_later_parts_run(of_self(name))
    assert_later_parts_run(of_cross("bool", cross_attention_norm="layer_norm"))


def test_masks_are_not_repeated_for_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = library.Attention(D, **SIZES, **CROSS).double(), []
    original = functional.attention

    def watched(*arguments: Any, **options: Any) -> Any:
        found.append({name: tuple(mask.shape) for name, mask in options.items() if name.endswith("_mask")})
        return original(*arguments, **options)

    monkeypatch.setattr(functional, "attention", watched)
    replace_attention(model)
    x, read = tensors((B, Lq, D), (B, Lk, D_READ))
    for name in ("padding", "bool", "heads"):
        model(x, read, attention_mask=masks()[name])
    assert found == [{"attn_mask": (B, 1, 1, Lk)}, {"key_mask": (B, Lk)}, {"attn_mask": (B, H, Lq, Lk)}]


@pytest.mark.parametrize("spatial", [False, True])
def test_attention_over_an_image(spatial: bool) -> None:
    """As an autoencoder has it: four axes, a norm over groups, a residual, a factor; and a norm that reads another image."""
    options = {"spatial_norm_dim": 3} if spatial else {"norm_num_groups": 4}
    # SpatialNorm has 32 groups whatever the width.
    width = 32 if spatial else D
    build = functools.partial(attention, width, residual_connection=True, rescale_output_factor=1.5, bias=True, **options)
    shapes = {"x": (B, width, 3, 4)} | ({"temb": (B, 3, 3, 4)} if spatial else {})
    assert_replaced(Case(build, on_all, shapes, ONE), training=True)


def test_a_transformers_block() -> None:
    case = Case(
        lambda: layers.BasicTransformerBlock(D, H, d, attention_bias=True, **CROSS), on_all,
        {"x": (B, Lq, D), "encoder_hidden_states": (B, Lk, D_READ)}, {"Attention": 2},
        arrays=lambda: {"encoder_attention_mask": masks()["padding"]},
    )  # fmt: skip
    report = assert_replaced(case, training=True)
    assert_compiles(case, training=True, gradients=False)
    assert [entry.name for entry in report.converted] == ["attn1", "attn2"]


@pytest.mark.parametrize("upcast", [{}, {"processor": library.AttnProcessor(), "upcast_softmax": True}], ids=["", "upcast"])
def test_is_as_accurate_in_bfloat16(upcast: dict[str, Any]) -> None:
    """Over many modules: one may be right by luck."""
    compared, case = [], of_self("plain")
    for seed in range(12):
        double = case.model(seed=seed)
        model = library.Attention(D, **SIZES, **upcast).bfloat16()
        model.load_state_dict(double.state_dict())
        double.load_state_dict(model.state_dict())
        x = torch.randn(B, Lq, D, dtype=torch.bfloat16)
        with torch.no_grad():
            eager, oracle = model(x), double(x.double())
            replace_attention(model)
            compared.append((model(x), eager, oracle))
    assert_as_accurate(*(torch.stack(each) for each in zip(*compared, strict=True)), "result")


def test_processors_are_set_and_come_back() -> None:
    model = library.Attention(D, **SIZES)
    processor, attributes = model.processor, dict(model.__dict__)
    replace_attention(model, dry_run=True)
    assert model.processor is processor
    report = replace_attention(model)
    assert type(model) is library.Attention and type(model.get_processor()) is ours.PerceiverKernelsAttnProcessor
    assert replace_attention(model).kept[0].reason == "converted already"
    twin = copy.deepcopy(model)
    report.undo()
    assert model.processor is processor and model.__dict__ == attributes and list(model.__dict__) == list(attributes)
    assert type(twin.processor) is ours.PerceiverKernelsAttnProcessor


def test_set_by_hand() -> None:
    model = layers.BasicTransformerBlock(D, H, d, **CROSS).double()
    x, read = tensors((B, Lq, D), (B, Lk, D_READ))
    expected = model(x, encoder_hidden_states=read)
    processor = ours.PerceiverKernelsAttnProcessor()
    for module in (model.attn1, model.attn2):
        module.set_processor(processor)
    torch.testing.assert_close(model(x, encoder_hidden_states=read), expected)


class LoRA(nn.Linear):
    """Stands for an adapter, whose weight is not all of it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Own(library.Attention):
    """May compute something else."""


def test_attention_that_is_left_alone_says_why() -> None:
    model = nn.ModuleDict(
        {
            "sliced": library.Attention(D, processor=library.SlicedAttnProcessor(1), **SIZES),
            "few keys": library.Attention(D, kv_heads=1, **SIZES),
            "added": library.Attention(D, added_kv_proj_dim=4, only_cross_attention=True, **SIZES),
            "norms": library.Attention(D, qk_norm="layer_norm", processor=library.AttnProcessor(), **SIZES),
            "scale": library.Attention(D, scale_qk=False, processor=library.AttnProcessor2_0(), **SIZES),
            "own": Own(D, **SIZES),
        }
    )
    processors = {name: module.processor for name, module in model.items()}
    report = replace_attention(model)
    assert not report.converted
    assert {entry.name: entry.reason for entry in report.kept} == {
        "sliced": "its processor is a SlicedAttnProcessor, not a default one",
        "few keys": "its projections are none that AttnProcessor2_0 runs",
        "added": "its projections are none that AttnProcessor2_0 runs",
        "norms": "AttnProcessor leaves out its norms of queries and keys",
        "scale": "AttnProcessor2_0 leaves out its scale",
        "own": "a subclass of Attention, which may compute something else",
    }
    assert all(module.processor is processors[name] for name, module in model.items())


def test_adapters_and_hooks_on_a_processors_layers_count() -> None:
    def build() -> nn.Module:
        model = attention()
        model.to_q.__class__ = LoRA
        model.to_out[0].register_forward_hook(lambda module, inputs, out: 3 * out)
        return model

    assert_replaced(dataclasses.replace(of_self("plain"), build=build), training=True)


class OwnBlock(embeddings.IPAdapterPlusImageProjectionBlock):
    """May compute something else."""


def test_blocks_that_are_left_alone_say_why() -> None:
    """Their attention takes a processor instead, where it can."""

    def build() -> nn.Module:
        model = projection(depth=5)
        hooked, adapted, sliced, own, factor = model.layers
        hooked.ff.register_forward_hook(lambda *_: None)
        adapted.attn.to_v.__class__ = LoRA
        sliced.attn.set_processor(library.SlicedAttnProcessor(1))
        own.__class__ = OwnBlock
        factor.attn.rescale_output_factor = 2.0
        return model

    kept = {"IPAdapterPlusImageProjectionBlock": 4, "OwnBlock": 1, "Attention": 1}
    case = dataclasses.replace(projecting(), build=build, converted={"Attention": 4}, kept=kept)
    report = assert_replaced(case, training=True)
    assert [entry.name for entry in report.converted] == [f"layers.{i}.attn" for i in (0, 1, 3, 4)]
    assert {entry.name: entry.reason for entry in report.kept} == {
        "layers.0": "ff has hooks, which a replacement of the whole would not call",
        "layers.1": "attn.to_v is a LoRA, whose weight may be no plain one, where a Linear was expected",
        "layers.2": "attn: its processor is a SlicedAttnProcessor, not a default one",
        "layers.2.attn": "its processor is a SlicedAttnProcessor, not a default one",
        "layers.3": "a subclass of IPAdapterPlusImageProjectionBlock, which may compute something else",
        "layers.4": "attn has norms, a residual or a factor, which IP-Adapter's has not",
    }


def test_a_processor_that_a_block_gets_later_counts() -> None:
    model = projection().double()
    (tokens,) = tensors((B, 7, 10))
    replace_attention(model)
    called: list[nn.Module] = []

    class Processor(library.AttnProcessor):
        def __call__(self, attn: nn.Module, *arguments: Any, **options: Any) -> Tensor:
            called.append(attn)
            return super().__call__(attn, *arguments, **options)

    expected = model(tokens)
    model.layers[1].attn.set_processor(Processor())
    torch.testing.assert_close(model(tokens), expected)
    assert called == [model.layers[1].attn]
