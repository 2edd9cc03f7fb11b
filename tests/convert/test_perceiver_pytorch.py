"""perceiver-pytorch: its weights in ours and back, and the same outputs and gradients in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import convert
from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models import EncoderConfig, Perceiver, PerceiverEncoder, PerceiverIO
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.modules import perturbed

library = pytest.importorskip("perceiver_pytorch", reason="perceiver-pytorch is not installed")
module = pytest.importorskip("perceiver_pytorch.perceiver_pytorch", reason="perceiver-pytorch is not installed")

B, BANDS, MAX_FREQ, CLASSES, VOCAB, LENGTH = 2, 3, 10.0, 5, 13, 12

# The README's sizes, scaled down; no width of heads is that of the latents.
THEIRS: dict[str, Any] = {
    "num_latents": 6, "latent_dim": 16, "cross_heads": 1, "cross_dim_head": 7, "latent_heads": 4, "latent_dim_head": 5,
}  # fmt: skip
OURS: dict[str, Any] = {
    "num_latents": 6, "latent_dim": 16, "cross_heads": 1, "qk_channels": 7, "latent_heads": 4, "latent_qk_channels": 20,
}  # fmt: skip
TWO_HEADS: tuple[dict[str, Any], dict[str, Any]] = {"cross_heads": 2}, {"cross_heads": 2, "qk_channels": 14}


@dataclass(frozen=True)
class Case:
    """A model of theirs and ours.

    Args:
        data: shape of what they read; channels last.
        theirs, ours: make the models.
        array: what ours reads, of what they read.
        asked: queries that both are given.
    """

    data: tuple[int, ...]
    theirs: Callable[..., nn.Module]
    ours: Callable[..., nn.Module]
    array: Callable[[Tensor], Any] = lambda data: data
    asked: tuple[int, ...] | None = None


def positions(axes: int) -> FourierPositions:
    return FourierPositions(BANDS, (MAX_FREQ,) * axes, order="perceiver-pytorch")


def image(data: Tensor) -> InputArray:
    return InputArray.image(data.movedim(-1, 1), positions(2))


def video(data: Tensor) -> InputArray:
    return InputArray(data.flatten(1, 3), positions(3), grid=tuple(data.shape[1:4]))


def perceiver(**changes: Any) -> Callable[[], nn.Module]:
    sizes = {
        "num_freq_bands": BANDS, "max_freq": MAX_FREQ, "num_classes": CLASSES, "depth": 3, "self_per_cross_attn": 2, **THEIRS
    }  # fmt: skip
    return lambda: library.Perceiver(**{**sizes, **changes})


def ours(**changes: Any) -> Callable[..., nn.Module]:
    sizes = {"input_dim": 17, "num_classes": CLASSES, "num_cross_attends": 3, "num_blocks": 3, **OURS}
    return lambda **more: Perceiver.perceiver_pytorch(**{**sizes, **changes, **more})


def headless(**more: Any) -> PerceiverEncoder:
    config = ours()(device="meta").config
    sizes = {name: getattr(config, name) for name in EncoderConfig.__dataclass_fields__}
    device = more.pop("device", None)
    return PerceiverEncoder(EncoderConfig(**{**sizes, **more}), device=device)


def perceiver_io(**changes: Any) -> Callable[[], nn.Module]:
    return lambda: library.PerceiverIO(**{"dim": 9, "queries_dim": 11, "logits_dim": 4, "depth": 3, **THEIRS, **changes})


def our_io(**changes: Any) -> Callable[..., nn.Module]:
    sizes = {"channels": 9, "query_channels": 11, "out_channels": 4, "num_blocks": 3, "input_dropout": 0.0, **OURS}
    return lambda **more: PerceiverIO.perceiver_pytorch(**{**sizes, **changes, **more})


def language(**changes: Any) -> Callable[[], nn.Module]:
    sizes = {"dim": 9, "num_tokens": VOCAB, "max_seq_len": LENGTH, "depth": 3, **THEIRS}
    return lambda: library.PerceiverLM(**{**sizes, **changes})


def our_language(**changes: Any) -> Callable[..., nn.Module]:
    sizes = {"vocab_size": VOCAB, "channels": 9, "max_length": LENGTH, "num_blocks": 3, **OURS}
    return lambda **more: PerceiverIO.perceiver_pytorch_lm(**{**sizes, **changes, **more})


SEQUENCE, QUERIES = (B, 10, 9), (8, 11)
CASES = {
    "image": Case((B, 4, 5, 3), perceiver(), ours(), image),
    "image, tied, two heads": Case(
        (B, 4, 5, 3), perceiver(weight_tie_layers=True, depth=4, **TWO_HEADS[0]),
        ours(weight_sharing="v1", num_cross_attends=4, num_blocks=4, **TWO_HEADS[1]), image,
    ),
    "video": Case((B, 2, 3, 4, 2), perceiver(input_axis=3, input_channels=2), ours(input_dim=23), video),
    "tokens": Case(
        (B, 10, 9), perceiver(input_axis=1, input_channels=9, fourier_encode_data=False), ours(input_dim=9)
    ),
    "cross-attends only": Case((B, 4, 5, 3), perceiver(self_per_cross_attn=0), ours(layers_per_block=0), image),
    "no classifier": Case((B, 4, 5, 3), perceiver(final_classifier_head=False), headless, image),
    "io": Case(SEQUENCE, perceiver_io(), our_io(), asked=QUERIES),
    "io, tied": Case(SEQUENCE, perceiver_io(weight_tie_layers=True), our_io(weight_sharing="v2"), asked=QUERIES),
    "io, feed-forward": Case(
        SEQUENCE, perceiver_io(decoder_ff=True, **TWO_HEADS[0]), our_io(decoder_feed_forward=True, **TWO_HEADS[1]),
        asked=(B, 3, 11),
    ),
    "io, no logits": Case(SEQUENCE, perceiver_io(logits_dim=None), our_io(out_channels=None), asked=QUERIES),
    "language": Case((B, 10), language(), our_language()),
    "language, tied, feed-forward": Case(
        (B, LENGTH), language(weight_tie_layers=True, decoder_ff=True),
        our_language(weight_sharing="v2", decoder_feed_forward=True),
    ),
}  # fmt: skip


def features_as_ours(x: Tensor, max_freq: float, num_bands: int = 4) -> Tensor:
    """Their fourier_encode with places and frequencies that were rounded to fp32 once, as ours are."""
    x = x[..., None].float().to(x)
    scales = 1 + torch.arange(num_bands, dtype=torch.float64) * ((max_freq / 2 - 1) / (num_bands - 1))
    angles = x * scales.float().to(x) * math.pi
    return torch.cat((angles.sin(), angles.cos(), x), -1)


@pytest.fixture
def exact_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fourier_encode", features_as_ours)


def models(case: Case, seed: int = 0, **changes: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    theirs, model = perturbed(case.theirs(), seed).eval(), case.ours(**changes).eval()
    convert.load(model, theirs.state_dict(), "perceiver_pytorch")
    return theirs, model


def drawn(case: Case, dtype: torch.dtype = torch.float64, seed: int = 1) -> dict[str, Tensor]:
    """Data and queries."""
    generator = torch.Generator().manual_seed(seed)
    if len(case.data) == 2:
        return {"data": torch.randint(0, VOCAB, case.data, generator=generator)}
    shapes = {"data": case.data} | ({} if case.asked is None else {"queries": case.asked})
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for name, shape in shapes.items()}


def visible(case: Case) -> Tensor:
    shape = case.data if len(case.data) == 2 else case.data[:-1]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[:, 0] = True
    return mask


def run_theirs(model: nn.Module, case: Case, inputs: dict[str, Tensor], mask: Tensor | None) -> Tensor:
    return model(inputs["data"], mask=mask, **({"queries": inputs["queries"]} if "queries" in inputs else {}))


def run_ours(model: nn.Module, case: Case, inputs: dict[str, Tensor], mask: Tensor | None) -> Tensor:
    asked = {"points": inputs["queries"]} if "queries" in inputs else {}
    array, key_mask = case.array(inputs["data"]), None if mask is None else mask.flatten(1)
    if isinstance(array, InputArray) and key_mask is not None:
        array = InputArray(array.content, array.positions, grid=array.grid, key_mask=key_mask)
        key_mask = None
    return model(array, key_mask, **asked)


def gradients(run: Callable[[dict[str, Tensor]], Tensor], model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of inputs and parameters, those of shared ones under every name."""
    leaves = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    model.zero_grad()
    out = run(leaves)
    out.backward(torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(out))
    named = dict(model.named_parameters(remove_duplicate=False)) | {n: t for n, t in leaves.items() if t.requires_grad}
    return {"out": out.detach(), **{name: leaf.grad.clone() for name, leaf in named.items()}}


def assert_same(case: Case, theirs: nn.Module, model: nn.Module, mask: Tensor | None, seed: int | None = None) -> None:
    """Output and every gradient in fp64, relative to the largest element of each."""
    inputs = drawn(case)

    def seeded(run: Any, model: nn.Module) -> dict[str, Tensor]:
        if seed is not None:
            torch.manual_seed(seed)
        return gradients(lambda leaves: run(model, case, leaves, mask), model, inputs)

    actual, expected = seeded(run_ours, model), seeded(run_theirs, theirs)
    given = {name: expected.pop(name) for name in ("out", "data", "queries") if name in expected}
    expected = given | convert.to_ours(convert.rules_of(model, "perceiver_pytorch"), expected, model.state_dict())
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert wanted.any(), name
        atol = 4096 * torch.finfo(torch.float64).eps * wanted.abs().max().item()
        torch.testing.assert_close(actual[name], wanted, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("exact_features")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_same_outputs_and_gradients(name: str, masked: bool) -> None:
    case = CASES[name]
    theirs, model = (m.double() for m in models(case))
    assert_same(case, theirs, model, visible(case) if masked else None)


@pytest.mark.usefixtures("exact_features")
@pytest.mark.parametrize("method", ["absorbed", "projected"])
@pytest.mark.parametrize("name", ["image", "io", "language"])
def test_same_by_either_method(name: str, method: str) -> None:
    case = CASES[name]
    theirs, model = (m.double() for m in models(case, method=method))
    assert_same(case, theirs, model, visible(case))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["io, feed-forward", "language"])
def test_dropped_tokens_are_theirs(name: str, masked: bool) -> None:
    """seq_dropout_prob draws as theirs does: the same seed keeps the same tokens."""
    case, share = CASES[name], {"seq_dropout_prob": 0.35}
    two_heads = TWO_HEADS[0] if name.startswith("io") else {}
    build = perceiver_io(decoder_ff=True, **two_heads, **share) if name.startswith("io") else language(**share)
    theirs, model = perturbed(build()).double().train(), case.ours(input_dropout=0.35).double().train()
    convert.load(model, theirs.state_dict(), "perceiver_pytorch")
    mask = visible(case) if masked else None
    assert_same(case, theirs, model, mask, seed=3)
    inputs = drawn(case)
    torch.manual_seed(3)
    dropped = run_ours(model, case, inputs, mask)
    assert not torch.allclose(dropped, run_ours(model.eval(), case, inputs, mask)), "something was dropped"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tokens", "io", "language"])
def test_as_accurate_as_the_original(name: str, dtype: torch.dtype) -> None:
    """Over many models: one may be right by luck."""
    case, compared = CASES[name], []
    for seed in range(8):
        theirs, model = (m.to(dtype) for m in models(case, seed))
        inputs = drawn(case, dtype, seed)
        with torch.no_grad():
            actual, eager = run_ours(model, case, inputs, None), run_theirs(theirs, case, inputs, None)
            exact = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
            compared.append((actual, eager, run_theirs(theirs.double(), case, exact, None)))
    assert_as_accurate(*(torch.stack(results) for results in zip(*compared, strict=True)), "result")


@pytest.mark.parametrize("name", ["image", "video"])
def test_features_as_they_are(name: str) -> None:
    """Their own Fourier features, in fp32 as users run them."""
    case = CASES[name]
    theirs, model = models(case)
    inputs = drawn(case, torch.float32)
    with torch.no_grad():
        expected = run_theirs(theirs, case, inputs, None)
        torch.testing.assert_close(run_ours(model, case, inputs, None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name: str) -> None:
    case = CASES[name]
    theirs, model = models(case)
    back, state = convert.to_library(model, "perceiver_pytorch"), theirs.state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[key], tensor) for key, tensor in state.items())
    perturbed(model, 5)
    theirs.load_state_dict(convert.to_library(model, "perceiver_pytorch"))
    again = case.ours()
    convert.load(again, theirs.state_dict(), "perceiver_pytorch")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert model.num_params() == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize(
    ("theirs", "build"),
    [
        (
            lambda: library.Perceiver(
                input_channels=3, input_axis=2, num_freq_bands=6, max_freq=10.0, depth=6, num_latents=256, latent_dim=512,
                self_per_cross_attn=2,
            ),
            Perceiver.perceiver_pytorch,
        ),
        (
            lambda: library.PerceiverIO(
                dim=32, queries_dim=32, logits_dim=100, depth=6, num_latents=256, latent_dim=512, seq_dropout_prob=0.2
            ),
            PerceiverIO.perceiver_pytorch,
        ),
        (
            lambda: library.PerceiverLM(
                num_tokens=20_000, dim=32, depth=6, max_seq_len=2048, num_latents=256, latent_dim=512
            ),
            PerceiverIO.perceiver_pytorch_lm,
        ),
    ],
)  # fmt: skip
def test_readme_sizes(theirs: Callable[[], nn.Module], build: Callable[..., nn.Module]) -> None:
    model = build(device="meta")
    with torch.device("meta"):
        state = theirs().state_dict()
    shapes = {name: tensor.shape for name, tensor in convert.to_library(model, "perceiver_pytorch").items()}
    assert shapes == {name: tensor.shape for name, tensor in state.items()}


def test_shared_weights_of_files() -> None:
    """They may be left out, and must be the same."""
    case = CASES["image, tied, two heads"]
    theirs, model = models(case)
    state = dict(theirs.state_dict())
    without = {name: t for name, t in state.items() if not name.startswith(("layers.2.", "layers.3."))}
    copy = case.ours()
    convert.load(copy, without, "perceiver_pytorch")
    assert all(torch.equal(tensor, copy.state_dict()[key]) for key, tensor in model.state_dict().items())
    other = "layers.3.cross_attn.fn.to_kv.weight"
    message = f"of shared weights that differ: {other} from layers.1.cross_attn.fn.to_kv.weight$"
    with pytest.raises(ValueError, match=message):
        convert.load(copy, state | {other: state[other] + 1}, "perceiver_pytorch")


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (
        lambda: Perceiver.imagenet(device="meta", num_cross_attends=2, head_norm=True),
        "model must be built as perceiver_pytorch's, got qkv_bias=True instead of False, cross_widening_factor=1 instead of 4, "
        "latent_widening_factor=1 instead of 4, activation='gelu' instead of 'geglu', num_cross_attends=2 instead of 8",
    ),
    (lambda: ours(head_norm=False)(device="meta"), "got head_norm=False instead of True"),
    (lambda: ours(v_channels=8)(device="meta"), "got v_channels=8 instead of 7"),
    (lambda: ours(latent_v_channels=8)(device="meta"), "got latent_v_channels=8 instead of 20"),
    (lambda: ours(cross_attends="start")(device="meta"), "got cross_attends='start' instead of 'interleaved'"),
    (lambda: our_io(layers_per_block=2)(device="meta"), "got layers_per_block=2 instead of 1"),
    (lambda: PerceiverIO.language(device="meta"), "got TextPreprocessor, LearnedQueries, TokenHead"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_what_the_library_has_no_model_for_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert.to_library(build(), "perceiver_pytorch")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("residual", True, "decoder must be built as perceiver_pytorch's, got residual=True instead of False"),
        ("num_heads", 7, "got num_heads=7 instead of 1"),
    ],
)
def test_other_decoders_are_refused(name: str, value: Any, message: str) -> None:
    model = our_io()()
    setattr(model.decoder.attention, name, value)
    with pytest.raises(ValueError, match=message):
        convert.to_library(model, "perceiver_pytorch")
