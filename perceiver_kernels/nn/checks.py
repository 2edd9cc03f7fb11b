"""What the layers check of their arguments; every message names the argument, the rule and the value."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.checks import is_integer
from perceiver_kernels.inputs import InputArray, PackedInputs
from perceiver_kernels.problem import MAX_CHANNELS, check_tensor


def check_count(name: str, value: object, least: int = 1) -> None:
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_input_dim(input_dim: int) -> None:
    """What no call could read is refused before there are weights for it."""
    check_count("input_dim", input_dim)
    if input_dim > MAX_CHANNELS:
        raise ValueError(f"input_dim must be at most {MAX_CHANNELS}, content and positions together, got {input_dim}")


def check_widths(num_heads: int, **channels: int) -> None:
    """Every width must be a positive multiple of ``num_heads``."""
    check_count("num_heads", num_heads)
    for name, width in channels.items():
        if not is_integer(width):
            raise TypeError(f"{name} must be an integer, got {width!r}")
        if width < 1 or width % num_heads:
            raise ValueError(f"{name} must be a positive multiple of num_heads={num_heads}, got {width}")


def check_sequence(name: str, x: Tensor, axes: str, channels: int, weight: Tensor) -> None:
    """A sequence of a layer whose parameters are as ``weight``; autocast takes any dtype."""
    check_tensor(name, x)
    if x.ndim != axes.count(",") + 1 or x.shape[-1] != channels:
        raise ValueError(f"{name} must be [{axes}] with {axes.split(', ')[-1]}={channels}, got {tuple(x.shape)}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise TypeError(f"{name} must have the parameters' dtype {weight.dtype} unless autocast is on, got {x.dtype}")


def check_inputs(inputs: Tensor | InputArray | PackedInputs, input_dim: int) -> None:
    """An input array of ``input_dim`` channels, in any of its three forms."""
    if not isinstance(inputs, (Tensor, InputArray, PackedInputs)):
        raise TypeError(f"inputs must be a Tensor, InputArray or PackedInputs, got {type(inputs).__name__}")
    if isinstance(inputs, Tensor) and inputs.ndim != 3:
        raise ValueError(f"inputs must be [B, M, C] with C={input_dim}, got {tuple(inputs.shape)}")
    channels = inputs.shape[-1] if isinstance(inputs, Tensor) else inputs.channels
    if channels != input_dim:
        raise ValueError(f"inputs must have input_dim={input_dim} channels, content and positions together, got {channels}")
