"""Linformer and LinformerLM against the installed package linformer: outputs and every gradient in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels import convert
from perceiver_kernels.models import Linformer, LinformerConfig, LinformerLM, LinformerLMConfig
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.modules import assert_same, perturbed, result_and_gradients

linformer = pytest.importorskip("linformer")

B, N, LENGTH, D, V = 2, 11, 16, 24, 30

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "one kv head": {"one_kv_head": True},
    "shared": {"share_kv": True},
    "head_dim": {"head_dim": 10, "one_kv_head": True, "share_kv": True},
}


def theirs(case: str, language: bool) -> nn.Module:
    """Their model with noise on every parameter, the same at every call."""
    torch.manual_seed(0)
    options = {name.replace("head_dim", "dim_head"): value for name, value in CASES[case].items()}
    sizes = {"dim": D, "seq_len": LENGTH, "depth": 2, "k": 5, "heads": 4, **options}
    model = linformer.LinformerLM(num_tokens=V, **sizes) if language else linformer.Linformer(**sizes)
    return perturbed(model, scale=0.2).double()


def ours(case: str, language: bool, **changes: Any) -> Linformer | LinformerLM:
    sizes = {"dim": D, "length": LENGTH, "depth": 2, "num_keys": 5, "num_heads": 4, **CASES[case], **changes}
    if language:
        model: Any = LinformerLM(LinformerLMConfig(vocab_size=V, **sizes), dtype=torch.float64)
    else:
        model = Linformer(LinformerConfig(**sizes), dtype=torch.float64)
    convert.load(model, theirs(case, language).state_dict(), "linformer")
    return model


def sequence(length: int = N) -> Tensor:
    return torch.randn(B, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def tokens(length: int = N) -> Tensor:
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("length", [N, LENGTH])
@pytest.mark.parametrize("language", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_parity(case: str, language: bool, length: int) -> None:
    original, model = theirs(case, language), ours(case, language)
    leaves = [] if language else [sequence(length)]
    run = (lambda m: lambda: m(tokens(length))) if language else (lambda m: m)
    expected = result_and_gradients(run(original), original, *leaves)
    gradients = {name: expected[name] for name, _ in original.named_parameters()}
    home = convert.rules.to_ours(convert.rules_of(model, "linformer"), gradients, model.state_dict())
    actual = result_and_gradients(run(model), model, *leaves)
    assert_same(actual, home | {name: tensor for name, tensor in expected.items() if name not in gradients}, 1024)


@pytest.mark.parametrize("language", [False, True])
def test_what_hidden_tokens_hold_is_never_used(language: bool) -> None:
    model, mask = ours("default", language).eval(), torch.arange(N) < torch.tensor([N, 6])[:, None]
    if language:
        x = tokens()
        other = x.where(mask, (x + 1) % V)
        assert torch.equal(model(other, mask)[mask], model(x, mask)[mask])
        torch.testing.assert_close(model(x, mask)[1, :6], model(x[1:, :6])[0], rtol=1e-11, atol=1e-11)
        return
    x = sequence().detach()
    clean, poisoned = (x.masked_fill(~mask[..., None], value).requires_grad_() for value in (0.0, float("nan")))
    actual, expected = (result_and_gradients(lambda x: model(x, mask), model, t) for t in (poisoned, clean))
    assert all(torch.equal(actual[name], expected[name]) and actual[name].isfinite().all() for name in expected)
    torch.testing.assert_close(actual["out"][1, :6], model(x[1:, :6])[0], rtol=1e-11, atol=1e-11)


def test_dropout_is_where_theirs_is() -> None:
    model = ours("default", False, dropout=0.4)
    for layer in model.layers:
        assert layer.attention.dropout == 0.4 and layer.feed_forward.hidden_dropout == 0.4 and layer.feed_forward.dropout == 0
    original = linformer.Linformer(dim=D, seq_len=LENGTH, depth=1, dropout=0.4, heads=4)
    found = {name for name, module in original.named_modules() if isinstance(module, nn.Dropout) and module.p == 0.4}
    assert found == {"net.layers.0.0.fn.dropout", "net.layers.0.1.fn.dropout"}
    x = sequence()
    assert not torch.equal(model(x), model(x)) and torch.equal(model.eval()(x), model(x))


def test_starts_as_theirs() -> None:
    """Standard deviations of all weights of a larger model, within what so many samples leave."""
    sizes = {"dim": 64, "depth": 1}
    model = LinformerLM(LinformerLMConfig(vocab_size=200, length=128, num_keys=32, **sizes))
    original = linformer.LinformerLM(num_tokens=200, seq_len=128, k=32, **sizes)
    written = convert.to_library(model, "linformer")
    for name, tensor in original.state_dict().items():
        tolerance = 5 * tensor.numel() ** -0.5
        torch.testing.assert_close(written[name].std(), tensor.std(), rtol=tolerance, atol=0, msg=name)
        assert written[name].abs().max() <= tensor.abs().max() * 1.3, name


@pytest.mark.parametrize("language", [False, True])
def test_activation_checkpointing_changes_no_bit(language: bool) -> None:
    model, again = (ours("default", language, activation_checkpointing=on) for on in (False, True))
    runs: list[int] = []
    next(m for m in again.modules() if isinstance(m, nn.ModuleList))[0].register_forward_pre_hook(lambda *_: runs.append(1))
    leaves = [] if language else [sequence()]
    run = (lambda m: lambda: m(tokens())) if language else (lambda m: m)
    expected, actual = (result_and_gradients(run(m), m, *leaves) for m in (model, again))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert len(runs) == 2, "the layer ran again for its gradient"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_without_a_graph_break(checkpointing: bool) -> None:
    model = ours("one kv head", True, activation_checkpointing=checkpointing)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mask = torch.arange(N) < torch.tensor([N, 6])[:, None]
    actual = result_and_gradients(lambda: compiled(tokens(), mask), model)
    assert_same(actual, result_and_gradients(lambda: model(tokens(), mask), model), 1024)


def test_autocast() -> None:
    oracle, original, model = theirs("default", False), theirs("default", False).float(), ours("default", False).float()
    x = sequence().detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, eager = model(x.float()), original(x.float())
    assert_as_accurate(actual.bfloat16(), eager.bfloat16(), oracle(x).detach(), "out")


def test_learns_a_batch() -> None:
    """To tell the first token of a sequence at every place of it."""
    torch.manual_seed(0)
    model = LinformerLM(LinformerLMConfig(vocab_size=6, length=8, depth=2, dim=32, num_keys=4, num_heads=4))
    x, losses = torch.randint(6, (32, 8)), []
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(80):
        loss = F.cross_entropy(model(x).flatten(0, 1), x[:, :1].expand(-1, 8).flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_the_position_embedding_is_called() -> None:
    """A hook of it, or an adapter in its place, has its say."""
    model = ours("default", True)
    with_hook, given = copy.deepcopy(model), tokens()
    with_hook.position_embedding.register_forward_hook(lambda module, places, vectors: 2 * vectors)
    with torch.no_grad():
        model.position_embedding.weight.mul_(2)
    assert torch.equal(with_hook(given), model(given))


def test_number_of_parameters() -> None:
    for language in (False, True):
        assert ours("shared", language).num_params() == sum(p.numel() for p in theirs("shared", language).parameters())
    assert copy.deepcopy(ours("default", False)).config.num_keys == 5


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"length": 0}, ValueError, "length must be at least 1, got 0"),
        ({"depth": -1}, ValueError, "depth must be at least 0, got -1"),
        ({"num_heads": 5}, ValueError, "dim must be a positive multiple of num_heads=5, got 24"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"num_keys": 1.5}, TypeError, "num_keys must be an integer, got 1.5"),
        ({"share_kv": 1}, TypeError, "share_kv must be a bool, got 1"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
    ],
)
def test_wrong_configurations_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LinformerLMConfig(**{"vocab_size": V, "length": LENGTH, "depth": 1, "dim": D, **changes})


def test_wrong_inputs_are_named() -> None:
    stack, language = ours("default", False), ours("default", True)
    with pytest.raises(ValueError, match="x must have at most length=16 tokens, got 17"):
        stack(sequence(17))
    with pytest.raises(ValueError, match=r"x must be \[B, N, D\] with D=24, got \(2, 11, 3\)"):
        stack(sequence()[..., :3])
    with pytest.raises(ValueError, match="tokens must have at most length=16 places, got 17"):
        language(tokens(17))
    with pytest.raises(TypeError, match="tokens must be int64 or int32, got float32"):
        language(tokens().float())
    with pytest.raises(ValueError, match=r"tokens must be \[B, N\], got \(11,\)"):
        language(tokens()[0])
    with pytest.raises(TypeError, match="key_mask must be torch.bool"):
        language(tokens(), torch.ones(B, N))
