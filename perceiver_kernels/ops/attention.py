"""The attention boundary: separate keys and values, in one or two segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from perceiver_kernels.dispatch import load, serving
from perceiver_kernels.layouts import empty_beside, empty_heads, result_dtype, worth_joining
from perceiver_kernels.masks import NO_MASKS, Masks
from perceiver_kernels.ops.boundary import BatchFold, define, is_plain_call, refuse_double_backward, transforms_active
from perceiver_kernels.problem import needs_gradient

_OPTIONS = (
    "Tensor? key_mask, Tensor? lengths, Tensor? query_mask, Tensor? attn_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "str causal, Tensor? dropout_seed, float scale, float dropout_p, str backend"
)


def _flat(masks: Masks) -> tuple[Any, ...]:
    return (*masks.tensors, masks.causal)


def _serving(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], backend: str, rule: str = "leaves") -> str:
    B, H, Lq, d_qk = query.shape
    return serving("attention", backend, (B, H, Lq, sum(key.shape[2] for key in keys), d_qk, values[0].shape[3]), rule)


def _forward(
    query: Tensor, keys: list[Tensor], values: list[Tensor], key_mask: Tensor | None, lengths: Tensor | None,
    query_mask: Tensor | None, attn_mask: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, causal: Any,
    dropout_seed: Tensor | None, scale: float, dropout_p: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    masks = Masks(key_mask, lengths, query_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, causal)
    return load("attention", _serving(query, keys, values, backend)).attention_forward(
        query, tuple(keys), tuple(values), masks, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed
    )


def _forward_fake(
    query: Tensor, keys: list[Tensor], values: list[Tensor], key_mask: Tensor | None, lengths: Tensor | None,
    query_mask: Tensor | None, attn_mask: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, Lq, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    additive = attn_mask is not None and attn_mask.dtype != torch.bool
    out = empty_heads(query, B, H, Lq, values[0].shape[3], result_dtype(query.dtype, options[-2]))
    return out, query.new_empty((B, H, Lq), dtype=wide), query.new_empty((2, B, H, Lq) if additive else (0,), dtype=wide)


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, statistics: Tensor, query: Tensor, keys: list[Tensor],
    values: list[Tensor], key_mask: Tensor | None, lengths: Tensor | None, query_mask: Tensor | None,
    attn_mask: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, causal: Any,
    dropout_seed: Tensor | None, scale: float, dropout_p: float, backend: str, needs_dq: bool, needs_dkv: bool,
) -> list[Tensor]:  # fmt: skip
    masks = Masks(key_mask, lengths, query_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, causal)
    # Kernels that compute every gradient at once are no choice where dq alone is asked for.
    if not needs_dkv:
        backend = backend.split(",")[-1]
    return load("attention", _serving(query, keys, values, backend, "leaves_backward")).attention_backward(
        dout, dlse, out, lse, statistics, query, tuple(keys), tuple(values), masks, scale=scale, dropout_p=dropout_p,
        dropout_seed=dropout_seed, needs_dq=needs_dq, needs_dkv=needs_dkv,
    )  # fmt: skip


def _backward_into(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, statistics: Tensor,
    query: Tensor, keys: list[Tensor], values: list[Tensor], key_mask: Tensor | None, lengths: Tensor | None,
    query_mask: Tensor | None, attn_mask: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, causal: Any,
    dropout_seed: Tensor | None, scale: float, dropout_p: float, backend: str,
) -> None:  # fmt: skip
    masks = Masks(key_mask, lengths, query_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, causal)
    load("attention", _serving(query, keys, values, backend, "leaves_backward")).attention_backward(
        dout, dlse, out, lse, statistics, query, tuple(keys), tuple(values), masks, scale=scale, dropout_p=dropout_p,
        dropout_seed=dropout_seed, into=(dq, dk, dv),
    )  # fmt: skip


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, statistics: Tensor, query: Tensor, keys: list[Tensor],
    values: list[Tensor], *options: Any,
) -> list[Tensor]:  # fmt: skip
    needs_dq, needs_dkv = options[-2:]
    Lk = sum(key.shape[2] for key in keys)
    dq = empty_heads(query, *query.shape) if needs_dq else query.new_empty(0)
    dk, dv = (
        empty_heads(parts[0], *parts[0].shape[:2], Lk, parts[0].shape[3]) if needs_dkv else query.new_empty(0)
        for parts in (keys, values)
    )
    return [dq, dk, dv]


# (out, lse, statistics); out is fp32 under dropout, see layouts.result_dtype.
FORWARD = define(
    "attention_forward",
    f"(Tensor query, Tensor[] keys, Tensor[] values, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
# [dquery, dkey, dvalue], the latter two over the keys of all segments; a gradient that is not needed is empty.
BACKWARD = define(
    "attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor statistics, Tensor query, Tensor[] keys, Tensor[] values, "
    f"{_OPTIONS}, bool needs_dq, bool needs_dkv) -> Tensor[]",
    _backward,
    _backward_fake,
)
# Every gradient, of one segment, written to memory that is there: not one with BACKWARD, whose results the compiler may place.
BACKWARD_INTO = define(
    "attention_backward_into",
    "(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor statistics, "
    f"Tensor query, Tensor[] keys, Tensor[] values, {_OPTIONS}) -> ()",
    _backward_into,
    lambda *_: None,
)


@register_flop_formula(torch.ops.perceiver_kernels.attention_forward)
def _forward_flops(query_shape: Any, key_shapes: Any, value_shapes: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(query_shape, key_shapes, value_shapes, 1, 1)


@register_flop_formula(torch.ops.perceiver_kernels.attention_backward)
def _backward_flops(
    dout_shape: Any, dlse_shape: Any, out_shape: Any, lse_shape: Any, statistics_shape: Any, query_shape: Any, key_shapes: Any,
    value_shapes: Any, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    needs_dq, needs_dkv = args[-2:]
    # S, dq and dk are products over d_qk; dP and dv over d_v.
    return _flops(query_shape, key_shapes, value_shapes, 1 + needs_dq + needs_dkv, 1 + needs_dkv)


@register_flop_formula(torch.ops.perceiver_kernels.attention_backward_into)
def _backward_into_flops(dq_shape: Any, dk_shape: Any, dv_shape: Any, *shapes: Any, **kwargs: Any) -> int:
    return _backward_flops(*shapes, True, True)


def _flops(query_shape: Any, key_shapes: Any, value_shapes: Any, products_qk: int, products_v: int) -> int:
    B, H, Lq, d_qk = query_shape
    Lk, d_v = sum(shape[2] for shape in key_shapes), value_shapes[0][3]
    return 2 * B * H * Lq * Lk * (products_qk * d_qk + products_v * d_v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, causal, scale, dropout_p, backends, segments = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    ctx.arguments = (causal, scale, dropout_p, backends[1], segments)


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Any) -> tuple[Any, ...]:
    *tensors, out, lse, statistics = ctx.saved_tensors
    causal, scale, dropout_p, backend, segments = ctx.arguments
    (*masks, dropout_seed), query, keys, values = tensors[:7], tensors[7], tensors[8 : 8 + segments], tensors[8 + segments :]
    nothing = (None,) * 5
    if dout is None and dlse is None:
        return (*(None,) * len(tensors), *nothing)
    sources = [t for t in (dout, dlse, query, *keys, *values) if t is not None]
    needs = ctx.needs_input_grad[7 : 8 + 2 * segments]
    dout = torch.zeros_like(out, dtype=query.dtype) if dout is None else dout.to(query.dtype)
    arguments = (
        dout, dlse, out, lse, statistics, query, keys, values, *masks, causal, dropout_seed, scale, dropout_p, backend
    )  # fmt: skip
    # Compiled, results are as the fakes have them; a result of a transform's backward may be mapped.
    eager = not (torch.compiler.is_compiling() or transforms_active())
    beside = eager and segments == 1 and all(needs) and worth_joining((query, *keys, *values))
    into = empty_beside(query, keys[0], values[0]) if beside else None
    if into is None:
        dq, dk, dv = BACKWARD(*arguments, needs[0], any(needs[1:]))
    else:
        BACKWARD_INTO(*into, *arguments)
        dq, dk, dv = into
    dq = refuse_double_backward(dq, *sources) if needs[0] else None
    lengths = [key.shape[2] for key in keys]
    parts = [
        refuse_double_backward(part, *sources) if needed else None
        for gradient, wanted in ((dk, needs[1 : 1 + segments]), (dv, needs[1 + segments :]))
        for part, needed in zip(_split(gradient, lengths) if any(wanted) else [None] * segments, wanted, strict=True)
    ]
    return (*(None,) * 7, dq, *parts, *nothing)


def _split(gradient: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """The segments of a gradient of keys or values."""
    return (gradient,) if len(lengths) == 1 else gradient.split(lengths, 2)


def _run(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, causal, scale, dropout_p, backends, segments = inputs
    (*masks, dropout_seed), query, keys, values = tensors[:7], tensors[7], tensors[8 : 8 + segments], tensors[8 + segments :]
    return FORWARD(query, keys, values, *masks, causal, dropout_seed, scale, dropout_p, backends[0])


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _run(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradient)


class _AttentionFunctorch(Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _run(*inputs)

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradient)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The mapped axis joins the batch. With dropout, packed sequences or an attn_mask every entry is a call of its own.

        What dropout drops depends on the batch entry, packed sequences lie in one, and a mask may lack a batch axis.
        """
        attn_mask, starts, dropout_p = inputs[3], inputs[4], inputs[-3]
        size = info.batch_size
        if dropout_p > 0.0 or starts is not None or attn_mask is not None:
            mapped = [isinstance(value, Tensor) and dim is not None for value, dim in zip(inputs, in_dims, strict=True)]
            entries = (
                [value.select(dim, v) if m else value for value, dim, m in zip(inputs, in_dims, mapped, strict=True)]
                for v in range(size)
            )
            outputs = [_apply(*entry) for entry in entries]
            return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0, 0, 0)
        fold = BatchFold(size, inputs[7].shape[0] if in_dims[7] is None else inputs[7].movedim(in_dims[7], 0).shape[1])
        folded = [fold(v, dim) if isinstance(v, Tensor) else v for v, dim in zip(inputs, in_dims, strict=True)]
        out, lse, statistics = _apply(*folded)
        return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1)), statistics), (0, 0, None)  # type: ignore[return-value]


def _apply(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    if transforms_active():
        return _AttentionFunctorch.apply(*inputs)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return _Attention.apply(*inputs)
    return _run(*inputs)


def attention(
    query: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], *, masks: Masks = NO_MASKS, scale: float,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None, backends: tuple[str, str],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Differentiable attention on kernel backends: (out, lse); see functional.attention.

    ``backends`` serve the forward and the backward. A batch of 1 beside another one is expanded here, so that autograd sums
    its gradient.
    """
    B = keys[0].shape[0] if query.shape[0] == 1 else query.shape[0]
    if query.shape[0] != B or keys[0].shape[0] != B:
        query, *rest = [t if t.shape[0] == B else t.expand(B, -1, -1, -1) for t in (query, *keys, *values)]
        keys, values = tuple(rest[: len(keys)]), tuple(rest[len(keys) :])
    if not needs_gradient(query, *keys, *values) and is_plain_call((query, keys, values, masks.tensors)):
        out, lse, _ = load("attention", _serving(query, keys, values, backends[0])).attention_forward(
            query, keys, values, masks, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed
        )
        return out.to(query.dtype), lse
    *flat, causal = _flat(masks)
    out, lse, _ = _apply(*flat, dropout_seed, query, *keys, *values, causal, scale, dropout_p, backends, len(keys))
    return out.to(query.dtype), lse
