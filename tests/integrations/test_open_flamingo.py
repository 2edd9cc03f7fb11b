"""OpenFlamingo's helpers: its resampler and its gated cross-attention, before and after replacement."""

from __future__ import annotations

import dataclasses
import functools
import re
from types import ModuleType
from typing import Any

import pytest
import torch

from perceiver_kernels import replace_attention
from tests.convert.test_resamplers import open_flamingo
from tests.integrations import flamingo_cases as cases
from tests.integrations.flamingo_cases import D_MEDIA, HEADS, LOCATIONS, WHICH, B, D, L, M, N, T
from tests.integrations.replaced import (
    DEVICES,
    Case,
    assert_accurate_in_bfloat16,
    assert_compiles,
    assert_later_parts_run,
    assert_replaced,
)

READING = {"dim_visual": D_MEDIA, **HEADS}


@pytest.fixture
def library() -> ModuleType:
    return open_flamingo()


def resampling(library: ModuleType, shape: tuple[int, ...], **sizes: int) -> Case:
    return cases.resampling(library, shape, max_num_media=4, max_num_frames=2, **sizes)


def of(kind: Any, immediate: bool) -> Any:
    return functools.partial(kind, dim=D, only_attend_immediate_media=immediate, **READING)


@pytest.mark.parametrize("training", [False, True])
def test_resampler(library: ModuleType, training: bool) -> None:
    case = resampling(library, (B, T, 2, M, D))
    report = assert_replaced(case, training=training)
    assert report.converted[0].kind == "open_flamingo PerceiverAttention"
    if training:
        assert_compiles(case, training=True, gradients=False)


@pytest.mark.parametrize("immediate", [True, False], ids=["last medium", "all media"])
@pytest.mark.parametrize("count", [T, 1])
@pytest.mark.parametrize("locations", list(LOCATIONS))
def test_text_reads_media(library: ModuleType, locations: str, count: int, immediate: bool) -> None:
    case = cases.reading(of(library.GatedCrossAttentionBlock, immediate), count, locations)
    assert_replaced(case, training=True)
    if locations == "usual":
        assert_compiles(case, training=True, gradients=False)


@pytest.mark.parametrize("immediate", [True, False], ids=["last medium", "all media"])
@pytest.mark.parametrize("locations", [*LOCATIONS, None])
def test_text_after_cached_media(library: ModuleType, locations: str | None, immediate: bool) -> None:
    """Media came in text of before, of another length; all of this one comes after the last of them."""
    case = cases.reading(of(library.MaskedCrossAttention, immediate), T, locations, use_cached_media=True)
    case = dataclasses.replace(case, shapes=case.shapes | {"text": (B, 3, D)})
    assert_replaced(case, training=True)
    if locations == "usual":
        assert_compiles(case, training=True, gradients=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["resampler", *(f"{where}, {which}" for where in LOCATIONS for which in WHICH)])
def test_bfloat16(library: ModuleType, name: str, device: str) -> None:
    resampler = resampling(library, (B, T, 2, 75, 64), num_latents=64, dim_head=32)
    assert_accurate_in_bfloat16(cases.large(library, {"resampler": resampler}, {"dim_visual": 48})[name], device)


def test_parts_that_are_replaced_later_run(library: ModuleType) -> None:
    assert_later_parts_run(resampling(library, (B, T, 2, M, D)))
    assert_later_parts_run(cases.reading(of(library.GatedCrossAttentionBlock, True), T, "usual"))


@pytest.mark.parametrize("immediate", [True, False], ids=["last medium", "all media"])
def test_one_medium_takes_no_mask_of_pairs(library: ModuleType, immediate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = library.MaskedCrossAttention(dim=D, only_attend_immediate_media=immediate, **READING).double()
    cases.check_one_medium_takes_no_mask_of_pairs(layer, immediate, monkeypatch)


def test_media_and_latents_are_two_segments(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.check_media_and_latents_are_two_segments(library, monkeypatch)


def test_what_is_left_alone_says_why(library: ModuleType) -> None:
    cases.check_what_is_left_alone(library, READING)


def test_wrong_arguments_are_refused(library: ModuleType) -> None:
    cases.check_refusals(library, READING)
    cross = library.MaskedCrossAttention(dim=D, **READING)
    replace_attention(cross)
    with pytest.raises(ValueError, match=re.escape("media_locations must be given without use_cached_media, got None")):
        cross(torch.randn(B, L, D), torch.randn(B, T, N, D_MEDIA))
