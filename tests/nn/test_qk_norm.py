"""Norms of queries and keys in the cross-attentions, against the layer written out: values, every gradient, masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import functional
from perceiver_kernels.inputs import InputArray
from perceiver_kernels.nn import CrossAttention, OutputCrossAttention
from tests.modules import randomised, result_and_gradients

B, N, M, D, C = 2, 5, 17, 24, 10

LAYERS: dict[str, Any] = {
    "input": lambda **o: CrossAttention(D, C, num_heads=3, qk_channels=12, v_channels=18, **o),
    "output": lambda **o: OutputCrossAttention(D, C, num_heads=3, qk_channels=12, v_channels=18, residual=True, **o),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "layer": {"qk_norm": "layer"},
    "rms": {"qk_norm": "rms", "eps": 1e-3},
    "bare": {"qk_norm": "layer", "bias": False, "out_bias": False},
}


def norm(x: Tensor, layer: nn.Module) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if hasattr(layer, "bias") else x
    scaled = centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight
    return scaled + layer.bias if hasattr(layer, "bias") else scaled


def written_out(layer: Any, y: Tensor, x: Tensor, visible: Tensor | None) -> Tensor:
    names = ("norm_latents", "norm_inputs") if isinstance(layer, CrossAttention) else ("norm_queries", "norm_latents")
    first, second = (getattr(layer, name) for name in names)
    q, k, v = layer.q_proj(norm(y, first)), layer.k_proj(norm(x, second)), layer.v_proj(norm(x, second))
    outs = []
    for q_h, k_h, v_h in zip(*(t.chunk(3, -1) for t in (q, k, v)), strict=True):
        weights = (norm(q_h, layer.norm_query) @ norm(k_h, layer.norm_key).mT / 2.0).exp()
        weights = weights if visible is None else weights * visible[:, None]
        total = weights.sum(-1, keepdim=True)
        outs.append(weights @ v_h / total.where(total > 0, 1))
    return y + layer.out_proj(torch.cat(outs, -1))


def leaves(batch: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y, x = (torch.randn(size, dtype=torch.float64, generator=generator) for size in ((batch, N, D), (B, M, C)))
    return y.requires_grad_(), x.requires_grad_()


VISIBILITY: dict[str, dict[str, Tensor]] = {
    "all": {},
    "mask": {"key_mask": torch.rand(B, M, generator=torch.Generator().manual_seed(3)) < 0.6},
    "lengths": {"lengths": torch.tensor([M - 4, 0], dtype=torch.int32)},
}


@pytest.mark.parametrize("visibility", VISIBILITY)
@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_as_written(kind: str, options: str, batch: int, visibility: str) -> None:
    layer = randomised(LAYERS[kind](dtype=torch.float64, **OPTIONS[options]))
    given = VISIBILITY[visibility]
    visible = given.get("key_mask")
    if "lengths" in given:
        visible = torch.arange(M) < given["lengths"][:, None]
    actual = result_and_gradients(lambda y, x: layer(y, x, **given), layer, *leaves(batch))
    expected = result_and_gradients(lambda y, x: written_out(layer, y, x, visible), layer, *leaves(batch))
    for name, tensor in expected.items():
        # A bias of the keys' norm shifts all scores of a query alike: its gradient is rounding of what the weight's sums.
        scale = expected[name.replace("norm_key.bias", "norm_key.weight")].abs().max().item()
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-12 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", LAYERS)
def test_what_hidden_keys_and_queries_hold_is_never_used(kind: str) -> None:
    layer, (y, x) = randomised(LAYERS[kind](dtype=torch.float64, qk_norm="layer")), leaves()
    mask, x = VISIBILITY["mask"]["key_mask"], x.detach()
    poisoned = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    actual, expected = (result_and_gradients(lambda y, x: layer(y, x, mask), layer, y, t) for t in (
        poisoned, x.masked_fill(~mask[..., None], 0.0).requires_grad_(),
    ))  # fmt: skip
    assert all(torch.equal(actual[name], expected[name]) and actual[name].isfinite().all() for name in expected)
    if kind == "output":
        layer.residual = False
        query_mask = torch.tensor([[True] * N, [True, False, True, False, False]])
        y = y.detach().masked_fill(~query_mask[..., None], torch.nan).requires_grad_()
        found = result_and_gradients(lambda y, x: layer(y, x, query_mask=query_mask), layer, y, x.requires_grad_())
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert torch.equal(found["out"][~query_mask], layer.out_proj.bias.expand(3, -1))


@pytest.mark.parametrize("kind", LAYERS)
def test_compiles_without_a_graph_break(kind: str) -> None:
    layer, (y, x) = randomised(LAYERS[kind](dtype=torch.float64, qk_norm="rms")), leaves()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(y, x), layer(y, x))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: LAYERS["input"](qk_norm="batch"), ValueError, "norm must be one of 'layer', 'rms', got 'batch'"),
        (lambda: LAYERS["input"](qk_norm="rms", chunk_size=4), ValueError, "qk_norm must be None with chunk_size or .*'rms'"),
        (
            lambda: OutputCrossAttention(D, C, qk_norm="rms", method="absorbed"),
            ValueError,
            "qk_norm must be None with method='absorbed', got 'rms'",
        ),
        (
            lambda: LAYERS["input"](qk_norm="rms")(torch.randn(B, N, D), InputArray.tokens(torch.randn(B, M, C))),
            TypeError,
            "inputs must be a torch.Tensor with qk_norm, got InputArray",
        ),
        (
            lambda: OutputCrossAttention(D, C, qk_norm="rms").double()(functional.pack_inputs(leaves()[0]), leaves()[1]),
            TypeError,
            "queries must be a torch.Tensor with qk_norm, got PackedInputs",
        ),
        (
            lambda: LAYERS["input"](qk_norm="rms")(torch.randn(B, N, D), torch.randn(B, M, C), torch.ones(B, N) > 0),
            ValueError,
            r"key_mask must be \[B, M\] with B=2, M=17, got \(2, 5\)",
        ),
    ],
)
def test_wrong_use_is_named(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
