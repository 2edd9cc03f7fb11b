"""Checks of tensors and numbers; every message names the argument, the rule and the value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.checks import FLOAT_DTYPES, check_dense, is_integer

MAX_CHANNELS = 1024
CHANNEL_MULTIPLE = 16


def pad_channels(channels: int) -> int:
    """``channels`` rounded up to a multiple of 16: rows of 16 bytes or more, as TMA descriptors need."""
    return -(-channels // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


def is_positive(number: float) -> bool:
    """A plain bool even where torch.compile has made a symbol of the number."""
    if number > 0.0:  # noqa: SIM103 (the comparison itself would be a symbol)
        return True
    return False


_CONSTANTS = tuple(range(4 * MAX_CHANNELS + 1))


def constant(size: int) -> int:
    """``size`` as a plain number: torch.compile(dynamic=True) makes symbols of channel counts too, an index makes it look."""
    return _CONSTANTS[size] if size < len(_CONSTANTS) else size


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    check_dense(name, value)


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_rank(name: str, tensor: Tensor, axes: str) -> None:
    if tensor.ndim != axes.count(",") + 1:
        raise ValueError(f"{name} must be [{axes}], got {shape_of(tensor)}")


def check_shape(name: str, tensor: Tensor, axes: str, expected: tuple[int, ...]) -> None:
    """Compare ``tensor.shape`` with ``expected``; the message names each axis that was expected."""
    if shape_of(tensor) != tuple(expected):
        names = [axis.strip() for axis in axes.split(",")]
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(names, expected, strict=True))
        raise ValueError(f"{name} must be [{axes}] with {sizes}, got {shape_of(tensor)}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """``tensor`` must have the dtype and device of ``other``."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {tensor.dtype}")
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {tensor.device}")


def check_constants(constants: int, channels: int) -> None:
    if not is_integer(constants) or constants < 0:
        raise ValueError(f"constants must be a number of channels, at least 0, got {constants!r}")
    if channels + constants > MAX_CHANNELS:
        raise ValueError(f"constants must leave at most {MAX_CHANNELS} channels in all, got {constants} after {channels}")


def check_scale(scale: float | None) -> None:
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number, got {scale!r}")


def check_probability(name: str, p: float) -> None:
    if not (isinstance(p, (int, float)) and 0.0 <= p < 1.0):
        raise ValueError(f"{name} must be in [0, 1), got {p!r}")


def check_eps(eps: float) -> None:
    if not (isinstance(eps, (int, float)) and 0.0 <= eps < math.inf):
        raise ValueError(f"eps must be a finite number, at least 0, got {eps!r}")


def check_key_visibility(key_mask: Tensor | None, lengths: Tensor | None, B: int, M: int, device: torch.device) -> None:
    """A key mask is bool [B, M], True where a token is visible; lengths are int32 [B]; not both."""
    if key_mask is not None and lengths is not None:
        raise ValueError("key_mask and lengths exclude each other: give one of them")
    if key_mask is not None:
        check_is_tensor("key_mask", key_mask)
        if key_mask.dtype != torch.bool:
            raise TypeError(
                f"key_mask must be torch.bool (True = the token is visible), got {key_mask.dtype}, "
                "whose polarity is ambiguous; convert it with .bool() or ~mask.bool()"
            )
        check_shape("key_mask", key_mask, "B, M", (B, M))
        if key_mask.device != device:
            raise ValueError(f"key_mask must be on {device}, got {key_mask.device}")
    if lengths is not None:
        check_is_tensor("lengths", lengths)
        if lengths.dtype != torch.int32:
            raise TypeError(f"lengths must be torch.int32 [B], got {lengths.dtype}")
        check_shape("lengths", lengths, "B", (B,))
        if lengths.device != device:
            raise ValueError(f"lengths must be on {device}, got {lengths.device}")


def check_query_mask(mask: Tensor | None, axes: str, B: int, length: int, name: str, query: Tensor) -> None:
    """A query mask is bool [B, length], on the device of the tensor ``query`` that is called ``name``."""
    if mask is None:
        return
    check_is_tensor("query_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"query_mask must be torch.bool (True = the query sees keys), got {mask.dtype}")
    check_shape("query_mask", mask, axes, (B, length))
    check_device("query_mask", mask, name, query)


def check_vectors(name: str, other: Tensor, *vectors: tuple[str, Tensor | None, str, int]) -> None:
    """Biases and norms: (name, tensor or None, axis, size), on the device of the tensor ``other`` that is called ``name``.

    Along C they may come with zeros up to C_padded.
    """
    for vector_name, vector, axis, size in vectors:
        if vector is not None:
            check_is_tensor(vector_name, vector)
            check_floating(vector_name, vector)
            check_device(vector_name, vector, name, other)
            if axis != "C" or vector.shape != (pad_channels(size),):
                check_shape(vector_name, vector, axis, (size,))


def check_projection(name: str, weight: Tensor, axes: str, rows: int, C: int) -> None:
    """A weight of [rows, C] that may come with zero columns up to C_padded."""
    if shape_of(weight) != (rows, pad_channels(C)):
        check_shape(name, weight, axes, (rows, C))


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
