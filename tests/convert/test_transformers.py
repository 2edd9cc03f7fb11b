"""The seven Perceiver classes of transformers and PerceiverIO: weights both ways, outputs and every gradient in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import convert
from perceiver_kernels.inputs import FourierPositions
from perceiver_kernels.models import PerceiverIO

transformers = pytest.importorskip("transformers", minversion="5.0")
modeling = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")


def features_in_fp64(
    pos: Tensor, num_bands: int, max_resolution: tuple[int, ...], concat_pos: bool = True, sine_only: bool = False
) -> Tensor:
    """Their generate_fourier_features without its fp32: at 112 half turns fp32 leaves an error of 2e-5 in a sine."""
    assert concat_pos and not sine_only
    pos = pos.double()
    steps = torch.tensor([[(size / 2 - 1) / (num_bands - 1)] for size in max_resolution], dtype=torch.float64)
    bands = (1 + torch.arange(num_bands) * steps).float().double()
    phases = torch.pi * (pos[..., None] * bands).flatten(2)
    return torch.cat((pos, phases.sin(), phases.cos()), 2)


def rounded_once(index_dims: Any, output_range: Any = (-1.0, 1.0), device: Any = None) -> Tensor:
    """Their build_linear_positions, whose fp32 places are some of them an ulp away."""
    axes = [torch.linspace(*output_range, size, dtype=torch.float64).float() for size in index_dims]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


@pytest.fixture
def exact_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling, "build_linear_positions", rounded_once)
    monkeypatch.setattr(modeling, "generate_fourier_features", features_in_fp64)

SIZES: dict[str, Any] = {
    "num_latents": 12, "d_latents": 32, "num_blocks": 2, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1, "self_attention_widening_factor": 2, "cross_attention_widening_factor": 3, "num_labels": 5,
    "attention_probs_dropout_prob": 0.0, "cross_attention_shape_for_attention": "kv",
}  # fmt: skip
OURS: dict[str, Any] = {
    "num_latents": 12, "latent_dim": 32, "num_blocks": 2, "layers_per_block": 2, "latent_heads": 4,
    "latent_widening_factor": 2, "cross_widening_factor": 3, "like": "transformers",
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 20, "d_model": 24, "max_position_embeddings": 16, "qk_channels": 16, "v_channels": 32,
    "num_cross_attention_heads": 8, "num_self_attention_heads": 8,
}  # fmt: skip
OUR_TEXT: dict[str, Any] = {
    "vocab_size": 20, "channels": 24, "max_length": 16, "cross_heads": 8, "latent_heads": 8, "qk_channels": 16,
    "v_channels": 32, "latent_qk_channels": 16, "latent_v_channels": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One of their classes and our constructor for it.

    Args:
        theirs: the class's name.
        sizes: of its configuration.
        ours: makes our model.
        inputs: what both read.
        points: the outputs that are asked for; theirs has several modalities' outputs only so.
    """

    theirs: str
    sizes: dict[str, Any]
    ours: Callable[[], PerceiverIO]
    inputs: Callable[[], Any]
    points: dict[str, Any] | None = None

    @property
    def theirs_asked(self) -> dict[str, Any]:
        return {"subsampled_output_points": self.points} if self.points else {}

    @property
    def ours_asked(self) -> dict[str, Any]:
        return {"points": self.points} if self.points else {}


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64)


def ids(length: int) -> Tensor:
    return torch.randint(0, 20, (2, length))


def media() -> dict[str, Tensor]:
    return {
        "image": torch.randn(2, 2, 3, 8, 8, dtype=torch.float64), "audio": torch.randn(2, 16, 1, dtype=torch.float64),
        "label": torch.rand(2, 5, dtype=torch.float64),
    }  # fmt: skip


MULTIMODAL: dict[str, Any] = {
    "num_frames": 2, "audio_samples_per_frame": 8, "samples_per_patch": 4, "image_size": 2, "output_shape": [2, 2, 8, 8],
    "output_num_channels": 24, "_label_trainable_num_channels": 40,
}  # fmt: skip
PAIRS = {
    "fourier": Pair(
        "PerceiverForImageClassificationFourier", SIZES, lambda: PerceiverIO.imagenet_fourier(num_classes=5, **OURS),
        lambda: images(9),
    ),
    "learned": Pair(
        "PerceiverForImageClassificationLearned", SIZES | {"image_size": 6},
        lambda: PerceiverIO.imagenet_learned(image_size=6, num_classes=5, **OURS), lambda: images(6),
    ),
    "conv": Pair(
        "PerceiverForImageClassificationConvProcessing", SIZES, lambda: PerceiverIO.imagenet_conv(num_classes=5, **OURS),
        lambda: images(32),
    ),
    "flow": Pair(
        "PerceiverForOpticalFlow", SIZES | {"train_size": [5, 7]}, lambda: PerceiverIO.optical_flow(size=(5, 7), **OURS),
        lambda: torch.randn(2, 2, 27, 5, 7, dtype=torch.float64),
    ),
    "masked language": Pair(
        "PerceiverForMaskedLM", SIZES | TEXT, lambda: PerceiverIO.language(**OURS | OUR_TEXT), lambda: ids(16)
    ),
    "text classes": Pair(
        "PerceiverForSequenceClassification", SIZES | TEXT,
        lambda: PerceiverIO.text_classifier(num_classes=5, **OURS | OUR_TEXT), lambda: ids(11),
    ),
    "multimodal": Pair(
        "PerceiverForMultimodalAutoencoding", SIZES | MULTIMODAL,
        lambda: PerceiverIO.multimodal(
            frames=2, image_size=8, samples_per_frame=8, samples_per_patch=4, num_classes=5, hidden_channels=24,
            label_query_channels=40, **OURS,
        ),
        media, {"image": torch.arange(128), "audio": torch.arange(4), "label": None},
    ),
}  # fmt: skip


def their_model(pair: Pair) -> nn.Module:
    """With random weights, no bias zero and no LayerNorm weight one; running statistics random too."""
    torch.manual_seed(0)
    config = transformers.PerceiverConfig(**pair.sizes)
    model = getattr(transformers, pair.theirs)(config).double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(torch.rand_like(tensor), alpha=0.2)
    return model


def leaves_of(outputs: Any) -> list[Tensor]:
    return [outputs[name] for name in sorted(outputs)] if isinstance(outputs, dict) else [outputs]


def assert_same_model(pair: Pair, ours: PerceiverIO, theirs: nn.Module, their_kwargs: Any, our_kwargs: Any) -> None:
    """Outputs, and the gradients of every parameter and of floating-point inputs."""
    torch.manual_seed(1)
    inputs = pair.inputs()
    floats = [t for t in (inputs.values() if isinstance(inputs, dict) else [inputs]) if t.is_floating_point()]
    for tensor in floats:
        tensor.requires_grad_()
    expected = leaves_of(theirs(inputs, **their_kwargs).logits)
    actual = leaves_of(ours(inputs, **our_kwargs))
    torch.manual_seed(2)
    upstream = [torch.randn_like(tensor) for tensor in expected]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)
    their_leaves = [*floats, *theirs.parameters()]
    our_leaves = [*floats, *ours.parameters()]
    their_grads = torch.autograd.grad(expected, their_leaves, upstream, allow_unused=True)
    our_grads = torch.autograd.grad(actual, our_leaves, upstream, allow_unused=True)
    for a, e in zip(our_grads[: len(floats)], their_grads[: len(floats)], strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-9)
    # Gradients as state dicts, so that the rules say which belongs to which.
    zeros = {name: torch.zeros_like(tensor) for name, tensor in theirs.state_dict().items()}
    named = (name for name, _ in theirs.named_parameters())
    their_state = zeros | {n: g for n, g in zip(named, their_grads[len(floats) :], strict=True) if g is not None}
    wanted = convert.to_ours(convert.rules_of(ours, "transformers"), their_state, ours.state_dict())
    for (name, _), gradient in zip(ours.named_parameters(), our_grads[len(floats) :], strict=True):
        found = torch.zeros_like(wanted[name]) if gradient is None else gradient
        torch.testing.assert_close(found, wanted[name], rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", list(PAIRS))
@pytest.mark.usefixtures("exact_features")
class TestEveryClass:
    def test_same_outputs_and_gradients(self, name: str) -> None:
        pair = PAIRS[name]
        theirs, ours = their_model(pair), pair.ours().double().eval()
        convert.load(ours, theirs.state_dict(), "transformers")
        assert_same_model(pair, ours, theirs, pair.theirs_asked, pair.ours_asked)

    def test_weights_there_and_back(self, name: str) -> None:
        pair = PAIRS[name]
        theirs, ours = their_model(pair), pair.ours().double()
        convert.load(ours, theirs.state_dict(), "transformers")
        back = convert.to_library(ours, "transformers")
        state = theirs.state_dict()
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
        theirs.load_state_dict(back)

    def test_parameters_are_as_many(self, name: str) -> None:
        pair = PAIRS[name]
        assert pair.ours().num_params() == sum(p.numel() for p in their_model(pair).parameters())


@pytest.mark.parametrize("name", ["fourier", "conv", "flow", "multimodal"])
def test_as_they_are_outputs_agree_to_fp32_features(name: str) -> None:
    pair = PAIRS[name]
    theirs, ours = their_model(pair), pair.ours().double().eval()
    convert.load(ours, theirs.state_dict(), "transformers")
    inputs = pair.inputs()
    expected = theirs(inputs, **pair.theirs_asked).logits
    for a, e in zip(leaves_of(ours(inputs, **pair.ours_asked)), leaves_of(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["masked language", "text classes"])
def test_masked_tokens(name: str) -> None:
    pair = PAIRS[name]
    theirs, ours = their_model(pair), pair.ours().double().eval()
    convert.load(ours, theirs.state_dict(), "transformers")
    mask = torch.ones(2, pair.inputs().shape[1], dtype=torch.bool)
    mask[0, 7:], mask[1, 3] = False, False
    assert_same_model(pair, ours, theirs, {"attention_mask": mask}, {"key_mask": mask})


@pytest.mark.usefixtures("exact_features")
def test_some_outputs_of_several_modalities() -> None:
    pair = PAIRS["multimodal"]
    theirs, ours = their_model(pair), pair.ours().double().eval()
    convert.load(ours, theirs.state_dict(), "transformers")
    points = {"image": torch.tensor([5, 0, 77, 127]), "audio": torch.tensor([3, 1]), "label": None}
    assert_same_model(pair, ours, theirs, {"subsampled_output_points": points}, {"points": points})


def test_files(tmp_path: Any) -> None:
    pair = PAIRS["fourier"]
    theirs, ours, again = their_model(pair), pair.ours().double(), pair.ours().double()
    convert.load(ours, theirs.state_dict(), "transformers")
    convert.save(ours, tmp_path / "theirs.safetensors", "transformers")
    convert.save(ours, tmp_path / "ours.safetensors")
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    for file, library in (("theirs.safetensors", "transformers"), ("ours.safetensors", None), ("theirs.pt", "transformers")):
        again.load_state_dict({name: torch.zeros_like(t) for name, t in again.state_dict().items()})
        convert.load(again, tmp_path / file, library)
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in ours.state_dict().items())


def test_what_does_not_fit_is_listed_and_nothing_is_loaded() -> None:
    pair = PAIRS["fourier"]
    theirs, ours = their_model(pair), pair.ours().double()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    state = dict(theirs.state_dict())
    del state["perceiver.embeddings.latents"]
    state["head.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match="it lacks: perceiver.embeddings.latents\n  it has besides: head.weight"):
        convert.load(ours, state, "transformers")
    state = dict(theirs.state_dict()) | {"perceiver.embeddings.latents": torch.zeros(3, 32)}
    with pytest.raises(ValueError, match=r"of wrong shape: perceiver.embeddings.latents \(3, 32\) instead of \(12, 32\)"):
        convert.load(ours, state, "transformers")
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_unknown_libraries_and_models_are_named() -> None:
    model = PAIRS["fourier"].ours()
    with pytest.raises(ValueError, match="library must be one of .*'transformers'.*, got 'keras'"):
        convert.to_library(model, "keras")
    with pytest.raises(ValueError, match="transformers has no model like Linear, but .*PerceiverIO"):
        convert.to_library(nn.Linear(2, 2), "transformers")
    several = PerceiverIO.imagenet_fourier(num_classes=5, **OURS | {"num_cross_attends": 2})
    with pytest.raises(ValueError, match="transformers has one cross-attend"):
        convert.to_library(several, "transformers")


ONE_HEAD: dict[str, Any] = {"num_cross_attention_heads": 1, "cross_attention_shape_for_attention": "kv"}
IMAGENET: dict[str, Any] = {
    "num_latents": 512, "d_latents": 1024, "num_blocks": 8, "num_self_attends_per_block": 6, "num_labels": 1000, **ONE_HEAD,
}  # fmt: skip


def photographs() -> Tensor:
    return torch.randn(1, 3, 224, 224)


def video() -> dict[str, Tensor]:
    return {"image": torch.randn(1, 16, 3, 224, 224), "audio": torch.randn(1, 30_720, 1), "label": torch.rand(1, 700)}


PUBLISHED = {
    "fourier": Pair(
        "PerceiverForImageClassificationFourier", IMAGENET, lambda: PerceiverIO.imagenet_fourier(like="transformers"),
        photographs,
    ),
    "learned": Pair(
        "PerceiverForImageClassificationLearned", IMAGENET | {"image_size": 224},
        lambda: PerceiverIO.imagenet_learned(like="transformers"), photographs,
    ),
    "conv": Pair(
        "PerceiverForImageClassificationConvProcessing", IMAGENET, lambda: PerceiverIO.imagenet_conv(like="transformers"),
        photographs,
    ),
    "masked language": Pair(
        "PerceiverForMaskedLM",
        {"num_attention_heads": 8, "num_cross_attention_heads": 8, "qk_channels": 256, "v_channels": 1280},
        lambda: PerceiverIO.language(like="transformers"), lambda: torch.randint(0, 262, (1, 2048)),
    ),
    "flow": Pair(
        "PerceiverForOpticalFlow",
        {
            "num_latents": 2048, "d_latents": 512, "num_blocks": 1, "num_self_attends_per_block": 24,
            "num_self_attention_heads": 16, **ONE_HEAD,
        },
        lambda: PerceiverIO.optical_flow(like="transformers"), lambda: torch.randn(1, 2, 27, 368, 496),
    ),
    "multimodal": Pair(
        "PerceiverForMultimodalAutoencoding",
        {"num_latents": 784, "d_latents": 512, "num_blocks": 1, "num_self_attends_per_block": 8, "num_labels": 700, **ONE_HEAD},
        lambda: PerceiverIO.multimodal(like="transformers"), video,
        {"image": torch.arange(6272), "audio": torch.arange(15), "label": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_sizes(name: str) -> None:
    """Shapes of all weights, and the frequencies of positions, which no shape tells."""
    pair = PUBLISHED[name]
    with torch.device("meta"):
        theirs, ours = getattr(transformers, pair.theirs)(transformers.PerceiverConfig(**pair.sizes)), pair.ours()
    state = convert.to_ours(convert.rules_of(ours, "transformers"), theirs.state_dict(), ours.state_dict())
    assert {key: tensor.shape for key, tensor in state.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    expected = {
        (module.num_bands, tuple(module.max_resolution))
        for module in theirs.modules()
        if isinstance(module, modeling.PerceiverFourierPositionEncoding)
    }
    positions = [p for module in ours.modules() if isinstance(p := getattr(module, "positions", None), FourierPositions)]
    assert {(p.num_bands, tuple(p.max_resolution)) for p in positions} == expected


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_sizes_on_a_gpu(name: str) -> None:
    """Outputs in fp32, which both round: the difference is far below what the weights' own rounding to fp16 makes."""
    pair = PUBLISHED[name]
    torch.manual_seed(0)
    theirs = getattr(transformers, pair.theirs)(transformers.PerceiverConfig(**pair.sizes)).cuda().eval()
    ours = pair.ours().cuda().eval()
    convert.load(ours, theirs.state_dict(), "transformers")
    inputs = pair.inputs()
    inputs = {key: tensor.cuda() for key, tensor in inputs.items()} if isinstance(inputs, dict) else inputs.cuda()
    with torch.no_grad():
        expected, actual = theirs(inputs, **pair.theirs_asked).logits, ours(inputs, **pair.ours_asked)
    for a, e in zip(leaves_of(actual), leaves_of(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3 * e.abs().max().item())
