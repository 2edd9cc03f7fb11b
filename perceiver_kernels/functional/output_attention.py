"""Output queries that read the latents, query and output projections included: absorbed or projected, with one result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.absorption import absorb_keys, bias_channels, fold_norm
from perceiver_kernels.device import device_facts
from perceiver_kernels.functional.attention import attention
from perceiver_kernels.functional.common import autocast_dtype, visible
from perceiver_kernels.functional.cross_attention import Inputs, Method, check_reading, on_device, requires_gradient
from perceiver_kernels.functional.packing import normalise_wide, pack_inputs
from perceiver_kernels.inputs import InputArray, PackedInputs
from perceiver_kernels.plan import plan_output_cross_attention
from perceiver_kernels.problem import (
    MAX_CHANNELS,
    OutputCrossAttentionProblem,
    check_device,
    check_eps,
    check_is_tensor,
    check_key_visibility,
    check_probability,
    check_query_mask,
    check_rank,
    check_scale,
    check_vectors,
)

Kept = dict[tuple[Any, ...], tuple[Tensor, Tensor]]
"""What calls without gradients make of the same latents and weights, under what it depends on besides."""


@dataclass(frozen=True)
class OutputProjections:
    """Weights of the query and output projections and of the LayerNorm before the former, in nn.Linear's layout."""

    w_q: Tensor
    w_o: Tensor
    b_q: Tensor | None
    b_o: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


@dataclass(frozen=True)
class OutputCall:
    """One call, checked and decided: everything that is left is to compute it.

    ``source`` hides what no batch entry's query is; ``query_mask`` [B, O] says it for each entry.
    """

    problem: OutputCrossAttentionProblem
    source: InputArray | PackedInputs
    key: Tensor
    value: Tensor
    weights: OutputProjections
    key_mask: Tensor | None
    lengths: Tensor | None
    query_mask: Tensor | None
    normalize: bool
    eps: float
    scale: float
    dropout_p: float
    method: Method

    @property
    def constants(self) -> int:
        """Channels of ones that the queries are packed with."""
        return self.problem.bias_channels if self.method == "absorbed" else 0


def as_queries(queries: Inputs, query_mask: Tensor | None) -> InputArray | PackedInputs:
    """Queries in one of two forms."""
    if isinstance(queries, (InputArray, PackedInputs)):
        if query_mask is not None and not (queries.key_mask is None and queries.lengths is None):
            raise ValueError(f"query_mask and a mask or lengths of the {type(queries).__name__} exclude each other")
        return queries
    check_is_tensor("queries", queries)
    check_rank("queries", queries, "B, O, C")
    return InputArray.tokens(queries)


def hide(
    source: InputArray | PackedInputs, query_mask: Tensor | None, B: int
) -> tuple[InputArray | PackedInputs, Tensor | None]:
    """The source with its mask, and the mask of every batch entry."""
    if query_mask is None:
        seen = visible(source.key_mask, source.lengths, source.length)
        return source, None if seen is None else seen.expand(B, -1)
    if isinstance(source, InputArray):
        # Queries that the batch shares are packed if any of its entries asks them.
        shared = source.batch == 1 and B != 1
        source = replace(source, key_mask=query_mask.any(0, keepdim=True) if shared else query_mask)
    return source, query_mask


def resolve(
    queries: Inputs, key: Tensor, value: Tensor, w_q: Tensor, w_o: Tensor, *, b_q: Tensor | None = None,
    b_o: Tensor | None = None, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, normalize: bool = True,
    eps: float = 1e-5, scale: float | None = None, key_mask: Tensor | None = None, lengths: Tensor | None = None,
    query_mask: Tensor | None = None, dropout_p: float = 0.0, method: Method | None = None,
) -> OutputCall:  # fmt: skip
    """Check every argument of output_cross_attention and decide how it is computed."""
    check_reading(None, method)
    check_eps(eps)
    check_scale(scale)
    check_probability("dropout_p", dropout_p)
    source = as_queries(queries, query_mask)
    check_is_tensor("key", key)
    if isinstance(source, PackedInputs):
        check_device("queries", source.data, "key", key)
        (batch, O, _), dtype, constants = source.data.shape, source.data.dtype, source.constants
    else:
        batch, O, dtype, constants = source.batch, source.length, autocast_dtype(key) or key.dtype, 0
    problem = OutputCrossAttentionProblem.of(
        key, value, w_q, w_o, query_batch=batch, O=O, C=source.channels, dtype=dtype, packed=isinstance(source, PackedInputs),
        constants=constants, bias_channels=bias_channels(b_q, norm_bias, dtype), queries_need_grad=requires_gradient(source),
    )  # fmt: skip
    B, H, C = problem.B, problem.H, problem.C
    check_vectors(
        "key", key, ("b_q", b_q, "H*d_qk", H * problem.d_qk), ("b_o", b_o, "C_out", problem.C_out),
        ("norm_weight", norm_weight, "C", C), ("norm_bias", norm_bias, "C", C),
    )  # fmt: skip
    check_key_visibility(key_mask, lengths, B, problem.N, key.device)
    check_query_mask(query_mask, "B, O", B, O, "key", key)
    if method == "absorbed" and problem.against_absorption:
        raise ValueError(f"method='absorbed' cannot serve this call: {'; '.join(problem.against_absorption)}")
    method = method or plan_output_cross_attention(problem, device_facts(key.device)).method
    source, query_mask = hide(source, query_mask, B)
    return OutputCall(
        problem, source, key, value, OutputProjections(w_q, w_o, b_q, b_o, norm_weight, norm_bias), key_mask, lengths,
        query_mask, normalize, eps, problem.d_qk**-0.5 if scale is None else float(scale), dropout_p, method,
    )  # fmt: skip


def _rows(call: OutputCall, backend: str | None) -> Tensor:
    """The normalised queries [b, O, channels]."""
    source, p = call.source, call.problem
    if isinstance(source, PackedInputs):
        return source.data
    source = on_device(source, call.key.device)
    if p.C > MAX_CHANNELS:
        seen = visible(source.key_mask, source.lengths, p.O)
        return normalise_wide(source, seen, call.normalize, call.eps, p.dtype)
    return pack_inputs(
        source, normalize=call.normalize, eps=call.eps, dtype=p.dtype, constants=call.constants, backend=backend
    ).data


def _attend(call: OutputCall, query: Tensor, key: Tensor, value: Tensor, backend: str | None) -> Tensor:
    return attention(
        query.expand(call.problem.B, -1, -1, -1), key, value, key_mask=call.key_mask, lengths=call.lengths,
        query_mask=call.query_mask, dropout_p=call.dropout_p, scale=call.scale, backend=backend,
    )  # fmt: skip


def _absorbed_latents(call: OutputCall, channels: int, full: bool) -> tuple[Tensor, Tensor]:
    """key' [B, 1, N, channels] and value' [B, 1, N, C_out]."""
    p, w, key, value = call.problem, call.weights, call.key, call.value
    seen = visible(call.key_mask, call.lengths, p.N)
    if seen is not None:
        # The gradients of the weights are products with all keys and values, and 0 * NaN would be NaN.
        key, value = (torch.where(seen[:, None, :, None], tensor, 0.0) for tensor in (key, value))
    key = absorb_keys(key, w.w_q, w.b_q, w.norm_weight, w.norm_bias, p.C, channels, p.dtype)
    b_o = w.b_o.to(p.dtype) if full and w.b_o is not None else None
    return key, F.linear(value.to(p.dtype), w.w_o.to(p.dtype), b_o)


def _absorbed(call: OutputCall, rows: Tensor, backend: str | None, kept: Kept) -> Tensor:
    p, b_o, channels = call.problem, call.weights.b_o, rows.shape[-1]
    # Weights that sum to 1 in every row carry b_o with the values: no pass over the result adds it.
    seen = call.key_mask is None and call.lengths is None and call.query_mask is None
    full = seen and call.dropout_p == 0.0 and p.N > 0
    key, value = _once(kept, ("absorbed", channels, p.dtype, full), lambda: _absorbed_latents(call, channels, full))
    out = _attend(call, rows[:, None], key, value, backend)[:, 0]
    return out if full or b_o is None else out + b_o.to(p.dtype)


def _projected(call: OutputCall, rows: Tensor, backend: str | None, kept: Kept) -> Tensor:
    p, w, channels = call.problem, call.weights, rows.shape[-1]
    weight, shift = _once(
        kept, ("projected", channels, p.dtype),
        lambda: fold_norm(w.w_q, w.b_q, w.norm_weight, w.norm_bias, channels, p.dtype),
    )  # fmt: skip
    query = F.linear(rows, weight, shift).unflatten(-1, (p.H, -1)).transpose(1, 2)  # [b, H, O, d_qk]
    out = _attend(call, query, call.key.to(p.dtype), call.value.to(p.dtype), backend)
    return F.linear(out.transpose(1, 2).flatten(2), w.w_o.to(p.dtype), None if w.b_o is None else w.b_o.to(p.dtype))


def _once(kept: Kept, what: tuple[Any, ...], make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    # With gradients it is part of the call's own graph: checkpointing computes that again, from its arguments alone.
    if torch.is_grad_enabled():
        return make()
    if what not in kept:
        kept[what] = make()
    return kept[what]


def compute(call: OutputCall, backend: str | None, kept: Kept) -> Tensor:
    """The result of ``output_cross_attention``. What does not depend on the queries is made where ``kept`` has it not yet."""
    run = _absorbed if call.method == "absorbed" else _projected
    return run(call, _rows(call, backend), backend, kept)


def output_cross_attention(
    queries: Tensor | InputArray | PackedInputs,
    key: Tensor,
    value: Tensor,
    w_q: Tensor,
    w_o: Tensor,
    *,
    b_q: Tensor | None = None,
    b_o: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-5,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    query_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    method: Method | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-attention of output queries to keys and values of the latents, query and output projections included.

    ``out = W_o softmax(scale q k^T) v + b_o`` with ``q = W_q (g y_hat + b) + b_q`` and y_hat the normalised queries. Absorbed,
    which one head can be, the projections act on the latents' keys and values, and neither q nor the result before W_o is
    ever stored; projected, they are computed as written. Both give the same result; a roofline estimate chooses
    (docs/decode.md).

    Args:
        queries: ``[B, O, C]``, an InputArray, or PackedInputs; of batch 1 where the batch shares them. Packed, those with
            biases are absorbed only if ``pack_inputs`` gave them ``constants``. What their key_mask or lengths hide sees
            nothing.
        key: ``[B, H, N, d_qk]``.
        value: ``[B, H, N, d_v]``.
        w_q: ``[H*d_qk, C]``, in nn.Linear's layout; zero columns up to C_padded (C rounded up to 16) may follow, as in
            ``norm_weight`` and ``norm_bias``.
        w_o: ``[C_out, H*d_v]``, in nn.Linear's layout.
        b_q: ``[H*d_qk]``.
        b_o: ``[C_out]``, added to every row, those that see nothing too.
        norm_weight: ``[C]``, LayerNorm's weight g.
        norm_bias: ``[C]``, its bias b.
        normalize: apply LayerNorm's normalisation to the queries. PackedInputs carry their own answer.
        eps: LayerNorm's.
        scale: factor on the scores; None is ``1/sqrt(d_qk)``.
        key_mask: bool ``[B, N]``, True where a latent is visible. What hidden keys and values hold is never used, NaN included.
        lengths: int32 ``[B]``, instead of ``key_mask``: latents visible from the front.
        query_mask: bool ``[B, O]``, False for queries that see nothing: their result is ``b_o``. Not beside a mask of the
            queries' own.
        dropout_p: probability in ``[0, 1)`` of dropping an attention weight.
        method: ``"absorbed"`` or ``"projected"``; None lets the planner choose.
        backend: a backend's name; it never falls back.

    Returns:
        ``[B, O, C_out]``, in the dtype of packed queries, else in autocast's or key's.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names it. ValueError also for ``method="absorbed"`` with
            several heads, or more than 1024 channels (biases take two of them, one in float32 and float64).

    Source: Jaegle et al. 2021 (Perceiver IO), arXiv 2107.14795, section 3.2; the absorbed form is derived in docs/decode.md.
    """
    call = resolve(
        queries, key, value, w_q, w_o, b_q=b_q, b_o=b_o, norm_weight=norm_weight, norm_bias=norm_bias, normalize=normalize,
        eps=eps, scale=scale, key_mask=key_mask, lengths=lengths, query_mask=query_mask, dropout_p=dropout_p, method=method,
    )  # fmt: skip
    return compute(call, backend, {})
