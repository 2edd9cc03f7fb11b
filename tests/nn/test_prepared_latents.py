"""Latents that OutputCrossAttention.prepare made ready for queries of many calls: the same results, made once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import perceiver_kernels
from perceiver_kernels.functional import output_attention
from perceiver_kernels.nn import OutputBlock, OutputCrossAttention
from perceiver_kernels.nn.checkpointing import run_block
from tests.modules import assert_same, randomised, result_and_gradients
from tests.nn.test_attention import METHODS
from tests.nn.test_output_attention import ONE_HEAD, SWITCHES, B, C, D, N, O, masks_of, tensors

QK_NORM: dict[str, Any] = {"qk_norm": "layer", "num_heads": 2}
CASES = [(name, "absorbed") for name in ONE_HEAD] + [(name, "projected") for name in SWITCHES]


def in_parts(
    module: OutputCrossAttention, queries: Tensor, latents: Tensor, query_mask: Tensor | None = None, **masks: Any
) -> Tensor:
    """The layer, 16 queries at a time."""
    prepared = module.prepare(latents, **masks)
    seen = [None] * 3 if query_mask is None else query_mask.split(16, 1)
    return torch.cat(
        [module(part, prepared, query_mask=rows) for part, rows in zip(queries.split(16, 1), seen, strict=True)], 1
    )


def assert_whole(module: OutputCrossAttention, **masks: Any) -> None:
    leaves = tensors(torch.float64)
    actual = result_and_gradients(lambda y, z: in_parts(module, y, z, **masks), module, *leaves)
    expected = result_and_gradients(lambda y, z: module(y, z, **masks), module, *leaves)
    # A bias of all keys moves no softmax: rounding is all that its gradient has.
    for gradients in (actual, expected):
        if "norm_key.bias" in gradients:
            assert gradients.pop("norm_key.bias").abs().max() < 1e-12
    assert_same(actual, expected)


@pytest.mark.parametrize(("switch", "method"), CASES)
def test_queries_in_parts_are_the_whole(switch: str, method: str) -> None:
    assert_whole(randomised(OutputCrossAttention(C, D, method=method, dtype=torch.float64, **SWITCHES[switch])))


@pytest.mark.parametrize("kind", ["key_mask", "lengths", "query_mask", "both"])
@pytest.mark.parametrize("options", [*({"method": method} for method in METHODS), QK_NORM], ids=str)
def test_masks(options: dict[str, Any], kind: str) -> None:
    assert_whole(randomised(OutputCrossAttention(C, D, dtype=torch.float64, **options)), **masks_of(kind))


@pytest.mark.parametrize("qk_norm", ["layer", "rms"])
def test_norms_of_queries_and_keys(qk_norm: Any) -> None:
    assert_whole(randomised(OutputCrossAttention(C, D, num_heads=3, qk_norm=qk_norm, residual=True, dtype=torch.float64)))


@pytest.mark.parametrize(("method", "made"), [("absorbed", "absorb_keys"), ("projected", "fold_norm")])
def test_what_is_prepared_is_made_once(method: Any, made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = randomised(OutputCrossAttention(C, D, method=method)), []
    original = getattr(output_attention, made)
    monkeypatch.setattr(output_attention, made, lambda *a: calls.append(1) or original(*a))
    projected = []
    for projection in (module.norm_latents, module.k_proj, module.v_proj):
        projection.register_forward_hook(lambda *_: projected.append(1))
    queries, latents = tensors()
    with torch.no_grad():
        prepared = module.prepare(latents)
        first = module(queries, prepared)
        done = len(projected)
        assert torch.equal(module(queries, prepared), first)
    assert len(calls) == 1 and len(projected) == done
    # With gradients it is made anew.
    module(queries, prepared).sum().backward()
    assert len(calls) == 2 and module.q_proj.weight.grad.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_odd_widths_in_every_dtype(dtype: torch.dtype, method: Any) -> None:
    """Flow's widths, whose weights are widened with zeros on a GPU: the same kernels, and the same bits."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = randomised(OutputCrossAttention(322, 96, qk_channels=51, v_channels=35, method=method)).to(device, dtype)
    queries, latents = (leaf.detach().to(device) for leaf in tensors(dtype, (B, 300, 322), (B, 64, 96)))
    with torch.no_grad():
        assert torch.equal(module(queries, module.prepare(latents)), module(queries, latents))


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: Any) -> None:
    module = randomised(OutputCrossAttention(C, D, method=method))
    queries, latents = tensors()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(queries, module.prepare(latents)), module(queries, latents))


@pytest.mark.parametrize("method", METHODS)
def test_compiles_as_one_graph(method: Any) -> None:
    torch._dynamo.reset()
    module = randomised(OutputCrossAttention(C, D, method=method))
    leaves = tensors()
    compiled = torch.compile(lambda y, z: in_parts(module, y, z), backend="aot_eager", fullgraph=True)
    actual = result_and_gradients(compiled, module, *leaves)
    assert_same(actual, result_and_gradients(module, module, *leaves))


def test_one_gradient_from_many_calls() -> None:
    """A backward for every part, as memory may want it, needs the graph that the parts share kept."""
    module = randomised(OutputCrossAttention(C, D, dtype=torch.float64))
    queries, latents = tensors(torch.float64)
    module(queries, latents).square().sum().backward()
    expected = latents.grad
    latents.grad = None
    prepared = module.prepare(latents)
    for part in queries.split(16, 1):
        module(part, prepared).square().sum().backward(retain_graph=True)
    torch.testing.assert_close(latents.grad, expected)


def test_parts_may_be_checkpointed() -> None:
    """Computed again from their arguments, of which the prepared latents are one."""
    module = randomised(OutputCrossAttention(C, D, method="absorbed", dtype=torch.float64))
    leaves = tensors(torch.float64)

    def checkpointed(queries: Tensor, latents: Tensor) -> Tensor:
        prepared = module.prepare(latents)
        parts = queries.split(16, 1)
        return torch.cat([run_block(module, part, prepared, checkpointing=True) for part in parts], 1)

    actual = result_and_gradients(checkpointed, module, *leaves)
    assert_same(actual, result_and_gradients(module, module, *leaves))


def test_a_block_takes_them() -> None:
    block = randomised(OutputBlock(C, D))
    queries, latents = tensors()
    with perceiver_kernels.use_backend("reference"):
        assert torch.equal(block(queries, block.attention.prepare(latents)), block(queries, latents))


QUERIES, LATENTS = torch.zeros(B, O, C), torch.zeros(B, N, D)
KEYS = torch.ones(B, N, dtype=torch.bool)


def test_wrong_uses_are_named() -> None:
    layer, other = OutputCrossAttention(C, D), OutputCrossAttention(C, D)
    with pytest.raises(ValueError, match="latents must have been prepared by this layer"):
        layer(QUERIES, other.prepare(LATENTS))
    for masks in ({"key_mask": KEYS}, {"lengths": torch.ones(B, dtype=torch.int32)}):
        with pytest.raises(ValueError, match="key_mask and lengths must be given to prepare"):
            layer(QUERIES, layer.prepare(LATENTS), **masks)
    with pytest.raises(ValueError, match=r"latents must be \[B, N, D\] with D=24"):
        layer.prepare(LATENTS[..., 1:])
    with pytest.raises(ValueError, match=r"queries must be \[B, O, C\] with B=2 or 1"):
        layer(QUERIES[:1].expand(3, O, C), layer.prepare(LATENTS))
