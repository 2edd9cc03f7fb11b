"""What flamingo-pytorch's and OpenFlamingo's layers are both held to; a library is the module that holds its classes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import functional, replace_attention
from tests.integrations.replaced import Case

B, T, M, N, L, D, D_MEDIA = 2, 3, 5, 4, 7, 12, 10
HEADS: dict[str, int] = {"dim_head": 6, "heads": 2}
ATTENTION, READING = {"PerceiverAttention": 1}, {"MaskedCrossAttention": 1}

# Where media come in a text: some tokens before the first; more media than are given; none at all.
LOCATIONS = {
    "usual": [[0, 1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0, 1]],
    "more than given": [[1, 1, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1, 1]],
    "none": [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0]],
}

WHICH = {"last medium": True, "all media": False}


def locations_of(name: str, stretch: int = 1) -> Tensor:
    """bool [B, L * stretch], ``stretch`` - 1 tokens of text after each of LOCATIONS."""
    where = torch.tensor(LOCATIONS[name], dtype=torch.bool)
    longer = torch.zeros(*where.shape, stretch, dtype=torch.bool)
    longer[..., 0] = where
    return longer.flatten(1)


def tensors(*shapes: tuple[int, ...], seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def on_media(model: nn.Module, media: Tensor) -> Any:
    return model(media)


def on_arrays(model: nn.Module, *, media: Tensor, **arrays: Any) -> Any:
    """Text, or latents, are first; the others have names."""
    if "latents" in arrays:
        return model(media, arrays["latents"])
    return model(arrays.pop("text"), media, **arrays)


def resampling(library: Any, shape: tuple[int, ...], **sizes: int) -> Case:
    """A resampler of two layers; ``shape`` is of the media."""
    sizes = {"depth": 2, "num_latents": N, **HEADS, **sizes}
    build = functools.partial(library.PerceiverResampler, dim=shape[-1], **sizes)
    return Case(build, on_media, {"media": shape}, {"PerceiverAttention": 2})


def reading(build: Any, count: int, where: str | None, stretch: int = 1, **options: Any) -> Case:
    """Text of L * stretch tokens of media of N * stretch each; ``build`` has their widths, and the heads, in its keywords."""
    width = build.keywords["dim"]
    shapes = {
        "text": (B, L * stretch, width),
        "media": (B, count, N * stretch, build.keywords.get("dim_visual", width)),
    }
    arrays = dict(options) | ({} if where is None else {"media_locations": locations_of(where, stretch)})
    return Case(build, on_arrays, shapes, READING, arrays=lambda: arrays)


def large(library: Any, resampled: dict[str, Case], dim_visual: dict[str, int]) -> dict[str, Case]:
    """Cases of some hundred tokens and heads of 32 channels: of resamplers, and of text with every kind of locations."""
    found = dict(resampled)
    for name in LOCATIONS:
        for which, immediate in WHICH.items():
            build = functools.partial(
                library.GatedCrossAttentionBlock, dim=64, dim_head=32, heads=4, only_attend_immediate_media=immediate,
                **dim_visual,
            )  # fmt: skip
            found[f"{name}, {which}"] = reading(build, T, name, 32)
    return found


@contextmanager
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Calls of attention inside the block, as their keys and their masks."""
    calls: list[dict[str, Any]] = []
    original = functional.attention

    def watched(query: Tensor, key: Any, value: Any, **options: Any) -> Any:
        calls.append({"key": key, **options})
        return original(query, key, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "attention", watched)
        yield calls


def check_media_and_latents_are_two_segments(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = library.PerceiverAttention(dim=D, **HEADS).double()
    media, latents = tensors((B, T, M, D), (B, T, N, D))
    replace_attention(model)
    with attention_calls(monkeypatch) as calls:
        model(media, latents)
    (call,) = calls
    assert [tuple(key.shape) for key in call["key"]] == [(B * T, 2, M, 6), (B * T, 2, N, 6)]


def check_one_medium_takes_no_mask_of_pairs(layer: nn.Module, immediate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_attention(layer)
    media_channels = layer.to_kv.in_features
    for count, expected in ((1, {"query_mask": (B, L)} if immediate else {}), (T, {"attn_mask": (B, 1, L, T * N)})):
        text, media = tensors((B, L, D), (B, count, N, media_channels))
        with attention_calls(monkeypatch) as calls:
            layer(text, media, locations_of("usual"))
        assert {name: tuple(mask.shape) for name, mask in calls[0].items() if name.endswith("_mask")} == expected


class LoRA(nn.Linear):
    """Stands for an adapter, whose weight is not all of it."""


def check_what_is_left_alone(library: ModuleType, reading: dict[str, int]) -> None:
    """A subclass, a hook on a child, a child of another class; of both classes, ``reading`` being sizes of the second."""
    for kind, sizes, norm in (
        (library.PerceiverAttention, {}, "norm_media"), (library.MaskedCrossAttention, reading, "norm")
    ):  # fmt: skip
        own = type("Own", (kind,), {})
        model = nn.ModuleDict({name: kind(dim=D, **sizes) for name in ("hooked", "adapted", "normed", "plain")})
        model["own"] = own(dim=D, **sizes)
        model["hooked"].to_out.register_forward_pre_hook(lambda *_: None)
        model["adapted"].to_kv = LoRA(D, 2)
        setattr(model["normed"], norm, nn.Identity())
        report = replace_attention(model)
        assert [entry.name for entry in report.converted] == ["plain"]
        assert {entry.name: entry.reason for entry in report.kept} == {
            "hooked": "to_out has hooks, which a replacement of the whole would not call",
            "adapted": "to_kv is a LoRA, whose weight may be no plain one, where a Linear was expected",
            "normed": f"{norm} is a Identity, whose weight may be no plain one, where a LayerNorm was expected",
            "own": f"a subclass of {kind.__name__}, which may compute something else",
        }
        assert type(model["own"]) is own and type(model["hooked"]) is kind


def check_refusals(library: ModuleType, reading: dict[str, int]) -> None:
    attention = library.PerceiverAttention(dim=D, **HEADS)
    cross = library.MaskedCrossAttention(dim=D, **reading)
    replace_attention(nn.ModuleList([attention, cross]))
    media, latents = torch.randn(B, T, M, D), torch.randn(B, T, N, D)
    with pytest.raises(ValueError, match=r"x must be \[B, T, M, D\], got \(2, 5, 12\)"):
        attention(media[:, 0], latents)
    with pytest.raises(ValueError, match=r"latents must be \[B, T, N, D\], got \(2, 4, 12\)"):
        attention(media, latents[:, 0])
    with pytest.raises(ValueError, match=r"latents must have x's \[B, T\]=\(2, 3\), got \(2, 1\)"):
        attention(media, latents[:, :1])
    text, media = torch.randn(B, L, D), torch.randn(B, T, N, cross.to_kv.in_features)
    with pytest.raises(ValueError, match=r"media must be \[B, T, M, D\], got \(2, 4, \d+\)"):
        cross(text, media[:, 0], locations_of("usual"))
    with pytest.raises(ValueError, match=r"media_locations must be \[B, L\] with B=2 or 1, L=7, got \(2, 6\)"):
        cross(text, media, locations_of("usual")[:, 1:])
