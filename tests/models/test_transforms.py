"""Models under torch.func: vmap, and gradients of every sample, whose integers have no values to look at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from perceiver_kernels.models import PerceiverAR
from tests.models.families import MODELS, arguments, results

INTEGERS = ["language", "autoregressive", "linformer", "interface", "vector sets"]


@pytest.mark.parametrize("name", INTEGERS)
def test_samples_one_by_one(name: str) -> None:
    model, given = MODELS[name]().eval(), arguments(name, 3)
    together = results(model(*given))
    mapped = vmap(lambda *sample: model(*(each[None] for each in sample)), randomness="same")(*given)
    for whole, single in zip(together, results(mapped), strict=True):
        torch.testing.assert_close(single.view_as(whole), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", INTEGERS)
def test_gradients_of_every_sample(name: str) -> None:
    model, given = MODELS[name]().eval(), arguments(name, 3)

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        result = functional_call(model, parameters, tuple(each[None] for each in sample))
        return torch.stack([part.square().sum() for part in results(result)]).sum()

    parameters = dict(model.named_parameters())
    gradients = vmap(grad(loss), (None,) + (0,) * len(given), randomness="same")(parameters, *given)
    for i in range(3):
        expected = torch.autograd.grad(
            loss(parameters, *(each[i] for each in given)), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        for found, wanted in zip(gradients.values(), expected, strict=True):
            torch.testing.assert_close(found[i], wanted, rtol=1e-3, atol=1e-4)


def test_paddings_one_by_one() -> None:
    model = MODELS["autoregressive"]().eval()
    assert isinstance(model, PerceiverAR)
    (tokens,), padding = arguments("autoregressive", 3), torch.tensor([0, 1, 2])
    mapped = vmap(lambda row, none: model(row[None], padding=none[None])[0])(tokens, padding)
    torch.testing.assert_close(mapped, model(tokens, padding=padding), rtol=1e-4, atol=1e-5)
