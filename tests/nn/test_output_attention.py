"""nn.OutputCrossAttention against the textbook, in every configuration, forward and every gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import perceiver_kernels
from perceiver_kernels import functional, reference
from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.nn import OutputCrossAttention
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.modules import assert_same, randomised, result_and_gradients
from tests.nn.test_attention import METHODS

B, O, N, D, C = 2, 37, 5, 24, 21

SWITCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "no query norm": {"norm_queries": False},
    "no latent norm": {"norm_latents": False},
    "no biases": {"bias": False, "out_bias": False},
    "no output bias": {"out_bias": False},
    "residual": {"residual": True},
    "other width": {"out_channels": 17},
    "several heads": {"num_heads": 3, "qk_channels": 24, "v_channels": 24},
    "heads, d_qk != d_v": {"num_heads": 4, "qk_channels": 12, "v_channels": 28},
    "d_qk != d_v": {"qk_channels": 9, "v_channels": 40},
    "eps": {"eps": 0.1},
    "bare": {"norm_queries": False, "norm_latents": False, "bias": False, "out_bias": False},
}
ONE_HEAD = [name for name, options in SWITCHES.items() if "num_heads" not in options]


def textbook(module: OutputCrossAttention, queries: Tensor, latents: Tensor, **masks: Tensor) -> Tensor:
    """The layer as the paper writes it, queries in full."""
    normed, norm = latents, module.norm_queries
    if module.norm_latents is not None:
        normed = F.layer_norm(latents, latents.shape[-1:], module.norm_latents.weight, module.norm_latents.bias, module.eps)
    key, value = (
        projection(normed).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for projection in (module.k_proj, module.v_proj)
    )
    out = reference.output_cross_attention(
        queries, key, value, module.q_proj.weight, module.out_proj.weight, b_q=module.q_proj.bias, b_o=module.out_proj.bias,
        norm_weight=None if norm is None else norm.weight, norm_bias=None if norm is None else norm.bias,
        normalize=norm is not None, eps=module.eps, **masks,
    )  # fmt: skip
    return queries + out if module.residual else out


def tensors(
    dtype: torch.dtype = torch.float32, queries: tuple[int, ...] = (B, O, C), latents: tuple[int, ...] = (B, N, D)
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = 0.5 + 2.0 * torch.randn(queries, generator=generator)
    z = torch.randn(latents, generator=generator)
    return y.to(dtype).requires_grad_(), z.to(dtype).requires_grad_()


def masks_of(kind: str) -> dict[str, Tensor]:
    keys = torch.tensor([[True, False, True, True, False], [False] * N])
    rows = torch.rand(B, O, generator=torch.Generator().manual_seed(2)) < 0.5
    return {
        "none": {}, "key_mask": {"key_mask": keys}, "lengths": {"lengths": torch.tensor([3, 0], dtype=torch.int32)},
        "query_mask": {"query_mask": rows}, "both": {"key_mask": keys, "query_mask": rows},
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    ("switch", "method"), [(name, "absorbed") for name in ONE_HEAD] + [(name, "projected") for name in SWITCHES]
)
def test_equals_the_textbook(switch: str, method: str) -> None:
    module = randomised(OutputCrossAttention(C, D, method=method, dtype=torch.float64, **SWITCHES[switch]))
    leaves = tensors(torch.float64)
    actual = result_and_gradients(module, module, *leaves)
    assert_same(actual, result_and_gradients(lambda y, z: textbook(module, y, z), module, *leaves))


@pytest.mark.parametrize("kind", ["key_mask", "lengths", "query_mask", "both"])
@pytest.mark.parametrize("method", METHODS)
def test_masks(method: str, kind: str) -> None:
    module = randomised(OutputCrossAttention(C, D, method=method, residual=True, dtype=torch.float64))
    leaves, masks = tensors(torch.float64), masks_of(kind)
    actual = result_and_gradients(lambda y, z: module(y, z, **masks), module, *leaves)
    assert_same(actual, result_and_gradients(lambda y, z: textbook(module, y, z, **masks), module, *leaves))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_queries_of_batch_one_are_shared_over_the_batch(method: str, residual: bool) -> None:
    module = randomised(OutputCrossAttention(C, D, method=method, residual=residual, dtype=torch.float64))
    leaves = tensors(torch.float64, (1, O, C), (4, N, D))
    actual = result_and_gradients(module, module, *leaves)
    assert actual["out"].shape == (4, O, C) and actual["leaf 0"].shape == (1, O, C)
    assert_same(actual, result_and_gradients(lambda y, z: textbook(module, y, z), module, *leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("widths", "method"), [({}, "absorbed"), ({}, "projected"), ({"num_heads": 4, "v_channels": 96}, "projected")]
)
def test_is_as_accurate_as_eager(widths: dict[str, int], method: str, dtype: torch.dtype) -> None:
    """Error against fp64 at most twice that of the textbook in the same dtype."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = randomised(OutputCrossAttention(85, 64, method=method, **widths)).to(device, dtype)
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in tensors(dtype, (2, 300, 85), (2, 64, 64))]
    actual = result_and_gradients(module, module, *leaves)
    eager = result_and_gradients(lambda y, z: textbook(module, y, z), module, *leaves)
    module64, leaves64 = copy.deepcopy(module).double(), [leaf.detach().double().requires_grad_() for leaf in leaves]
    oracle = result_and_gradients(lambda y, z: textbook(module64, y, z), module64, *leaves64)
    # The key bias does not move the softmax: its gradient is rounding alone in the textbook.
    for name in actual.keys() - {"k_proj.bias"}:
        assert_as_accurate(actual[name], eager[name], oracle[name], name)


@pytest.mark.parametrize("method", METHODS)
def test_key_bias_gradient_is_exactly_zero(method: str) -> None:
    module = randomised(OutputCrossAttention(C, D, method=method))
    module(*tensors()).square().sum().backward()
    assert torch.equal(module.k_proj.bias.grad, torch.zeros(D))
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("method", METHODS)
def test_what_hidden_rows_hold_is_never_used(method: str) -> None:
    """NaN in hidden latents and queries changes no result and no gradient, of the weights neither."""
    module, masks = randomised(OutputCrossAttention(C, D, method=method)), masks_of("both")
    queries, latents = (leaf.detach() for leaf in tensors())
    hidden = ~masks["query_mask"][..., None], ~masks["key_mask"][..., None]
    clean, dirty = (
        [leaf.masked_fill(where, value).requires_grad_() for leaf, where in zip((queries, latents), hidden, strict=True)]
        for value in (0.0, float("nan"))
    )
    expected, actual = (result_and_gradients(lambda y, z: module(y, z, **masks), module, *leaves) for leaves in (clean, dirty))
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("method", METHODS)
def test_one_pack_serves_several_layers(method: str) -> None:
    layers = torch.nn.ModuleList(randomised(OutputCrossAttention(C, D, method=method), seed=seed) for seed in (1, 2))

    def packed_once(queries: Tensor, latents: Tensor) -> Tensor:
        packed = functional.pack_inputs(queries, constants=2)
        return layers[0](packed, latents) + layers[1](packed, latents)

    leaves = tensors()
    actual = result_and_gradients(packed_once, layers, *leaves)
    assert_same(actual, result_and_gradients(lambda y, z: layers[0](y, z) + layers[1](y, z), layers, *leaves))


@pytest.mark.parametrize("method", METHODS)
def test_positions_that_are_never_stored_ask(method: str) -> None:
    """Optical flow's decoder: pixels and Fourier features of their grid, joined only where they are packed."""
    images = torch.rand(B, 3, 5, 6, generator=torch.Generator().manual_seed(3))
    array = InputArray.image(images, FourierPositions(4, (5.0, 6.0)))
    whole = array.slice()
    features = reference.fourier_features(whole.positions, 4, (5.0, 6.0)).expand(B, -1, -1)
    module = randomised(OutputCrossAttention(array.channels, D, method=method, out_channels=2))
    _, latents = tensors()
    expected = textbook(module, torch.cat([whole.content, features], -1), latents)
    torch.testing.assert_close(module(array, latents), expected, rtol=1e-4, atol=1e-5)


def test_order_of_the_latents_does_not_matter() -> None:
    module = randomised(OutputCrossAttention(C, D, method="absorbed"))
    queries, latents = tensors()
    torch.testing.assert_close(module(queries, latents.flip(1)), module(queries, latents))


def test_dropout_follows_the_generator_and_rests_in_evaluation() -> None:
    module = randomised(OutputCrossAttention(C, D, dropout=0.5, method="absorbed"))
    queries, latents = tensors()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(module(queries, latents))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    torch.testing.assert_close(module.eval()(queries, latents), textbook(module, queries, latents))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_is_as_accurate_as_the_textbook_under_autocast(method: str) -> None:
    module = randomised(OutputCrossAttention(C, D, method=method))
    queries, latents = tensors(queries=(B, 300, C), latents=(B, 32, D))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, eager = module(queries, latents), textbook(module, queries, latents)
    oracle = textbook(copy.deepcopy(module).double(), queries.double(), latents.double()).detach()
    assert actual.dtype == eager.dtype
    assert_as_accurate(actual, eager, oracle, "out")


@pytest.mark.parametrize("method", METHODS)
def test_compiles_once_for_any_number_of_queries(method: str) -> None:
    """One graph without a break; another length reuses it."""
    torch._dynamo.reset()
    module = randomised(OutputCrossAttention(C, D, method=method))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for length in (O, 50):
        leaves = tensors(queries=(B, length, C))
        torch._dynamo.mark_dynamic(leaves[0], 1)
        actual = result_and_gradients(compiled, module, *leaves)
        assert_same(actual, result_and_gradients(module, module, *leaves))
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_that_run(method: str) -> None:
    """With C a multiple of 16 and no bias of the scores nothing is padded: every matrix product is in the formula."""
    module = OutputCrossAttention(
        32, D, qk_channels=16, v_channels=48, out_channels=7, bias=False, norm_queries=False, method=method
    )
    queries, latents = torch.randn(1, O, 32), torch.randn(3, N, D)
    with torch.no_grad(), perceiver_kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        module(queries, latents)
    assert counter.get_total_flops() == module.flops(3, O, N, query_batch=1, method=method)


def test_state_dict_keys_and_default_widths_are_stable() -> None:
    module = OutputCrossAttention(322, 512)
    assert list(module.state_dict()) == [
        f"{name}.{kind}"
        for name in ("norm_queries", "norm_latents", "q_proj", "k_proj", "v_proj", "out_proj")
        for kind in ("weight", "bias")
    ]
    shapes = {name: tuple(projection.weight.shape) for name, projection in module.named_children() if "proj" in name}
    assert shapes == {"q_proj": (512, 322), "k_proj": (512, 512), "v_proj": (512, 512), "out_proj": (322, 512)}
    bare = OutputCrossAttention(C, D, **SWITCHES["bare"])
    assert list(bare.state_dict()) == [f"{name}_proj.weight" for name in ("q", "k", "v", "out")]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"query_dim": 0}, ValueError, "query_dim must be at least 1, got 0"),
        ({"latent_dim": 24.0, "qk_channels": 8}, TypeError, "latent_dim must be an integer, got 24.0"),
        ({"out_channels": 0}, ValueError, "out_channels must be at least 1, got 0"),
        ({"num_heads": 5}, ValueError, "qk_channels must be a positive multiple of num_heads=5, got 24"),
        ({"residual": True, "out_channels": 7}, ValueError, "out_channels must be query_dim=21 with a residual, got 7"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number, at least 0, got -1.0"),
        ({"method": "fast"}, ValueError, "method must be 'absorbed', 'projected' or None, got 'fast'"),
        ({"num_heads": 2, "method": "absorbed"}, ValueError, "num_heads must be 1 with method='absorbed', got 2"),
    ],
)
def test_wrong_configurations_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OutputCrossAttention(**{"query_dim": C, "latent_dim": D} | options)


QUERIES, LATENTS = torch.zeros(B, O, C), torch.zeros(B, N, D)


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({}, (None, LATENTS), TypeError, "queries must be a Tensor, InputArray or PackedInputs, got NoneType"),
        ({}, (QUERIES[0], LATENTS), ValueError, r"queries must be \[B, O, C\] with C=21, got \(37, 21\)"),
        ({}, (QUERIES[..., 1:], LATENTS), ValueError, "queries must have query_dim=21 channels, .* got 20"),
        ({}, (QUERIES.expand(B, O, C)[:0], LATENTS), ValueError, r"queries must be \[B, O, C\] with B=2 or 1"),
        ({}, (QUERIES, LATENTS[..., 1:]), ValueError, r"latents must be \[B, N, D\] with D=24, got \(2, 5, 23\)"),
        ({}, (QUERIES, LATENTS.half()), TypeError, "latents must have the parameters' dtype torch.float32 .*float16"),
        ({}, (functional.pack_inputs(QUERIES, normalize=False), LATENTS), ValueError, "packed with normalize=True"),
        ({"residual": True}, (InputArray.tokens(QUERIES), LATENTS), TypeError, "queries must be .* with a residual"),
        ({"method": "absorbed"}, (functional.pack_inputs(QUERIES), LATENTS), ValueError, "constants=1"),
        ({}, (QUERIES, LATENTS, None, torch.ones(B, O)), TypeError, "query_mask must be torch.bool"),
        ({}, (QUERIES, LATENTS, torch.ones(B, N)), TypeError, "key_mask must be torch.bool"),
        ({}, (QUERIES, LATENTS, torch.ones(B, O, dtype=torch.bool)), ValueError, "key_mask must be"),
    ],
)
def test_wrong_inputs_are_named(
    options: dict[str, Any], arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        OutputCrossAttention(C, D, **options)(*arguments)
