"""Whole models that are measured: beside their originals, or beside themselves through PyTorch's attention; dense grids."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.models import RIN, PerceiverAR, PerceiverIO, PerceiverResampler, SetTransformer, VecSetAutoencoder

IMAGENET: dict[str, Any] = {"num_blocks": 8, "num_self_attends_per_block": 6, "num_latents": 512, "d_latents": 1024}
ONE_HEAD: dict[str, Any] = {"num_cross_attention_heads": 1, "cross_attention_shape_for_attention": "kv"}
FLOW: dict[str, Any] = {
    "num_blocks": 1, "num_self_attends_per_block": 24, "num_latents": 2048, "d_latents": 512, "num_self_attention_heads": 16,
}  # fmt: skip
MULTIMODAL: dict[str, Any] = {"num_blocks": 1, "num_self_attends_per_block": 8, "num_latents": 784, "d_latents": 512}
LANGUAGE: dict[str, Any] = {
    "num_blocks": 1, "num_self_attends_per_block": 26, "num_latents": 256, "d_latents": 1280, "num_self_attention_heads": 8,
    "num_cross_attention_heads": 8, "qk_channels": 256, "v_channels": 1280,
}  # fmt: skip
PARTS_OF_A_VIDEO = 128
"""Multimodal outputs are evaluated a part at a time, as the original is: 6,272 pixels, 15 patches of audio and the label."""
PASSES = ("forward", "training")
SMALL: dict[str, Any] = {
    "num_latents": 6, "d_latents": 16, "num_blocks": 1, "num_self_attends_per_block": 1, "num_self_attention_heads": 2,
}  # fmt: skip
OUR_SMALL: dict[str, Any] = {"num_latents": 6, "latent_dim": 16, "num_blocks": 1, "layers_per_block": 1, "latent_heads": 2}
"""Sizes for a CPU, as the original and as our models name them."""


@dataclass(frozen=True)
class ModelCase:
    """One model on one input.

    Args:
        name: of the case.
        B: batch.
        original: transformers' class, and its sizes.
        build: our model.
        inputs: inputs on a CPU, or a mapping of them.
        options: arguments of our call and of theirs, beside the inputs.
        theirs_under_autocast: the original mixes in fp32 tables and cannot be of half width; its weights stay in fp32.
        compiles: whether torch.compile of both models is measured too, which takes minutes.
        passes: of "forward" and "training" (forward and backward).
        small: what replaces fields for a CPU.
    """

    name: str
    B: int
    original: tuple[str, dict[str, Any]]
    build: Callable[..., PerceiverIO]
    inputs: Callable[[], Any]
    options: Callable[[], tuple[dict[str, Any], dict[str, Any]]] = lambda: ({}, {})
    theirs_under_autocast: bool = False
    compiles: bool = False
    passes: tuple[str, ...] = PASSES
    small: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> dict[str, int]:
        """Batch, latents and their channels."""
        return {"B": self.B, "N": self.original[1]["num_latents"], "D": self.original[1]["d_latents"]}

    @property
    def title(self) -> str:
        shape = self.shape
        return f"{self.name}: B={self.B}, {shape['N']} latents x {shape['D']}, beside {self.original[0]}"

    def scaled(self, max_inputs: int | None = None) -> ModelCase:
        """The same model at sizes for a CPU, whatever the limit."""
        sizes = {**self.original[1], **SMALL, **self.small.get("sizes", {})}
        changes = {name: value for name, value in self.small.items() if name not in ("sizes", "ours")}
        build = functools.partial(self.build, **OUR_SMALL, **self.small.get("ours", {}))
        return replace(self, original=(self.original[0], sizes), build=build, small={}, **changes)

    def cut(self, max_inputs: int) -> ModelCase:
        """The case itself: a model's inputs have one length."""
        return self


@dataclass(frozen=True)
class GridCase:
    """The field of one shape on a dense grid, beside the same model through PyTorch's own attention.

    Args:
        name: of the case.
        resolution: points of an edge of the grid.
        build: our model.
    """

    name: str
    resolution: int
    build: Callable[..., VecSetAutoencoder] = VecSetAutoencoder.shapenet
    N: int = 512
    D: int = 512
    passes: tuple[str, ...] = ("forward",)

    @property
    def shape(self) -> dict[str, int]:
        """Batch, queries, latents and their channels."""
        return {"B": 1, "Lq": self.resolution**3, "N": self.N, "D": self.D}

    @property
    def title(self) -> str:
        return f"{self.name}: {self.resolution}^3 queries, {self.N} latents x {self.D}"

    def scaled(self, max_inputs: int | None = None) -> GridCase:
        """A small grid and model for a CPU, whatever the limit."""
        build = functools.partial(self.build, num_latents=8, dim=32, decoder_layers=1, latent_heads=2)
        return replace(self, resolution=5, build=build, N=8, D=32)

    def cut(self, max_inputs: int) -> GridCase:
        """The case itself: its grid is its size."""
        return self


@dataclass(frozen=True)
class SameCase:
    """One of our models on one input, beside the same model through PyTorch's own attention.

    Args:
        name: of the case.
        build: our model; keyword arguments change its sizes.
        inputs: what the model is called with, on a CPU.
        shape: of the problem, for rows.
        small: keyword arguments of ``build``, and ``inputs`` and ``shape``, at sizes for a CPU.
        passes: of "forward" and "training" (forward and backward).
    """

    name: str
    build: Callable[..., nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    shape: dict[str, int]
    small: Mapping[str, Any]
    passes: tuple[str, ...] = PASSES

    @property
    def title(self) -> str:
        return f"{self.name}: {', '.join(f'{name}={size}' for name, size in self.shape.items())}"

    def scaled(self, max_inputs: int | None = None) -> SameCase:
        """The same model at sizes for a CPU, whatever the limit."""
        changes = {name: value for name, value in self.small.items() if name not in ("inputs", "shape")}
        build = functools.partial(self.build, **changes)
        return replace(self, build=build, inputs=self.small["inputs"], shape=self.small["shape"])

    def cut(self, max_inputs: int) -> SameCase:
        """The case itself: a model's inputs have one length."""
        return self


def _images(batch: int, size: int = 224) -> Tensor:
    return torch.randn(batch, 3, size, size)


def _media() -> dict[str, Tensor]:
    return {"image": torch.randn(1, 16, 3, 224, 224), "audio": torch.randn(1, 30_720, 1), "label": torch.rand(1, 700)}


def _small_media() -> dict[str, Tensor]:
    return {"image": torch.randn(1, 2, 3, 8, 8), "audio": torch.randn(1, 64, 1), "label": torch.rand(1, 5)}


def _points(image: int, audio: int) -> tuple[dict[str, Any], dict[str, Any]]:
    points = {"image": torch.arange(image), "audio": torch.arange(audio), "label": None}
    return {"points": points}, {"subsampled_output_points": points}


def _image_case(name: str, kind: str, build: Callable[..., PerceiverIO], batch: int, size: int, **more: Any) -> ModelCase:
    """An ImageNet classifier; ``size`` of its pictures on a CPU."""
    original = (f"PerceiverForImageClassification{kind}", {**IMAGENET, **ONE_HEAD, "num_labels": 1000})
    classes = {"sizes": {"num_labels": 5}, "ours": {"num_classes": 5}}
    if kind == "Learned":
        original[1]["image_size"] = 224
        classes = {"sizes": {"num_labels": 5, "image_size": size}, "ours": {"num_classes": 5, "image_size": size}}
    small = {**classes, "B": min(batch, 2), "inputs": functools.partial(_images, min(batch, 2), size)}
    return ModelCase(name, batch, original, build, functools.partial(_images, batch), small=small, **more)


def _tokens(batch: int, length: int, vocabulary: int = 259) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(0, vocabulary, (batch, length)),)


def _noisy(batch: int, size: int, classes: int) -> Callable[[], tuple[Tensor, ...]]:
    """Images, how noisy they are, and their classes."""
    return lambda: (torch.randn(batch, 3, size, size), torch.rand(batch), torch.randint(0, classes, (batch,)))


def _features(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape),)


SMALL_AR: dict[str, Any] = {
    "num_latents": 8, "dim": 32, "num_heads": 2, "num_layers": 2, "inputs": _tokens(2, 49),
    "shape": {"B": 2, "M": 49, "N": 8, "D": 32},
}  # fmt: skip
SMALL_RESAMPLER: dict[str, Any] = {
    "num_latents": 5, "dim": 32, "num_heads": 4, "head_dim": 8, "inputs": _features(2, 11, 32),
    "shape": {"B": 2, "M": 11, "N": 5, "D": 32},
}  # fmt: skip
SAME = (
    SameCase(
        "perceiver-ar-imagenet64-b1", PerceiverAR.imagenet64, _tokens(1, 12_289), {"B": 1, "M": 12_289, "N": 1024, "D": 1024},
        {**SMALL_AR, "max_length": 4 * 4 * 3 + 1, "grid": (4, 4, 3)},
    ),
    SameCase(
        "perceiver-ar-copy-b1", PerceiverAR.copy_task, _tokens(1, 131_072), {"B": 1, "M": 131_072, "N": 1024, "D": 1024},
        {**SMALL_AR, "max_length": 49},
    ),
    SameCase(
        "rin-imagenet64-b32", RIN.imagenet64, _noisy(32, 64, 1000), {"B": 32, "M": 64, "C": 512, "N": 128, "D": 768},
        {
            "image_size": 16, "patch_size": 4, "num_classes": 5, "num_latents": 8, "latent_dim": 32, "tape_dim": 16,
            "layers": (1, 1), "latent_heads": 2, "tape_heads": 2, "inputs": _noisy(2, 16, 5),
            "shape": {"B": 2, "M": 16, "C": 16, "N": 8, "D": 32},
        },
    ),
    SameCase(
        "resampler-flamingo-b32", PerceiverResampler.flamingo, _features(32, 2048, 1024),
        {"B": 32, "M": 2048, "N": 64, "D": 1024}, SMALL_RESAMPLER,
    ),
    SameCase(
        "resampler-idefics2-b8", PerceiverResampler.idefics2, _features(8, 4900, 4096),
        {"B": 8, "M": 4900, "N": 64, "D": 4096}, {**SMALL_RESAMPLER, "num_kv_heads": 2, "depth": 1},
    ),
    SameCase(
        "set-transformer-modelnet40-b16", SetTransformer.modelnet40, _features(16, 5000, 3),
        {"B": 16, "M": 5000, "C": 3, "N": 16, "D": 256},
        {
            "dim": 16, "num_heads": 2, "num_inducing": 4, "inputs": _features(2, 13, 3),
            "shape": {"B": 2, "M": 13, "C": 3, "N": 4, "D": 16},
        },
    ),
)  # fmt: skip
MODELS: dict[str, ModelCase | GridCase | SameCase] = {
    case.name: case
    for case in (
        _image_case("imagenet-fourier-b8", "Fourier", PerceiverIO.imagenet_fourier, 8, 8, compiles=True),
        _image_case("imagenet-fourier-b1", "Fourier", PerceiverIO.imagenet_fourier, 1, 8, passes=("forward",)),
        _image_case("imagenet-learned-b8", "Learned", PerceiverIO.imagenet_learned, 8, 8),
        _image_case("imagenet-conv-b8", "ConvProcessing", PerceiverIO.imagenet_conv, 8, 32),
        ModelCase(
            "language-b8", 8, ("PerceiverForMaskedLM", LANGUAGE), PerceiverIO.language,
            lambda: torch.randint(0, 262, (8, 2048)),
            small={
                "sizes": {"d_model": 24, "max_position_embeddings": 16, "qk_channels": 16, "v_channels": 16},
                "ours": {
                    "channels": 24, "max_length": 16, "qk_channels": 16, "v_channels": 16, "latent_qk_channels": 16,
                    "latent_v_channels": 16,
                },
                "B": 2, "inputs": lambda: torch.randint(0, 262, (2, 16)),
            },
        ),
        ModelCase(
            "optical-flow", 1, ("PerceiverForOpticalFlow", {**FLOW, **ONE_HEAD}), PerceiverIO.optical_flow,
            lambda: torch.randn(1, 2, 27, 368, 496),
            small={
                "sizes": {"train_size": [5, 7]}, "ours": {"size": (5, 7)}, "inputs": lambda: torch.randn(1, 2, 27, 5, 7),
            },
        ),
        ModelCase(
            "multimodal-part", 1, ("PerceiverForMultimodalAutoencoding", {**MULTIMODAL, **ONE_HEAD, "num_labels": 700}),
            PerceiverIO.multimodal, _media,
            functools.partial(_points, 16 * 224 * 224 // PARTS_OF_A_VIDEO, 1920 // PARTS_OF_A_VIDEO),
            theirs_under_autocast=True,
            small={
                "sizes": {
                    "num_frames": 2, "audio_samples_per_frame": 32, "image_size": 2, "output_shape": [1, 2, 8, 8],
                    "num_labels": 5,
                },
                "ours": {"frames": 2, "image_size": 8, "samples_per_frame": 32, "num_classes": 5},
                "inputs": _small_media, "options": functools.partial(_points, 9, 2),
            },
        ),
        GridCase("shape-decoder-129", 129),
        GridCase("shape-decoder-257", 257),
        *SAME,
    )
}  # fmt: skip
DEFAULT_MODELS = (
    "imagenet-fourier-b8", "imagenet-fourier-b1", "optical-flow", "multimodal-part", "shape-decoder-129", "shape-decoder-257",
    "resampler-flamingo-b32", "set-transformer-modelnet40-b16", "rin-imagenet64-b32", "perceiver-ar-imagenet64-b1",
)  # fmt: skip
