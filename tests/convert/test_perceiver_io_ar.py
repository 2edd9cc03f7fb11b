"""krasserm's perceiver-io: weights of its Perceiver AR models in ours and back, the same logits and gradients in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import convert
from perceiver_kernels.models import PerceiverAR
from perceiver_kernels.models import perceiver_ar as module
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.convert.krasserm import assert_same, gradients, needs_perceiver_io
from tests.convert.krasserm import theirs as library
from tests.modules import perturbed

pytestmark = needs_perceiver_io

B, M, N, VOCAB = 2, 20, 8, 13

# Their three published models, scaled down: their configuration, our constructor and what it is given.
SIZES: dict[str, Any] = {"num_channels": 48, "num_heads": 3, "num_self_attention_layers": 3}
OURS: dict[str, Any] = {"dim": 48, "num_heads": 3, "num_layers": 3}
CASES: dict[str, tuple[dict[str, Any], Callable[..., PerceiverAR], dict[str, Any]]] = {
    "small": ({}, PerceiverAR.clm_small, {}),
    "base": (
        {"output_norm": True, "output_bias": False, "abs_pos_emb": False, "max_heads_parallel": 2}, PerceiverAR.clm_base,
        {"rotary_width": None},
    ),
    "giantmidi": ({"num_self_attention_rotary_layers": 2}, PerceiverAR.giantmidi, {"num_rotary_layers": 2}),
    "all rotary": (
        {"num_self_attention_rotary_layers": -1, "self_attention_widening_factor": 2, "cross_attention_widening_factor": 2},
        PerceiverAR.clm_small, {"num_rotary_layers": None, "widening_factor": 2},
    ),
}  # fmt: skip


def original(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "max_seq_len": M, "max_latents": N, "cross_attention_dropout": 0.0, **SIZES}
    config = library.config.CausalSequenceModelConfig(**{**sizes, **CASES[name][0], **changes})
    return perturbed(library.core.CausalSequenceModel(config), seed).eval()


def ours(name: str, theirs: nn.Module, **changes: Any) -> PerceiverAR:
    _, build, given = CASES[name]
    if "rotary_width" in given:
        given = {**given, "rotary_width": 16}
    sizes = {"vocab_size": VOCAB, "max_length": M, "num_latents": N, "prefix_dropout": 0.0, **OURS}
    without = {"attention_dropout": 0.0, "cross_attention_dropout": 0.0, "dropout": 0.0}
    model = build(**{**sizes, **without, **given, **changes}).eval()
    convert.load(model, theirs.state_dict(), "perceiver_io")
    return model


def tokens(length: int = M) -> Tensor:
    return torch.randint(0, VOCAB, (B, length), generator=torch.Generator().manual_seed(1))


def in_double(theirs: nn.Module, model: PerceiverAR, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, PerceiverAR]:
    """Both in fp64, ours with the original's angles instead of tables that are rounded to fp32."""
    frequencies = theirs.input_adapter.frq_pos_encoding.inv_freq.double()

    def tables(places: Tensor, width: int, *, base: float) -> tuple[Tensor, Tensor]:
        assert width == 2 * len(frequencies) and base == 10_000
        angles = places.double()[:, None] * frequencies
        return angles.cos(), angles.sin()

    monkeypatch.setattr(module, "rotary_tables", tables)
    return with_double_places(theirs.double()), model.double()


def with_double_places(theirs: nn.Module) -> nn.Module:
    """Its einsum of integer places and frequencies needs one dtype."""
    part = theirs.input_adapter.frq_pos_encoding
    forward = type(part).forward
    part.forward = lambda places: forward(part, places.to(part.inv_freq))
    return theirs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["whole", "short", "padded", "prefix dropout", "padded, prefix dropout", "dropout"])
def test_same_logits_and_gradients(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64. Dropout of the prefix and of layers' results draws as theirs does: the same seed keeps the same."""
    their_drops = {"prefix dropout": {"cross_attention_dropout": 0.3}, "dropout": {"residual_dropout": 0.2}}
    our_drops = {"prefix dropout": {"prefix_dropout": 0.3}, "dropout": {"dropout": 0.2}}
    kind = mode.removeprefix("padded, ")
    theirs = original(name, **their_drops.get(kind, {}))
    model = ours(name, theirs, **our_drops.get(kind, {}))
    theirs, model = in_double(theirs, model, monkeypatch)
    x = tokens(M - 3 if mode == "short" else M)
    prefix = x.shape[1] - N
    padding = torch.tensor([0, 5]) if mode.startswith("padded") else None
    pad_mask = None if padding is None else torch.arange(x.shape[1]) < padding[:, None]
    dropping = kind in our_drops
    theirs.train(dropping)
    model.train(dropping)

    def seeded(run: Callable[[], Tensor], model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(3)
        return gradients(lambda _: run(), model, x)

    expected = seeded(lambda: theirs(x, prefix_len=prefix, pad_mask=pad_mask).logits, theirs)
    actual = seeded(lambda: model(x, prefix, padding=padding), model)
    if dropping:
        other = theirs.eval()(x, prefix_len=prefix, pad_mask=pad_mask).logits
        assert not torch.allclose(other, expected["out"]), "something was dropped"
    assert_same(actual, expected, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_the_original(name: str, dtype: torch.dtype) -> None:
    """Rotary tables included; over many models, of which one may be right by luck."""
    compared = []
    for seed in range(6):
        theirs = original(name, seed)
        frequencies, width = theirs.input_adapter.frq_pos_encoding.inv_freq, ours(name, theirs).config.rotary_channels
        model, eager = ours(name, theirs).to(dtype), theirs.to(dtype)
        oracle = copy.deepcopy(eager).double()
        # Frequencies of 16 bits would be a loss of the conversion: theirs stay in fp32, the oracle's were never rounded.
        eager.input_adapter.frq_pos_encoding.inv_freq = frequencies
        exact = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        oracle.input_adapter.frq_pos_encoding.inv_freq = exact
        both = with_angles_in(with_double_places(eager), dtype), with_double_places(oracle)
        with torch.no_grad():
            compared.append((model(tokens()), *(each(tokens(), prefix_len=M - N).logits for each in both)))
    assert_as_accurate(*(torch.stack(results) for results in zip(*compared, strict=True)), "logits")


def with_angles_in(theirs: nn.Module, dtype: torch.dtype) -> nn.Module:
    part = theirs.input_adapter.frq_pos_encoding
    forward = part.forward
    part.forward = lambda places: forward(places).to(dtype)
    return theirs


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name: str) -> None:
    theirs = original(name)
    model = ours(name, theirs)
    back, state = convert.to_library(model, "perceiver_io"), theirs.state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[key], tensor) for key, tensor in state.items())
    perturbed(model, 5)
    theirs.load_state_dict(convert.to_library(model, "perceiver_io"))
    again = ours(name, theirs)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert model.num_params() == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (PerceiverAR.clm_small, {}),
        (
            PerceiverAR.clm_base,
            {
                "vocab_size": 32_000, "max_seq_len": 1024, "num_channels": 1280, "num_heads": 10,
                "num_self_attention_layers": 20, "output_norm": True, "output_bias": False, "abs_pos_emb": False,
            },
        ),
        (
            PerceiverAR.giantmidi,
            {
                "vocab_size": 389, "max_seq_len": 6144, "max_latents": 2048, "num_channels": 768,
                "num_self_attention_layers": 18,
            },
        ),
    ],
)  # fmt: skip
def test_published_sizes(build: Callable[..., PerceiverAR], config: dict[str, Any]) -> None:
    with torch.device("meta"):
        theirs = library.core.CausalSequenceModel(library.config.CausalSequenceModelConfig(**config))
    model = build(device="meta")
    shapes = {key: tensor.shape for key, tensor in convert.to_library(model, "perceiver_io").items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        convert.to_library(PerceiverAR.perceiver_ar_pytorch(device="meta", num_perceiver_layers=2), "perceiver_io")
    assert str(error.value) == (
        "model must be built as perceiver_io's, got num_perceiver_layers=2 instead of 1, rotary_interleaved=False instead of "
        "True, tied_logits=False instead of True"
    )
    with pytest.raises(ValueError, match="got head_channels=32 instead of 64"):
        convert.to_library(PerceiverAR.clm_small(device="meta", head_dim=32), "perceiver_io")
