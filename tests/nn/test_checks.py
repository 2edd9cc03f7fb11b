"""What layers refuse, when they are made or when they are called: one sentence with the argument, the rule and the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from perceiver_kernels import functional
from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models import PerceiverConfig
from perceiver_kernels.nn import (
    MAB,
    CrossAttention,
    CrossBlock,
    FeedForward,
    JointAttention,
    LatentBlock,
    LearnedPositions,
    OutputCrossAttention,
    SelfAttention,
)

B, N, M, D, C = 2, 5, 9, 24, 21
LATENTS, INPUTS = torch.zeros(B, N, D), torch.zeros(B, M, C)
NESTED = torch.nested.nested_tensor([torch.zeros(n, D) for n in (N, M)])

CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "cross": lambda **changes: CrossAttention(**{"latent_dim": D, "input_dim": C} | changes),
    "cross block": lambda **changes: CrossBlock(**{"latent_dim": D, "input_dim": C} | changes),
    "self": lambda **changes: SelfAttention(**{"dim": D} | changes),
    "feed forward": lambda **changes: FeedForward(**{"dim": D} | changes),
    "latent block": lambda **changes: LatentBlock(**{"dim": D} | changes),
    "positions": lambda **changes: LearnedPositions(**{"length": M, "channels": C} | changes),
    "config": lambda **changes: PerceiverConfig(**{"input_dim": C, "num_classes": 3} | changes),
}

REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("cross", {"input_dim": 1025}, ValueError, "input_dim must be at most 1024, content and positions together, got 1025"),
    ("cross block", {"input_dim": 1025}, ValueError, "input_dim must be at most 1024"),
    ("config", {"input_dim": 1025}, ValueError, "input_dim must be at most 1024"),
    ("cross", {"input_dim": 0, "qk_channels": 8}, ValueError, "input_dim must be at least 1, got 0"),
    ("cross", {"input_dim": 21.0, "qk_channels": 8}, TypeError, "input_dim must be an integer, got 21.0"),
    ("cross", {"latent_dim": "24"}, TypeError, "latent_dim must be an integer, got '24'"),
    ("cross", {"num_heads": "1"}, TypeError, "num_heads must be an integer, got '1'"),
    ("cross", {"num_heads": True}, TypeError, "num_heads must be an integer, got True"),
    ("cross", {"qk_channels": 8.0}, TypeError, "qk_channels must be an integer, got 8.0"),
    ("cross", {"dropout": "0.1"}, ValueError, r"dropout must be in \[0, 1\), got '0.1'"),
    ("cross", {"dropout": None}, ValueError, r"dropout must be in \[0, 1\), got None"),
    ("cross", {"eps": -1e-5}, ValueError, "eps must be a finite number, at least 0, got -1e-05"),
    ("cross", {"eps": float("nan")}, ValueError, "eps must be a finite number, at least 0, got nan"),
    ("cross", {"chunk_size": 2.5}, ValueError, "chunk_size must be a positive number of tokens, got 2.5"),
    ("config", {"chunk_size": "16"}, ValueError, "chunk_size must be a positive number of tokens, got '16'"),
    ("config", {"num_latents": 8.0}, TypeError, "num_latents must be an integer, got 8.0"),
    ("config", {"num_blocks": "8"}, TypeError, "num_blocks must be an integer, got '8'"),
    ("self", {"num_heads": 8.0}, TypeError, "num_heads must be an integer, got 8.0"),
    ("self", {"eps": -1.0}, ValueError, "eps must be a finite number, at least 0, got -1.0"),
    ("feed forward", {"widening_factor": 1.5}, TypeError, "widening_factor must be an integer, got 1.5"),
    ("feed forward", {"eps": "1e-5"}, ValueError, "eps must be a finite number, at least 0, got '1e-5'"),
    ("feed forward", {"out_dim": 5}, ValueError, "out_dim must be dim=24 with a residual, got 5"),
    ("feed forward", {"out_dim": 0, "residual": False}, ValueError, "out_dim must be at least 1, got 0"),
    ("latent block", {"attention_dropout": "0"}, ValueError, r"dropout must be in \[0, 1\), got '0'"),
    ("positions", {"channels": 0}, ValueError, "channels must be at least 1, got 0"),
    ("positions", {"length": 9.0}, TypeError, "length must be an integer, got 9.0"),
]


@pytest.mark.parametrize(("name", "changes", "error", "message"), REFUSED, ids=[f"{r[0]}-{r[3]}" for r in REFUSED])
def test_constructors_refuse(name: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    CONSTRUCTORS[name]()
    with pytest.raises(error, match=message):
        CONSTRUCTORS[name](**changes)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("width", [C - 1, C + 1, 32])
def test_inputs_of_another_width_are_refused(width: int, chunk_size: int | None) -> None:
    """In each of the three forms, though all of these widths are packed as 32 channels, as 21 are."""
    module, inputs = CrossAttention(D, C, chunk_size=chunk_size), torch.zeros(B, M, width)
    for given in (inputs, InputArray.tokens(inputs), functional.pack_inputs(inputs)):
        with pytest.raises(ValueError, match=f"inputs must have input_dim=21 channels, .* got {width}"):
            module(LATENTS, given)


@pytest.mark.parametrize(
    ("latents", "inputs", "error", "message"),
    [
        (None, INPUTS, TypeError, "latents must be a torch.Tensor, got NoneType"),
        (LATENTS, None, TypeError, "inputs must be a Tensor, InputArray or PackedInputs, got NoneType"),
        (LATENTS, INPUTS[0], ValueError, r"inputs must be \[B, M, C\] with C=21, got \(9, 21\)"),
        (LATENTS, NESTED, TypeError, "inputs must be a dense tensor, got a nested one"),
        (NESTED, INPUTS, TypeError, "latents must be a dense tensor, got a nested one"),
        (LATENTS.half(), INPUTS, TypeError, "latents must have the parameters' dtype torch.float32 unless autocast .*float16"),
        (LATENTS.double(), INPUTS, TypeError, "latents must have the parameters' dtype torch.float32 .*float64"),
        (LATENTS.long(), INPUTS, TypeError, "latents must have the parameters' dtype torch.float32 .*int64"),
    ],
)
def test_cross_attention_refuses(latents: Any, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CrossAttention(D, C)(latents, inputs)


@pytest.mark.parametrize(
    ("layer", "others", "message"),
    [
        (CrossAttention(D, C), INPUTS, r"latents must be \[B, N, D\] with B=2 or 1"),
        (CrossAttention(D, C), functional.pack_inputs(INPUTS), r"latents must be \[B, N, D\] with B=2 or 1"),
        (CrossAttention(D, C, qk_norm="rms"), INPUTS, r"latents must be \[B, N, D\] with B=2 or 1"),
        (OutputCrossAttention(D, D), LATENTS, r"queries must be \[B, O, C\] with B=2 or 1"),
        (OutputCrossAttention(D, D, qk_norm="rms"), LATENTS, r"queries must be \[B, O, C\] with B=2 or 1"),
        (MAB(D, C, D), INPUTS, r"queries must be \[B, N, C\] with B=2 or 1"),
        (JointAttention(D), LATENTS, r"context must be \[B, M, D\] with B=3"),
    ],
)
def test_batches_of_two_sizes_are_refused_by_name(layer: torch.nn.Module, others: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message + ", got a batch of [23]"):
        layer(torch.zeros(3, N, D), others)


@pytest.mark.parametrize("layer", [SelfAttention(D), FeedForward(D)], ids=["self", "feed forward"])
def test_sequences_have_the_dtype_of_the_parameters_or_autocasts(layer: torch.nn.Module) -> None:
    with pytest.raises(TypeError, match="x must have the parameters' dtype torch.float32 unless autocast is on, got torch.bfl"):
        layer(LATENTS.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(LATENTS.bfloat16()).shape == LATENTS.shape


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_of_chunks_are_refused(transform: str) -> None:
    """torch.func sees no autograd.Function without a setup_context: its own error names neither the layer nor a way out."""
    module = CrossAttention(D, C, chunk_size=4)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def total(parameters: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, parameters, (LATENTS, inputs)).sum()

    transformed = torch.func.grad(total) if transform == "grad" else torch.func.vmap(total, (None, 0))
    with pytest.raises(ValueError, match="chunk_size must be None under torch.func's transforms"):
        transformed(parameters, INPUTS if transform == "grad" else INPUTS[None])


def test_fourier_positions_with_content_may_fill_all_channels() -> None:
    """1024 channels are the most: what fits is made and read."""
    array = InputArray.tokens(torch.zeros(B, M, 1024 - 3), FourierPositions(1, (9.0,)))
    assert CrossAttention(D, 1024, qk_channels=8)(LATENTS, array).shape == LATENTS.shape
