"""torch.compile(model, dynamic=True), which is also what torch turns to when sizes change, and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, randn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from perceiver_kernels.device import CPU
from perceiver_kernels.models import (
    RIN,
    Perceiver,
    PerceiverAR,
    PerceiverARConfig,
    PerceiverConfig,
    PerceiverResampler,
    PerceiverResamplerConfig,
    RINConfig,
    SetTransformer,
    SetTransformerConfig,
    VecSetAutoencoder,
)
from perceiver_kernels.nn import MAB, CrossAttention, JointAttention, MultiheadAttention, OutputCrossAttention
from perceiver_kernels.plan import plan_cross_attention
from perceiver_kernels.problem import CrossAttentionProblem
from tests.models.test_perceiver_io import MODELS, tensors

AR: dict[str, Any] = {"vocab_size": 7, "max_length": 9, "num_latents": 4, "dim": 16, "num_heads": 2, "num_layers": 1}


def assert_compiles(model: Any, *calls: tuple[Any, ...]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), dynamic=True, fullgraph=True, backend="aot_eager")
    for call in calls:
        for actual, expected in zip(tensors(compiled(*call)), tensors(model(*call)), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["learned", "flow"])
def test_perceiver_io(name: str) -> None:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    assert_compiles(build(layers_per_block=1, num_blocks=1), (inputs(),))


def test_perceiver_ar() -> None:
    torch.manual_seed(0)
    assert_compiles(PerceiverAR(PerceiverARConfig(**AR)), *((torch.randint(0, 7, (2, M)),) for M in (6, 8)))


def test_images_of_several_sizes() -> None:
    torch.manual_seed(0)
    images = (torch.randn(2, 3, 8, 7), torch.randn(3, 3, 5, 9))
    assert_compiles(MODELS["fourier"][0](layers_per_block=1, num_blocks=1), *((image,) for image in images))


def test_clouds_and_queries_of_several_sizes() -> None:
    torch.manual_seed(0)
    model = VecSetAutoencoder.shapenet(num_latents=6, dim=16, decoder_layers=1, latent_heads=2).eval()
    model.register_forward_hook(lambda module, inputs, outputs: outputs[0])
    assert_compiles(model, *((torch.randn(2, M, 3), torch.randn(2, n, 3)) for M, n in ((20, 9), (31, 17))))


def mask(B: int, M: int) -> Tensor:
    return torch.arange(M) % 3 < torch.arange(1, B + 1)[:, None]


def lengths(B: int, M: int) -> Tensor:
    return torch.arange(M, M - B, -1, dtype=torch.int32)


def ar() -> PerceiverAR:
    return PerceiverAR(PerceiverARConfig(**AR | {"max_length": 64}))


def set_transformer() -> SetTransformer:
    config = {"num_heads": 2, "num_inducing": 3, "encoder_blocks": 1}
    return SetTransformer(SetTransformerConfig(input_dim=8, output_dim=3, dim=16, **config))


def perceiver() -> Perceiver:
    config = {"num_latents": 4, "latent_dim": 16, "num_cross_attends": 1, "num_blocks": 1, "layers_per_block": 1}
    return Perceiver(PerceiverConfig(input_dim=8, **config, latent_heads=2, num_classes=3))


def rin() -> RIN:
    latents = {"num_latents": 4, "latent_dim": 16, "latent_heads": 2}
    tape = {"tape_dim": 16, "tape_heads": 2, "tape_widening_factor": 2}
    return RIN(RINConfig(image_size=4, patch_size=2, layers=(1,), num_classes=3, **latents, **tape))


def resampler() -> PerceiverResampler:
    return PerceiverResampler(PerceiverResamplerConfig(dim=16, num_latents=4, depth=1, num_heads=2, head_dim=8))


# A layer or model, and its arguments of batch size B and length M.
VISIBLE: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], tuple[Any, ...]]]] = {
    "CrossAttention key_mask": (lambda: CrossAttention(16, 8), lambda B, M: (randn(B, 5, 16), randn(B, M, 8), mask(B, M))),
    "CrossAttention lengths": (
        lambda: CrossAttention(16, 8), lambda B, M: (randn(B, 5, 16), randn(B, M, 8), None, lengths(B, M))
    ),
    "OutputCrossAttention query_mask": (
        lambda: OutputCrossAttention(8, 16), lambda B, M: (randn(B, M, 8), randn(B, 5, 16), None, mask(B, M))
    ),
    "MAB": (lambda: MAB(16, 8, 16, num_heads=2), lambda B, M: (randn(B, 5, 16), randn(B, M, 8), mask(B, M))),
    "MultiheadAttention": (
        lambda: MultiheadAttention(16, 2, batch_first=True), lambda B, M: (*3 * (randn(B, M, 16),), ~mask(B, M), False)
    ),
    "JointAttention": (lambda: JointAttention(16, 2), lambda B, M: (randn(B, 5, 16), randn(B, M, 16), mask(B, M))),
    "SetTransformer": (set_transformer, lambda B, M: (randn(B, M, 8), mask(B, M))),
    "Perceiver lengths": (perceiver, lambda B, M: (randn(B, M, 8), None, lengths(B, M))),
    "PerceiverIO": (lambda: MODELS["language"][0](max_length=64), lambda B, M: (torch.arange(M).expand(B, M) % 20, mask(B, M))),
    "PerceiverResampler": (resampler, lambda B, M: (randn(B, M, 16), mask(B, M))),
    "PerceiverAR prefix_mask": (ar, lambda B, M: (torch.arange(M).expand(B, M) % 7, None, mask(B, M - 4))),
    "PerceiverAR padding": (ar, lambda B, M: (torch.arange(M).expand(B, M) % 7, None, None, torch.arange(B))),
    "RIN": (rin, lambda B, M: (randn(B, 3, 4, 4), torch.rand(B), torch.arange(B) % 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", VISIBLE)
def test_masks_of_several_sizes_share_graphs(name: str) -> None:
    torch.manual_seed(0)
    build, arguments = VISIBLE[name]
    model, graphs = build().eval(), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=graphs)
    for B, M in ((2, 40), (3, 40), (5, 43), (5, 50), (4, 33), (6, 12)):
        call = arguments(B, M)
        torch.testing.assert_close(compiled(*call), model(*call))
    assert graphs.frame_count <= 2


# Arguments whose batch sizes and lengths are open; the planner reads short ones otherwise than long ones.
EXPORTED: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], tuple[Tensor, ...]]]] = {
    "CrossAttention": (lambda: CrossAttention(32, 24), lambda B, M: (randn(B, 5, 32), randn(B, M, 24))),
    "CrossAttention key_mask": (lambda: CrossAttention(32, 24), lambda B, M: (randn(B, 5, 32), randn(B, M, 24), mask(B, M))),
    "OutputCrossAttention": (lambda: OutputCrossAttention(32, 24), lambda B, M: (randn(B, M, 32), randn(B, 5, 24))),
    "Perceiver": (perceiver, lambda B, M: (randn(B, M, 8),)),
    "PerceiverIO": (
        lambda: MODELS["language"][0](max_length=2000, cross_heads=1), lambda B, M: (torch.arange(M).expand(B, M) % 20,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("dims", ["named", "auto"])
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_programs_take_other_sizes(name: str, dims: str) -> None:
    torch.manual_seed(0)
    build, arguments = EXPORTED[name]
    model, example, Dim = build().eval(), arguments(3, 40), torch.export.Dim
    B, M = (Dim("B", min=2, max=64), Dim("M", min=2, max=2000)) if dims == "named" else (Dim.AUTO, Dim.AUTO)
    shapes = tuple({0: B, 1: M} if tensor.shape[1] == 40 else {0: B} for tensor in example)
    exported = torch.export.export(model, example, dynamic_shapes=shapes).module()
    for sizes in ((3, 40), (2, 2), (2, 7), (5, 2000), (40, 300)):
        call = arguments(*sizes)
        torch.testing.assert_close(exported(*call), model(*call))


def test_a_size_that_only_the_data_tells_is_planned_for() -> None:
    weights = torch.zeros(24, 24)
    problem = CrossAttentionProblem.of(
        torch.zeros(1, 1, 5, 24), weights, weights, B=2, M=100, C=24, dtype=torch.float32, packed=False, inputs_need_grad=False
    )
    unknown = problem.with_sizes(M=ShapeEnv().create_unbacked_symint())
    assert plan_cross_attention(unknown, CPU) == plan_cross_attention(problem.with_sizes(M=4096), CPU)
