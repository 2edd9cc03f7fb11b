"""The Set Transformer against the equations written out, in its published forms, and its symmetries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels import convert
from perceiver_kernels.models import SetTransformer, SetTransformerConfig
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.models.plain_set_transformer import PlainSetTransformer
from tests.modules import assert_same, result_and_gradients
from tests.nn.test_attention import METHODS

B, M = 3, 29

FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixture": (SetTransformer.mixture_of_gaussians, {"dim": 24, "num_inducing": 5}),
    "mixture, normed": (SetTransformer.mixture_of_gaussians, {"dim": 24, "num_inducing": 5, "post_norm": True}),
    "modelnet40": (SetTransformer.modelnet40, {"dim": 32, "num_inducing": 6}),
    "sab": (SetTransformer.mixture_of_gaussians, {"dim": 24, "num_inducing": None, "encoder_blocks": 3}),
}


def model_of(form: str, **changes: Any) -> SetTransformer:
    """A model with noise on every parameter, so that no bias is zero and no norm weight is one."""
    build, sizes = FORMS[form]
    model, generator = build(dtype=torch.float64, **{**sizes, **changes}), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter == 1).all())
    return model


def oracle_of(model: SetTransformer) -> PlainSetTransformer:
    """The equations with the model's weights, which conversion carries over."""
    c = model.config
    oracle = PlainSetTransformer(
        c.input_dim, c.output_dim, outputs=c.num_outputs, dim=c.dim, heads=c.num_heads, inducing=c.num_inducing,
        encoder=c.encoder_blocks, decoder=c.decoder_blocks, post_norm=c.post_norm, dropout=c.pooling_dropout > 0,
    ).double()  # fmt: skip
    oracle.load_state_dict(convert.to_library(model, "set_transformer"))
    return oracle


def elements(model: SetTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, M, model.config.input_dim, dtype=torch.float64, generator=generator).requires_grad_()


def mask_of() -> Tensor:
    return torch.rand(B, M, generator=torch.Generator().manual_seed(2)) < 0.7


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_equations_written_out(form: str, method: str, masked: bool) -> None:
    """The output and the gradients of the elements and of all weights; theirs are brought home by conversion."""
    model = model_of(form, method=method).eval()
    oracle, x, mask = oracle_of(model), elements(model), mask_of() if masked else None
    actual = result_and_gradients(lambda x: model(x, mask), model, x)
    expected = result_and_gradients(lambda x: oracle(x, mask), oracle, x)
    gradients = {name: expected[name] for name, _ in oracle.named_parameters()}
    ours = convert.rules.to_ours(convert.rules_of(model, "set_transformer"), gradients, model.state_dict())
    assert_same(actual, ours | {"out": expected["out"], "leaf 0": expected["leaf 0"]}, 1024)


@pytest.mark.parametrize("form", FORMS)
def test_order_of_the_elements_does_not_matter(form: str) -> None:
    model, order = model_of(form).eval(), torch.randperm(M, generator=torch.Generator().manual_seed(3))
    x, mask = elements(model), mask_of()
    torch.testing.assert_close(model(x[:, order], mask[:, order]), model(x, mask), rtol=1e-11, atol=1e-11)
    encoded = model.encode(x, mask)[:, order]
    torch.testing.assert_close(model.encode(x[:, order], mask[:, order]), encoded, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_what_hidden_elements_hold_is_never_used(form: str) -> None:
    """Sets of several sizes in one batch: the same bits whatever fills them up, and no NaN in any gradient."""
    model = model_of(form).eval()
    x, mask = elements(model).detach(), torch.arange(M) < torch.tensor([M, 9, 0])[:, None]
    clean, poisoned = (x.masked_fill(~mask[..., None], value).requires_grad_() for value in (0.0, float("nan")))
    actual = result_and_gradients(lambda x: model(x, mask), model, poisoned)
    expected = result_and_gradients(lambda x: model(x, mask), model, clean)
    assert all(torch.equal(actual[name], expected[name]) and actual[name].isfinite().all() for name in expected)
    torch.testing.assert_close(actual["out"][1:2], model(x[1:2, :9]), rtol=1e-11, atol=1e-11)


def test_published_sizes() -> None:
    mixture, cloud = SetTransformer.mixture_of_gaussians(), SetTransformer.modelnet40()
    assert mixture(torch.randn(2, 300, 2)).shape == (2, 4, 4)
    assert cloud(torch.randn(2, 100, 3)).shape == (2, 1, 40)
    for model, points in ((mixture, 32), (cloud, 16)):
        assert [block.inducing.shape[1] for block in model.encoder] == [points] * 2
    assert [block.attention.num_heads for block in mixture.decoder] == [4, 4] and len(cloud.decoder) == 0
    c, dims = cloud.config, (mixture.config.dim, cloud.config.dim)
    assert dims == (128, 256) and (c.num_heads, c.pooling_dropout) == (4, 0.5)
    assert mixture.num_params() == parameters_by_hand(2, 4, 4, 128, 32, 2)
    assert cloud.num_params() == parameters_by_hand(3, 40, 1, 256, 16, 0)


def parameters_by_hand(C: int, out: int, seeds: int, D: int, inducing: int, decoder: int) -> int:
    """Parameters by hand: a MAB of widths a, b has aD + 2bD + D^2 weights and 4D biases."""

    def mab(a: int, b: int) -> int:
        return a * D + 2 * b * D + D * D + 4 * D

    encoder = mab(D, C) + mab(C, D) + 2 * mab(D, D) + 2 * inducing * D
    return encoder + (1 + decoder) * mab(D, D) + seeds * D + D * out + out


def test_dropout_around_the_pooling() -> None:
    """On average, over many sets, what the second dropout leaves is what came in; none in evaluation."""
    model = model_of("modelnet40").float()
    copies = 6000
    x = elements(model).detach().float()[:1].expand(copies, -1, -1)
    pooled: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    read: list[Tensor] = []
    model.pooling.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        model(x)
        encoded = model.encode(x[:1])
    for dropped in (read[0], pooled[0]):
        assert abs((dropped == 0).double().mean() - 0.5) < 0.01
    error = read[0].mean(0) - encoded[0]
    assert (error.abs() <= 6 * read[0].std(0) / copies**0.5 + 1e-6).all()
    model.eval()
    assert torch.equal(model(x[:2]), model(x[:2]))


@pytest.mark.parametrize("form", ["mixture, normed", "sab"])
def test_activation_checkpointing_changes_no_bit(form: str) -> None:
    model = model_of(form)
    again = model_of(form, activation_checkpointing=True)
    x, mask, runs = elements(model), mask_of(), []
    again.encoder[0].register_forward_pre_hook(lambda *_: runs.append(1))
    expected = result_and_gradients(lambda x: model(x, mask), model, x)
    actual = result_and_gradients(lambda x: again(x, mask), again, x)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert len(runs) == 2, "the block ran again for its gradient"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_without_a_graph_break(checkpointing: bool) -> None:
    model = model_of("mixture", activation_checkpointing=checkpointing)
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), elements(model)
    mask = mask_of()
    actual = result_and_gradients(lambda x: compiled(x, mask), model, x)
    assert_same(actual, result_and_gradients(lambda x: model(x, mask), model, x), 1024)


def test_autocast() -> None:
    model = model_of("mixture, normed").eval()
    oracle, x = oracle_of(model), elements(model).detach()
    expected, model, eager = oracle(x).detach(), model.float(), copy.deepcopy(oracle).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, stock = model(x.float()), eager(x.float())
    assert actual.dtype == torch.bfloat16
    assert_as_accurate(actual, stock, expected, "out")


def test_learns_a_batch() -> None:
    """The largest element of a set, which no order of its elements tells."""
    torch.manual_seed(0)
    model = SetTransformer(SetTransformerConfig(1, 1, dim=16, num_inducing=4))
    x, losses = torch.rand(16, 10, 1), []
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        loss = F.mse_loss(model(x)[:, 0], x.amax(1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_dim": 0}, ValueError, "input_dim must be at least 1, got 0"),
        ({"dim": 10}, ValueError, "dim must be a positive multiple of num_heads=4, got 10"),
        ({"encoder_blocks": 0}, ValueError, "encoder_blocks must be at least 1, got 0"),
        ({"decoder_blocks": -1}, ValueError, "decoder_blocks must be at least 0, got -1"),
        ({"num_inducing": 0}, ValueError, "num_inducing must be at least 1, got 0"),
        ({"num_inducing": 2.0}, TypeError, "num_inducing must be an integer, got 2.0"),
        ({"post_norm": "yes"}, TypeError, "post_norm must be a bool, got 'yes'"),
        ({"pooling_dropout": 1.0}, ValueError, r"pooling_dropout must be in \[0, 1\), got 1.0"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number, at least 0, got -1.0"),
        ({"method": "fused"}, ValueError, "method must be 'absorbed', 'projected' or None, got 'fused'"),
    ],
)
def test_wrong_configurations_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SetTransformerConfig(**{"input_dim": 2, "output_dim": 4, **changes})


def test_wrong_inputs_are_named() -> None:
    model = SetTransformer(SetTransformerConfig(2, 4))
    x = torch.randn(B, M, 2)
    with pytest.raises(ValueError, match=r"x must be \[B, M, C\] with C=2, got \(3, 29, 3\)"):
        model(torch.randn(B, M, 3))
    with pytest.raises(TypeError, match="x must have the parameters' dtype torch.float32 unless autocast is on"):
        model(x.double())
    with pytest.raises(TypeError, match=r"key_mask must be torch.bool"):
        model(x, torch.ones(B, M))
    with pytest.raises(ValueError, match=r"key_mask must be \[B, M\] with B=3, M=29, got \(3, 28\)"):
        model(x, torch.ones(B, M - 1, dtype=torch.bool))
