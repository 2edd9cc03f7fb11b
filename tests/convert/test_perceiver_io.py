"""krasserm's perceiver-io: weights of its Perceiver IO models in ours and back, the same outputs and gradients in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import convert
from perceiver_kernels.inputs import FourierPositions
from perceiver_kernels.models import EncoderConfig, Perceiver, PerceiverEncoder, PerceiverIO
from perceiver_kernels.models.heads import PatchHead, PlainHead
from perceiver_kernels.models.preprocessing import ArrayPreprocessor, PixelPreprocessor, TextPreprocessor
from perceiver_kernels.models.queries import GivenQueries, LearnedQueries
from perceiver_kernels.nn import OutputBlock
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.convert.krasserm import assert_same, gradients, needs_perceiver_io
from tests.convert.krasserm import theirs as library
from tests.modules import perturbed

pytestmark = needs_perceiver_io

B = 2

# The sizes of the library's examples, scaled down.
ENCODER: dict[str, Any] = {
    "num_cross_attention_heads": 1, "num_self_attention_heads": 4, "num_self_attention_layers_per_block": 2,
    "cross_attention_widening_factor": 2, "self_attention_widening_factor": 3,
}  # fmt: skip
OURS: dict[str, Any] = {
    "num_latents": 6, "latent_dim": 16, "cross_heads": 1, "latent_heads": 4, "layers_per_block": 2,
    "cross_widening_factor": 2, "latent_widening_factor": 3, "attention_dropout": 0.0,
}  # fmt: skip
LATENTS: dict[str, int] = {"num_latents": 6, "num_latent_channels": 16}
TEXT: dict[str, Any] = {"vocab_size": 13, "max_seq_len": 12, "num_input_channels": 10}
OUR_TEXT: dict[str, Any] = {"vocab_size": 13, "channels": 10, "max_length": 12}
SEVERAL: dict[str, Any] = {"num_self_attention_blocks": 4, "num_cross_attention_layers": 2}
OUR_SEVERAL: dict[str, Any] = {"num_blocks": 4, "num_cross_attends": 2, "cross_attends": "leading"}


def classes(**changes: Any) -> Any:
    sizes = {"num_output_query_channels": 8, "num_cross_attention_heads": 2, "num_classes": 5}
    return library.config.ClassificationDecoderConfig(**{**sizes, **changes})


def image_classifier(**changes: Any) -> nn.Module:
    encoder = library.image.ImageEncoderConfig(**{"image_shape": (5, 4, 1), "num_frequency_bands": 3, **ENCODER, **changes})
    return library.image.ImageClassifier(library.image.ImageClassifierConfig(encoder, classes(), **LATENTS))


def our_image_classifier(**changes: Any) -> PerceiverIO:
    sizes = {"image_size": (5, 4), "num_bands": 3, "num_classes": 5, "query_channels": 8, "decoder_heads": 2}
    return PerceiverIO.mnist(**{**sizes, **OURS, **OUR_SEVERAL, **changes})


def text_classifier(residual: bool = True, **changes: Any) -> nn.Module:
    widths = {"num_cross_attention_qk_channels": 6, "num_cross_attention_v_channels": 9}
    encoder = library.classifier.TextEncoderConfig(**{**TEXT, **ENCODER, **widths, **changes})
    decoder = classes(cross_attention_residual=residual)
    return library.classifier.TextClassifier(library.classifier.TextClassifierConfig(encoder, decoder, **LATENTS))


def our_text_classifier(**changes: Any) -> PerceiverIO:
    sizes = {**OUR_TEXT, "num_classes": 5, "query_channels": 8, "decoder_heads": 2, "qk_channels": 6, "v_channels": 9}
    return PerceiverIO.imdb(**{**sizes, **OURS, "latent_qk_channels": None, "latent_v_channels": None, **changes})


LANGUAGE: dict[str, Any] = {
    "num_cross_attention_heads": 2, "num_cross_attention_qk_channels": 6, "num_cross_attention_v_channels": 12,
    "num_self_attention_qk_channels": 8, "num_self_attention_v_channels": 12,
}  # fmt: skip


def language_model(query_channels: int | None = None) -> nn.Module:
    encoder = library.language.TextEncoderConfig(**{**TEXT, **ENCODER, **LANGUAGE})
    decoder = library.language.TextDecoderConfig(
        num_output_query_channels=query_channels, vocab_size=13, max_seq_len=12, num_cross_attention_heads=2,
        num_cross_attention_qk_channels=6, num_cross_attention_v_channels=10, cross_attention_residual=False,
    )  # fmt: skip
    return library.language.MaskedLanguageModel(
        library.language.MaskedLanguageModelConfig(encoder, decoder, **LATENTS)
    )


OUR_LANGUAGE: dict[str, Any] = {
    **OURS, "cross_heads": 2, "qk_channels": 6, "v_channels": 12, "latent_qk_channels": 8, "latent_v_channels": 12,
}  # fmt: skip


def our_language_model(**changes: Any) -> PerceiverIO:
    sizes = {**OUR_TEXT, "decoder_heads": 2, "decoder_qk_channels": 6, "like": "transformers"}
    return PerceiverIO.language(**{**sizes, **OUR_LANGUAGE, **changes})


def our_untied_language_model(device: Any = None, dtype: Any = None) -> PerceiverIO:
    """Of parts: queries of their own width, logits by a linear layer."""
    where = {"device": device, "dtype": dtype}
    fields = {"input_dim": 10, "num_cross_attends": 1, "num_blocks": 1, **OUR_LANGUAGE}
    return PerceiverIO(
        TextPreprocessor(13, 10, 12, **where), PerceiverEncoder(EncoderConfig(**fields), **where),
        LearnedQueries(12, 14, like_inputs=True, **where),
        OutputBlock(14, 16, num_heads=2, qk_channels=6, v_channels=10, **where), PatchHead(14, 13, **where),
    )  # fmt: skip


def optical_flow() -> nn.Module:
    sizes = {"image_shape": (4, 5), "num_patch_input_channels": 27, "num_patch_hidden_channels": 64, "num_frequency_bands": 64}
    flow = library.flow
    decoder = flow.OpticalFlowDecoderConfig(
        image_shape=(4, 5), num_cross_attention_heads=1, num_cross_attention_qk_channels=16,
        num_cross_attention_v_channels=16, cross_attention_residual=False,
    )  # fmt: skip
    return flow.OpticalFlow(flow.OpticalFlowConfig(flow.OpticalFlowEncoderConfig(**sizes, **ENCODER), decoder, **LATENTS))


@dataclass(frozen=True)
class Case:
    """A model of theirs and ours.

    Args:
        data: shape of what they read; of token ids where it has two axes.
        array: what ours reads, of what they read.
        masked: whether theirs takes a mask.
    """

    data: tuple[int, ...]
    theirs: Callable[[], nn.Module]
    ours: Callable[..., PerceiverIO]
    array: Callable[[Tensor], Tensor] = lambda data: data
    masked: bool = True


def channels_first(images: Tensor) -> Tensor:
    return images.movedim(-1, 1)


CASES = {
    "image": Case((B, 5, 4, 1), lambda: image_classifier(first_self_attention_block_shared=False, **SEVERAL),
                  our_image_classifier, channels_first),
    "image, first block alike": Case(
        (B, 5, 4, 1), lambda: image_classifier(**SEVERAL),
        lambda **c: our_image_classifier(weight_sharing="v2", **c), channels_first,
    ),
    "image, all alike": Case(
        (B, 5, 4, 1), lambda: image_classifier(first_cross_attention_layer_shared=True, **SEVERAL),
        lambda **c: our_image_classifier(weight_sharing="v2", cross_weight_sharing="v2", **c), channels_first,
    ),
    "image, cross-attends alike": Case(
        (B, 5, 4, 1),
        lambda: image_classifier(
            first_cross_attention_layer_shared=True, first_self_attention_block_shared=False,
            **{**SEVERAL, "num_cross_attention_layers": 4},
        ),
        lambda **c: our_image_classifier(cross_weight_sharing="v2", num_cross_attends=4, **c), channels_first,
    ),
    "text classes": Case((B, 9), text_classifier, our_text_classifier),
    "language": Case((B, 9), language_model, our_language_model),
    "language, untied": Case((B, 9), lambda: language_model(14), our_untied_language_model),
    "flow": Case(
        (B, 2, 27, 4, 5), optical_flow,
        lambda **c: PerceiverIO.optical_flow(
            size=(4, 5), like="transformers", **{**OURS, "num_blocks": 1, "num_cross_attends": 1, **c}
        ),
        masked=False,
    ),
}  # fmt: skip


def models(case: Case, seed: int = 0, **changes: Any) -> tuple[nn.Module, PerceiverIO]:
    torch.manual_seed(seed)
    theirs, model = perturbed(case.theirs(), seed).eval(), case.ours(**changes).eval()
    convert.load(model, theirs.state_dict(), "perceiver_io")
    return theirs, model


def with_exact_features(theirs: nn.Module) -> nn.Module:
    """In fp64, their Fourier features too, of places and frequencies that were rounded to fp32 once, as ours are."""
    theirs = theirs.double()
    for part in theirs.modules():
        if isinstance(part, library.position.FourierPositionEncoding):
            axes = [torch.linspace(-1, 1, n, dtype=torch.float64).float().double() for n in part.input_shape]
            places = torch.meshgrid(*axes, indexing="ij")
            count = part.num_frequency_bands
            steps = [torch.arange(count, dtype=torch.float64) * ((n / 2 - 1) / (count - 1)) for n in part.input_shape]
            angles = [math.pi * p[..., None] * (1 + s).float().double() for p, s in zip(places, steps, strict=True)]
            features = [torch.stack(places, -1), *(a.sin() for a in angles), *(a.cos() for a in angles)]
            part.position_encoding = torch.cat(features, -1).flatten(0, -2)
    return theirs


def drawn(case: Case, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if len(case.data) == 2:
        return torch.randint(0, 13, case.data, generator=generator)
    return torch.randn(case.data, dtype=torch.float64, generator=generator).to(dtype)


def padded(case: Case) -> Tensor:
    """True where there is padding."""
    length = case.data[1] if len(case.data) == 2 else math.prod(case.data[1:3])
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[:, 0] = False
    return mask


def run_theirs(model: nn.Module, case: Case, data: Tensor, mask: Tensor | None) -> Tensor:
    return model(data, pad_mask=mask) if case.masked else model(data)


def run_ours(model: nn.Module, case: Case, data: Tensor, mask: Tensor | None) -> Tensor:
    return model(case.array(data), None if mask is None else ~mask)


@pytest.mark.parametrize(("name", "masked"), [(n, m) for n, case in CASES.items() for m in (False, True)[: 1 + case.masked]])
def test_same_outputs_and_gradients(name: str, masked: bool) -> None:
    case = CASES[name]
    theirs, model = models(case)
    theirs, model, data, mask = with_exact_features(theirs), model.double(), drawn(case), padded(case) if masked else None
    expected = gradients(lambda data: run_theirs(theirs, case, data, mask), theirs, data)
    assert_same(gradients(lambda data: run_ours(model, case, data, mask), model, data), expected, model)


def test_a_decoder_without_residual() -> None:
    """Its names are others."""
    case = CASES["text classes"]
    theirs, model = perturbed(text_classifier(residual=False)).double().eval(), case.ours().double().eval()
    model.decoder.attention.residual = False
    convert.load(model, theirs.state_dict(), "perceiver_io")
    torch.testing.assert_close(model(drawn(case)), theirs(drawn(case)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["text classes", "language"])
def test_as_accurate_as_the_original(name: str, dtype: torch.dtype) -> None:
    """Over many models: one may be right by luck."""
    case, compared = CASES[name], []
    for seed in range(8):
        theirs, model = (m.to(dtype) for m in models(case, seed))
        data = drawn(case, dtype, seed)
        with torch.no_grad():
            actual, eager = run_ours(model, case, data, None), run_theirs(theirs, case, data, None)
            compared.append((actual, eager, run_theirs(theirs.double(), case, data, None)))
    assert_as_accurate(*(torch.stack(results) for results in zip(*compared, strict=True)), "result")


@pytest.mark.parametrize("name", ["image", "flow"])
def test_features_as_they_are(name: str) -> None:
    """Their own Fourier features, in fp32 as users run them."""
    case = CASES[name]
    theirs, model = models(case)
    data = drawn(case, torch.float32)
    with torch.no_grad():
        expected = run_theirs(theirs, case, data, None)
        torch.testing.assert_close(run_ours(model, case, data, None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name: str) -> None:
    """Buffers of Fourier features included."""
    case = CASES[name]
    theirs, model = models(case)
    back, state = convert.to_library(model, "perceiver_io"), theirs.state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[key], tensor) for key, tensor in state.items())
    perturbed(model, 5)
    theirs.load_state_dict(convert.to_library(model, "perceiver_io"))
    again = case.ours()
    convert.load(again, theirs.state_dict(), "perceiver_io")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert model.num_params() == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize(
    ("name", "build", "config"),
    [
        (
            "image", PerceiverIO.mnist,
            lambda: library.image.ImageClassifier(library.image.ImageClassifierConfig(
                library.image.ImageEncoderConfig(
                    image_shape=(28, 28, 1), num_cross_attention_layers=2, num_cross_attention_heads=1,
                    num_self_attention_blocks=3, num_self_attention_layers_per_block=3, first_self_attention_block_shared=False,
                ),
                classes(num_output_query_channels=128, num_cross_attention_heads=1, num_classes=10),
                num_latents=32, num_latent_channels=128,
            )),
        ),
        (
            "text", PerceiverIO.imdb,
            lambda: library.classifier.TextClassifier(library.classifier.TextClassifierConfig(
                library.classifier.TextEncoderConfig(
                    vocab_size=262, max_seq_len=2048, num_input_channels=768, num_self_attention_layers_per_block=26,
                    num_cross_attention_qk_channels=256, num_cross_attention_v_channels=1280,
                    num_self_attention_qk_channels=256, num_self_attention_v_channels=1280,
                ),
                classes(num_output_query_channels=768, num_cross_attention_heads=1, num_classes=2),
                num_latents=256, num_latent_channels=1280,
            )),
        ),
    ],
)  # fmt: skip
def test_published_sizes(name: str, build: Callable[..., PerceiverIO], config: Callable[[], nn.Module]) -> None:
    model = build(device="meta")
    with torch.device("meta"):
        state = config().state_dict()
    shapes = {key: tensor.shape for key, tensor in convert.to_library(model, "perceiver_io").items()}
    assert shapes == {key: tensor.shape for key, tensor in state.items()}
    if name == "image":
        assert round(model.num_params() / 1e3) == 907


def of_parts(**parts: Any) -> PerceiverIO:
    encoder = PerceiverEncoder(EncoderConfig(input_dim=8, num_latents=2, latent_dim=8, num_blocks=1, num_cross_attends=1))
    common = {"preprocessor": TextPreprocessor(5, 8, 4), "queries": LearnedQueries(1, 8), "head": PatchHead(8, 3)}
    chosen = {**common, "decoder": OutputBlock(8, 8), **parts}
    return PerceiverIO(encoder=encoder, **chosen)


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: PerceiverIO.imagenet_fourier(device="meta"), "got activation='gelu_tanh' instead of 'gelu'$"),
    (
        lambda: our_image_classifier(cross_attends="interleaved"),
        r"got schedule=\(\('cross', 0\), \('block', 0\), \('block', 1\), \('cross', 1\)",
    ),
    (lambda: our_image_classifier(weight_sharing="none"), "got schedule="),
    (lambda: our_image_classifier(qkv_bias=False), "got qkv_bias=False instead of True"),
    (lambda: our_image_classifier(eps=1e-6), "got eps=1e-06 instead of 1e-05"),
    (lambda: our_image_classifier(cross_residual=False), "got cross_residual=False instead of True"),
    (lambda: of_parts(preprocessor=ArrayPreprocessor(8)), "perceiver_io has no preprocessor like ArrayPreprocessor"),
    (lambda: of_parts(queries=GivenQueries(8)), "perceiver_io has no queries like GivenQueries"),
    (lambda: of_parts(head=PlainHead()), "perceiver_io has no head like PlainHead"),
    (lambda: of_parts(decoder=OutputBlock(8, 8, feed_forward=False)), "got decoder.feed_forward=None instead of 'gelu'"),
    (lambda: of_parts(decoder=OutputBlock(8, 8, qkv_bias=False)), "got decoder.qkv_bias=False instead of True"),
    (lambda: of_parts(decoder=OutputBlock(8, 8, eps=1e-6)), "got decoder.eps=1e-06 instead of 1e-05"),
    (lambda: Perceiver.imagenet(device="meta"), "it has besides: head.bias, head.weight"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message[-60:] for _, message in REFUSED])
def test_what_the_library_has_no_model_for_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert.to_library(build(), "perceiver_io")


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (FourierPositions(3, (5.0, 4.0), order="perceiver-pytorch"), "got order='perceiver-pytorch' instead of 'deepmind'"),
        (FourierPositions(3, (5.0, 4.0), include_raw=False), "got include_raw=False instead of True"),
        (FourierPositions(3, (5.0, 4.5)), r"got max_resolution=\(5.0, 4.5\) instead of \(5, 4\)"),
    ],
)
def test_other_positions_are_refused(positions: FourierPositions, message: str) -> None:
    model = our_image_classifier()
    model.preprocessor = PixelPreprocessor(1, positions)
    with pytest.raises(ValueError, match=message):
        convert.to_library(model, "perceiver_io")
