"""torch.compile(model, dynamic=True), which is also what torch turns to when sizes change: one graph, no break."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perceiver_kernels.models import PerceiverAR, PerceiverARConfig, VecSetAutoencoder
from tests.models.test_perceiver_io import MODELS, tensors

AR: dict[str, Any] = {"vocab_size": 7, "max_length": 9, "num_latents": 4, "dim": 16, "num_heads": 2, "num_layers": 1}


def assert_compiles(model: Any, *calls: tuple[Any, ...]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), dynamic=True, fullgraph=True, backend="aot_eager")
    for call in calls:
        for actual, expected in zip(tensors(compiled(*call)), tensors(model(*call)), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["learned", "flow"])
def test_perceiver_io(name: str) -> None:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    assert_compiles(build(layers_per_block=1, num_blocks=1), (inputs(),))


def test_perceiver_ar() -> None:
    torch.manual_seed(0)
    assert_compiles(PerceiverAR(PerceiverARConfig(**AR)), *((torch.randint(0, 7, (2, M)),) for M in (6, 8)))


def test_images_of_several_sizes() -> None:
    torch.manual_seed(0)
    images = (torch.randn(2, 3, 8, 7), torch.randn(3, 3, 5, 9))
    assert_compiles(MODELS["fourier"][0](layers_per_block=1, num_blocks=1), *((image,) for image in images))


def test_clouds_and_queries_of_several_sizes() -> None:
    torch.manual_seed(0)
    model = VecSetAutoencoder.shapenet(num_latents=6, dim=16, decoder_layers=1, latent_heads=2).eval()
    model.register_forward_hook(lambda module, inputs, outputs: outputs[0])
    assert_compiles(model, *((torch.randn(2, M, 3), torch.randn(2, n, 3)) for M, n in ((20, 9), (31, 17))))
