"""Rotary embedding as models use it: beside transformers' own, in scores that see distances alone, over two segments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import perceiver_kernels as pk

close = torch.testing.assert_close
B, H, L, D = 2, 3, 19, 24
FORMS = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def gradients(out: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return out.detach(), torch.autograd.grad(out, x, randn(*out.shape, seed=7))[0]


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_half_split_equals_transformers_llama(base: float) -> None:
    """Queries and keys, tables from positions [B, L] that restart, values and gradients."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=H * D, num_attention_heads=H, head_dim=D, rope_parameters={"rope_type": "default", "rope_theta": base}
    )
    x, k = randn(B, H, L, D).requires_grad_(), randn(B, H, L, D, seed=1).requires_grad_()
    places = torch.stack([torch.arange(L), torch.arange(L) + 1000])
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, places)
    theirs = llama.apply_rotary_pos_emb(x, k, cos, sin)
    tables = pk.rotary_tables(places, D, base=base)
    for expected, given in zip(theirs, (x, k), strict=True):
        # Their angles are fp32: off by 6e-5 at position 1000.
        for ours, other in zip(gradients(pk.rotary_embedding(given, *tables), given), gradients(expected, given), strict=True):
            close(ours, other, rtol=1e-4, atol=5e-4)
        # From their own tables, of which both halves are alike, the results differ by rounding alone.
        close(pk.rotary_embedding(given, cos[..., : D // 2], sin[..., : D // 2]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [D, 8])
def test_interleaved_equals_transformers_gpt_j(width: int) -> None:
    """Their tensors are [B, L, H, D]; where rotary_dim is given, the other channels pass."""
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x = randn(B, H, L, D).requires_grad_()
    sin, cos = gptj.create_sinusoidal_positions(L, width)[None].chunk(2, -1)
    rows = x.transpose(1, 2)
    turned = gptj.apply_rotary_pos_emb(rows[..., :width], sin, cos)
    expected = gradients(torch.cat([turned, rows[..., width:]], -1).transpose(1, 2), x)
    found = gradients(pk.rotary_embedding(x, *pk.rotary_tables(L, width), interleaved=True), x)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, rtol=1e-5, atol=1e-5)


@FORMS
@pytest.mark.parametrize("width", [D, 10])
def test_scores_depend_on_distances_alone(width: int, interleaved: bool) -> None:
    """q_i . k_j for positions moved by any common amount, whole or not; in fp64 but for the tables."""
    q, k = randn(1, H, L, D, dtype=torch.float64), randn(1, H, L, D, seed=1, dtype=torch.float64)
    places = torch.arange(L, dtype=torch.float64)

    def scores(shift: float) -> Tensor:
        tables = pk.rotary_tables(places + shift, width)
        q_turned, k_turned = (pk.rotary_embedding(x, *tables, interleaved=interleaved) for x in (q, k))
        return q_turned @ k_turned.mT

    for shift in (1.0, 0.375, -17.0, 1_000_000.0):
        close(scores(shift), scores(0.0), rtol=1e-5, atol=1e-5)
    assert (scores(0.0) - q @ k.mT).abs().max() > 0.1


@FORMS
def test_two_segments_as_in_perceiver_ar(interleaved: bool) -> None:
    """A prefix and latents, turned apart by their own positions, then read causally: as one sequence that is turned whole."""
    prefix, width = 12, 12
    latents = L - prefix
    x, q, v = randn(B, H, L, D), randn(B, H, latents, D, seed=1), randn(B, H, L, D, seed=2)
    options: dict[str, Any] = {"is_causal": True, "causal_alignment": "bottom_right"}

    def attend(apart: bool) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (q, x, v)]
        query, key, value = leaves
        cos, sin = pk.rotary_tables(L, width)

        def turn(part: Tensor, start: int, stop: int) -> Tensor:
            return pk.rotary_embedding(part, cos[start:stop], sin[start:stop], interleaved=interleaved)

        query = turn(query, prefix, L)
        if apart:
            keys = turn(key[:, :, :prefix], 0, prefix), turn(key[:, :, prefix:], prefix, L)
            out = pk.attention(query, keys, (value[:, :, :prefix], value[:, :, prefix:]), **options)
        else:
            out = pk.attention(query, turn(key, 0, L), value, **options)
        return out.detach(), *torch.autograd.grad(out, leaves, randn(*out.shape, seed=3))

    for two, one in zip(attend(True), attend(False), strict=True):
        close(two, one)
