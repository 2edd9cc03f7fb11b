"""MAB, SAB, ISAB and PMA against the equations written out: values and every gradient, masks, and symmetries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import perceiver_kernels
from perceiver_kernels.nn import ISAB, MAB, PMA, SAB
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.models.plain_set_transformer import Block, PlainISAB, PlainPMA, PlainSAB
from tests.modules import assert_same, randomised, result_and_gradients
from tests.nn.test_attention import METHODS

B, N, M, D, C, H = 2, 5, 23, 24, 7, 3

NAMES = {
    "q_proj": "fc_q", "k_proj": "fc_k", "v_proj": "fc_v", "out_proj": "fc_o", "norm_attention": "ln0", "norm_out": "ln1",
    "read": "mab0", "write": "mab1", "attention": "mab", "inducing": "I", "seeds": "S",
}  # fmt: skip

MASKS = {
    "all": None,
    "some": torch.rand(B, M, generator=torch.Generator().manual_seed(3)) < 0.6,
    "none of one": torch.tensor([[True] * M, [False] * M]),
}


def plain(block: nn.Module, oracle: nn.Module) -> nn.Module:
    """``oracle`` with the very parameters of ``block``, so that gradients are compared by name."""
    for name, parameter in block.named_parameters():
        *path, leaf = (NAMES.get(part, part) for part in name.split("."))
        owner = oracle.get_submodule(".".join(path))
        assert getattr(owner, leaf).shape == parameter.shape
        setattr(owner, leaf, parameter)
    assert {id(p) for p in oracle.parameters()} == {id(p) for p in block.parameters()}
    return oracle.double()


def elements(channels: int, length: int = M, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, length, channels, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("query_batch", [1, B])
def test_mab_as_written(query_batch: int, post_norm: bool, method: str, masked: str) -> None:
    block = randomised(MAB(11, C, D, H, post_norm=post_norm, method=method, dtype=torch.float64))
    oracle = plain(block, Block(11, C, D, H, post_norm))
    queries, x, mask = elements(11, N, 2)[:query_batch].detach().requires_grad_(), elements(C), MASKS[masked]
    actual = result_and_gradients(lambda y, x: block(y, x, mask), block, queries, x)
    assert_same(actual, result_and_gradients(lambda y, x: oracle(y, x, mask), block, queries, x))


SET_BLOCKS: dict[str, tuple[Any, Any, int]] = {
    "sab": (lambda **o: SAB(C, D, H, **o), lambda n: PlainSAB(C, D, H, n), C),
    "isab": (lambda **o: ISAB(C, D, 4, H, **o), lambda n: PlainISAB(C, D, 4, H, n), C),
    "pma": (lambda **o: PMA(D, 3, H, **o), lambda n: PlainPMA(D, 3, H, n), D),
}


@pytest.mark.parametrize("masked", ["all", "some"])
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("kind", SET_BLOCKS)
def test_blocks_as_written(kind: str, post_norm: bool, masked: str) -> None:
    build, build_plain, channels = SET_BLOCKS[kind]
    block = randomised(build(post_norm=post_norm, dtype=torch.float64))
    oracle, x, mask = plain(block, build_plain(post_norm)), elements(channels), MASKS[masked]
    actual = result_and_gradients(lambda x: block(x, mask), block, x)
    assert_same(actual, result_and_gradients(lambda x: oracle(x, mask), block, x))


def test_pooling_with_the_papers_feed_forward() -> None:
    block = randomised(PMA(D, 3, H, feed_forward=True, dtype=torch.float64))
    inner, oracle, x = block.feed_forward, PlainPMA(D, 3, H, False), elements(D)
    block.feed_forward = None
    oracle = plain(block, oracle)
    block.feed_forward = inner
    written_out = lambda x: oracle(inner.down_proj(inner.up_proj(x).clamp(min=0)))  # noqa: E731
    actual = result_and_gradients(block, block, x)
    assert_same(actual, result_and_gradients(written_out, block, x))


@pytest.mark.parametrize("kind", SET_BLOCKS)
def test_order_of_the_elements(kind: str) -> None:
    """SAB and ISAB permute their rows as the set is permuted; PMA does not see the order."""
    build, _, channels = SET_BLOCKS[kind]
    block, x = randomised(build(dtype=torch.float64)), elements(channels)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(4))
    expected = block(x) if kind == "pma" else block(x)[:, order]
    torch.testing.assert_close(block(x[:, order]), expected, rtol=1e-12, atol=1e-12)
    assert kind == "pma" or not torch.allclose(block(x[:, order]), block(x))


@pytest.mark.parametrize("kind", SET_BLOCKS)
def test_a_mask_is_truncation(kind: str) -> None:
    build, _, channels = SET_BLOCKS[kind]
    block, x = randomised(build(dtype=torch.float64)), elements(channels)
    mask = (torch.arange(M) < 9).expand(B, -1)
    rows = slice(None) if kind == "pma" else slice(9)
    torch.testing.assert_close(block(x, mask)[:, rows], block(x[:, :9]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_inducing_points_are_projected_once(method: str) -> None:
    rows: list[int] = []
    block = ISAB(C, D, 4, H, method=method)
    block.read.q_proj.register_forward_hook(lambda _, inputs, out: rows.append(out.shape[0]))
    block(elements(C).float())
    assert rows == [1]


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str) -> None:
    block = randomised(ISAB(C, D, 4, H, post_norm=True, method=method))
    x = elements(C).detach().float()
    oracle = plain(copy.deepcopy(block).double(), PlainISAB(C, D, 4, H, True))
    eager = copy.deepcopy(oracle).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, expected = block(x), eager(x)
    assert_as_accurate(actual.bfloat16(), expected.bfloat16(), oracle(x.double()).detach(), "out")


@pytest.mark.parametrize("kind", SET_BLOCKS)
def test_compiles_without_a_graph_break(kind: str) -> None:
    build, _, channels = SET_BLOCKS[kind]
    block, x = randomised(build(dtype=torch.float64)), elements(channels)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert_same(result_and_gradients(compiled, block, x), result_and_gradients(block, block, x))


@pytest.mark.parametrize("query_batch", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_that_run(method: str, query_batch: int) -> None:
    block = MAB(12, 32, D, H, method=method)
    with torch.no_grad(), perceiver_kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        block(torch.randn(query_batch, N, 12), torch.randn(3, M, 32))
    assert counter.get_total_flops() == block.flops(3, N, M, query_batch=query_batch, method=method)


def test_starts_as_the_authors_code_does() -> None:
    """Linear layers as torch's: uniform within 1/sqrt(fan-in); points Xavier's uniform."""
    block = ISAB(64, 128, 16)
    weight = block.read.k_proj.weight
    assert weight.abs().max() <= 64**-0.5 and abs(weight.std() * (3 * 64) ** 0.5 - 1) < 0.05
    # Of [1, m, D] torch takes m D as fan-in and D as fan-out.
    bound = (6 / (16 * 128 + 128)) ** 0.5
    assert block.inducing.shape == (1, 16, 128) and 0.99 * bound < block.inducing.abs().max() <= bound


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: MAB(C, C, D, 5), ValueError, "dim must be a positive multiple of num_heads=5, got 24"),
        (lambda: MAB(0, C, D), ValueError, "query_dim must be at least 1, got 0"),
        (lambda: MAB(C, 2000, D), ValueError, "input_dim must be at most 1024, .* got 2000"),
        (lambda: MAB(C, C, D, post_norm=1), TypeError, "post_norm must be a bool, got 1"),
        (lambda: MAB(C, C, D, method="fast"), ValueError, "method must be 'absorbed', 'projected' or None, got 'fast'"),
        (lambda: ISAB(C, D, 0), ValueError, "num_inducing must be at least 1, got 0"),
        (lambda: PMA(D, 0), ValueError, "num_seeds must be at least 1, got 0"),
        (lambda: PMA(D, feed_forward=2), TypeError, "feed_forward must be a bool, got 2"),
        (lambda: SAB(C, D)(torch.randn(B, M, D)), ValueError, r"queries must be \[B, N, C\] with C=7, got \(2, 23, 24\)"),
        (
            lambda: MAB(C, C, D)(torch.randn(B, N, C), torch.randn(M, C)),
            ValueError,
            r"inputs must be \[B, M, C\] with C=7, got \(23, 7\)",
        ),
        (lambda: SAB(C, D)(torch.randn(B, M, C).half()), TypeError, "queries must have the parameters' dtype torch.float32"),
        (lambda: SAB(C, D)(torch.randn(B, M, C), torch.ones(B, M)), TypeError, "key_mask must be bool"),
        (lambda: SAB(C, D)(torch.randn(B, M, C), torch.ones(B, N) > 0), ValueError, "key_mask must be"),
    ],
)
def test_wrong_use_is_named(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
