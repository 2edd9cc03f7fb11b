"""Generation: cached steps equal forwards over the documented window; filters and draws as written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from perceiver_kernels.models import CachedDecoder, LatentWindow, PerceiverAR, PerceiverARConfig, filter_logits

B, M, N, VOCAB = 3, 20, 6, 13

LUCIDRAINS: dict[str, Any] = {
    "own_keys": True, "latent_proj": False, "final_norm": False, "bias": False, "rotary_base": 10_000.0, "positions": "learned",
    "rotary_interleaved": False, "num_perceiver_layers": 2,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "lucidrains": LUCIDRAINS,
    "krasserm": {**LUCIDRAINS, "num_perceiver_layers": 1, "num_rotary_layers": 1, "tied_logits": True},
    "sinusoidal": {"positions": "sinusoidal", "rotary_width": 0},
    "latents only": {"max_length": N, "num_latents": N},
    "no blocks": {"num_layers": 0},
}


def tiny(**changes: Any) -> PerceiverAR:
    """Of random weights, in fp64, with dropout that generation must not use."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "max_length": M, "num_latents": N, "dim": 32, "num_heads": 4, "num_layers": 3, "init_std": 0.3,
        "dropout": 0.3, "prefix_dropout": 0.5,
    }  # fmt: skip
    torch.manual_seed(0)
    model = PerceiverAR(PerceiverARConfig(**{**sizes, **changes}))
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model.double().eval()


def prompt(length: int) -> Tensor:
    return torch.randint(0, VOCAB, (B, length), generator=torch.Generator().manual_seed(1))


def window_by_steps(first: int, stride: int, max_prefix: int, most: int) -> dict[int, tuple[int, int]]:
    """(start, boundary) for every length from ``first + 1`` on, one token at a time."""
    boundary, windows = first, {}
    for length in range(first + 1, most):
        if length - boundary > N:
            boundary += stride
        windows[length] = max(boundary - max_prefix, 0), boundary
    return windows


@pytest.mark.parametrize("stride", [1, 2, 3, N])
@pytest.mark.parametrize("first", [0, 3, M - N])
def test_window_moves_as_latents_fill_up(first: int, stride: int) -> None:
    window = LatentWindow(first, N, M - N, stride)
    for length, (start, boundary) in window_by_steps(first, stride, M - N, 60).items():
        assert (window.start(length), window.boundary(length)) == (start, boundary)
        assert 1 <= length - boundary <= N and boundary - start <= M - N and length - start <= M
        if boundary > first:
            assert length - boundary >= N - stride + 1


@pytest.mark.parametrize(("length", "first"), [(1, 0), (N - 2, 0), (N + 5, N - 1), (N + 5, None), (M, None)])
@pytest.mark.parametrize("stride", [1, 4, None])
@pytest.mark.parametrize("case", CASES)
def test_cached_logits_equal_those_of_a_whole_forward(case: str, stride: int | None, length: int, first: int | None) -> None:
    """Every step, in fp64, until far past the longest sequence; the window is written out step by step."""
    model = tiny(**CASES[case])
    limit = model.config.max_length
    length, first = min(length, limit), None if first is None else min(first, limit - N)
    decoder = CachedDecoder(model, prompt(length), prefix_length=first, stride=stride)
    windows = window_by_steps(max(length - N, 0) if first is None else first, stride or N // 2, limit - N, length + 30)
    for step in range(30):
        logits = decoder.logits()
        start, boundary = windows[length + step]
        with torch.no_grad():
            expected = model(decoder.tokens[:, start:], boundary - start)[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
        decoder.append(torch.randint(0, VOCAB, (B,)))


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_whole_forwards(case: str) -> None:
    model, limit = tiny(**CASES[case]), CASES[case].get("max_length", M)
    x = prompt(5)
    expected = x
    windows = window_by_steps(0, 3, limit - N, 60)
    for _ in range(30):
        start, boundary = windows[expected.shape[1]]
        token = model(expected[:, start:], boundary - start)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, token), 1)
    assert len(expected[:, 5:].unique()) > 1, "or none could have been wrong"
    model.train().perceiver_layers.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(model.generate(x, 30, temperature=0.0, stride=3), expected)
    assert [module.training for module in model.modules()] == modes, "as they were before, frozen parts too"


def test_a_step_computes_one_token() -> None:
    model = tiny()
    decoder, widths = CachedDecoder(model, prompt(8), prefix_length=5, stride=2), []
    model.latent_blocks[0].register_forward_pre_hook(lambda module, arguments: widths.append(arguments[0].shape[1]))
    for _ in range(7):
        decoder.append(decoder.logits().argmax(-1))
    # Three latents of the prompt, three steps more until there are six, then five again, six, five, six.
    assert widths == [3, 1, 1, 1, 5, 1, 5]


def test_asking_again_changes_nothing() -> None:
    decoder = CachedDecoder(tiny(), prompt(8))
    first = decoder.logits()
    assert torch.equal(decoder.logits(), first)


def filtered_as_written(row: list[float], top_k: int | None, top_p: float | None) -> list[bool]:
    """Which tokens of one row are kept."""
    logits = torch.tensor(row, dtype=torch.float64)
    kept = set(range(len(row)))
    if top_k is not None:
        least = sorted(row, reverse=True)[min(top_k, len(row)) - 1]
        kept = {i for i in kept if row[i] >= least}
    if top_p is not None and top_p < 1:
        mass = sum(logits[i].exp() for i in kept)
        chosen, total = set(), 0.0
        for i in sorted(kept, key=lambda i: (-row[i], i)):
            if total >= top_p:
                break
            chosen.add(i)
            total += float(logits[i].exp() / mass)
        kept = chosen
    return [i in kept for i in range(len(row))]


@pytest.mark.parametrize(
    ("top_k", "top_p"), list(itertools.product((None, 1, 3, VOCAB, 50), (None, 1e-9, 0.3, 0.5, 0.9, 1.0)))
)
def test_filtered_logits_as_written(top_k: int | None, top_p: float | None) -> None:
    logits = 2 * torch.randn(40, VOCAB, dtype=torch.float64)
    logits[0, 3:6] = logits[0].max() + 1  # ties
    filtered = filter_logits(logits, top_k=top_k, top_p=top_p)
    for row, result in zip(logits, filtered, strict=True):
        kept = torch.tensor(filtered_as_written(row.tolist(), top_k, top_p))
        assert torch.equal(result, torch.where(kept, row, -torch.inf))
        assert kept.any()


def test_top_k_keeps_ties_and_top_p_the_fewest_tokens() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    kept = [filter_logits(logits, top_p=p).isfinite().sum().item() for p in (0.4, 0.5, 0.6, 0.75, 0.8, 0.95)]
    assert kept == [1, 1, 2, 2, 3, 4]
    kept = [filter_logits(logits, top_k=k).isfinite().sum().item() for k in (1, 2, 3, 4)]
    assert kept == [1, 2, 4, 4]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.7, "temperature": 0.5}])
def test_tokens_are_drawn_by_their_probabilities(options: dict[str, Any]) -> None:
    """Of 4,000 sequences from one prompt the first new tokens, against softmax(filtered logits / temperature)."""
    model, count = tiny(), 4000
    x = prompt(7)[:1]
    logits = model(x)[:, -1] / options.get("temperature", 1.0)
    kept = {name: value for name, value in options.items() if name != "temperature"}
    probabilities = filter_logits(logits, **kept).softmax(-1)[0]
    new = model.generate(x.expand(count, -1), 1, generator=torch.Generator().manual_seed(2), **options)[:, -1]
    shares = new.bincount(minlength=VOCAB) / count
    assert not shares[probabilities == 0].any()
    # Four standard deviations.
    assert ((shares - probabilities).abs() <= 4 * (probabilities * (1 - probabilities) / count).sqrt()).all()


def test_the_generator_decides() -> None:
    model, x = tiny(), prompt(7)
    runs = [model.generate(x, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    torch.manual_seed(5)
    first = model.generate(x, 12)
    torch.manual_seed(5)
    assert torch.equal(model.generate(x, 12), first)
    assert torch.equal(model.generate(x, 12, top_k=1), model.generate(x, 12, temperature=0.0))


def test_an_ended_sequence_is_filled_and_all_ended_stop() -> None:
    model, x = tiny(), prompt(7)
    free = model.generate(x, 25, temperature=0.0)[:, 7:]
    for token in free.unique().tolist():
        out = model.generate(x, 25, temperature=0.0, eos_token=token)[:, 7:]
        ends = [row.tolist().index(token) if token in row.tolist() else 25 for row in free]
        assert out.shape[1] == min(max(ends) + 1, 25)
        for row, expected, end in zip(out.tolist(), free.tolist(), ends, strict=True):
            assert row[: end + 1] == expected[: end + 1][: len(row)]
            assert all(t == token for t in row[end + 1 :])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["paper", "lucidrains"])
def test_gradients_beside_caches_are_those_without(case: str, checkpointing: bool) -> None:
    whole = {"dropout": 0.0, "prefix_dropout": 0.0, "activation_checkpointing": checkpointing}
    model, tokens = tiny(**CASES[case] | whole).train(), torch.randint(VOCAB, (B, M))
    found, expected = (
        torch.autograd.grad(
            model.extend(tokens, 0, M - N, caches=caches).square().sum(), list(model.parameters()), allow_unused=True
        )
        for caches in (model.new_caches(), None)
    )
    for a, e in zip(found, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e)


def test_caches_are_no_larger_than_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    model, built = tiny(), []
    original = model.new_caches
    monkeypatch.setattr(model, "new_caches", lambda length: built.extend(original(length)) or built)
    model.generate(prompt(7), 4)
    # The last token is drawn, not read.
    assert [(cache.capacity, cache.length) for cache in built] == [(11, 10), *3 * [(N, 6)]]


def test_dtypes_shapes_and_a_grid() -> None:
    model = tiny()
    x = prompt(7)
    assert torch.equal(model.generate(x, 0), x)
    out = model.generate(x.int(), 3)
    assert out.dtype == torch.int32 and out.shape == (B, 10) and torch.equal(out[:, :7], x.int())
    half = model.bfloat16().generate(x, 3, top_p=0.9)
    assert half.shape == (B, 10)
    grid = tiny(positions="learned", grid=(19,), rotary_width=0)
    assert grid.generate(x, M - 7).shape == (B, M)
    with pytest.raises(ValueError, match="max_new_tokens must leave at most max_length=20 with a grid, the prompt having M=7"):
        grid.generate(x, M - 6)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 0, got -1"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an integer, got 2.0"),
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number, at least 0, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a finite number, at least 0, got nan"),
        ({"temperature": "hot"}, TypeError, "temperature must be a finite number, at least 0, got 'hot'"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer, got 1.5"),
        ({"top_p": 0.0}, ValueError, r"top_p must be a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, ValueError, r"top_p must be a number in \(0, 1\], got 1.1"),
        ({"top_p": True}, TypeError, r"top_p must be a number in \(0, 1\], got True"),
        ({"eos_token": VOCAB}, ValueError, "eos_token must be a token, 0 to 12, got 13"),
        ({"eos_token": 1.0}, TypeError, "eos_token must be an integer, got 1.0"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": N + 1}, ValueError, "stride must be at most num_latents=6, got 7"),
        ({"prompt": prompt(M + 1)}, ValueError, r"prompt must be \[B, M\] with M from 1 to max_length=20, got \(3, 21\)"),
        ({"prompt": prompt(0)}, ValueError, r"prompt must be \[B, M\] with M from 1 to max_length=20, got \(3, 0\)"),
        ({"prompt": prompt(4).float()}, TypeError, "prompt must be int64 or int32, got float32"),
        ({"prefix_length": 4}, ValueError, "prefix_length must leave 1 to num_latents=6 of M=4 tokens, got 4"),
        (
            {"prefix_length": 15, "prompt": prompt(16)}, ValueError,
            "prefix_length must be at most max_length - num_latents=14, got 15",
        ),
    ],
)  # fmt: skip
def test_wrong_use_is_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"prompt": prompt(4), "max_new_tokens": 2, **options}
    with pytest.raises(kind, match=message):
        tiny().generate(**arguments)
