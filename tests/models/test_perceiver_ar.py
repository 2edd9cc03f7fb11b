"""Perceiver AR: the paper's equations written out, causality, dropout of the prefix, training, wrong inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from perceiver_kernels import use_backend
from perceiver_kernels.models import PerceiverAR, PerceiverARConfig, SequencePositions

B, M, N, D, H, VOCAB = 2, 19, 6, 32, 4, 11


def tiny(**changes: Any) -> PerceiverARConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "max_length": M, "num_latents": N, "dim": D, "num_heads": H, "num_layers": 2, "dropout": 0.0,
    }  # fmt: skip
    return PerceiverARConfig(**{**sizes, **changes})


def randomised(config: PerceiverARConfig) -> PerceiverAR:
    """In fp64, every parameter random, the same for every call."""
    torch.manual_seed(0)
    model = PerceiverAR(config)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def tokens(length: int = M, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (B, length), generator=torch.Generator().manual_seed(seed))


LUCIDRAINS: dict[str, Any] = {
    "own_keys": True, "latent_proj": False, "final_norm": False, "bias": False, "rotary_base": 10_000.0, "positions": "learned",
    "rotary_interleaved": False,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "absolute": {"positions": "sinusoidal", "rotary_width": 0},
    "grid": {"positions": "learned", "grid": (2, 3, 3), "rotary_width": 0},
    "lucidrains": {**LUCIDRAINS, "num_perceiver_layers": 2, "head_dim": 6, "activation": "gelu", "logits_bias": False},
    "krasserm": {**LUCIDRAINS, "num_rotary_layers": 1, "tied_logits": True, "init_std": 0.3, "rotary_interleaved": True},
    "all channels": {"rotary_width": 8, "num_perceiver_layers": 2, "num_layers": 0, "tied_logits": True, "init_std": 0.2},
}


def norm(x: Tensor, layer: nn.LayerNorm | None) -> Tensor:
    return x if layer is None else F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def feed_forward(x: Tensor, layer: Any, activation: str) -> Tensor:
    hidden = layer.up_proj(norm(x, layer.norm))
    return x + layer.down_proj(F.gelu(hidden) if activation == "gelu" else F.relu(hidden) ** 2)


def turned(x: Tensor, places: Tensor, config: PerceiverARConfig) -> Tensor:
    """x [B, H, L, d] at places [L], pair by pair."""
    width = config.rotary_channels
    if config.rotary_base is None:
        # The authors': width / 2 exponents from 0 to 1, both included.
        frequencies = 1 / config.max_length ** torch.linspace(0, 1, width // 2, dtype=torch.float64)
    else:
        frequencies = config.rotary_base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    out = x.clone()
    for i, frequency in enumerate(frequencies):
        a, b = (2 * i, 2 * i + 1) if config.rotary_interleaved else (i, i + width // 2)
        # Tables are fp32.
        cos, sin = ((places * frequency).cos().float().double(), (places * frequency).sin().float().double())
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., a] * sin + x[..., b] * cos
    return out


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    scores = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def position_vectors(model: PerceiverAR, length: int) -> Tensor | int:
    config = model.config
    if config.positions is None:
        return 0
    places = torch.arange(length, dtype=torch.float64)
    if config.positions == "sinusoidal":
        angles = places[:, None] / 10_000 ** (torch.arange(D // 2, dtype=torch.float64) / (D // 2 - 1))
        return torch.cat((angles.sin(), angles.cos()), 1)
    tables = [table.weight for table in model.positions.tables]
    if config.grid is None:
        return tables[0][:length]
    rows = [(0, 0, 0)] + [(y + 1, x + 1, c + 1) for y in range(2) for x in range(3) for c in range(3)]
    return torch.stack([sum(table[i] for table, i in zip(tables, row, strict=True)) for row in rows[:length]])


def textbook(model: PerceiverAR, x: Tensor, prefix: int, mask: Tensor | None = None) -> Tensor:
    """Logits for tokens x [B, L]; every latent reads tokens up to its own, and of the prefix those that ``mask`` shows."""
    config, length = model.config, x.shape[1]
    embedded = model.token_embedding.weight[x] + position_vectors(model, length)
    z, places = embedded[:, prefix:], torch.arange(length, dtype=torch.float64)
    if model.latent_proj is not None:
        z = model.latent_proj(z)
    visible = torch.ones(length, length, dtype=torch.bool).tril()[prefix:].expand(B, 1, -1, -1).clone()
    if mask is not None:
        visible[..., :prefix] &= mask[:, None, None]
    for layer in model.perceiver_layers:
        part = layer.attention
        own = norm(z, part.norm)
        if config.own_keys:
            read = torch.cat((norm(embedded[:, :prefix], part.norm_context), own), 1)
        else:
            read = norm(embedded, part.norm_context)
        query, (key, value) = part.q_proj(own), part.kv_proj(read).chunk(2, -1)
        query, key = turned(heads(query), places[prefix:], config), turned(heads(key), places, config)
        z = feed_forward(z + part.out_proj(attend(query, key, heads(value), visible)), layer.feed_forward, config.activation)
    for i, block in enumerate(model.latent_blocks):
        part = block.attention
        query, key, value = (heads(t) for t in part.qkv_proj(norm(z, part.norm)).chunk(3, -1))
        if config.num_rotary_layers is None or i < config.num_rotary_layers:
            query, key = turned(query, places[prefix:], config), turned(key, places[prefix:], config)
        causal = torch.ones(length - prefix, length - prefix, dtype=torch.bool).tril()
        z = feed_forward(z + part.out_proj(attend(query, key, value, causal)), block.feed_forward, config.activation)
    z = norm(z, model.norm)
    return z @ model.token_embedding.weight.T + (0 if model.head_bias is None else model.head_bias) if model.head is None else (
        model.head(z)
    )  # fmt: skip


@pytest.mark.parametrize("length", [M, N + 3, N - 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_equations_written_out(case: str, masked: bool, length: int) -> None:
    """Logits and all gradients in fp64."""
    model, x, prefix = randomised(tiny(**CASES[case])), tokens(length), max(length - N, 0)
    mask = torch.rand(B, prefix, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    actual, expected = model(x, None, mask), textbook(model, x, prefix, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    upstream, names = torch.randn_like(actual), [name for name, _ in model.named_parameters()]
    # Without a prefix the norm of the context may have no part in it.
    leaves = list(model.parameters())
    both = [torch.autograd.grad(out, leaves, upstream, materialize_grads=True) for out in (actual, expected)]
    for name, a, e in zip(names, *both, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("prefix", [M - N, M - 1, M - 3])
def test_any_prefix_that_leaves_latents(prefix: int) -> None:
    model = randomised(tiny())
    assert model(tokens(), prefix).shape == (B, M - prefix, VOCAB)
    torch.testing.assert_close(model(tokens(), prefix), textbook(model, tokens(), prefix), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_padding_is_as_if_it_were_not_there(case: str) -> None:
    """Learned positions move with the sequences; rotary tables are rounded to fp32, at other places otherwise."""
    model, x, prefix = randomised(tiny(**CASES[case])), tokens(), M - N
    logits = model(x, prefix, padding=torch.tensor([0, 5]))
    for i, padding in enumerate((0, 5)):
        expected = model(x[i : i + 1, padding:], prefix - padding)
        torch.testing.assert_close(logits[i : i + 1], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits[1], model(x, prefix)[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_later_tokens_change_no_earlier_logits(case: str) -> None:
    model, x = randomised(tiny(**CASES[case])), tokens()
    logits = model(x)
    for t in range(M):
        other = x.clone()
        other[:, t] = (x[:, t] + 1) % VOCAB
        changed = (model(other) - logits).abs().amax((0, 2)) > 1e-9
        first = max(t - (M - N), 0)
        assert changed.tolist() == [False] * first + [True] * (N - first), t


def test_prefix_dropout_keeps_a_share_of_the_prefix() -> None:
    """As many for each sequence, others for each, in order, the same for the same state of torch's generator."""
    layer = randomised(tiny(prefix_dropout=0.4, own_keys=True, num_layers=0)).perceiver_layers[0]
    assert layer.draw(3, 10, 10, torch.device("cpu")) is None, "evaluation reads all"
    layer.train()
    torch.manual_seed(4)
    kept = layer.draw(3, 10, 12, torch.device("cpu"))
    assert kept.shape == (3, 10 - 4 + 2)
    assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0
    assert kept[:, 6:].tolist() == [[10, 11]] * 3 and kept[:, :6].max() < 10
    assert len({tuple(row) for row in kept.tolist()}) == 3
    torch.manual_seed(4)
    assert torch.equal(layer.draw(3, 10, 12, torch.device("cpu")), kept)
    assert layer.draw(3, 2, 2, torch.device("cpu")) is None, "int(2 * 0.4) tokens are none"
    counts = torch.stack([layer.draw(1, 10, 10, torch.device("cpu"))[0] for _ in range(600)]).flatten().bincount()
    assert (counts / 600 - 0.6).abs().max() < 0.08


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", ["paper", "lucidrains"])
def test_a_dropped_prefix_is_as_a_masked_one(case: str, masked: bool) -> None:
    """Positions stay those of the whole sequence; each layer drops others."""
    model = randomised(tiny(**CASES[case], prefix_dropout=0.5)).train()
    prefix = M - N
    mask = torch.rand(B, prefix, generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None
    torch.manual_seed(6)
    actual = model(tokens(), None, mask)
    torch.manual_seed(6)
    shown = []
    for _ in model.perceiver_layers:
        kept = torch.rand(B, prefix).topk(prefix - int(prefix * 0.5)).indices
        seen = torch.zeros(B, prefix, dtype=torch.bool).scatter(1, kept, True)
        shown.append(seen if mask is None else seen & mask)
    model.eval()
    for layer, seen in zip(model.perceiver_layers, shown, strict=True):
        if not model.config.own_keys:
            seen = torch.cat((seen, seen.new_ones(B, N)), 1)
        layer.forward = lambda x, context, _, *rest, whole=layer.forward, seen=seen: whole(x, context, seen, *rest)
    torch.testing.assert_close(actual, model(tokens()), rtol=1e-11, atol=1e-11)
    if len(shown) > 1:
        assert not torch.equal(shown[0], shown[1])


@pytest.mark.parametrize("case", CASES)
def test_activation_checkpointing_gives_the_same_gradients(case: str) -> None:
    """With dropout everywhere: what is computed again draws the same."""
    kinds = ("prefix_dropout", "cross_attention_dropout", "attention_dropout", "dropout", "hidden_dropout")
    drops = dict.fromkeys(kinds, 0.2)
    results = []
    for checkpointing in (False, True):
        model = randomised(tiny(**{**CASES[case], **drops}, activation_checkpointing=checkpointing)).train()
        torch.manual_seed(3)
        logits = model(tokens())
        saved: list[int] = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):  # noqa: B023
            model(tokens())
        results.append((logits, torch.autograd.grad(logits.square().sum(), list(model.parameters())), sum(saved)))
    (whole, gradients, kept), (again, others, few) = results
    assert torch.equal(whole, again)
    for a, e in zip(others, gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert few < kept / 2


@pytest.mark.parametrize(("case", "checkpointing"), [(case, bool(i % 2)) for i, case in enumerate(CASES)])
def test_compiles_as_one_graph(case: str, checkpointing: bool) -> None:
    torch._dynamo.reset()
    changes = {"prefix_dropout": 0.3, "activation_checkpointing": checkpointing}
    model = randomised(tiny(**{**CASES[case], **changes})).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        torch.manual_seed(3)
        logits = run(tokens())
        results.append((logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_autocast_runs_in_half_width_and_keeps_gradients_in_float32() -> None:
    model = randomised(tiny()).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens())
    logits.float().square().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    torch.testing.assert_close(logits.float(), model(tokens()), rtol=0.1, atol=0.3)


def test_dropout_reaches_every_layer() -> None:
    drops = {"cross_attention_dropout": 0.2, "attention_dropout": 0.3, "dropout": 0.4, "hidden_dropout": 0.5}
    model = PerceiverAR(tiny(**drops))
    for layer in model.perceiver_layers:
        assert (layer.attention.dropout, layer.attention.out_dropout) == (0.2, 0.4)
    for block in model.latent_blocks:
        assert (block.attention.dropout, block.attention.out_dropout) == (0.3, 0.4)
    for block in (*model.perceiver_layers, *model.latent_blocks):
        assert (block.feed_forward.dropout, block.feed_forward.hidden_dropout) == (0.4, 0.5)


def test_starts_as_the_authors_code() -> None:
    """Linear layers fan-in, embeddings of unit deviation cut at two, logits zero; with ``init_std`` all normal."""
    torch.manual_seed(0)
    model = PerceiverAR(tiny(dim=256, vocab_size=400, positions="learned"))
    assert torch.equal(model(tokens()), torch.zeros(B, N, 400))
    for table in (model.token_embedding.weight, model.positions.tables[0].weight):
        assert 0.85 < table.std() < 0.91 and table.abs().max() <= 2
    assert abs(model.latent_proj.weight.std() * 16 - 1) < 0.02 and not model.latent_proj.bias.any()
    model = PerceiverAR(tiny(dim=256, vocab_size=400, positions="learned", init_std=0.02))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert abs(parameter.std() - 0.02) < 1e-3, name


def test_learns_to_repeat_a_token_from_the_prefix() -> None:
    """The answer is in the prefix alone."""
    torch.manual_seed(0)
    model = PerceiverAR(tiny(max_length=8, num_latents=2, dropout=0.0, num_layers=1))
    x = torch.randint(0, VOCAB, (64, 8))
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(80):
        loss = F.cross_entropy(model(x)[:, -1], x[:, 3])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.05


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [M, N - 2])
def test_flops_are_those_that_run(case: str, length: int) -> None:
    model = PerceiverAR(tiny(**CASES[case], eps=1e-6))
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(tokens(length))
    assert counter.get_total_flops() == model.flops(B, length)


def test_state_dict_keys_are_stable() -> None:
    keys = set(PerceiverAR(tiny(num_layers=1, positions="learned")).state_dict())
    parts = {"attention": ("norm", "norm_context", "q_proj", "kv_proj", "out_proj"), "own": ("norm", "qkv_proj", "out_proj")}
    forward = {f"feed_forward.{name}" for name in ("norm", "up_proj", "down_proj")}
    modules = {f"perceiver_layers.0.{name}" for name in {f"attention.{part}" for part in parts["attention"]} | forward}
    modules |= {f"latent_blocks.0.{name}" for name in {f"attention.{part}" for part in parts["own"]} | forward}
    modules |= {"latent_proj", "norm", "head"}
    expected = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    assert keys == expected | {"token_embedding.weight", "positions.tables.0.weight"}
    tied = set(PerceiverAR(tiny(tied_logits=True, init_std=0.02)).state_dict())
    assert "head_bias" in tied and not any(key.startswith("head.") for key in tied)


def test_wrong_inputs_are_named() -> None:
    model = PerceiverAR(tiny())
    with pytest.raises(ValueError, match=rf"tokens must be \[B, M\] with M from 1 to max_length={M}, got \(2, {M + 1}\)"):
        model(tokens(M + 1))
    with pytest.raises(ValueError, match=rf"tokens must be \[B, M\] with M from 1 to max_length={M}, got \(2, 0\)"):
        model(tokens(0))
    with pytest.raises(ValueError, match=r"tokens must be \[B, M\], got \(19,\)"):
        model(tokens()[0])
    with pytest.raises(TypeError, match=r"tokens must be int64 or int32, got float32"):
        model(tokens().float())
    with pytest.raises(TypeError, match=r"tokens must be a tensor \[B, M\], got list"):
        model([[1, 2]])
    with pytest.raises(ValueError, match="tokens must be on cpu as the model, got meta"):
        model(tokens().to("meta"))
    for prefix in (M, M - N - 1):
        with pytest.raises(ValueError, match=f"prefix_length must leave 1 to num_latents={N} of M={M} tokens, got {prefix}"):
            model(tokens(), prefix)
    with pytest.raises(ValueError, match="prefix_length must be at least 0, got -1"):
        model(tokens(3), -1)
    with pytest.raises(ValueError, match=r"prefix_mask must be \[B, prefix_length\] with B=2, prefix_length=13, got \(2, 19\)"):
        model(tokens(), None, torch.ones(B, M, dtype=torch.bool))
    with pytest.raises(TypeError, match="prefix_mask must be bool, True = visible, got float32"):
        model(tokens(), None, torch.ones(B, M - N))
    with pytest.raises(ValueError, match=r"padding must be \[B\] with B=2, got \(3,\)"):
        model(tokens(), padding=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"padding must be in 0..prefix_length={M - N}, got 0..{M}"):
        model(tokens(), padding=torch.tensor([0, M]))
    with pytest.raises(ValueError, match="padding and prefix_mask exclude each other"):
        model(tokens(), None, torch.ones(B, M - N, dtype=torch.bool), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="positions must be one of"):
        SequencePositions("rotary", 4, 4)
