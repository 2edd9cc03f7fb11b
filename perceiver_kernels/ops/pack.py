"""The pack_inputs boundary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from perceiver_kernels.dispatch import load, serving
from perceiver_kernels.ops.boundary import BatchFold, define, refuse_double_backward, transforms_active
from perceiver_kernels.problem import pad_channels


def _channels(content: Tensor, positions: Tensor | None, fourier: Tensor | None) -> int:
    if positions is None:
        return content.shape[2]
    return content.shape[2] + (positions if fourier is None else fourier).shape[-1]


def choice_sizes(content: Tensor, positions: Tensor | None, fourier: Tensor | None) -> tuple[int, ...]:
    """What kernels of two backends are chosen by: rows, channels, bytes of one, 1 where content is packed alone, one run."""
    rows, run = content.shape[0] * content.shape[1], positions is None and content.is_contiguous()
    return rows, _channels(content, positions, fourier), content.element_size(), int(run)


def _pack_forward(
    content: Tensor, positions: Tensor | None, fourier: Tensor | None, key_mask: Tensor | None, normalize: bool, eps: float,
    dtype: torch.dtype, backend: str, constants: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    serves = serving("pack_inputs", backend, choice_sizes(content, positions, fourier))
    return load("pack_inputs", serves).pack_inputs_forward(
        content, positions, fourier, key_mask, normalize=normalize, eps=eps, dtype=dtype, constants=constants
    )


def _pack_forward_fake(
    content: Tensor, positions: Tensor | None, fourier: Tensor | None, key_mask: Tensor | None, normalize: bool, eps: float,
    dtype: torch.dtype, backend: str, constants: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    channels = _channels(content, positions, fourier)
    packed = content.new_empty((*content.shape[:2], pad_channels(channels + constants)), dtype=dtype)
    wide = torch.promote_types(content.dtype, torch.float32)
    rstd = content.new_empty(content.shape[:2] if normalize else (0,), dtype=wide)
    return packed, rstd


def _pack_backward(
    dpacked: Tensor, packed: Tensor, rstd: Tensor, content_channels: int, channels: int, normalize: bool, dtype: torch.dtype,
    backend: str,
) -> Tensor:  # fmt: skip
    sizes = packed.shape[0] * packed.shape[1], channels, dtype.itemsize, 1
    return load("pack_inputs", serving("pack_inputs", backend, sizes, "leaves_backward")).pack_inputs_backward(
        dpacked, packed, rstd, content_channels=content_channels, channels=channels, normalize=normalize, dtype=dtype
    )


def _pack_backward_fake(
    dpacked: Tensor, packed: Tensor, rstd: Tensor, content_channels: int, channels: int, normalize: bool, dtype: torch.dtype,
    backend: str,
) -> Tensor:  # fmt: skip
    return dpacked.new_empty((*dpacked.shape[:2], content_channels), dtype=dtype)


PACK_FORWARD = define(
    "pack_inputs_forward",
    "(Tensor content, Tensor? positions, Tensor? fourier, Tensor? key_mask, bool normalize, float eps, ScalarType dtype, "
    "str backend, int constants=0) -> (Tensor, Tensor)",
    _pack_forward,
    _pack_forward_fake,
)
PACK_BACKWARD = define(
    "pack_inputs_backward",
    "(Tensor dpacked, Tensor packed, Tensor rstd, int content_channels, int channels, bool normalize, ScalarType dtype, "
    "str backend) -> Tensor",
    _pack_backward,
    _pack_backward_fake,
)


def _pack_gradient(ctx: Any, dpacked: Tensor | None, _: Tensor | None = None) -> tuple[Any, ...]:
    nothing = (None,) * 8
    if dpacked is None or not ctx.needs_input_grad[0]:
        return (None, *nothing)
    packed, rstd, hidden = ctx.saved_tensors
    gradient = PACK_BACKWARD(dpacked, packed, rstd, *ctx.arguments)
    if hidden is not None:
        gradient = gradient.masked_fill(hidden, 0.0)
    return (refuse_double_backward(gradient, dpacked, packed), *nothing)


def _save_pack(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    content, positions, fourier, key_mask, normalize, _, _, (_, backend), _ = inputs
    packed, rstd = output
    channels = _channels(content, positions, fourier)
    # Normalised, masked tokens have rstd 0 and with it no gradient.
    hidden = ~key_mask[..., None] if key_mask is not None and not normalize else None
    ctx.save_for_backward(packed, rstd, hidden)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.arguments = (content.shape[2], channels, normalize, content.dtype, backend)


def _packed(*inputs: Any) -> tuple[Tensor, Tensor]:
    *given, (backend, _), constants = inputs
    return PACK_FORWARD(*given, backend, constants)


class _Pack(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _packed(*inputs)
        _save_pack(ctx, inputs, output)
        return output

    backward = staticmethod(_pack_gradient)


class _PackFunctorch(Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _packed(*inputs)

    setup_context = staticmethod(_save_pack)
    backward = staticmethod(_pack_gradient)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        """The mapped axis is folded into the batch; positions shared by the batch stay shared."""
        content, positions, fourier, key_mask, *rest = inputs
        size = info.batch_size
        fold = BatchFold(size, content.shape[0 if in_dims[0] is None else 1 if in_dims[0] == 0 else 0])
        content = fold(content, in_dims[0])
        if positions is not None and (in_dims[1] is not None or positions.ndim == 3):
            positions = fold(positions, in_dims[1], rank=3)
        if key_mask is not None:
            key_mask = fold(key_mask, in_dims[3])
        packed, rstd = pack_inputs(content, positions, fourier, key_mask, *rest)
        return (packed.unflatten(0, (size, -1)), rstd.unflatten(0, (size, -1)) if rest[0] else rstd), (
            0,
            0 if rest[0] else None,
        )


def pack_inputs(
    content: Tensor, positions: Tensor | None, fourier: Tensor | None, key_mask: Tensor | None, normalize: bool, eps: float,
    dtype: torch.dtype, backends: tuple[str, str], constants: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Differentiable pack on kernel backends, of the forward and the backward; see functional.pack_inputs."""
    inputs = (content, positions, fourier, key_mask, normalize, eps, dtype, backends, constants)
    if transforms_active():
        return _PackFunctorch.apply(*inputs)
    if torch.is_grad_enabled() and content.requires_grad:
        return _Pack.apply(*inputs)
    return _packed(*inputs)
