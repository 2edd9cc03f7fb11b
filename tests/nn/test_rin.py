"""nn.RINBlock against its description written out: values and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import perceiver_kernels
from perceiver_kernels.nn import RINBlock
from tests.models.plain_rin import plain_round
from tests.modules import assert_same, randomised, result_and_gradients

B, M, N = 2, 21, 6

CASES: dict[str, dict[str, Any]] = {
    "published": {},
    "wide tape": {"tape_dim": 48, "latent_dim": 32},
    "norms": {"norm_read": True, "norm_written": True},
    "no feed-forward after writing": {"tape_widening_factor": 0},
    "no layers": {"num_layers": 0, "latent_widening_factor": 1},
}


def block_of(case: str, **changes: Any) -> RINBlock:
    sizes = {"tape_dim": 24, "latent_dim": 32, "num_layers": 2, "tape_heads": 4, "latent_heads": 8}
    options = {**sizes, **CASES[case], **changes}
    return randomised(RINBlock(options.pop("tape_dim"), options.pop("latent_dim"), options.pop("num_layers"), **options))


def arrays(block: RINBlock) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (B, M, block.write.query_dim), (B, N, block.write.latent_dim)
    return tuple(torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_() for size in sizes)


def joined(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([out.flatten() for out in outputs])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_as_written(case: str, masked: bool) -> None:
    block = block_of(case, dtype=torch.float64)
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    leaves = arrays(block)
    actual = result_and_gradients(lambda x, z: joined(block(x, z, mask)), block, *leaves)
    assert_same(actual, result_and_gradients(lambda x, z: joined(plain_round(block, x, z, mask)), block, *leaves), 1024)


def test_widths_of_reading_and_writing() -> None:
    """The smaller of the two widths: 16 heads of 32 in the published model of 64 x 64 images."""
    block = RINBlock(512, 768, 4, device="meta")
    for layer in (block.read.attention, block.write):
        assert (layer.qk_channels, layer.v_channels, layer.num_heads) == (512, 512, 16)
    assert block.read.attention.norm_inputs is None and block.write.norm_latents is None and block.write.residual
    assert block.process[0].attention.num_heads == 16 and block.feed_forward.hidden_dim == 2048


def test_dropout_is_that_of_the_latent_blocks() -> None:
    block = block_of("published", attention_dropout=0.1, hidden_dropout=0.2, drop_path=0.3)
    for layer in block.process:
        assert (layer.attention.dropout, layer.feed_forward.hidden_dropout, layer.feed_forward.drop_path) == (0.1, 0.2, 0.3)
    assert block.read.attention.dropout == block.write.dropout == block.feed_forward.hidden_dropout == 0


@pytest.mark.parametrize("case", ["published", "no feed-forward after writing"])
def test_flops_are_those_that_run(case: str) -> None:
    block = block_of(case, tape_dim=32)
    with torch.no_grad(), perceiver_kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        block.read.attention.method = "projected"
        block(*(x.float() for x in arrays(block)))
    assert counter.get_total_flops() == block.flops(B, N, M)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RINBlock(24, 32, 1, tape_heads=5), "qk_channels must be a positive multiple of num_heads=5, got 24"),
        (lambda: RINBlock(24, 32, 1, tape_heads=4, latent_heads=3), "qk_channels must be a positive multiple of num_heads=3"),
        (lambda: RINBlock(24, 32, -1), "num_layers must be at least 0, got -1"),
        (lambda: RINBlock(24, 32, 1, tape_widening_factor=-1), "tape_widening_factor must be at least 0, got -1"),
        (lambda: RINBlock(2000, 32, 1, tape_heads=4), "input_dim must be at most 1024"),
        (
            lambda: block_of("published")(torch.randn(B, M, 24), torch.randn(B, N, 24)),
            r"latents must be \[B, N, D\] with D=32, got \(2, 6, 24\)",
        ),
    ],
)
def test_wrong_use_is_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
