"""The shared_kv_attention boundary."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from perceiver_kernels.dispatch import load, serving
from perceiver_kernels.ops.boundary import BatchFold, define, refuse_double_backward, transforms_active

State = tuple[Tensor, Tensor, Tensor]


def _serving(q: Tensor, x: Tensor, backend: str, rule: str = "leaves") -> ModuleType:
    """The module that serves the call."""
    sizes = *q.shape[:2], x.shape[1], q.shape[2]
    return load("shared_kv_attention", serving("shared_kv_attention", backend, sizes, rule))


def _forward(
    q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, dropout_seed: Tensor | None, scale: float,
    dropout_p: float, key_offset: int, z_state: Tensor | None, lse_state: Tensor | None, rho_state: Tensor | None,
    out_dtype: torch.dtype | None, backend: str,
) -> State:  # fmt: skip
    state = None if z_state is None else (z_state, lse_state, rho_state)
    return _serving(q, x, backend).shared_kv_attention_forward(
        q, x, key_mask, lengths, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed, key_offset=key_offset,
        state=state, out_dtype=out_dtype,
    )  # fmt: skip


def _forward_fake(
    q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, dropout_seed: Tensor | None, scale: float,
    dropout_p: float, key_offset: int, z_state: Tensor | None, lse_state: Tensor | None, rho_state: Tensor | None,
    out_dtype: torch.dtype | None, backend: str,
) -> State:  # fmt: skip
    wide = torch.promote_types(q.dtype, torch.float32)
    z = q.new_empty(q.shape, dtype=out_dtype or q.dtype)
    return z, q.new_empty(q.shape[:2], dtype=wide), q.new_empty(q.shape[:2], dtype=wide)


def _delta(
    dz: Tensor, z: Tensor, dlse: Tensor | None, drho: Tensor | None, rho: Tensor, backend: str
) -> Tensor:
    # Of two alternatives for the backward either takes the other's.
    return load("shared_kv_attention", backend.split(",")[0]).shared_kv_attention_delta(dz, z, dlse, drho, rho)


def _delta_fake(
    dz: Tensor, z: Tensor, dlse: Tensor | None, drho: Tensor | None, rho: Tensor, backend: str
) -> Tensor:
    return z.new_empty(z.shape[:2], dtype=torch.promote_types(rho.dtype, torch.float32))


def _backward(
    dz: Tensor, delta: Tensor, drho: Tensor | None, q: Tensor, x: Tensor, lse: Tensor, key_mask: Tensor | None,
    lengths: Tensor | None, dropout_seed: Tensor | None, scale: float, dropout_p: float, key_offset: int, needs_dq: bool,
    needs_dx: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dq, dx = _serving(q, x, backend, "leaves_backward").shared_kv_attention_backward(
        dz, delta, drho, q, x, lse, key_mask, lengths, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed,
        key_offset=key_offset, needs_dq=needs_dq, needs_dx=needs_dx,
    )  # fmt: skip
    return q.new_empty(0) if dq is None else dq, x.new_empty(0) if dx is None else dx


def _backward_fake(
    dz: Tensor, delta: Tensor, drho: Tensor | None, q: Tensor, x: Tensor, lse: Tensor, key_mask: Tensor | None,
    lengths: Tensor | None, dropout_seed: Tensor | None, scale: float, dropout_p: float, key_offset: int, needs_dq: bool,
    needs_dx: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape if needs_dq else 0), x.new_empty(x.shape if needs_dx else 0)


def _backward_add(
    dq_sum: Tensor | None, dz: Tensor, delta: Tensor, drho: Tensor | None, q: Tensor, x: Tensor, lse: Tensor,
    key_mask: Tensor | None, dropout_seed: Tensor | None, scale: float, dropout_p: float, key_offset: int, needs_dx: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    _, dx = _serving(q, x, backend, "leaves_backward").shared_kv_attention_backward(
        dz, delta, drho, q, x, lse, key_mask, None, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed,
        key_offset=key_offset, needs_dq=dq_sum is not None, needs_dx=needs_dx, dq_sum=dq_sum,
    )  # fmt: skip
    return x.new_empty(0) if dx is None else dx


def _backward_add_fake(
    dq_sum: Tensor | None, dz: Tensor, delta: Tensor, drho: Tensor | None, q: Tensor, x: Tensor, lse: Tensor,
    key_mask: Tensor | None, dropout_seed: Tensor | None, scale: float, dropout_p: float, key_offset: int, needs_dx: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape if needs_dx else 0)


FORWARD = define(
    "shared_kv_attention_forward",
    "(Tensor q, Tensor x, Tensor? key_mask, Tensor? lengths, Tensor? dropout_seed, float scale, float dropout_p, "
    "SymInt key_offset, Tensor? z_state, Tensor? lse_state, Tensor? rho_state, ScalarType? out_dtype, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
DELTA = define(
    "shared_kv_attention_delta",
    "(Tensor dz, Tensor z, Tensor? dlse, Tensor? drho, Tensor rho, str backend) -> Tensor",
    _delta,
    _delta_fake,
)
BACKWARD = define(
    "shared_kv_attention_backward",
    "(Tensor dz, Tensor delta, Tensor? drho, Tensor q, Tensor x, Tensor lse, Tensor? key_mask, Tensor? lengths, "
    "Tensor? dropout_seed, float scale, float dropout_p, SymInt key_offset, bool needs_dq, bool needs_dx, str backend) "
    "-> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
# Of one chunk of keys: dq is added to dq_sum (None: not needed). Not one with BACKWARD, which vmap must be able to call.
BACKWARD_ADD = define(
    "shared_kv_attention_backward_add",
    "(Tensor(a!)? dq_sum, Tensor dz, Tensor delta, Tensor? drho, Tensor q, Tensor x, Tensor lse, Tensor? key_mask, "
    "Tensor? dropout_seed, float scale, float dropout_p, SymInt key_offset, bool needs_dx, str backend) -> Tensor",
    _backward_add,
    _backward_add_fake,
)


@register_flop_formula(torch.ops.perceiver_kernels.shared_kv_attention_forward)
def _forward_flops(q_shape: tuple[int, ...], x_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    B, R, C = q_shape
    return 4 * B * R * x_shape[1] * C


@register_flop_formula(torch.ops.perceiver_kernels.shared_kv_attention_backward)
def _backward_flops(
    dz_shape: Any, delta_shape: Any, drho_shape: Any, q_shape: tuple[int, ...], x_shape: tuple[int, ...], lse_shape: Any,
    key_mask: Any, lengths: Any, dropout_seed: Any, scale: float, dropout_p: float, key_offset: int, needs_dq: bool,
    needs_dx: bool, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _gradient_flops(q_shape, x_shape, needs_dq, needs_dx)


@register_flop_formula(torch.ops.perceiver_kernels.shared_kv_attention_backward_add)
def _backward_add_flops(
    dq_sum_shape: Any, dz_shape: Any, delta_shape: Any, drho_shape: Any, q_shape: tuple[int, ...], x_shape: tuple[int, ...],
    lse_shape: Any, key_mask: Any, dropout_seed: Any, scale: float, dropout_p: float, key_offset: int, needs_dx: bool,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _gradient_flops(q_shape, x_shape, dq_sum_shape is not None, needs_dx)


def _gradient_flops(q_shape: tuple[int, ...], x_shape: tuple[int, ...], needs_dq: bool, needs_dx: bool) -> int:
    B, R, C = q_shape
    products = 3 * bool(needs_dq) + 4 * bool(needs_dx)
    return 2 * products * B * R * x_shape[1] * C


def row_gradients(
    dz: Tensor | None, dlse: Tensor | None, drho: Tensor | None, q: Tensor, z: Tensor, rho: Tensor, dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dz, delta, drho) as BACKWARD takes them, from the gradients of the forward's results.

    dz is rounded to q's dtype before delta is taken from it: ds = p (dz.x_j - dz.z) then sees one dz, whose rounding weighs
    with x_j - z instead of with both.
    """
    dz = torch.zeros_like(z, dtype=q.dtype) if dz is None else dz.to(q.dtype)
    drho = drho if dropout_p > 0.0 else None  # without dropout rho is constant: its gradient cancels
    return dz, DELTA(dz, z, dlse, drho, rho, backend), drho


def _save(ctx: Any, inputs: tuple[Any, ...], output: State) -> None:
    q, x, key_mask, lengths, dropout_seed, scale, dropout_p, backends = inputs
    z, lse, rho = output
    ctx.save_for_backward(q, x, z, lse, rho, key_mask, lengths, dropout_seed)
    ctx.set_materialize_grads(False)
    ctx.arguments = (scale, dropout_p, backends[1])


def _gradient(ctx: Any, dz: Tensor | None, dlse: Tensor | None, drho: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 6
    q, x, z, lse, rho, key_mask, lengths, dropout_seed = ctx.saved_tensors
    if dz is None and dlse is None and drho is None:
        return (None, None, *nothing)
    sources = dz, dlse, drho, q, x
    scale, dropout_p, backend = ctx.arguments
    needs_dq, needs_dx = ctx.needs_input_grad[:2]
    dz, delta, drho = row_gradients(dz, dlse, drho, q, z, rho, dropout_p, backend)
    dq, dx = BACKWARD(
        dz, delta, drho, q, x, lse, key_mask, lengths, dropout_seed, scale, dropout_p, 0, needs_dq, needs_dx, backend
    )
    dq = refuse_double_backward(dq, *sources) if needs_dq else None
    dx = refuse_double_backward(dx, *sources) if needs_dx else None
    return (dq, dx, *nothing)


def _run(
    q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, dropout_seed: Tensor | None, scale: float,
    dropout_p: float, backends: tuple[str, str], out_dtype: torch.dtype | None,
) -> State:  # fmt: skip
    return FORWARD(q, x, key_mask, lengths, dropout_seed, scale, dropout_p, 0, None, None, None, out_dtype, backends[0])


def _run_wide(q: Tensor, *inputs: Any) -> State:
    """With z in fp32 (fp64 for fp64): the backward subtracts dz.z from the gradients of the scores.

    Rounded z left an error of 2^-9 |dz| |z| in scores whose gradients cancel, such as those of a row that sees one key.
    """
    return _run(q, *inputs, torch.promote_types(q.dtype, torch.float32))


class _SharedKV(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> State:
        output = _run_wide(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradient)


class _SharedKVFunctorch(Function):
    @staticmethod
    def forward(*inputs: Any) -> State:
        return _run_wide(*inputs)

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradient)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[State, tuple[int, int, int]]:
        """Over mapped inputs the axis joins the batch; over shared inputs it joins the query rows, so x is not copied.

        With dropout every entry is a call of its own: what is dropped depends on batch and row, and the backward of each
        entry counts its own from 0.
        """
        q, x, key_mask, lengths, dropout_seed, scale, dropout_p, backends = inputs
        size, wide = info.batch_size, torch.promote_types(q.dtype, torch.float32)
        rest = dropout_seed, scale, dropout_p, backends, wide
        if dropout_p > 0.0:
            mapped = [isinstance(value, Tensor) and dim is not None for value, dim in zip(inputs, in_dims, strict=True)]
            entries = (
                [value.select(dim, v) if m else value for value, dim, m in zip(inputs, in_dims, mapped, strict=True)]
                for v in range(size)
            )
            outputs = [shared_kv_attention(*entry, wide) for entry in entries]
            return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0, 0, 0)
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
    dropout_p: float, backends: tuple[str, str], out_dtype: torch.dtype | None = None,
) -> State:  # fmt: skip
    """Differentiable shared-KV attention on kernel backends: (z, lse, rho); see functional.shared_kv_attention.

    ``backends`` serve the forward and the backward. z has ``out_dtype``, or q's where that is None.
    """
    inputs = (q, x, key_mask, lengths, dropout_seed, scale, dropout_p, backends)
    if transforms_active():
        z, lse, rho = _SharedKVFunctorch.apply(*inputs)
    elif torch.is_grad_enabled() and (q.requires_grad or x.requires_grad):
        z, lse, rho = _SharedKV.apply(*inputs)
    else:
        return _run(*inputs, out_dtype)
    return z.to(out_dtype or q.dtype), lse, rho
