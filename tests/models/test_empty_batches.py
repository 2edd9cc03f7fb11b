"""Batches of no sequence: results of their shapes from every family, and gradients of zeros."""

from __future__ import annotations

import pytest
import torch

from perceiver_kernels.models import Perceiver, PerceiverConfig
from tests.models.families import ENCODER, MODELS, arguments, results


@pytest.mark.parametrize("name", list(MODELS))
def test_models(name: str) -> None:
    model = MODELS[name]()
    found = results(model(*arguments(name, 0)))
    shapes = [result.shape[1:] for result in results(model(*arguments(name, 1)))]
    assert [result.shape for result in found] == [(0, *shape) for shape in shapes]
    torch.stack([result.sum() for result in found]).sum().backward()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_perceiver_in_chunks() -> None:
    model = Perceiver(PerceiverConfig(input_dim=6, num_classes=5, num_cross_attends=1, chunk_size=4, **ENCODER))
    model(torch.zeros(0, 9, 6)).sum().backward()
    assert model.latents.grad is not None and not model.latents.grad.any()
