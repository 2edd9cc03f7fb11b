"""Whole models as CUDA graphs: after one call nothing is copied from the host, and a replay reads what inputs then hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_manager
from torch.utils._pytree import tree_flatten, tree_map

from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models import Perceiver, PerceiverIO, SetTransformer, SetTransformerConfig
from tests.models import test_perceiver_io, test_vecset
from tests.models.families import MODELS, arguments
from tests.modules import perturbed


class OfImages(nn.Module):
    """A Perceiver that reads images with Fourier positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = FourierPositions(3, (8, 8))
        self.model = Perceiver.imagenet(
            input_dim=3 + self.positions.channels, num_classes=5, num_latents=6, latent_dim=16, num_blocks=2,
            num_cross_attends=2, latent_heads=4,
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.model(InputArray.image(images, self.positions))


class Points(nn.Module):
    """The multimodal model asked for some outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.model: PerceiverIO = test_perceiver_io.MODELS["multimodal"][0]()

    def forward(self, media: dict[str, Tensor], image: Tensor, audio: Tensor) -> dict[str, Tensor]:
        return self.model(media, points={"image": image, "audio": audio, "label": None})


def _alone(inputs: Callable[[], Any]) -> tuple[Any]:
    return (inputs(),)


def _media_and_points() -> tuple[Any, ...]:
    return test_perceiver_io.MODELS["multimodal"][1](), torch.randperm(128)[:9], torch.randperm(4)[:3]


FAMILY: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    **{name: (MODELS[name], partial(arguments, name, 2)) for name in MODELS},
    **{
        f"{name}, perceiver io": (build, partial(_alone, inputs))
        for name, (build, inputs) in (test_perceiver_io.MODELS | test_perceiver_io.OTHERS).items()
    },
    "multimodal, points": (Points, _media_and_points),
    "perceiver, positions": (OfImages, lambda: (torch.rand(2, 3, 7, 9),)),
    "set transformer, masked": (
        lambda: SetTransformer(SetTransformerConfig(input_dim=3, output_dim=4, dim=16, num_inducing=4, num_heads=2)),
        lambda: (torch.randn(2, 9, 3), torch.rand(2, 9) < 0.7),
    ),
    "vector sets, sampled": (
        lambda: test_vecset.model_of("sampled"), lambda: test_vecset.arrays(test_vecset.model_of("sampled"))
    ),
}  # fmt: skip


def started(build: Callable[[], nn.Module], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """On the GPU, where no parameter is zero and no gradient waits for one."""
    torch.manual_seed(0)
    return perturbed(build(), scale=0.1).to("cuda", dtype).eval()


def moved(values: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cuda()
        return value.to(dtype) if value.is_floating_point() else value

    return tree_map(one, values)


def leaves(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


def gradient_of(output: Tensor) -> Tensor:
    """What no norm, softmax or sum takes for zero, made on the device."""
    return torch.arange(output.numel(), device=output.device).mul(2.4).sin().to(output.dtype).view_as(output)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(FAMILY))
@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward and backward"])
def test_replays_are_calls(name: str, training: bool) -> None:
    build, inputs_of = FAMILY[name]
    model = started(build)
    first, second = moved(inputs_of()), moved(inputs_of())

    def call(inputs: Any) -> list[Tensor]:
        """Outputs and gradients, without the graph of autograd, whose nodes remember the stream that they were made on."""
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training):
            outputs = leaves(model(*inputs))
        if training:
            floats = [output for output in outputs if output.requires_grad]
            torch.autograd.backward(floats, [gradient_of(output) for output in floats])
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [tensor.detach() for tensor in (*outputs, *gradients)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [tensor.clone() for tensor in call(second)]
        call(first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(first)
    for place, value in zip(leaves(first), leaves(second), strict=True):
        place.copy_(value)
    graph.replay()
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["images", "perceiver, positions", "autoregressive", "resampler", "linformer"])
def test_graphed_callables_train(name: str) -> None:
    build, inputs_of = FAMILY[name]
    model = started(build)
    (sample,), (inputs,) = moved(inputs_of()), moved(inputs_of())

    def step(call: Callable[[Tensor], Any]) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        output = call(inputs)
        output.backward(gradient_of(output))
        return [output.detach().clone(), *(p.grad for p in model.parameters() if p.grad is not None)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step(model)
    torch.cuda.current_stream().wait_stream(stream)
    graphed = torch.cuda.make_graphed_callables(model, (sample,))
    for _ in range(2):
        for a, e in zip(step(graphed), expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["images", "perceiver, positions", "autoregressive", "resampler"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward and backward"])
def test_compiled_code_is_captured(name: str, training: bool) -> None:
    """torch.compile's "reduce-overhead" makes graphs of forward and backward, and leaves nothing out of them."""
    build, inputs_of = FAMILY[name]
    model = started(build, torch.float32)
    (inputs,) = moved(inputs_of(), torch.float32)

    def step(call: Callable[[Tensor], Any]) -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training):
            output = call(inputs)
        if training:
            output.backward(gradient_of(output))
        return [output.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = step(model)
    torch.compiler.reset()
    counters["inductor"].clear()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    # One call warms up, one is captured, the others are replays.
    for _ in range(4):
        for a, e in zip(step(compiled), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert get_manager(torch.cuda.current_device(), create_if_none_exists=False) is not None
    torch.compiler.reset()
