"""nn.LinformerAttention against the equations written out, its two orders of products, masks, and memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import perceiver_kernels
from perceiver_kernels.nn import LinformerAttention
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.modules import assert_same, randomised, result_and_gradients

B, N, L, D, H, K = 2, 13, 19, 24, 4, 5

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "one kv head": {"one_kv_head": True},
    "shared": {"share_kv": True},
    "one shared head": {"share_kv": True, "one_kv_head": True},
    "head_dim": {"head_dim": 9, "norm": "rms", "residual": False},
    "bare": {"norm": None, "residual": False},
}


def sequence(length: int = N, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, length, D, dtype=torch.float64, generator=generator).requires_grad_()


def written_out(layer: LinformerAttention, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Keys and values of all tokens, then their mixtures, then attention, head by head."""
    y = x
    if layer.norm is not None and hasattr(layer.norm, "bias"):
        y = F.layer_norm(x, (D,), layer.norm.weight, layer.norm.bias)
    elif layer.norm is not None:
        y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    tokens = y if context is None else context
    keys = tokens @ layer.k_proj.weight.T
    values = keys if layer.share_kv else tokens @ layer.v_proj.weight.T
    if mask is not None:
        keys, values = keys * mask[..., None], values * mask[..., None]
    length = tokens.shape[1]
    keys = torch.einsum("bld,lk->bkd", keys, layer.mix_keys[:length])
    values = torch.einsum("bld,lk->bkd", values, (layer.mix_keys if layer.share_kv else layer.mix_values)[:length])
    outs = []
    for h, q in enumerate((y @ layer.q_proj.weight.T).split(layer.head_dim, -1)):
        start = h * layer.head_dim if layer.num_kv_heads > 1 else 0
        k, v = (t[..., start : start + layer.head_dim] for t in (keys, values))
        outs.append((q @ k.mT / layer.head_dim**0.5).softmax(-1) @ v)
    out = torch.cat(outs, -1) @ layer.out_proj.weight.T + layer.out_proj.bias
    return x + out if layer.residual else out


@pytest.mark.parametrize("mixes_first", [False, True])
@pytest.mark.parametrize("given", ["short", "whole", "context", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_as_written(case: str, given: str, mixes_first: bool) -> None:
    layer = randomised(LinformerAttention(D, L, K, H, dtype=torch.float64, **CASES[case]))
    layer.mixes_first = mixes_first
    leaves = [sequence(L if given == "whole" else N)]
    leaves += [sequence(L - 2, 2)] if given == "context" else []
    mask = torch.rand(B, N, generator=torch.Generator().manual_seed(3)) < 0.6 if given == "masked" else None
    actual = result_and_gradients(lambda *t: layer(*t, key_mask=mask), layer, *leaves)
    assert_same(actual, result_and_gradients(lambda *t: written_out(layer, *t, mask=mask), layer, *leaves))


def test_the_cheaper_order_is_taken() -> None:
    """With as many key channels as the sequence has, tokens are mixed first; with one narrow head of keys, projected."""
    assert LinformerAttention(512, 4096, 256).mixes_first
    assert not LinformerAttention(512, 4096, 256, one_kv_head=True).mixes_first
    for options in ({}, {"one_kv_head": True}, {"share_kv": True}):
        layer = LinformerAttention(64, 128, 16, 8, **options)
        flops = []
        for mixes_first in (layer.mixes_first, not layer.mixes_first):
            layer.mixes_first = mixes_first
            with torch.no_grad(), perceiver_kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
                layer(torch.randn(3, 128, 64))
            assert counter.get_total_flops() == layer.flops(3, 128)
            flops.append(layer.flops(3, 128))
        assert flops[0] <= flops[1]


def test_tokens_are_not_copied_to_mix_them() -> None:
    """Beside x, its norm, the query, attention's result and the output, nothing of [B, L, D] is kept for the gradient."""
    layer = LinformerAttention(64, 512, 8, 8)
    x, kept = torch.randn(2, 512, 64, requires_grad=True), {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sum(size >= x.nbytes for size in kept.values()) <= 4


def test_a_mask_at_the_end_is_a_shorter_sequence() -> None:
    layer, x = randomised(LinformerAttention(D, L, K, H, dtype=torch.float64)), sequence()
    mask = (torch.arange(N) < 7).expand(B, -1)
    torch.testing.assert_close(layer(x, key_mask=mask)[:, :7], layer(x[:, :7]), rtol=1e-12, atol=1e-12)


def test_dropout_of_the_weights() -> None:
    layer = randomised(LinformerAttention(D, L, K, H, dropout=0.3, residual=False))
    x = sequence().detach().float()[:1]
    expected, copies = layer.eval()(x), 4000
    layer.train()
    with torch.no_grad():
        dropped = layer(x.expand(copies, -1, -1))
    error = dropped.std(0) / copies**0.5
    assert error.min() > 0 and ((dropped.mean(0) - expected[0]).abs() <= 5 * error).all()


def test_starts_as_lucidrains() -> None:
    layer = LinformerAttention(64, 512, 16)
    for mix in (layer.mix_keys, layer.mix_values):
        assert mix.shape == (512, 16) and 0.99 * 0.25 < mix.abs().max() <= 0.25
    assert abs(layer.q_proj.weight.std() * (3 * 64) ** 0.5 - 1) < 0.05


@pytest.mark.parametrize("case", ["default", "one kv head"])
def test_autocast(case: str) -> None:
    layer, x = randomised(LinformerAttention(D, L, K, H, **CASES[case])), sequence().detach()
    oracle = written_out(copy.deepcopy(layer).double(), x).detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, eager = layer(x.float()), written_out(layer, x.float())
    assert actual.dtype == eager.dtype
    assert_as_accurate(actual.bfloat16(), eager.bfloat16(), oracle, "out")


@pytest.mark.parametrize("case", CASES)
def test_compiles_without_a_graph_break(case: str) -> None:
    layer, x = randomised(LinformerAttention(D, L, K, H, dtype=torch.float64, **CASES[case])), sequence()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same(result_and_gradients(compiled, layer, x), result_and_gradients(layer, layer, x))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: LinformerAttention(D, L, K, 5), ValueError, "dim must be a positive multiple of num_heads=5, got 24"),
        (lambda: LinformerAttention(D, 0), ValueError, "length must be at least 1, got 0"),
        (lambda: LinformerAttention(D, L, 0), ValueError, "num_keys must be at least 1, got 0"),
        (lambda: LinformerAttention(D, L, K, head_dim=0), ValueError, "head_dim must be at least 1, got 0"),
        (lambda: LinformerAttention(D, L, share_kv=None), TypeError, "share_kv must be a bool, got None"),
        (lambda: LinformerAttention(D, L, dropout=2), ValueError, r"dropout must be in \[0, 1\), got 2"),
        (lambda: LinformerAttention(D, L, norm="batch"), ValueError, "norm must be one of 'layer', 'rms', got 'batch'"),
        (lambda: LinformerAttention(D, 3)(torch.randn(B, 4, D)), ValueError, "x must have at most length=3 tokens, got 4"),
        (
            lambda: LinformerAttention(D, 3)(torch.randn(B, 4, D), torch.randn(B, 5, D)),
            ValueError,
            "context must have at most length=3 tokens, got 5",
        ),
        (
            lambda: LinformerAttention(D, L)(torch.randn(B, 4, D), torch.randn(B, 5, 3)),
            ValueError,
            r"context must be \[B, L, D\] with D=24, got \(2, 5, 3\)",
        ),
        (
            lambda: LinformerAttention(D, L)(torch.randn(B, 4, D), key_mask=torch.ones(B, 5) > 0),
            ValueError,
            r"key_mask must be \[B, M\] with B=2, M=4, got \(2, 5\)",
        ),
    ],
)
def test_wrong_use_is_named(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
