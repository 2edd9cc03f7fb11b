"""Feed-forward layer, blocks and learned positions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import perceiver_kernels
from perceiver_kernels import functional
from perceiver_kernels.inputs import InputArray
from perceiver_kernels.nn import CrossBlock, FeedForward, LatentBlock, LearnedPositions, OutputBlock, SelfAttention
from tests.modules import perturbed

B, N, M, D, C = 2, 6, 19, 16, 11


def as_torch_layer(block: LatentBlock, widening_factor: int) -> nn.TransformerEncoderLayer:
    """torch's pre-norm encoder layer with the block's own parameters."""
    layer = nn.TransformerEncoderLayer(
        D, block.attention.num_heads, widening_factor * D, dropout=0.0, activation="gelu", batch_first=True,
        norm_first=True,
    )  # fmt: skip
    layer.norm1, layer.norm2 = block.attention.norm, block.feed_forward.norm
    layer.self_attn.in_proj_weight = block.attention.qkv_proj.weight
    layer.self_attn.in_proj_bias = block.attention.qkv_proj.bias
    layer.self_attn.out_proj = block.attention.out_proj
    layer.linear1, layer.linear2 = block.feed_forward.up_proj, block.feed_forward.down_proj
    return layer


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("widening_factor", [1, 4])
def test_latent_block_equals_torch_encoder_layer(widening_factor: int, masked: bool) -> None:
    block = perturbed(LatentBlock(D, 4, widening_factor=widening_factor))
    layer = as_torch_layer(block, widening_factor)
    x = torch.randn(B, N, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    key_mask = torch.tensor([[True] * N, [True] * 3 + [False] * 3]) if masked else None
    actual = block(x, key_mask)
    oracle = layer(x, src_key_padding_mask=None if key_mask is None else ~key_mask)
    torch.testing.assert_close(actual, oracle)
    leaves = (x, *block.parameters())
    upstream = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2))
    for a, o in zip(torch.autograd.grad(actual, leaves, upstream), torch.autograd.grad(oracle, leaves, upstream), strict=True):
        torch.testing.assert_close(a, o)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


WRITTEN = {
    "gelu": gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "squared_relu": lambda x: torch.where(x > 0, x, 0.0) ** 2,
    "geglu": lambda x: x[..., : x.shape[-1] // 2] * gelu(x[..., x.shape[-1] // 2 :]),
    "swiglu": lambda x: x[..., : x.shape[-1] // 2] * x[..., x.shape[-1] // 2 :] * torch.sigmoid(x[..., x.shape[-1] // 2 :]),
}


@pytest.mark.parametrize("activation", list(WRITTEN))
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("residual", [False, True])
def test_feed_forward_as_written(activation: str, norm: str | None, residual: bool) -> None:
    bias = not residual
    layer = perturbed(FeedForward(D, 3, activation=activation, norm=norm, residual=residual, bias=bias)).double()
    x = torch.randn(B, N, D, dtype=torch.float64)
    y = x
    if norm == "layer":
        y = F.layer_norm(x, (D,), layer.norm.weight, layer.norm.bias)
    elif norm == "rms":
        y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    active = WRITTEN[activation](y @ layer.up_proj.weight.T + (layer.up_proj.bias if bias else 0))
    expected = active @ layer.down_proj.weight.T + (layer.down_proj.bias if bias else 0) + (x if residual else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert active.shape[-1] == 3 * D
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == layer.flops(B, N)


def layer_and_gradients(layer: nn.Module, x: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
    leaf = x.detach().requires_grad_()
    found = layer(leaf)
    return [found.detach(), *torch.autograd.grad(found, [leaf, *layer.parameters()], out)]


ODD = {
    "all": {"hidden_dim": 7}, "input alone": {"hidden_dim": 16}, "no biases": {"hidden_dim": 7, "bias": False},
    "result": {"hidden_dim": 24, "out_dim": 5, "residual": False}, "gated": {"hidden_dim": 8, "activation": "swiglu"},
    "squared": {"hidden_dim": 9, "activation": "squared_relu"},
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_feed_forward_of_packed_rows(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros after odd rows, and the norm's weights in those of the product, change no result."""
    layer = perturbed(FeedForward(C, **ODD[case])).double()
    x = torch.randn(B, N, C, dtype=torch.float64)
    out = torch.randn(B, N, layer.out_dim, dtype=torch.float64)
    expected = layer_and_gradients(layer, x, out)
    monkeypatch.setattr(FeedForward, "_packs", lambda self, x: True)
    seen: list[int] = []
    monkeypatch.setattr(F, "linear", lambda x, w, b, linear=F.linear: seen.append(w.shape[0]) or linear(x, w, b))
    found = layer_and_gradients(layer, x, out)
    assert all(width % 8 == 0 for width in seen) and len(seen) == 2
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "packed"),
    [({}, True), ({"activation": "geglu"}, False), ({"norm": "rms"}, False), ({"hidden_dim": 640}, True)], ids=str,
)
def test_long_odd_rows_are_packed_on_a_gpu(changes: dict[str, Any], packed: bool) -> None:
    layer = perturbed(FeedForward(322, **changes)).cuda()
    x, out = (torch.randn(1, 14_000, 322, device="cuda") for _ in range(2))
    exact = layer_and_gradients(copy.deepcopy(layer).double(), x.double(), out.double())
    layer, x, out = layer.bfloat16(), x.bfloat16(), out.bfloat16()
    assert layer._packs(x) == packed and not layer._packs(x[:, :100]) and not layer._packs(x.float())
    found = layer_and_gradients(layer, x, out)
    layer._packs = lambda x: False
    composed = layer_and_gradients(layer, x, out)
    for a, b, e in zip(found, composed, exact, strict=True):
        errors = [((each.double() - e).norm() / e.norm()).item() for each in (a, b)]
        assert errors[0] <= 1.5 * errors[1] + 1e-4


def test_feed_forward_of_another_width() -> None:
    layer = perturbed(FeedForward(D, hidden_dim=7, out_dim=5, activation="swiglu", residual=False)).double()
    x = torch.randn(B, N, D, dtype=torch.float64)
    active = WRITTEN["swiglu"](layer.up_proj(layer.norm(x)))
    torch.testing.assert_close(layer(x), active @ layer.down_proj.weight.T + layer.down_proj.bias, rtol=1e-12, atol=1e-12)
    assert layer(x).shape == (B, N, 5)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == layer.flops(B, N)


def test_feed_forward_dropout_spares_the_residual() -> None:
    layer = perturbed(FeedForward(D, dropout=0.5))
    x = torch.randn(64, N, D)
    torch.manual_seed(0)
    added = layer(x) - x
    dropped = added == 0
    assert 0.4 < dropped.float().mean() < 0.6
    undropped = layer.eval()(x) - x
    torch.testing.assert_close(added[~dropped], 2 * undropped[~dropped], rtol=1e-4, atol=1e-5)


def test_hidden_dropout_is_before_the_second_linear_layer() -> None:
    """With an identity as that layer, half of the result is 0 and the rest twice what it was."""
    layer = perturbed(FeedForward(D, hidden_dropout=0.5, residual=False))
    layer.down_proj.weight.data, layer.down_proj.bias.data = torch.eye(D), torch.zeros(D)
    x = torch.randn(64, N, D)
    dropped, undropped = layer(x), layer.eval()(x)
    kept = dropped != 0
    assert 0.45 < kept.float().mean() < 0.55
    torch.testing.assert_close(dropped[kept], 2 * undropped[kept])


@pytest.mark.parametrize("kind", [lambda p: SelfAttention(D, 4, drop_path=p), lambda p: FeedForward(D, drop_path=p)])
def test_drop_path_drops_whole_branches(kind: Callable[[float], nn.Module]) -> None:
    """An entry of the batch is the residual alone, or its branch weighs 1 / (1 - p); evaluation drops nothing."""
    layer, x = perturbed(kind(0.25)), torch.randn(400, N, D)
    branch = layer.eval()(x) - x
    layer.train()
    actual = layer(x) - x
    kept = (actual != 0).flatten(1).any(1)
    assert 0.68 < kept.float().mean() < 0.82
    torch.testing.assert_close(actual[kept], branch[kept] / 0.75, rtol=1e-4, atol=1e-5)


def test_blocks_pass_their_options_on() -> None:
    block = LatentBlock(D, 4, hidden_dropout=0.1, drop_path=0.2)
    assert (block.feed_forward.hidden_dropout, block.feed_forward.drop_path, block.attention.drop_path) == (0.1, 0.2, 0.2)
    assert CrossBlock(D, C, norm_inputs=False).attention.norm_inputs is None


def test_cross_block_is_attention_then_feed_forward() -> None:
    block = perturbed(CrossBlock(D, C, qk_channels=12, v_channels=8, num_heads=2, widening_factor=2, activation="gelu_tanh"))
    latents, inputs = torch.randn(1, N, D), torch.randn(B, M, C)
    lengths = torch.tensor([M, 4], dtype=torch.int32)
    read = block.attention(latents, inputs, lengths=lengths)
    assert torch.equal(block(latents, inputs, lengths=lengths), block.feed_forward(read))
    assert block.feed_forward.hidden_dim == 2 * D and block.feed_forward.activation == "gelu_tanh"


def test_cross_block_without_residual_forgets_the_latents() -> None:
    block = perturbed(CrossBlock(D, C, residual=False, method="absorbed"))
    latents, inputs = torch.randn(B, N, D), torch.randn(B, 1, C)
    # With one token every query reads the same value, so nothing of the latents is left.
    torch.testing.assert_close(block(latents, inputs), block(torch.zeros_like(latents), inputs))


def test_output_block_without_feed_forward_is_its_attention() -> None:
    block = perturbed(OutputBlock(C, D, qk_channels=6, feed_forward=False))
    queries, latents = torch.randn(B, M, C), torch.randn(B, N, D)
    assert torch.equal(block(queries, latents), block.attention(queries, latents))
    assert block.feed_forward is None and block.flops(B, M, N) == block.attention.flops(B, M, N)


def test_biases_of_queries_keys_and_values() -> None:
    """Without them a block is the one whose biases are zero; the other layers keep theirs."""
    x, inputs = torch.randn(B, N, D), torch.randn(B, M, C)
    for build, arguments in (
        (lambda **options: LatentBlock(D, 2, **options), (x,)),
        (lambda **options: CrossBlock(D, C, **options), (x, inputs)),
        (lambda **options: OutputBlock(C, D, **options), (inputs, x)),
    ):
        plain, biased = perturbed(build(qkv_bias=False)), build(qkv_bias=True)
        state = biased.state_dict()
        lacking = state.keys() - plain.state_dict().keys()
        assert lacking and all(name.startswith("attention.") and name.endswith("proj.bias") for name in lacking)
        assert "attention.out_proj.bias" not in lacking
        biased.load_state_dict(plain.state_dict() | {name: torch.zeros_like(state[name]) for name in lacking})
        torch.testing.assert_close(plain(*arguments), biased(*arguments))
    without = LatentBlock(D, bias=False, qkv_bias=True)
    assert without.attention.qkv_proj.bias is not None and without.attention.out_proj.bias is None


def test_flops_are_those_that_run() -> None:
    latent, cross = LatentBlock(D, 2, widening_factor=2), CrossBlock(D, 16, method="projected")
    x = torch.randn(B, N, D)
    with torch.no_grad(), perceiver_kernels.use_backend("reference"):
        with FlopCounterMode(display=False) as counter:
            latent(x)
        assert counter.get_total_flops() == latent.flops(B, N)
        with FlopCounterMode(display=False) as counter:
            cross(x, torch.randn(B, M, 16))
        assert counter.get_total_flops() == cross.flops(B, N, M)


def test_dropout_reaches_both_layers() -> None:
    for block in (LatentBlock(D, attention_dropout=0.1, dropout=0.2), CrossBlock(D, C, attention_dropout=0.1, dropout=0.2)):
        assert block.attention.dropout == 0.1 and block.feed_forward.dropout == 0.2


def test_blocks_copy_and_move() -> None:
    block = CrossBlock(D, C, dtype=torch.float64)
    assert {p.dtype for p in block.parameters()} == {torch.float64}
    twin = copy.deepcopy(block)
    latents, inputs = torch.randn(B, N, D).double(), torch.randn(B, M, C).double()
    assert torch.equal(twin(latents, inputs), block(latents, inputs))
    assert {p.device.type for p in LatentBlock(D, device="meta").parameters()} == {"meta"}


def test_learned_positions_receive_their_gradient() -> None:
    """The module's table beside the content is the concatenation, and learns through it."""
    positions = LearnedPositions(M, 4)
    block = perturbed(CrossBlock(D, C + 4))
    content, latents = torch.randn(B, M, C, requires_grad=True), torch.randn(1, N, D)
    leaves = (positions.weight, content)
    actual = block(latents, InputArray.tokens(content, positions()))
    oracle = block(latents, torch.cat((content, positions.weight.expand(B, -1, -1)), -1))
    torch.testing.assert_close(actual, oracle)
    for a, o in zip(
        torch.autograd.grad(actual.square().sum(), leaves), torch.autograd.grad(oracle.square().sum(), leaves), strict=True
    ):
        assert o.abs().max() > 0
        torch.testing.assert_close(a, o)


def test_learned_positions_are_not_trained_in_chunks() -> None:
    """Their gradient would be lost: the layer says so, and reads them where no gradient is wanted."""
    positions, block = LearnedPositions(M, 4), CrossBlock(D, C + 4, chunk_size=5)
    content, latents = torch.randn(B, M, C), torch.randn(1, N, D)
    with pytest.raises(ValueError, match="chunk_size needs positions without gradient"):
        block(latents, InputArray.tokens(content, positions()))
    with torch.no_grad():
        whole = block(latents, torch.cat((content, positions().expand(B, -1, -1)), -1))
        torch.testing.assert_close(block(latents, InputArray.tokens(content, positions())), whole)


def test_learned_positions_pack_beside_the_content() -> None:
    positions = LearnedPositions(M, 4)
    packed = functional.pack_inputs(torch.randn(B, M, C), positions())
    packed.data.square().sum().backward()
    assert packed.channels == C + 4 and positions.weight.grad is not None


def test_learned_positions_start_as_the_latents_do() -> None:
    torch.manual_seed(0)
    weight = LearnedPositions(500, 128).weight
    assert weight.shape == (500, 128)
    assert abs(weight.std() - 0.02) < 2e-4 and abs(weight.mean()) < 5e-4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FeedForward(D, 0), "widening_factor must be at least 1, got 0"),
        (lambda: FeedForward(D, activation="fast"), "activation must be one of 'gelu', .*'swiglu', got 'fast'"),
        (lambda: FeedForward(D, norm="batch"), "norm must be one of 'layer', 'rms', got 'batch'"),
        (lambda: FeedForward(D, hidden_dim=0), "hidden_dim must be at least 1, got 0"),
        (lambda: FeedForward(D, hidden_dropout=1.0), r"hidden_dropout must be in \[0, 1\), got 1.0"),
        (lambda: FeedForward(D, drop_path=1.5), r"drop_path must be in \[0, 1\), got 1.5"),
        (lambda: LatentBlock(D, drop_path=-1), r"drop_path must be in \[0, 1\), got -1"),
        (lambda: FeedForward(D, dropout=-0.1), r"dropout must be in \[0, 1\), got -0.1"),
        (lambda: LatentBlock(D, 3), "qk_channels must be a positive multiple of num_heads=3, got 16"),
        (lambda: LearnedPositions(0, 4), "length must be at least 1, got 0"),
        (lambda: FeedForward(D)(torch.randn(B, N, D + 1)), r"x must be \[B, N, D\] with D=16, got \(2, 6, 17\)"),
        (lambda: LatentBlock(D)(torch.randn(N, D)), r"x must be \[B, N, D\] with D=16, got \(6, 16\)"),
    ],
)
def test_wrong_use_is_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
