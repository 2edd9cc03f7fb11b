"""What the layers check of their arguments; every message names the argument, the rule and the value."""

from __future__ import annotations

from torch import Tensor

from perceiver_kernels.checks import autocasts, check_dense, is_integer
from perceiver_kernels.inputs import InputArray, PackedInputs
from perceiver_kernels.problem import MAX_CHANNELS, check_is_tensor


def check_count(name: str, value: object, least: int = 1) -> None:
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


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
    check_is_tensor(name, x)
    if x.ndim != axes.count(",") + 1 or x.shape[-1] != channels:
        raise ValueError(f"{name} must be [{axes}] with {axes.split(', ')[-1]}={channels}, got {tuple(x.shape)}")
    if x.dtype != weight.dtype and not autocasts(weight.device):
        raise TypeError(f"{name} must have the parameters' dtype {weight.dtype} unless autocast is on, got {x.dtype}")


def batch_of(array: Tensor | InputArray | PackedInputs) -> int:
    """B of an array in any of its three forms."""
    if isinstance(array, InputArray):
        return array.batch
    return (array.data if isinstance(array, PackedInputs) else array).shape[0]


def check_batch(name: str, axes: str, size: int, B: int, *, shared: bool = True) -> None:
    """A batch of ``size`` beside another one of B; with ``shared`` one entry may serve all."""
    if size != B and not (shared and size == 1):
        raise ValueError(f"{name} must be [{axes}] with B={B}{' or 1' if shared else ''}, got a batch of {size}")


def check_array(name: str, array: Tensor | InputArray | PackedInputs, axes: str, width: str, channels: int) -> None:
    """An array of ``channels`` channels, which the layer calls ``width``, in any of its three forms."""
    if not isinstance(array, (Tensor, InputArray, PackedInputs)):
        raise TypeError(f"{name} must be a Tensor, InputArray or PackedInputs, got {type(array).__name__}")
    if isinstance(array, Tensor):
        check_dense(name, array)
        if array.ndim != 3:
            raise ValueError(f"{name} must be [{axes}] with C={channels}, got {tuple(array.shape)}")
    found = array.shape[-1] if isinstance(array, Tensor) else array.channels
    if found != channels:
        raise ValueError(f"{name} must have {width}={channels} channels, content and positions together, got {found}")
