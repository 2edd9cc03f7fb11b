"""Input-to-latent cross-attention, projections included: absorbed, projected or chunked, with one result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.absorption import absorb_queries, fold_norm, project_values, with_zero_gradient
from perceiver_kernels.checks import is_integer
from perceiver_kernels.device import device_facts
from perceiver_kernels.functional.attention import attend_shared, attention
from perceiver_kernels.functional.chunked import ChunkSettings, check_source, chunked_attention
from perceiver_kernels.functional.common import autocast_dtype, visible
from perceiver_kernels.functional.heads import split_projection
from perceiver_kernels.functional.packing import pack_inputs
from perceiver_kernels.inputs import InputArray, PackedInputs
from perceiver_kernels.plan import plan_cross_attention
from perceiver_kernels.problem import (
    CrossAttentionProblem,
    check_device,
    check_eps,
    check_is_tensor,
    check_probability,
    check_scale,
    check_vectors,
    needs_gradient,
)

Method = Literal["absorbed", "projected"]
Inputs = Tensor | InputArray | PackedInputs


def check_reading(chunk_size: int | None, method: Method | None) -> None:
    """How inputs are read: ``method`` by name, ``chunk_size`` tokens at a time."""
    if method not in (None, "absorbed", "projected"):
        raise ValueError(f"method must be 'absorbed', 'projected' or None, got {method!r}")
    if chunk_size is None:
        return
    if not is_integer(chunk_size) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive number of tokens, got {chunk_size!r}")
    if method == "projected":
        raise ValueError("chunk_size needs method='absorbed' or None: projected keys and values are proportional to M")


@dataclass(frozen=True)
class Projections:
    """Weights of the key and value projections and of the LayerNorm before them, in nn.Linear's layout."""

    w_k: Tensor
    w_v: Tensor
    b_k: Tensor | None
    b_v: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    def check(self, H: int, d_qk: int, d_v: int, C: int, q: Tensor) -> None:
        check_vectors(
            "q", q, ("b_k", self.b_k, "H*d_qk", H * d_qk), ("b_v", self.b_v, "H*d_v", H * d_v),
            ("norm_weight", self.norm_weight, "C", C), ("norm_bias", self.norm_bias, "C", C),
        )  # fmt: skip


def as_source(inputs: Inputs, key_mask: Tensor | None, lengths: Tensor | None) -> InputArray | PackedInputs:
    """Inputs in one of two forms, with their masks."""
    if isinstance(inputs, (InputArray, PackedInputs)):
        if key_mask is not None or lengths is not None:
            raise ValueError(f"key_mask and lengths must come with the {type(inputs).__name__}, not beside it")
        return inputs
    check_is_tensor("inputs", inputs)
    return InputArray.tokens(inputs, key_mask=key_mask, lengths=lengths)


def requires_gradient(source: InputArray | PackedInputs) -> bool:
    """Whether anything that tokens are made of wants a gradient."""
    if isinstance(source, PackedInputs):
        return needs_gradient(source.data)
    positions = source.positions if isinstance(source.positions, Tensor) else None
    return needs_gradient(source.content, positions, source.coordinates)


def describe(
    q: Tensor,
    inputs: Inputs,
    weights: Projections,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[CrossAttentionProblem, InputArray | PackedInputs]:
    """The checked problem of one call and its inputs in one of two forms."""
    check_is_tensor("q", q)
    source = as_source(inputs, key_mask, lengths)
    if isinstance(source, PackedInputs):
        check_device("inputs", source.data, "q", q)
        (B, M, _), dtype = source.data.shape, source.data.dtype
    else:
        B, M = source.batch, source.length
        dtype = autocast_dtype(q) or q.dtype
    problem = CrossAttentionProblem.of(
        q, weights.w_k, weights.w_v, B=B, M=M, C=source.channels, dtype=dtype, packed=isinstance(source, PackedInputs),
        inputs_need_grad=requires_gradient(source),
    )  # fmt: skip
    weights.check(problem.H, problem.d_qk, problem.d_v, problem.C, q)
    return problem, source


@dataclass(frozen=True)
class Call:
    """One call, checked and decided: everything that is left is to compute it."""

    problem: CrossAttentionProblem
    source: InputArray | PackedInputs
    weights: Projections
    scale: float
    method: Method
    chunks: ChunkSettings | None


def resolve(
    q: Tensor, inputs: Inputs, w_k: Tensor, w_v: Tensor, *, b_k: Tensor | None = None, b_v: Tensor | None = None,
    norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, normalize: bool = True, eps: float = 1e-5,
    scale: float | None = None, key_mask: Tensor | None = None, lengths: Tensor | None = None, dropout_p: float = 0.0,
    chunk_size: int | None = None, method: Method | None = None,
) -> Call:  # fmt: skip
    """Check every argument of input_cross_attention and decide how it is computed."""
    check_reading(chunk_size, method)
    check_eps(eps)
    check_scale(scale)
    check_probability("dropout_p", dropout_p)
    if chunk_size is not None:
        method = "absorbed"
    weights = Projections(w_k, w_v, b_k, b_v, norm_weight, norm_bias)
    problem, source = describe(q, inputs, weights, key_mask, lengths)
    scale = problem.d_qk**-0.5 if scale is None else float(scale)
    chunks = None
    if chunk_size is not None and isinstance(source, InputArray):
        check_source(source)
        chunks = ChunkSettings(chunk_size, problem.dtype, normalize, eps, scale, dropout_p, source.channels)
    method = method or plan_cross_attention(problem, device_facts(q.device)).method
    return Call(problem, source, weights, scale, method, chunks)


def _absorbed(
    problem: CrossAttentionProblem, q: Tensor, packed: PackedInputs, weights: Projections, scale: float,
    dropout_p: float, backend: str | None,
) -> Tensor:  # fmt: skip
    absorbed = absorb_queries(q, weights.w_k, weights.norm_weight, packed.data.shape[-1], problem.dtype)
    absorbed = absorbed.expand(problem.B, -1, -1)
    # z stays in fp32: where attention is nearly uniform its rows are nearly equal, and so would be the errors of rounding
    # them, which the gradients of the norm and of W_v would add up.
    z, _, rho = attend_shared(
        absorbed, packed.data, packed.key_mask, packed.lengths, scale, dropout_p, False, backend,
        torch.promote_types(problem.dtype, torch.float32),
    )  # fmt: skip
    return _values_of(problem, z, rho, packed, dropout_p, weights)


def _values_of(
    problem: CrossAttentionProblem, z: Tensor, rho: Tensor, keys: PackedInputs | InputArray, dropout_p: float,
    weights: Projections,
) -> Tensor:  # fmt: skip
    # Where every row sees a token, and all of its weights, they sum to 1.
    full = keys.key_mask is None and keys.lengths is None and dropout_p == 0.0 and problem.M > 0
    out = project_values(
        z, None if full else rho, problem.H, weights.w_v.to(problem.dtype), weights.b_v, weights.norm_weight,
        weights.norm_bias,
    )  # fmt: skip
    return with_zero_gradient(out, weights.b_k)


def _projected(
    problem: CrossAttentionProblem, q: Tensor, packed: PackedInputs, weights: Projections, scale: float,
    dropout_p: float, backend: str | None,
) -> Tensor:  # fmt: skip
    channels = packed.data.shape[-1]
    # The biases of the keys shift every score of a row alike: left out, as in the absorbed form, their gradient is exactly 0.
    w_k, b_k = fold_norm(weights.w_k, None, weights.norm_weight, None, channels, problem.dtype)
    w_v, b_v = fold_norm(weights.w_v, weights.b_v, weights.norm_weight, weights.norm_bias, channels, problem.dtype)
    rows = F.linear(packed.data, torch.cat([w_k, w_v]), torch.cat([b_k, b_v]))
    key, value = split_projection(rows, (problem.H * problem.d_qk, problem.H * problem.d_v), problem.H)  # [B, H, M, d]
    q = q.to(problem.dtype).expand(problem.B, -1, -1, -1)
    key_mask = visible(packed.key_mask, packed.lengths, problem.M)
    out = attention(q, key, value, key_mask=key_mask, dropout_p=dropout_p, scale=scale, backend=backend)
    return with_zero_gradient(out, weights.b_k)


def _absorbed_chunked(
    problem: CrossAttentionProblem, q: Tensor, source: InputArray, weights: Projections, settings: ChunkSettings,
    backend: str | None,
) -> Tensor:  # fmt: skip
    absorbed = absorb_queries(q, weights.w_k, weights.norm_weight, settings.channels_padded, problem.dtype)
    absorbed = absorbed.expand(problem.B, -1, -1)
    z, _, rho = chunked_attention(absorbed, source, settings, backend)
    return _values_of(problem, z, rho, source, settings.dropout_p, weights)


def on_device(source: InputArray, device: torch.device) -> InputArray:
    """The raw inputs on the queries' device; whole, so only for inputs that are not chunked."""
    moved: dict[str, Any] = {
        name: value.to(device)
        for name in ("content", "positions", "coordinates", "key_mask", "lengths")
        if isinstance(value := getattr(source, name), Tensor) and value.device != device
    }
    return replace(source, **moved) if moved else source


def input_cross_attention(
    q: Tensor,
    inputs: Tensor | InputArray | PackedInputs,
    w_k: Tensor,
    w_v: Tensor,
    *,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-5,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    chunk_size: int | None = None,
    method: Method | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-attention of latent queries to an input array, key and value projections included.

    ``out = softmax(scale q k^T) v`` with ``k = W_k y + b_k``, ``v = W_v y + b_v`` and ``y = g x_hat + b`` (LayerNorm of the
    inputs). Absorbed, the projections act on the latent side and neither k, v nor y is ever stored; projected, they are
    computed as written. Both give the same result; a roofline estimate chooses (docs/encode.md).

    Args:
        q: ``[B, H, N, d_qk]``, or batch 1 for queries shared by the batch.
        inputs: ``[B, M, C]``, an InputArray, or PackedInputs (packed once for several calls).
        w_k: ``[H*d_qk, C]``, in nn.Linear's layout; zero columns up to C_padded (C rounded up to 16) may follow, as in ``w_v``,
            ``norm_weight`` and ``norm_bias``.
        w_v: ``[H*d_v, C]``.
        b_k: ``[H*d_qk]``.
        b_v: ``[H*d_v]``.
        norm_weight: ``[C]``, LayerNorm's weight g.
        norm_bias: ``[C]``, its bias b.
        normalize: apply LayerNorm's normalisation to the inputs. PackedInputs carry their own answer.
        eps: LayerNorm's.
        scale: factor on the scores; None is ``1/sqrt(d_qk)``.
        key_mask: bool ``[B, M]``, True where a token is visible.
        lengths: int32 ``[B]``, instead of ``key_mask``: tokens visible from the front, all of them above M and none below 0.
        dropout_p: probability in ``[0, 1)`` of dropping an attention weight.
        chunk_size: tokens packed and attended at a time; memory is then independent of M, forward and backward. Gradients
            reach the content, not positions or coordinates; there are no second ones, nor torch.func's transforms.
        method: ``"absorbed"`` or ``"projected"``; None lets the planner choose.
        backend: a backend's name; it never falls back.

    Returns:
        ``[B, H, N, d_v]``. A query that sees no token gives 0.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names it.

    Source: Jaegle et al. 2021 (Perceiver), section 3.1; the absorbed form is derived in docs/encode.md.
    """
    call = resolve(
        q, inputs, w_k, w_v, b_k=b_k, b_v=b_v, norm_weight=norm_weight, norm_bias=norm_bias, normalize=normalize, eps=eps,
        scale=scale, key_mask=key_mask, lengths=lengths, dropout_p=dropout_p, chunk_size=chunk_size, method=method,
    )  # fmt: skip
    if call.chunks is not None:
        assert isinstance(call.source, InputArray)
        return _absorbed_chunked(call.problem, q, call.source, call.weights, call.chunks, backend)
    packed = call.source
    if isinstance(packed, InputArray):
        packed = pack_inputs(
            on_device(packed, q.device), normalize=normalize, eps=eps, dtype=call.problem.dtype, backend=backend
        )
    run = _absorbed if call.method == "absorbed" else _projected
    return run(call.problem, q, packed, call.weights, call.scale, dropout_p, backend)
