"""Parameters and FLOPs of models: the papers' figures, parts that add up, and nothing that is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from perceiver_kernels.counting import summary
from perceiver_kernels.inputs import InputArray
from perceiver_kernels.models import Perceiver, PerceiverConfig, PerceiverIO


@pytest.mark.parametrize(
    ("build", "gflop"), [(PerceiverIO.imagenet_fourier, 407), (PerceiverIO.imagenet_conv, 369)]
)  # fmt: skip
def test_papers_figures(build: Any, gflop: int) -> None:
    """Perceiver IO, arXiv 2107.14795, table of ImageNet results."""
    counted = summary(build(device="meta"), torch.empty(1, 3, 224, 224, device="meta"))
    assert round(counted.whole.flops / 1e9) == gflop


def perceiver() -> Perceiver:
    config = PerceiverConfig(
        input_dim=16, num_classes=3, num_latents=4, latent_dim=8, num_cross_attends=2, num_blocks=2, layers_per_block=2,
        latent_heads=2,
    )  # fmt: skip
    return Perceiver(config)


def test_a_perceiver_is_counted_as_it_says_itself() -> None:
    model = perceiver()
    counted = summary(model, torch.empty(2, 32, 16))
    assert counted.whole.flops == model.flops(2, 32)
    assert counted.whole.parameters == model.num_params()
    parts = {part.name: part for part in counted.parts}
    assert list(parts) == ["cross_blocks", "latent_blocks", "head"]
    assert sum(part.flops for part in parts.values()) == counted.whole.flops
    assert parts["latent_blocks"].flops == 2 * sum(layer.flops(2, 4) for layer in model.latent_blocks[0])
    absorbed = summary(model, torch.empty(2, 32, 16), method="absorbed")
    assert absorbed.whole.flops == model.flops(2, 32, method="absorbed")


def test_deeper_parts() -> None:
    counted = summary(perceiver(), InputArray.tokens(torch.empty(2, 32, 16)), depth=3)
    flops = {part.name: part.flops for part in counted.parts}
    assert flops["latent_blocks.0"] == flops["latent_blocks.0.0"] + flops["latent_blocks.0.1"]


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    counted = summary(model, torch.empty(1, 3))
    assert counted.whole.parameters == 9 and [part.parameters for part in counted.parts] == [9, 0]


def test_a_model_is_as_it_was() -> None:
    model = perceiver().train()
    model.latent_blocks.eval()
    modes = [module.training for module in model.modules()]
    model.cross_blocks[0].attention.method = "absorbed"
    x = torch.randn(2, 32, 16)
    torch.manual_seed(0)
    before = model(x)
    summary(model, torch.empty(2, 32, 16))
    assert [module.training for module in model.modules()] == modes
    assert [block.attention.method for block in model.cross_blocks] == ["absorbed", None]
    torch.manual_seed(0)
    assert torch.equal(model(x), before) and all(p.grad is None for p in model.parameters())


def test_it_is_a_table() -> None:
    lines = str(summary(perceiver(), torch.empty(2, 32, 16))).splitlines()
    assert [line.split()[0] for line in lines] == ["part", "cross_blocks", "latent_blocks", "head", "all"]
    assert len({len(line) for line in lines}) == 1


def test_depth_is_checked() -> None:
    with pytest.raises(ValueError, match="depth must be at least 0, got -1"):
        summary(perceiver(), torch.empty(2, 32, 16), depth=-1)
