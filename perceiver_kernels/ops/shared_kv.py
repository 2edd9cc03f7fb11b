"""The shared_kv_attention boundary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from perceiver_kernels.dispatch import load
from perceiver_kernels.ops.boundary import BatchFold, define, refuse_double_backward, transforms_active

State = tuple[Tensor, Tensor, Tensor]


def _forward(
    q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, dropout_seed: Tensor | None, scale: float,
    dropout_p: float, key_offset: int, z_state: Tensor | None, lse_state: Tensor | None, rho_state: Tensor | None,
    out_dtype: torch.dtype | None, backend: str,
) -> State:  # fmt: skip
    state = None if z_state is None else (z_state, lse_state, rho_state)
    return load("shared_kv_attention", backend).shared_kv_attention_forward(
        q, x, key_mask, lengths, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed, key_offset=key_offset,
        state=state, out_dtype=out_dtype,
    )  # fmt: skip


def _forward_fake(
    q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, dropout_seed: Tensor | None, scale: float,
    dropout_p: float, key_offset: int, z_state: Tensor | None, lse_state: Tensor | None, rho_state: Tensor | None,
    out_dtype: torch.dtype | None, backend: str,
) -> State:  # fmt: skip
    z = q.new_empty(q.shape, dtype=out_dtype or q.dtype)
    return z, q.new_empty(q.shape[:2], dtype=torch.float32), q.new_empty(q.shape[:2], dtype=torch.float32)


def _backward(
    dz: Tensor, dlse: Tensor | None, drho: Tensor | None, q: Tensor, x: Tensor, z: Tensor, lse: Tensor, rho: Tensor,
    key_mask: Tensor | None, lengths: Tensor | None, dropout_seed: Tensor | None, scale: float, dropout_p: float,
    key_offset: int, needs_dq: bool, needs_dx: bool, dq_dtype: torch.dtype | None, backend: str,
    dq_earlier: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dq, dx = load("shared_kv_attention", backend).shared_kv_attention_backward(
        dz, dlse, drho, q, x, z, lse, rho, key_mask, lengths, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed,
        key_offset=key_offset, needs_dq=needs_dq, needs_dx=needs_dx, dq_dtype=dq_dtype, dq_earlier=dq_earlier,
    )  # fmt: skip
    return q.new_empty(0) if dq is None else dq, x.new_empty(0) if dx is None else dx


def _backward_fake(
    dz: Tensor, dlse: Tensor | None, drho: Tensor | None, q: Tensor, x: Tensor, z: Tensor, lse: Tensor, rho: Tensor,
    key_mask: Tensor | None, lengths: Tensor | None, dropout_seed: Tensor | None, scale: float, dropout_p: float,
    key_offset: int, needs_dq: bool, needs_dx: bool, dq_dtype: torch.dtype | None, backend: str,
    dq_earlier: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dq = q.new_empty(q.shape, dtype=dq_dtype or q.dtype) if needs_dq else q.new_empty(0)
    return dq, x.new_empty(x.shape) if needs_dx else x.new_empty(0)


FORWARD = define(
    "shared_kv_attention_forward",
    "(Tensor q, Tensor x, Tensor? key_mask, Tensor? lengths, Tensor? dropout_seed, float scale, float dropout_p, "
    "SymInt key_offset, Tensor? z_state, Tensor? lse_state, Tensor? rho_state, ScalarType? out_dtype, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
BACKWARD = define(
    "shared_kv_attention_backward",
    "(Tensor dz, Tensor? dlse, Tensor? drho, Tensor q, Tensor x, Tensor z, Tensor lse, Tensor rho, Tensor? key_mask, "
    "Tensor? lengths, Tensor? dropout_seed, float scale, float dropout_p, SymInt key_offset, bool needs_dq, bool needs_dx, "
    "ScalarType? dq_dtype, str backend, Tensor? dq_earlier=None) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


@register_flop_formula(torch.ops.perceiver_kernels.shared_kv_attention_forward)
def _forward_flops(q_shape: tuple[int, ...], x_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    B, R, C = q_shape
    return 4 * B * R * x_shape[1] * C


@register_flop_formula(torch.ops.perceiver_kernels.shared_kv_attention_backward)
def _backward_flops(
    dz_shape: Any, dlse_shape: Any, drho_shape: Any, q_shape: tuple[int, ...], x_shape: tuple[int, ...], z_shape: Any,
    lse_shape: Any, rho_shape: Any, key_mask: Any, lengths: Any, dropout_seed: Any, scale: float, dropout_p: float,
    key_offset: int, needs_dq: bool, needs_dx: bool, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    B, R, C = q_shape
    products = 3 * bool(needs_dq) + 4 * bool(needs_dx)
    return 2 * products * B * R * x_shape[1] * C


def _save(ctx: Any, inputs: tuple[Any, ...], output: State) -> None:
    q, x, key_mask, lengths, dropout_seed, scale, dropout_p, backend, _ = inputs
    z, lse, rho = output
    ctx.save_for_backward(q, x, z, lse, rho, key_mask, lengths, dropout_seed)
    ctx.set_materialize_grads(False)
    ctx.arguments = (scale, dropout_p, backend)


def _gradient(ctx: Any, dz: Tensor | None, dlse: Tensor | None, drho: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 7
    q, x, z, lse, rho, key_mask, lengths, dropout_seed = ctx.saved_tensors
    anchor = next((g for g in (dz, dlse, drho) if g is not None), None)
    if anchor is None:
        return (None, None, *nothing)
    scale, dropout_p, backend = ctx.arguments
    needs_dq, needs_dx = ctx.needs_input_grad[:2]
    dz = torch.zeros_like(z) if dz is None else dz
    dq, dx = BACKWARD(
        dz, dlse, drho, q, x, z, lse, rho, key_mask, lengths, dropout_seed, scale, dropout_p, 0, needs_dq, needs_dx, None,
        backend,
    )  # fmt: skip
    dq = refuse_double_backward(dq, anchor) if needs_dq else None
    dx = refuse_double_backward(dx, anchor) if needs_dx else None
    return (dq, dx, *nothing)


def _run(
    q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, dropout_seed: Tensor | None, scale: float,
    dropout_p: float, backend: str, out_dtype: torch.dtype | None = None,
) -> State:  # fmt: skip
    return FORWARD(q, x, key_mask, lengths, dropout_seed, scale, dropout_p, 0, None, None, None, out_dtype, backend)


class _SharedKV(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> State:
        output = _run(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradient)


class _SharedKVFunctorch(Function):
    @staticmethod
    def forward(*inputs: Any) -> State:
        return _run(*inputs)

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradient)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[State, tuple[int, int, int]]:
        """Over mapped inputs the axis joins the batch; over shared inputs it joins the query rows, so x is not copied."""
        q, x, key_mask, lengths, *rest = inputs
        size = info.batch_size
        if all(dim is None for dim in in_dims[1:4]):
            rows = q.movedim(in_dims[0], 1)  # [B, V, R, C]
            outputs = shared_kv_attention(rows.flatten(1, 2), x, key_mask, lengths, *rest)
            return tuple(out.unflatten(1, rows.shape[1:3]) for out in outputs), (1, 1, 1)
        fold = BatchFold(size, q.shape[0] if in_dims[0] is None else q.movedim(in_dims[0], 0).shape[1])
        q, x = fold(q, in_dims[0]), fold(x, in_dims[1])
        key_mask = None if key_mask is None else fold(key_mask, in_dims[2])
        lengths = None if lengths is None else fold(lengths, in_dims[3])
        outputs = shared_kv_attention(q, x, key_mask, lengths, *rest)
        return tuple(out.unflatten(0, (size, -1)) for out in outputs), (0, 0, 0)


def shared_kv_attention(
    q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, dropout_seed: Tensor | None, scale: float,
    dropout_p: float, backend: str, out_dtype: torch.dtype | None = None,
) -> State:  # fmt: skip
    """Differentiable shared-KV attention on a kernel backend: (z, lse, rho); see functional.shared_kv_attention.

    z has ``out_dtype``, or q's where that is None.
    """
    inputs = (q, x, key_mask, lengths, dropout_seed, scale, dropout_p, backend, out_dtype)
    if transforms_active():
        return _SharedKVFunctorch.apply(*inputs)
    if torch.is_grad_enabled() and (q.requires_grad or x.requires_grad):
        return _SharedKV.apply(*inputs)
    return _run(*inputs)
