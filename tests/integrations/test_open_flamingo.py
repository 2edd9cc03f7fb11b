"""OpenFlamingo's helpers: its resampler and its gated cross-attention, before and after replacement."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import torch

from perceiver_kernels import replace_attention
from tests.convert.test_resamplers import open_flamingo
from tests.integrations import flamingo_cases as cases
from tests.integrations.agreement import assert_replaced, randomised
from tests.integrations.flamingo_cases import D_MEDIA, HEADS, LOCATIONS, B, D, L, M, N, T, locations_of, tensors

READING = {"dim_visual": D_MEDIA, **HEADS}


@pytest.fixture
def library() -> ModuleType:
    return open_flamingo()


@pytest.mark.parametrize("training", [False, True])
def test_resampler(library: ModuleType, training: bool) -> None:
    model = randomised(
        library.PerceiverResampler(dim=D, depth=2, num_latents=N, max_num_media=4, max_num_frames=2, **HEADS)
    ).train(training)
    (media,) = tensors((B, T, 2, M, D))
    report = assert_replaced(model, lambda m: m(media), [media], converted=2, compiles=training)
    assert report.converted[0].kind == "open_flamingo PerceiverAttention"


@pytest.mark.parametrize("immediate", [True, False], ids=["last medium", "all media"])
@pytest.mark.parametrize("count", [T, 1])
@pytest.mark.parametrize("locations", list(LOCATIONS))
def test_text_reads_media(library: ModuleType, locations: str, count: int, immediate: bool) -> None:
    model = randomised(library.GatedCrossAttentionBlock(dim=D, only_attend_immediate_media=immediate, **READING))
    text, media = tensors((B, L, D), (B, count, N, D_MEDIA))
    where = locations_of(locations)
    assert_replaced(model, lambda m: m(text, media, where), [text, media], converted=1, compiles=locations == "usual")


@pytest.mark.parametrize("immediate", [True, False], ids=["last medium", "all media"])
@pytest.mark.parametrize("locations", [*LOCATIONS, None])
def test_text_after_cached_media(library: ModuleType, locations: str | None, immediate: bool) -> None:
    """Media came in text of before, of another length; all of this one comes after the last of them."""
    model = randomised(library.MaskedCrossAttention(dim=D, only_attend_immediate_media=immediate, **READING))
    text, media = tensors((B, 3, D), (B, T, N, D_MEDIA))
    where = None if locations is None else locations_of(locations)
    assert_replaced(
        model, lambda m: m(text, media, media_locations=where, use_cached_media=True), [text, media], converted=1,
        compiles=locations == "usual",
    )  # fmt: skip


@pytest.mark.parametrize("immediate", [True, False], ids=["last medium", "all media"])
def test_one_medium_takes_no_mask_of_pairs(library: ModuleType, immediate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = randomised(library.MaskedCrossAttention(dim=D, only_attend_immediate_media=immediate, **READING))
    cases.check_one_medium_takes_no_mask_of_pairs(layer, immediate, monkeypatch)


def test_media_and_latents_are_two_segments(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.check_media_and_latents_are_two_segments(library, monkeypatch)


def test_what_is_left_alone_says_why(library: ModuleType) -> None:
    cases.check_what_is_left_alone(library, READING)


def test_children_of_later_count(library: ModuleType) -> None:
    cases.check_children_of_later_count(library)


def test_wrong_arguments_are_refused(library: ModuleType) -> None:
    cases.check_refusals(library, READING)
    cross = library.MaskedCrossAttention(dim=D, **READING)
    replace_attention(cross)
    with pytest.raises(ValueError, match=re.escape("media_locations must be given without use_cached_media, got None")):
        cross(torch.randn(B, L, D), torch.randn(B, T, N, D_MEDIA))
