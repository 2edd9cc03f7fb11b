"""flamingo-pytorch: its resampler and its gated cross-attention, before and after replacement."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from perceiver_kernels import replace_attention
from tests.integrations import flamingo_cases as cases
from tests.integrations.flamingo_cases import HEADS, LOCATIONS, B, D, M, N, T, locations_of
from tests.integrations.replaced import (
    DEVICES,
    Case,
    assert_accurate,
    assert_accurate_in_bfloat16,
    assert_compiles,
    assert_later_parts_run,
    assert_replaced,
)

library = pytest.importorskip("flamingo_pytorch.flamingo_pytorch", reason="flamingo-pytorch is not installed")


def resampling(shape: tuple[int, ...], **sizes: int) -> Case:
    return cases.resampling(library, shape, num_media_embeds=4, **sizes)


def gated(immediate: bool) -> Any:
    return functools.partial(library.GatedCrossAttentionBlock, dim=D, only_attend_immediate_media=immediate, **HEADS)


LARGE = cases.large(library, {"resampler": resampling((B, T, 150, 64), num_latents=64, dim_head=32)}, {})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(B, T, M, D), (B, M, D)], ids=["media", "one medium"])
def test_resampler(shape: tuple[int, ...], training: bool) -> None:
    report = assert_replaced(resampling(shape), training=training)
    assert report.converted[0].name == "layers.0.0" and report.converted[0].kind == "flamingo_pytorch PerceiverAttention"


def test_a_resampler_of_nothing() -> None:
    """No token of media: latents read themselves."""
    build = functools.partial(library.PerceiverAttention, dim=D, **HEADS)
    shapes = {"media": (B, T, 0, D), "latents": (B, T, N, D)}
    assert_replaced(Case(build, cases.on_arrays, shapes, cases.ATTENTION), training=True)


@pytest.mark.parametrize("immediate", [True, False], ids=["last medium", "all media"])
@pytest.mark.parametrize("count", [T, 1])
@pytest.mark.parametrize("locations", [*LOCATIONS, None])
def test_text_reads_media(locations: str | None, count: int, immediate: bool) -> None:
    case = cases.reading(gated(immediate), count, locations)
    assert_replaced(case, training=True)
    if locations == "usual":
        assert_compiles(case, training=True, gradients=count == T and immediate)


def test_compiled() -> None:
    assert_compiles(resampling((B, T, M, D), depth=1), training=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LARGE)
def test_bfloat16(name: str, device: str) -> None:
    assert_accurate_in_bfloat16(LARGE[name], device)


def test_parts_that_are_replaced_later_run() -> None:
    assert_later_parts_run(resampling((B, T, M, D)))
    assert_later_parts_run(cases.reading(gated(True), T, "usual"))


def test_text_before_all_media_reads_nothing() -> None:
    """Zeros without a gradient where only the last medium is read, as in the original; one text's locations serve a batch."""
    build = functools.partial(library.MaskedCrossAttention, dim=D, **HEADS)
    case = cases.reading(build, T, "usual")
    case = dataclasses.replace(case, arrays=lambda: {"media_locations": locations_of("usual")[:1]})
    assert_replaced(case, training=True)
    model, data = case.model(), case.data()
    replace_attention(model)
    text = data["text"].requires_grad_()
    out = case.call(model, **data)
    out.sum().backward()
    assert not out[:, 0].any() and not text.grad[:, 0].any() and out[:, 1].all() and text.grad[:, 1].any()


@pytest.mark.parametrize("immediate", [True, False], ids=["last medium", "all media"])
def test_one_medium_takes_no_mask_of_pairs(immediate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = library.MaskedCrossAttention(dim=D, only_attend_immediate_media=immediate, **HEADS).double()
    cases.check_one_medium_takes_no_mask_of_pairs(layer, immediate, monkeypatch)


def test_media_and_latents_are_two_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    cases.check_media_and_latents_are_two_segments(library, monkeypatch)


def test_what_is_left_alone_says_why() -> None:
    cases.check_what_is_left_alone(library, {})


def test_wrong_shapes_are_refused() -> None:
    cases.check_refusals(library, {})


def test_autocast() -> None:
    case = resampling((B, T, M, D))
    model, media = case.model(torch.float32), case.data(torch.float32)["media"]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(media)
        replace_attention(model)
        found = model(media)
    assert found.dtype == expected.dtype
    assert_accurate(case, autocast=True)
