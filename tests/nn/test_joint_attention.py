"""Attention over a context and the sequence itself, and self-attention's causal, rotary and normed forms, as written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from perceiver_kernels import rotary_tables, use_backend
from perceiver_kernels.nn import FeedForward, JointAttention, Rotary, SelfAttention
from tests.modules import perturbed

B, N, M, D, H = 2, 5, 9, 24, 4


def sequence(length: int, seed: int) -> Tensor:
    return torch.randn(B, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    """The norm by its definition: the mean and the bias belong to LayerNorm alone."""
    if norm is None:
        return x
    centred = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return scaled + norm.bias if isinstance(norm, nn.LayerNorm) else scaled


def heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def turned(x: Tensor, rotary: Rotary | None) -> Tensor:
    """x [B, H, L, d] of the last L tokens."""
    if rotary is None:
        return x
    cos, sin = (table[-x.shape[2] :].double() for table in (rotary.cos, rotary.sin))
    r = cos.shape[-1]
    first, second, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), -1)


def attended(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


CASES: dict[str, dict[str, Any]] = {
    "flamingo": {},
    "biases": {"bias": True, "out_bias": True, "residual": False},
    "idefics2": {"num_kv_heads": 2, "head_dim": 7, "norm": "rms", "norm_context": "rms", "eps": 1e-6},
    "qk-norm": {"qk_norm": "layer", "norm_context": None},
    "causal": {"causal": True, "qk_norm": "rms"},
}


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", list(CASES))
def test_joint_attention_as_written(case: str, masked: bool, rotates: bool) -> None:
    layer = perturbed(JointAttention(D, H, **CASES[case])).double()
    x, context = sequence(N, 1), sequence(M, 2)
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    rotary = Rotary(*rotary_tables(M + N, 4)) if rotates else None
    own, read = normed(x, layer.norm), normed(context, layer.norm_context)
    query = turned(normed(heads(layer.q_proj(own), H), layer.norm_query), rotary)
    key, value = layer.kv_proj(torch.cat((read, own), 1)).chunk(2, -1)
    key = turned(normed(heads(key, layer.num_kv_heads), layer.norm_key), rotary)
    visible = torch.ones(B, 1, N, M + N, dtype=torch.bool)
    if layer.causal:
        visible = visible & torch.ones(N, M + N, dtype=torch.bool).tril(M)
    if mask is not None:
        visible = visible & torch.cat((mask, torch.ones(B, N, dtype=torch.bool)), 1)[:, None, None]
    expected = layer.out_proj(attended(query, key, heads(value, layer.num_kv_heads), visible)) + (x if layer.residual else 0)
    actual = layer(x, context, mask, rotary)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    leaves = (x, context, *layer.parameters())
    upstream = torch.randn_like(actual)
    gradients = (torch.autograd.grad(out, leaves, upstream) for out in (actual, expected))
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("options", [{"causal": True}, {"qk_norm": "rms", "norm": "rms"}, {"qk_norm": "layer", "bias": False}])
def test_self_attention_as_written(options: dict[str, Any], rotates: bool) -> None:
    layer = perturbed(SelfAttention(D, H, **options)).double()
    x, rotary = sequence(N, 1), Rotary(*rotary_tables(N, 4)) if rotates else None
    query, key, value = (heads(part, H) for part in layer.qkv_proj(normed(x, layer.norm)).chunk(3, -1))
    query, key = turned(normed(query, layer.norm_query), rotary), turned(normed(key, layer.norm_key), rotary)
    visible = torch.ones(N, N, dtype=torch.bool).tril(0 if layer.causal else N)
    expected = x + layer.out_proj(attended(query, key, value, visible))
    actual = layer(x, None, rotary)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    leaves, upstream = (x, *layer.parameters()), torch.randn_like(actual)
    gradients = (torch.autograd.grad(out, leaves, upstream) for out in (actual, expected))
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_without_context_a_sequence_reads_itself() -> None:
    layer, x = perturbed(JointAttention(D, H, causal=True)).double(), sequence(N, 1)
    own = layer.norm(x)
    key, value = (heads(part, H) for part in layer.kv_proj(own).chunk(2, -1))
    query = heads(layer.q_proj(own), H)
    expected = x + layer.out_proj(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, x[:, :0]), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_a_sequence_reads_a_context_that_holds_it(masked: bool, causal: bool) -> None:
    """Without keys of its own: causal queries stand beside the last N tokens of the context, not after it."""
    layer = perturbed(JointAttention(D, H, causal=causal, own_keys=False, bias=True)).double()
    x, context = sequence(N, 1), sequence(M, 2)
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    rotary = Rotary(*rotary_tables(M, 4))
    query = turned(heads(layer.q_proj(normed(x, layer.norm)), H), rotary)
    key, value = layer.kv_proj(normed(context, layer.norm_context)).chunk(2, -1)
    visible = torch.ones(B, 1, N, M, dtype=torch.bool)
    if causal:
        visible = visible & torch.ones(N, M, dtype=torch.bool).tril(M - N)
    if mask is not None:
        visible = visible & mask[:, None, None]
    expected = x + layer.out_proj(attended(query, turned(heads(key, H), rotary), heads(value, H), visible))
    actual = layer(x, context, mask, rotary)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    leaves, upstream = (x, context, *layer.parameters()), torch.randn_like(actual)
    gradients = (torch.autograd.grad(out, leaves, upstream) for out in (actual, expected))
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["joint", "self", "feed-forward", "hidden"])
def test_dropout_of_results_and_of_the_hidden_layer(kind: str) -> None:
    """Drawn as torch draws it, before the residual, and in training alone."""
    x = sequence(N, 1)
    build: dict[str, Any] = {
        "joint": lambda: JointAttention(D, H, out_dropout=0.4), "self": lambda: SelfAttention(D, H, out_dropout=0.4),
        "feed-forward": lambda: FeedForward(D, 2, dropout=0.4), "hidden": lambda: FeedForward(D, 2, hidden_dropout=0.4),
    }  # fmt: skip
    layer = perturbed(build[kind]()).double()
    run = (lambda: layer(x, x)) if kind == "joint" else (lambda: layer(x))
    layer.eval()
    whole = run() - x
    layer.train()
    torch.manual_seed(5)
    actual = run() - x
    torch.manual_seed(5)
    if kind == "hidden":
        hidden = F.gelu(layer.up_proj(normed(x, layer.norm)))
        torch.testing.assert_close(actual, layer.down_proj(F.dropout(hidden, 0.4)))
    else:
        torch.testing.assert_close(actual, F.dropout(whole, 0.4))
    assert not torch.allclose(actual, whole)


@pytest.mark.parametrize("own_keys", [True, False])
def test_flops_of_keys_of_its_own(own_keys: bool) -> None:
    layer = JointAttention(D, H, own_keys=own_keys)
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        layer(torch.randn(B, N, D), torch.randn(B, M, D))
    assert counter.get_total_flops() == layer.flops(B, N, M)


def test_flops() -> None:
    layer = JointAttention(D, H, num_kv_heads=2)
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        layer(torch.randn(B, N, D), torch.randn(B, M, D))
    assert counter.get_total_flops() == layer.flops(B, N, M)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: JointAttention(D, 4, num_kv_heads=3), "num_kv_heads must divide num_heads=4, got 3"),
        (lambda: JointAttention(D, 5), "dim must be a multiple of num_heads=5 unless head_dim is given, got 24"),
        (lambda: JointAttention(D, 4)(torch.randn(B, N, D), torch.randn(B, M, 3)), r"context must be \[B, M, D\] with D=24"),
        (
            lambda: JointAttention(D, 4)(torch.randn(B, N, D), torch.randn(B, M, D), torch.ones(B, N, dtype=torch.bool)),
            r"context_mask must be \[B, M\] with B=2, M=9, got \(2, 5\)",
        ),
        (
            lambda: JointAttention(D, 4)(torch.randn(B, N, D), torch.randn(B, M, D), None, Rotary(*rotary_tables(M, 4))),
            "rotary must hold the positions of M \\+ N=14 tokens, got 9",
        ),
        (
            lambda: JointAttention(D, 4, own_keys=False)(torch.randn(B, N, D), torch.randn(B, N - 1, D)),
            "context must hold the sequence's N=5 tokens without own_keys, got M=4",
        ),
        (
            lambda: JointAttention(D, 4, own_keys=False)(
                torch.randn(B, N, D), torch.randn(B, M, D), None, Rotary(*rotary_tables(M + N, 4))
            ),
            "rotary must hold the positions of M=9 tokens, got 14",
        ),
        (lambda: JointAttention(D, 4, out_dropout=1.0), "out_dropout must be in"),
        (lambda: SelfAttention(D, 4, out_dropout=-0.1), "out_dropout must be in"),
        (lambda: FeedForward(D, hidden_dropout=1.0), "hidden_dropout must be in"),
        (
            lambda: SelfAttention(D, 4)(torch.randn(B, N, D), None, Rotary(*rotary_tables(N + 1, 4))),
            "rotary must hold the positions of N=5 tokens, got 6",
        ),
    ],
)
def test_wrong_use_is_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
