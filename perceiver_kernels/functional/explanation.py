"""What a call would do and why: the plan, its predicted cost, and every backend's reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import plan as planning
from perceiver_kernels.cost import Cost, absorbed_cost, problem_pack_cost, projected_cost, shared_kv_cost
from perceiver_kernels.device import device_facts
from perceiver_kernels.dispatch import candidates, refusals
from perceiver_kernels.functional import cross_attention
from perceiver_kernels.functional.common import autocast_dtype
from perceiver_kernels.inputs import FourierPositions, InputArray, PackedInputs
from perceiver_kernels.problem import (
    AttentionProblem,
    PackProblem,
    Problem,
    SharedKVProblem,
    pad_channels,
)


@dataclass(frozen=True)
class Explanation:
    """One call explained; ``str()`` of it is meant to be read."""

    op: str
    problem: Problem
    backend: str | None
    refused: dict[str, list[str]]
    plan: Any
    flops: float
    bytes: float
    time_ms: float
    parts: tuple[Explanation, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.backend or 'no backend'}: {self.problem}"]
        lines.append(
            f"  predicted: {self.flops / 1e9:.3g} GFLOP, {self.bytes / 2**20:.4g} MiB through device memory, "
            f"{self.time_ms:.4g} ms at the device's ceilings"
        )
        if self.plan is not None:
            lines.append(f"  plan: {self.plan}")
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.refused.items()]
        for part in self.parts:
            lines += ["  " + line for line in str(part).splitlines()]
        return "\n".join(lines)


def _explain(problem: Problem, cost: Cost, plan: Any, device: torch.device, dtype: torch.dtype, backend: str | None,
             parts: tuple[Explanation, ...] = ()) -> Explanation:  # fmt: skip
    refused: dict[str, list[str]] = {}
    chosen = None
    for name in candidates(problem.OP, backend):
        refused[name] = refusals(problem, name)
        if not refused[name]:
            chosen = name
            del refused[name]
            break
    seconds = cost.seconds(device_facts(device), dtype)
    return Explanation(problem.OP, problem, chosen, refused, plan, cost.flops, cost.bytes, seconds * 1e3, parts)


def _explain_shared_kv(
    q: Tensor, x: Tensor | PackedInputs, *, key_mask: Tensor | None = None, lengths: Tensor | None = None,
    scale: float = 1.0, dropout_p: float = 0.0, return_lse: bool = False, backend: str | None = None,
) -> Explanation:  # fmt: skip
    if isinstance(x, PackedInputs):
        data, key_mask, lengths = x.data, x.key_mask, x.lengths
    else:
        data = x
    problem = SharedKVProblem.of(q, data, key_mask, lengths, scale, dropout_p, return_lse)
    cost = shared_kv_cost(problem.B, problem.R, problem.M, problem.C, q.dtype.itemsize)
    plan = planning.plan_shared_kv(problem.with_sizes(C=pad_channels(problem.C)), device_facts(q.device))
    return _explain(problem, cost, plan, q.device, q.dtype, backend)


def _explain_pack(
    content: Tensor | InputArray, positions: Tensor | FourierPositions | None = None, *, coordinates: Tensor | None = None,
    key_mask: Tensor | None = None, lengths: Tensor | None = None, normalize: bool = True, eps: float = 1e-5,
    dtype: torch.dtype | None = None, backend: str | None = None,
) -> Explanation:  # fmt: skip
    if not isinstance(content, InputArray):
        dense = isinstance(positions, FourierPositions) and coordinates is None
        grid = tuple(content.shape[1:-1]) if dense else None
        content = InputArray(content.flatten(1, -2), positions, coordinates, grid, key_mask, lengths)
    part = content.slice(dtype=None if content.content.is_floating_point() else torch.get_default_dtype())
    problem = PackProblem.of(
        part.content, part.positions, part.fourier, content.key_mask, content.lengths, normalize,
        dtype or autocast_dtype(part.content),
    )  # fmt: skip
    return _explain(problem, problem_pack_cost(problem), None, part.content.device, problem.dtype, backend)


def _explain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, key_mask: Tensor | None = None, attn_mask: Tensor | None = None,
    is_causal: bool = False, dropout_p: float = 0.0, scale: float | None = None, enable_gqa: bool = False,
    return_lse: bool = False, backend: str | None = None,
) -> Explanation:  # fmt: skip
    problem = AttentionProblem.of(
        query, key, value, key_mask, attn_mask, is_causal, dropout_p, scale, enable_gqa, return_lse
    )
    width = problem.d_qk + problem.d_v
    cost = Cost(
        2.0 * problem.B * problem.H * problem.Lq * problem.Lk * width,
        float(problem.B * problem.H * (problem.Lq + problem.Lk) * width * query.dtype.itemsize),
    )
    return _explain(problem, cost, None, query.device, query.dtype, backend)


def _explain_cross_attention(*args: Any, backend: str | None = None, **kwargs: Any) -> Explanation:
    call = cross_attention.resolve(*args, **kwargs)
    p, device = call.problem, device_facts(call.weights.w_k.device)
    masked = any(getattr(call.source, name) is not None for name in ("key_mask", "lengths"))
    dropout = kwargs.get("dropout_p", 0.0) > 0
    inner: Problem
    if call.method == "absorbed":
        cost = absorbed_cost(p)
        inner = SharedKVProblem(
            p.B, p.H * p.N, p.M, pad_channels(p.C), p.dtype, p.device_type, masked, dropout, call.chunks is not None,
            p.needs_grad,
        )  # fmt: skip
        inner_plan = planning.plan_shared_kv(inner, device)
        inner_cost = shared_kv_cost(inner.B, inner.R, inner.M, inner.C, p.dtype.itemsize)
    else:
        cost = projected_cost(p)
        mask = "key_mask" if masked else "none"
        inner = AttentionProblem(
            p.B, p.H, p.N, p.M, p.d_qk, p.d_v, p.dtype, p.device_type, mask, False, dropout, False, p.needs_grad
        )
        inner_plan, inner_cost = None, Cost(2.0 * p.B * p.H * p.N * p.M * (p.d_qk + p.d_v), 0.0)
    where = call.weights.w_k.device
    part = _explain(inner, inner_cost, inner_plan, where, p.dtype, backend)
    plan = planning.plan_cross_attention(p, device)
    seconds = cost.seconds(device, p.dtype)
    return Explanation(p.OP, p, part.backend, {}, plan, cost.flops, cost.bytes, seconds * 1e3, (part,))


_EXPLAINERS: dict[str, Callable[..., Explanation]] = {
    "attention": _explain_attention,
    "pack_inputs": _explain_pack,
    "shared_kv_attention": _explain_shared_kv,
    "input_cross_attention": _explain_cross_attention,
}


def explain(function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """What ``function(*args, **kwargs)`` would do: backend, plan, predicted FLOPs, bytes and time, and who refused and why.

    Args:
        function: ``attention``, ``pack_inputs``, ``shared_kv_attention`` or ``input_cross_attention``, or its name.
        *args, **kwargs: those of the call. Nothing is computed; tensors are only described.

    Raises:
        ValueError: not one of these functions; or an argument that the call itself would refuse (then also TypeError).
    """
    name = function if isinstance(function, str) else getattr(function, "__name__", repr(function))
    if name not in _EXPLAINERS:
        raise ValueError(f"function must be one of {', '.join(_EXPLAINERS)}, got {name!r}")
    return _EXPLAINERS[name](*args, **kwargs)
