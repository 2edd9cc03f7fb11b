"""Keys and values kept between calls: attention layers given a sequence piece by piece compute what they do at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import rotary_tables
from perceiver_kernels.nn import JointAttention, KeyValueCache, LatentBlock, Rotary, SelfAttention
from tests.modules import perturbed

B, M, N, D, H = 2, 7, 6, 16, 4


def sequence(length: int) -> Tensor:
    return torch.randn(B, length, D, dtype=torch.float64)


def angles(start: int, stop: int) -> Rotary:
    return Rotary(*rotary_tables(torch.arange(start, stop), 4))


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1, 1), (4, 2), (2, 1, 3)])
@pytest.mark.parametrize("layer_class", [SelfAttention, LatentBlock])
def test_a_causal_sequence_in_pieces(layer_class: Any, pieces: tuple[int, ...]) -> None:
    layer, x, cache = perturbed(layer_class(D, H, causal=True)).double(), sequence(N), KeyValueCache(N)
    outs, start = [], 0
    for size in pieces:
        stop = start + size
        outs.append(layer(x[:, start:stop], None, angles(start, stop), cache))
        start = stop
    torch.testing.assert_close(torch.cat(outs, 1), layer(x, None, angles(0, N)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1, 1), (4, 2)])
@pytest.mark.parametrize("own_keys", [True, False])
def test_a_context_is_read_once(own_keys: bool, pieces: tuple[int, ...]) -> None:
    """The first piece brings the context; without keys of its own, each piece brings its own tokens' other form."""
    layer = perturbed(JointAttention(D, H, causal=True, own_keys=own_keys, qk_norm="rms")).double()
    x, context, cache = sequence(N), sequence(M if own_keys else M + N), KeyValueCache(M + N)
    outs, start = [], 0
    for size in pieces:
        stop = start + size
        first, last = (0 if start == 0 else M + start), M + stop
        read = context[:, first:last] if not own_keys or start == 0 else context[:, :0]
        outs.append(layer(x[:, start:stop], read, None, angles(first, last), cache))
        start = stop
    torch.testing.assert_close(torch.cat(outs, 1), layer(x, context, None, angles(0, M + N)), rtol=1e-12, atol=1e-12)


def gradients(layer: nn.Module, *outs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(sum(out.square().sum() for out in outs), list(layer.parameters()), allow_unused=True))


@pytest.mark.parametrize("own_keys", [True, False])
def test_the_first_piece_has_all_its_gradients(own_keys: bool) -> None:
    layer = perturbed(JointAttention(D, H, causal=True, own_keys=own_keys, qk_norm="rms")).double()
    x, context = sequence(N), sequence(M)
    expected = gradients(layer, layer(x, context))
    for a, e in zip(gradients(layer, layer(x, context, cache=KeyValueCache(M + N))), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_no_gradient_passes_to_earlier_pieces() -> None:
    """Those of a later piece are as if the earlier tokens' keys and values were constants."""
    layer, cache, x = perturbed(SelfAttention(D, H, causal=True)).double(), KeyValueCache(N), sequence(N).requires_grad_()
    outs = [layer(piece, None, None, cache) for piece in x.split((4, 2), 1)]
    (gradient,) = torch.autograd.grad(outs[1].square().sum(), x, retain_graph=True)
    assert not gradient[:, :4].any() and gradient[:, 4:].all()
    # The first piece's own is not disturbed by what came after it.
    for a, e in zip(gradients(layer, outs[0]), gradients(layer, layer(x[:, :4])), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_a_cleared_cache_starts_anew() -> None:
    layer, x, cache = perturbed(SelfAttention(D, H, causal=True)).double(), sequence(N), KeyValueCache(N)
    first = layer(x, None, None, cache).clone()
    cache.clear()
    assert cache.length == 0
    assert torch.equal(layer(x, None, None, cache), first)


def test_wrong_use_is_named() -> None:
    key = torch.randn(B, H, 3, 4)
    cache = KeyValueCache(4)
    cache.append(key, key)
    with pytest.raises(ValueError, match="cache must hold at most capacity=4 tokens, got 3 \\+ 3"):
        cache.append(key, key)
    with pytest.raises(ValueError, match=r"value must be \[B, H, n, d\] as before, \(2, 4, 1, 4\), got \(2, 4, 1, 3\)"):
        cache.append(key[:, :, :1], key[:, :, :1, :3])
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        KeyValueCache(0)
    x = torch.randn(B, N, D)
    with pytest.raises(ValueError, match="cache needs causal=True and no key_mask, got causal=False"):
        SelfAttention(D, H)(x, None, None, KeyValueCache(N))
    with pytest.raises(ValueError, match="cache needs causal=True and no key_mask"):
        SelfAttention(D, H, causal=True)(x, torch.ones(B, N, dtype=torch.bool), None, KeyValueCache(N))
    with pytest.raises(ValueError, match="cache needs causal=True and no context_mask, got causal=False"):
        JointAttention(D, H)(x, x, None, None, KeyValueCache(2 * N))
