"""transformers' decoder cross-attention (PerceiverAttention) and nn.OutputCrossAttention agree with the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels.nn import OutputCrossAttention
from perceiver_kernels.testing.accuracy import assert_as_accurate

pytest.importorskip("transformers", minversion="5.0")
modeling = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")

B, O, N, D, C = 2, 200, 24, 64, 83
FORMS = [(1, "absorbed"), (1, "projected"), (4, "projected")]


def their_layer(heads: int, residual: bool = False) -> nn.Module:
    """As PerceiverBasicDecoder makes it, with random weights, no bias zero and no LayerNorm weight one."""
    torch.manual_seed(0)
    config = modeling.PerceiverConfig(d_latents=D, cross_attention_shape_for_attention="kv")
    layer = modeling.PerceiverAttention(
        config, is_cross_attention=True, num_heads=heads, q_dim=C, kv_dim=D, use_query_residual=residual
    ).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return layer


def their_modules(theirs: Any) -> dict[str, nn.Module]:
    """Our names for their modules."""
    return {
        "norm_queries": theirs.self.layernorm1, "norm_latents": theirs.self.layernorm2, "q_proj": theirs.self.query,
        "k_proj": theirs.self.key, "v_proj": theirs.self.value, "out_proj": theirs.output.dense,
    }  # fmt: skip


def our_layer(theirs: Any, heads: int, **options: Any) -> OutputCrossAttention:
    ours = OutputCrossAttention(C, D, num_heads=heads, dtype=theirs.self.query.weight.dtype, **options)
    named = their_modules(theirs).items()
    ours.load_state_dict({f"{name}.{kind}": tensor for name, m in named for kind, tensor in m.state_dict().items()})
    return ours


def run(layer: Any, modules: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and every gradient, under our names, for one draw of queries, latents and upstream gradient."""
    generator = torch.Generator().manual_seed(1)
    queries, latents, upstream = (torch.randn(B, *size, generator=generator) for size in ((O, C), (N, D), (O, C)))
    leaves = {"queries": queries.to(dtype).requires_grad_(), "latents": latents.to(dtype).requires_grad_()}
    leaves |= {f"{name}.{kind}": p for name, module in modules.items() for kind, p in module.named_parameters()}
    out = layer(leaves["queries"], leaves["latents"])
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream.to(dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def run_theirs(theirs: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    theirs = copy.deepcopy(theirs).to(dtype)
    return run(lambda y, z: theirs(y, inputs=z)[0], their_modules(theirs), dtype)


def run_ours(ours: OutputCrossAttention, dtype: torch.dtype) -> dict[str, Tensor]:
    return run(ours, dict(ours.named_children()), dtype)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("heads", "method"), FORMS)
def test_is_the_same_function(heads: int, method: str, residual: bool) -> None:
    """fp64: output and gradients of queries, latents and all twelve parameters agree to rounding."""
    theirs = their_layer(heads, residual).double()
    expected = run_theirs(theirs, torch.float64)
    actual = run_ours(our_layer(theirs, heads, method=method, residual=residual), torch.float64)
    assert actual.keys() == expected.keys() and len(actual) == 15
    for name in actual.keys() - {"k_proj.bias"}:
        assert (actual[name] - expected[name]).norm() < 1000 * torch.finfo(torch.float64).eps * expected[name].norm(), name
    # The key bias does not move the softmax; its gradient is rounding in theirs.
    assert not actual["k_proj.bias"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "method"), FORMS)
def test_is_as_accurate_as_theirs(heads: int, method: str, dtype: torch.dtype) -> None:
    """Error against fp64 at most twice that of transformers in the same dtype, for the output and every gradient."""
    theirs = their_layer(heads).to(dtype)
    oracle, eager = run_theirs(theirs, torch.float64), run_theirs(theirs, dtype)
    actual = run_ours(our_layer(theirs, heads, method=method), dtype)
    for name in actual.keys() - {"k_proj.bias"}:
        assert_as_accurate(actual[name], eager[name], oracle[name], name)


@pytest.mark.parametrize(("heads", "method"), FORMS)
def test_mask_of_latents_gives_the_same(heads: int, method: str) -> None:
    """transformers adds finfo.min to the scores of hidden latents."""
    theirs = their_layer(heads)
    generator = torch.Generator().manual_seed(3)
    queries, latents = torch.randn(B, O, C, generator=generator), torch.randn(B, N, D, generator=generator)
    visible = torch.rand(B, N, generator=generator) < 0.5
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None, None, :]
    expected = theirs(queries, inputs=latents, inputs_mask=additive)[0]
    torch.testing.assert_close(our_layer(theirs, heads, method=method)(queries, latents, key_mask=visible), expected)
