"""flamingo-pytorch: its resampler and its gated cross-attention, before and after replacement."""

from __future__ import annotations

import pytest
import torch

from tests.integrations import flamingo_cases as cases
from tests.integrations.agreement import assert_replaced, randomised
from tests.integrations.flamingo_cases import HEADS, LOCATIONS, B, D, L, M, N, T, locations_of, tensors

library = pytest.importorskip("flamingo_pytorch.flamingo_pytorch", reason="flamingo-pytorch is not installed")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(B, T, M, D), (B, M, D)], ids=["media", "one medium"])
def test_resampler(shape: tuple[int, ...], training: bool) -> None:
    model = randomised(library.PerceiverResampler(dim=D, depth=2, num_latents=N, num_media_embeds=4, **HEADS)).train(training)
    (media,) = tensors(shape)
    report = assert_replaced(model, lambda m: m(media), [media], converted=2, compiles=len(shape) == 4 and training)
    assert report.converted[0].name == "layers.0.0" and report.converted[0].kind == "flamingo_pytorch PerceiverAttention"


def test_a_resampler_of_nothing() -> None:
    """No token of media: latents read themselves."""
    model = randomised(library.PerceiverAttention(dim=D, **HEADS))
    media, latents = tensors((B, T, 0, D), (B, T, N, D))
    assert_replaced(model, lambda m: m(media, latents), [latents], converted=1, compiles=False)


@pytest.mark.parametrize("immediate", [True, False], ids=["last medium", "all media"])
@pytest.mark.parametrize("count", [T, 1])
@pytest.mark.parametrize("locations", [*LOCATIONS, None])
def test_text_reads_media(locations: str | None, count: int, immediate: bool) -> None:
    model = randomised(library.GatedCrossAttentionBlock(dim=D, only_attend_immediate_media=immediate, **HEADS))
    text, media = tensors((B, L, D), (B, count, N, D))
    where = None if locations is None else locations_of(locations)
    assert_replaced(
        model, lambda m: m(text, media, where), [text, media], converted=1, compiles=locations == "usual"
    )


def test_text_before_all_media_reads_nothing() -> None:
    """Zeros without a gradient where only the last medium is read, as in the original; one text's locations serve a batch."""
    model = library.MaskedCrossAttention(dim=D, **HEADS)
    text, media = (x.float() for x in tensors((B, L, D), (B, T, N, D)))
    where = locations_of("usual")[:1]
    assert_replaced(randomised(model), lambda m: m(text.double(), media.double(), where), [], converted=1, compiles=False)
    cases.replace_attention(model.float())
    out = model(text.requires_grad_(), media, where)
    out.sum().backward()
    assert not out[:, 0].any() and not text.grad[:, 0].any() and out[:, 1].all() and text.grad[:, 1].any()


@pytest.mark.parametrize("immediate", [True, False], ids=["last medium", "all media"])
def test_one_medium_takes_no_mask_of_pairs(immediate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = randomised(library.MaskedCrossAttention(dim=D, only_attend_immediate_media=immediate, **HEADS))
    cases.check_one_medium_takes_no_mask_of_pairs(layer, immediate, monkeypatch)


def test_media_and_latents_are_two_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    cases.check_media_and_latents_are_two_segments(library, monkeypatch)


def test_what_is_left_alone_says_why() -> None:
    cases.check_what_is_left_alone(library, {})


def test_children_of_later_count() -> None:
    cases.check_children_of_later_count(library)


def test_wrong_shapes_are_refused() -> None:
    cases.check_refusals(library, {})


def test_autocast() -> None:
    model = library.PerceiverResampler(dim=D, depth=1, num_latents=N, **HEADS)
    media = torch.randn(B, T, M, D)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(media)
        cases.replace_attention(model)
        found = model(media)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
