"""Batches of no sequence: results of their shapes, gradients of zeros, whatever the heads, the form and the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import use_backend
from perceiver_kernels.nn import (
    ISAB,
    MAB,
    PMA,
    SAB,
    CrossAttention,
    LinformerAttention,
    MultiheadAttention,
    OutputCrossAttention,
    SelfAttention,
)

N, M, C, D = 5, 40, 24, 32


def none(rows: int, channels: int) -> Tensor:
    return torch.zeros(0, rows, channels, requires_grad=True)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    **{
        f"cross, {heads} heads, {options}": (
            lambda heads=heads, options=options: CrossAttention(D, C, num_heads=heads, **options), (none(N, D), none(M, C))
        )
        for heads in (1, 2, 4)
        for options in ({}, {"method": "absorbed"}, {"method": "projected"}, {"chunk_size": 16}, {"dropout": 0.2})
    },
    "shared latents": (lambda: CrossAttention(D, C), (torch.zeros(1, N, D), none(M, C))),
    "masked": (lambda: CrossAttention(D, C, num_heads=2), (none(N, D), none(M, C), torch.ones(0, M, dtype=torch.bool))),
    "self": (lambda: SelfAttention(D, 4), (none(N, D),)),
    "output, 1 head": (lambda: OutputCrossAttention(D, D), (none(7, D), none(N, D))),
    "output, 4 heads": (lambda: OutputCrossAttention(D, D, num_heads=4), (none(7, D), none(N, D))),
    "shared queries": (lambda: OutputCrossAttention(D, D), (torch.zeros(1, 7, D), none(N, D))),
    **{f"mab, {heads} heads": (lambda heads=heads: MAB(D, C, D, heads), (none(N, D), none(M, C))) for heads in (1, 2, 4)},
    "sab": (lambda: SAB(C, D), (none(M, C),)),
    "isab": (lambda: ISAB(C, D, 4), (none(M, C),)),
    "pma": (lambda: PMA(D, 2), (none(M, D),)),
    "linformer": (lambda: LinformerAttention(D, M, 3, 2), (none(M, D),)),
}  # fmt: skip


def assert_empty(layer: nn.Module, result: Tensor, given: tuple[Any, ...]) -> None:
    assert result.shape[0] == 0
    result.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in layer.parameters())
    assert all(each.grad is not None for each in given if each.requires_grad)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", list(LAYERS))
def test_layers(name: str, backend: str) -> None:
    build, given = LAYERS[name]
    layer = build().train()
    with use_backend(backend, "reference"):  # sdpa does not serve dropout and lse of absorbed attention
        assert_empty(layer, layer(*given), given)


def test_multihead_attention() -> None:
    layer, x = MultiheadAttention(D, 4, batch_first=True), none(M, D)
    assert_empty(layer, layer(none(N, D), x, x, need_weights=False)[0], (x,))
