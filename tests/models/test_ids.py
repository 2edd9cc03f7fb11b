"""Integers that name something: those that name nothing are told, on a CPU, and the values with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from perceiver_kernels.inputs import FourierPositions
from perceiver_kernels.models import RIN, LinformerLM, LinformerLMConfig, PerceiverAR, PerceiverARConfig, PerceiverIO, RINConfig
from perceiver_kernels.models.preprocessing import TextPreprocessor
from perceiver_kernels.models.queries import FourierQueries, LearnedQueries
from tests.models.test_rin import SMALL


def tokens(*values: int) -> torch.Tensor:
    return torch.tensor([values])


def perceiver_ar() -> PerceiverAR:
    return PerceiverAR(PerceiverARConfig(vocab_size=7, max_length=8, num_latents=4, dim=16, num_heads=2, num_layers=1))


def linformer() -> LinformerLM:
    return LinformerLM(LinformerLMConfig(vocab_size=7, dim=16, length=8, depth=1, num_heads=2, num_keys=4))


def rin(labels: torch.Tensor) -> torch.Tensor:
    model = RIN(RINConfig(**SMALL))
    return model(torch.zeros(len(labels), 3, 12, 12), torch.zeros(len(labels)), labels)


ARRAY = torch.zeros(1, 3, 5)
CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "ids": (lambda: TextPreprocessor(7, 8, 4)(tokens(0, 7)), r"ids must be in 0\.\.vocab_size-1=6, got 0\.\.7"),
    "autoregressive": (lambda: perceiver_ar()(tokens(1, -1)), r"tokens must be in 0\.\.vocab_size-1=6, got -1\.\.1"),
    "prompt": (
        lambda: perceiver_ar().generate(tokens(1, 9), max_new_tokens=1), r"must be in 0\.\.vocab_size-1=6, got 1\.\.9"
    ),
    "no candidates": (
        lambda: perceiver_ar().generate(tokens(1), max_new_tokens=1, temperature=0, top_k=0), "top_k must be at least 1"
    ),
    "linformer": (lambda: linformer()(tokens(3, 7)), r"tokens must be in 0\.\.vocab_size-1=6, got 3\.\.7"),
    "labels": (lambda: rin(torch.tensor([0, 7])), r"labels must be in 0\.\.num_classes-1=6, got 0\.\.7"),
    "learned queries": (
        lambda: LearnedQueries(5, 4)(ARRAY, torch.tensor([-1])), r"points must be in 0\.\.O-1=4, got -1\.\.-1"
    ),
    "queries like inputs": (
        lambda: LearnedQueries(5, 4, like_inputs=True)(ARRAY, torch.tensor([3])), r"points must be in 0\.\.O-1=2, got 3\.\.3"
    ),
    "places": (
        lambda: FourierQueries((2, 3), FourierPositions(2, (2.0, 3.0)))(ARRAY, torch.tensor([0, 6])),
        r"points must be in 0\.\.O-1=5, got 0\.\.6",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CALLS))
def test_values_out_of_range_are_named(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("points", [[0, 1], torch.tensor([0.0]), torch.tensor([True, False])], ids=str)
def test_points_are_integers(points: Any) -> None:
    model = PerceiverIO.language(
        vocab_size=7, channels=8, max_length=4, num_latents=2, latent_dim=8, num_blocks=1, layers_per_block=1, latent_heads=2,
        cross_heads=2, qk_channels=8, v_channels=8, decoder_heads=2, decoder_qk_channels=8,
    )  # fmt: skip
    with pytest.raises(TypeError, match="points must be"):
        model(tokens(0, 1), points=points)


def test_what_is_decoded_was_encoded() -> None:
    model = PerceiverIO.imagenet_fourier(num_latents=2, latent_dim=8, latent_heads=2, num_blocks=1, layers_per_block=1)
    with pytest.raises(TypeError, match="encoded must be what encode or prepare gave, got Tensor"):
        model.decode(torch.zeros(1, 2, 8))


def test_nothing_may_be_asked_for() -> None:
    assert TextPreprocessor(7, 8, 4)(torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0, 8)
    assert LearnedQueries(5, 4)(ARRAY, torch.arange(0)).shape == (1, 0, 4)
