"""Checks that the constructors of inputs share; every message names the argument, the rule and the value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RAW_DTYPES = (*FLOAT_DTYPES, torch.uint8)

_Shape = tuple[int | None, ...]


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; torch's own question is an error for ``meta``."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise for a nested tensor: it has no shape to look at, and where sequences end is told in other ways here."""
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one: pad it, with a mask or lengths, or pack it")


def check_tensor(
    name: str, value: object, layout: str, *shapes: _Shape, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
) -> None:
    """Raise unless value is a tensor of one of these dtypes and shapes; None in a shape fits any size.

    Args:
        layout: the axes of each shape. No sizes: the message tells those that the last shape asks for, and to tell a size where
            all is well would make a constant of it under torch.compile.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {_with_sizes(layout, shapes[-1])}, got {type(value).__name__}")
    check_dense(name, value)
    if value.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        hint = ", True = visible" if dtypes == (torch.bool,) else ""
        raise TypeError(f"{name} must be {allowed}{hint}, got {str(value.dtype).removeprefix('torch.')}")
    got = tuple(value.shape)
    ranked = (shape for shape in shapes if len(shape) == len(got))
    if not any(all(want is None or want == size for want, size in zip(shape, got, strict=True)) for shape in ranked):
        raise ValueError(f"{name} must be {_with_sizes(layout, shapes[-1])}, got {got}")


def _with_sizes(layout: str, shape: _Shape) -> str:
    """``layout``, the sizes that ``shape`` asks for told behind the axes in its last brackets."""
    start, stop = layout.rindex("[") + 1, layout.rindex("]")
    sizes = zip(layout[start:stop].split(", "), shape, strict=True)
    told = ", ".join(f"{axis}={size}" for axis, size in sizes if size is not None and not axis.isdigit())
    return f"{layout[: stop + 1]} with {told}{layout[stop + 1 :]}" if told else layout


def has_values(tensor: Tensor) -> bool:
    """Whether values may be looked at: on a GPU they would have to be waited for, and fake, traced and vmapped have none.

    The type does not tell the vmapped.
    """
    if type(tensor) is not Tensor or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return tensor.device.type == "cpu" and tensor.numel() > 0


def check_indices(name: str, values: Tensor, rule: str, count: int) -> None:
    """Raise where integers are not in 0..count-1, if they have values to look at.

    Args:
        rule: the upper end as it is told, for example "vocab_size-1".
    """
    if not has_values(values):
        return
    least, most = values.aminmax()
    if least < 0 or most >= count:
        raise ValueError(f"{name} must be in 0..{rule}={count - 1}, got {least.item()}..{most.item()}")


def _check_number(name: str, value: object, rule: str, given: object, *, positive: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {rule}, got {given!r}")
    # Comparisons, as a compiler with dynamic sizes has no isfinite of a number.
    if not -math.inf < value < math.inf or (positive and value <= 0):
        raise ValueError(f"{name} must be {rule}, got {given!r}")
    return float(value)


def check_positive(name: str, value: object) -> float:
    return _check_number(name, value, "a finite positive number", value, positive=True)


def check_numbers(name: str, values: object, *, positive: bool) -> tuple[float, ...]:
    rule = "a tuple of finite positive numbers" if positive else "a tuple of finite numbers"
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{name} must be {rule}, got {values!r}")
    return tuple(_check_number(name, value, rule, values, positive=positive) for value in values)


def is_integer(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_patch(name: str, patch: object, sizes: tuple[int, ...], axes: str) -> None:
    """Raise unless patch holds one positive integer for each axis and divides its size."""
    if not isinstance(patch, (tuple, list)) or not all(is_integer(part) for part in patch):
        raise TypeError(f"{name} must be integers for {axes}, got {patch!r}")
    if len(patch) != len(sizes) or any(p < 1 or size % p for p, size in zip(patch, sizes, strict=True)):
        raise ValueError(f"{name} must be positive and divide {axes} = {sizes}, got {tuple(patch)}")


def check_range(start: int, stop: int | None, length: int) -> tuple[int, int]:
    stop = length if stop is None else stop
    if not 0 <= start <= stop <= length:
        raise ValueError(f"start, stop must satisfy 0 <= start <= stop <= M={length}, got {start}, {stop}")
    return start, stop
