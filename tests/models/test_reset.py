"""What FSDP and others do: modules made on the meta device, given memory, and started by their own methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels.models import PerceiverAR, PerceiverARConfig, PerceiverIO, VecSetAutoencoder, VecSetConfig
from perceiver_kernels.nn import ISAB, PMA, LinformerAttention, MultiheadAttention
from tests.models.families import ENCODER, MODELS, arguments, results

BUILDS: dict[str, Callable[..., nn.Module]] = {
    **MODELS,
    "multimodal": lambda **where: PerceiverIO.multimodal(**ENCODER, **where),
    "logits of the embedding": lambda **where: PerceiverAR(
        PerceiverARConfig(vocab_size=7, max_length=6, num_latents=3, dim=8, num_heads=2, num_layers=1, init_std=0.02,
                          tied_logits=True, logits_bias=True), **where
    ),
    "logits of zeros": lambda **where: PerceiverAR(
        PerceiverARConfig(vocab_size=7, max_length=6, num_latents=3, dim=8, num_heads=2, num_layers=1), **where
    ),
    "sampled queries": lambda **where: VecSetAutoencoder(
        VecSetConfig(num_latents=4, dim=8, decoder_layers=1, latent_heads=2), **where
    ),
    "isab": lambda **where: ISAB(4, 8, 8, 2, **where),
    "pma": lambda **where: PMA(8, 8, 2, feed_forward=True, **where),
    "linformer attention": lambda **where: LinformerAttention(8, 16, 8, 2, **where),
    "multihead attention": lambda **where: MultiheadAttention(8, 2, add_bias_kv=True, **where),
}  # fmt: skip


def reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def spread(starts: list[dict[str, Tensor]], path: str) -> float:
    """A parameter's standard deviation, which of 64 numbers is known to a tenth, over several starts."""
    return float(torch.stack([start[path].std() for start in starts]).square().mean().sqrt())


@pytest.mark.parametrize("name", list(BUILDS))
def test_modules_start_as_constructed(name: str) -> None:
    model = BUILDS[name](device="meta").to_empty(device="cpu")
    constructed, started = [], []
    for _ in range(8):
        constructed.append(BUILDS[name]().state_dict())
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)
        model.apply(reset)
        started.append({path: tensor.clone() for path, tensor in model.state_dict().items()})
    assert not list(model.buffers())
    for path, found in started[0].items():
        assert found.isfinite().all(), path
        start = constructed[0][path]
        if start.numel() > 1 and (start == start.flatten()[0]).all():
            assert torch.equal(found, start), path
        elif start.numel() >= 64:
            assert 0.75 < spread(started, path) / spread(constructed, path) < 1.33, path
    if name in MODELS:
        assert all(result.isfinite().all() for result in results(model(*arguments(name, 2))))


def test_owners_of_parameters_can_start_them() -> None:
    owners: Any = [module for build in BUILDS.values() for module in build(device="meta").modules()]
    for module in owners:
        if list(module.parameters(recurse=False)) and not isinstance(module, nn.ParameterDict):
            assert hasattr(module, "reset_parameters"), type(module)
