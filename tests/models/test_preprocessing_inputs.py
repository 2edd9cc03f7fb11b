"""What the parts of Perceiver IO take: dtypes of images, sizes of modalities, widths of heads, and errors that name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import models
from perceiver_kernels.inputs import FourierPositions
from perceiver_kernels.models import (
    AudioPreprocessor,
    ClassHead,
    ConvPreprocessor,
    EncoderConfig,
    FlowHead,
    FlowPreprocessor,
    LabelPreprocessor,
    LearnedPreprocessor,
    LearnedQueries,
    MultimodalHead,
    MultimodalPreprocessor,
    PatchHead,
    PerceiverEncoder,
    PerceiverIO,
    PixelPreprocessor,
    Source,
    TextPreprocessor,
    TokenHead,
    VideoPreprocessor,
    flow_patches,
)
from perceiver_kernels.models.multimodal import written_out
from perceiver_kernels.nn import OutputBlock

TINY: dict[str, Any] = {"num_latents": 6, "latent_dim": 16, "num_blocks": 1, "layers_per_block": 1, "latent_heads": 4}


def grid(*sizes: float) -> FourierPositions:
    return FourierPositions(3, sizes)


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


IMAGES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "fourier": (lambda: PixelPreprocessor(3, grid(8, 8)), lambda: pixels(2, 3, 8, 8)),
    "conv": (lambda: ConvPreprocessor(3, 4, grid(4, 4)), lambda: pixels(2, 3, 16, 16)),
    "learned": (lambda: LearnedPreprocessor((8, 8), 3, 6, 5), lambda: pixels(2, 3, 8, 8)),
    "flow": (lambda: FlowPreprocessor(27, 6, grid(4, 5)), lambda: flow_patches(pixels(2, 2, 3, 4, 5))),
    "video": (lambda: VideoPreprocessor(3, (1, 4, 4), grid(2, 2, 2)), lambda: pixels(2, 2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", list(IMAGES))
class TestDtypesOfImages:
    def test_bytes_are_parts_of_255(self, name: str) -> None:
        build, inputs = IMAGES[name]
        torch.manual_seed(0)
        part, raw = build().eval(), inputs()
        assert raw.dtype == torch.uint8
        expected = written_out(part(raw.float() / 255), torch.float32)
        torch.testing.assert_close(written_out(part(raw), torch.float32), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_every_float(self, name: str, dtype: torch.dtype) -> None:
        """They are rounded to the parameters' dtype, here a wider one or one that holds them."""
        build, inputs = IMAGES[name]
        torch.manual_seed(0)
        part, raw = build().eval(), inputs().float()
        torch.testing.assert_close(written_out(part(raw.to(dtype)), torch.float32), written_out(part(raw), torch.float32))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
    def test_autocast(self, name: str, dtype: torch.dtype) -> None:
        build, inputs = IMAGES[name]
        torch.manual_seed(0)
        part, raw = build(), inputs()
        raw = raw if dtype == torch.uint8 else (raw / 255).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            array = part(raw)
        expected = written_out(part(raw if dtype == torch.uint8 else raw.float()), torch.float32)
        torch.testing.assert_close(written_out(array, torch.float32), expected, rtol=0.05, atol=0.05)

    def test_parameters_of_16_bits(self, name: str) -> None:
        build, inputs = IMAGES[name]
        torch.manual_seed(0)
        part, raw = build().eval(), inputs()
        expected = written_out(part(raw), torch.float32)
        found = written_out(part.to(torch.bfloat16)(raw), torch.float32)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: PerceiverIO.imagenet_fourier(image_size=8, num_classes=5, **TINY), (2, 3, 8, 8)),
        (lambda: PerceiverIO.imagenet_learned(image_size=8, num_classes=5, **TINY), (2, 3, 8, 8)),
        (lambda: PerceiverIO.imagenet_conv(image_size=32, num_classes=5, **TINY), (2, 3, 32, 32)),
        (lambda: PerceiverIO.optical_flow(size=(4, 5), **TINY), (2, 2, 27, 4, 5)),
    ],
    ids=["fourier", "learned", "conv", "flow"],
)
def test_models_read_bytes_and_train_on_them(model: Callable[[], PerceiverIO], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    built, raw = model().eval(), pixels(*shape)
    torch.testing.assert_close(built(raw), built(raw.float() / 255))
    with torch.autocast("cpu", torch.bfloat16):
        built(raw).float().square().mean().backward()
        built((raw / 255).bfloat16()).float().square().mean().backward()
    assert all(p.grad is not None for p in built.preprocessor.parameters())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(built, fullgraph=True, backend="aot_eager")(raw), built(raw))


def video(**changes: Any) -> PerceiverIO:
    sizes = {"frames": 2, "image_size": 8, "samples_per_frame": 8, "samples_per_patch": 4, "num_classes": 5}
    return PerceiverIO.multimodal(**{**sizes, "hidden_channels": 12, "label_query_channels": 30, **TINY, **changes})


def clip(side: int = 8, samples: int = 16, frames: int = 2) -> dict[str, Tensor]:
    return {
        "image": torch.randn(2, frames, 3, side, side),
        "audio": torch.randn(2, samples, 1),
        "label": torch.rand(2, 5),
    }


class TestSizesOfModalities:
    def test_published_grids(self) -> None:
        grids = PerceiverIO.multimodal(device="meta", dtype=torch.float32).preprocessor.grids
        assert grids == {"audio": (1920,), "image": (16, 56, 56)}

    def test_any_size_where_it_is_said(self) -> None:
        """Fourier positions are read at any size; the outputs stay as many."""
        torch.manual_seed(0)
        model = video().eval()
        model.preprocessor.grids.clear()
        shapes = {name: tuple(out.shape) for name, out in model(clip(side=12, samples=20, frames=1)).items()}
        assert shapes == {"audio": (2, 16), "image": (2, 128, 3), "label": (2, 5)}

    def test_other_grids(self) -> None:
        """A modality's grid may be another than that of its positions; the array is the same."""
        torch.manual_seed(0)
        parts = {"a": AudioPreprocessor(4, grid(7)), "b": LabelPreprocessor(5)}
        part, raw = MultimodalPreprocessor(parts, grids={"a": [2]}), {"a": torch.randn(2, 8), "b": torch.rand(2, 5)}
        assert part(raw).shape == (2, 3, part.channels)
        with pytest.raises(ValueError, match=r"inputs\['a'\] must fill the grid \(2,\) of tokens, see grids, got \(3,\)"):
            part(raw | {"a": torch.randn(2, 12)})


@pytest.mark.parametrize("names", [("label",), ("audio", "label"), ("audio", "image", "label")])
def test_what_is_not_asked_for_is_empty(names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, raw = video().eval(), clip()
    none = torch.arange(0)
    points = {name: none if name in names else None for name in ("audio", "image", "label")}
    expected, found = model(raw), model(raw, points=points)
    for name, out in found.items():
        if name in names:
            assert tuple(out.shape) == {"audio": (2, 0), "image": (2, 0, 3), "label": (2, 0)}[name]
        else:
            torch.testing.assert_close(out, expected[name])


def test_a_model_of_exported_parts() -> None:
    """Every kind of part is there under the name of the package; the model is put together without another import."""
    torch.manual_seed(0)
    positions = grid(4, 4)
    preprocessor = models.PixelPreprocessor(3, positions)
    encoder = PerceiverEncoder(EncoderConfig(input_dim=preprocessor.channels, num_cross_attends=1, **TINY))
    queries = models.FourierQueries((4, 4), positions)
    model = PerceiverIO(preprocessor, encoder, queries, OutputBlock(queries.channels, 16), PatchHead(queries.channels, 3))
    assert model(torch.rand(2, 3, 4, 4)).shape == (2, 16, 3)
    for module in ("heads", "preprocessing", "queries"):
        source = getattr(models, module)
        own = {name for name, value in vars(source).items() if getattr(value, "__module__", "") == source.__name__}
        assert {name for name in own if name[0].isupper()} <= set(models.__all__), module


def of_head(head: nn.Module) -> Callable[[], Any]:
    """A call of a model whose decoder gives 16 channels."""
    preprocessor = PixelPreprocessor(3, grid(4, 4))
    encoder = PerceiverEncoder(EncoderConfig(input_dim=preprocessor.channels, num_cross_attends=1, **TINY))
    model = PerceiverIO(preprocessor, encoder, LearnedQueries(1, 16), OutputBlock(16, 16), head)
    return lambda: model(torch.rand(2, 3, 4, 4))


TEXT = Source(torch.zeros(1, 2, 8), TextPreprocessor(20, 8, 4))
MISUSES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: video()(clip() | {"audio": torch.randn(2, 16, 2)}), ValueError,
        r"samples must be \[B, S\] or \[B, S, 1\], got \(2, 16, 2\)",
    ),
    (
        lambda: video()(clip() | {"audio": torch.randn(3, 16)}), ValueError,
        "inputs must have one batch size B for all modalities, got B=3 of 'audio', B=2 of 'image', B=2 of 'label'",
    ),
    (
        lambda: video()(clip(side=12)), ValueError,
        r"inputs\['image'\] must fill the grid \(2, 2, 2\) of tokens, see grids, got \(2, 3, 3\)",
    ),
    (lambda: video()(clip(frames=4)), ValueError, r"inputs\['image'\] must fill .*, got \(4, 2, 2\)"),
    (lambda: video()(clip(samples=20)), ValueError, r"inputs\['audio'\] must fill the grid \(4,\) of tokens, .* got \(5,\)"),
    (lambda: video()(clip(samples=18)), ValueError, r"patch must be positive and divide \(S,\) = \(18,\), got \(4,\)"),
    (
        lambda: video(samples_per_patch=5), ValueError,
        r"patch must divide the samples, max_resolution=\(16.0,\) of positions, got 5",
    ),
    (lambda: MultimodalPreprocessor({}), ValueError, "modalities must hold at least one, got none"),
    (
        lambda: MultimodalPreprocessor({"x": LabelPreprocessor(3)}, grids={"z": (2,)}), ValueError,
        "grids must name modalities among x, got 'z'",
    ),
    (
        lambda: MultimodalPreprocessor({"x": LabelPreprocessor(3)}, grids={"x": (1,)})({"x": torch.rand(2, 3)}), ValueError,
        r"inputs\['x'\] must fill the grid \(1,\) of tokens, see grids, got None",
    ),
    (lambda: LearnedPreprocessor(8), TypeError, r"size must be integers \(H, W\), got 8"),
    (lambda: LearnedPreprocessor((8, 0)), ValueError, r"size must be positive integers \(H, W\), got \(8, 0\)"),
    (lambda: LearnedPreprocessor((8, 8), 0), ValueError, "in_channels must be at least 1, got 0"),
    (
        lambda: PerceiverIO.imagenet_learned(image_size=(8, 8)), TypeError,
        r"size must be integers \(H, W\), got \(\(8, 8\), \(8, 8\)\)",
    ),
    (
        lambda: PerceiverIO.multimodal(image_size=10), ValueError,
        "image_size must be a multiple of the patches' 4 pixels, got 10",
    ),
    (lambda: VideoPreprocessor(3, 4), TypeError, r"patch must be integers \(frames, rows, columns\), got 4"),
    (lambda: VideoPreprocessor(3, (4, 4)), ValueError, r"patch must be positive integers \(frames, .*\), got \(4, 4\)"),
    (lambda: PixelPreprocessor(3, grid(8)), ValueError, "positions must have 2 axes, got 1"),
    (lambda: ConvPreprocessor(3, 4, (8, 8)), TypeError, "positions must be a FourierPositions, got tuple"),
    (lambda: LearnedPreprocessor((2, 2))(pixels(1, 3, 2, 2).int()), TypeError, "images must be .* or uint8, got int32"),
    (of_head(ClassHead(8, 5)), ValueError, r"decoded must be \[B, O, C\] with C=8, got \(2, 1, 16\)"),
    (of_head(PatchHead(8, 5)), ValueError, r"decoded must be \[B, O, C\] with C=8, got \(2, 1, 16\)"),
    (of_head(FlowHead(8)), ValueError, r"decoded must be \[B, O, C\] with C=8, got \(2, 1, 16\)"),
    (of_head(FlowHead(16)), ValueError, r"decoded must have an output for every pixel of \(4, 4\), got 1"),
    (of_head(MultimodalHead(16, 8, {"x": PatchHead(8, 2)})), TypeError, "decoded must map 'x' to tensors, got Tensor"),
    (
        lambda: MultimodalHead(16, 8, {"x": PatchHead(9, 2)})({"x": torch.rand(2, 1, 16)}, TEXT), ValueError,
        r"decoded must be \[B, O, C\] with C=9, got \(2, 1, 8\)",
    ),
    (lambda: TokenHead(20)(torch.rand(2, 4, 9), TEXT), ValueError, r"decoded must be \[B, O, C\] with C=8, got \(2, 4, 9\)"),
    (lambda: TokenHead(21)(torch.rand(2, 4, 8), TEXT), ValueError, "preprocessor must have vocab_size=21 as the head, got 20"),
    (lambda: ClassHead(8, 0), ValueError, "num_classes must be at least 1, got 0"),
    (
        lambda: ClassHead(8, 5)(torch.rand(2, 1, 8, dtype=torch.float64), TEXT), TypeError,
        "decoded must have the parameters' dtype torch.float32 unless autocast is on, got torch.float64",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("build", "error", "message"), MISUSES)
def test_wrong_use_is_named(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
