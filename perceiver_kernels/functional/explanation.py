"""What a call would do and why: the plan, its predicted cost, and every backend's reasons."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from perceiver_kernels import plan as planning
from perceiver_kernels.cost import (
    Cost,
    absorbed_cost,
    attention_cost,
    output_absorbed_cost,
    output_projected_cost,
    problem_pack_cost,
    projected_cost,
    rotary_cost,
    shared_kv_cost,
)
from perceiver_kernels.device import device_facts
from perceiver_kernels.dispatch import candidates, load, refusals, select_passes, serving
from perceiver_kernels.functional import chunked, cross_attention, output_attention, rotary
from perceiver_kernels.functional.attention import attention, resolve_attention, resolve_shared_kv, shared_kv_attention
from perceiver_kernels.functional.packing import is_packed_already, pack_inputs
from perceiver_kernels.functional.packing import resolve as resolve_packing
from perceiver_kernels.inputs import InputArray, PackedInputs
from perceiver_kernels.layouts import used_strides
from perceiver_kernels.masks import Masks, check_starts
from perceiver_kernels.ops.pack import choice_sizes
from perceiver_kernels.problem import MAX_CHANNELS, AttentionProblem, Problem, SharedKVProblem, pad_channels


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
    backward: str | None = None
    """The backend of the backward where another one serves the forward."""
    parts: tuple[Explanation, ...] = field(default=())

    def __str__(self) -> str:
        backward = f", backward on {self.backward}" if self.backward else ""
        lines = [f"{self.op} on {self.backend or 'no backend'}{backward}: {self.problem}"]
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


def _choice_sizes(problem: Problem) -> tuple[int, ...] | None:
    """The sizes of a call between which kernels of two backends are chosen; None where there is no such choice."""
    if isinstance(problem, SharedKVProblem):
        return problem.B, problem.R, problem.M, pad_channels(problem.C)
    if isinstance(problem, AttentionProblem):
        return problem.B, problem.H, problem.Lq, problem.Lk, problem.d_qk, problem.d_v
    return None


def _explain(
    problem: Problem, cost: Cost, device: torch.device, backend: str | None, plan: Any = None,
    sizes: tuple[int, ...] | None = None,
) -> Explanation:  # fmt: skip
    """``plan`` is that of Triton's kernels, modules that plan otherwise say how themselves; ``sizes`` are those of a pack."""
    refused: dict[str, list[str]] = {}
    chosen = None
    for name in candidates(problem.OP, backend):
        refused[name] = refusals(problem, name)
        if not refused[name]:
            chosen = name
            del refused[name]
            break
    facts, backward = device_facts(device), None
    if chosen is not None and (sizes := sizes or _choice_sizes(problem)) is not None:
        forward, backward = select_passes(problem, backend)
        chosen = serving(problem.OP, forward, sizes)
        for name in forward.split(","):
            refused.pop(name, None)
            if name != chosen and (reason := getattr(load(problem.OP, name), "leaves", lambda _: None)(sizes)):
                refused[name] = [reason]
        backward = serving(problem.OP, backward, sizes, "leaves_backward")
        backward = None if backward == chosen else backward
    if chosen is None or load(problem.OP, chosen).COMPOSITE:
        plan = None  # tiles and splits are those of kernels
    elif own := getattr(load(problem.OP, chosen), "plan", None):
        plan = own(problem, facts)
    dtype: torch.dtype = problem.dtype  # type: ignore[attr-defined]
    seconds = cost.seconds(facts, dtype)
    return Explanation(problem.OP, problem, chosen, refused, plan, cost.flops, cost.bytes, seconds * 1e3, backward)


def _explain_shared_problem(p: SharedKVProblem, device: torch.device, backend: str | None) -> Explanation:
    cost = shared_kv_cost(p.B, p.R, p.M, p.C, p.dtype.itemsize)
    plan = planning.plan_shared_kv(p.with_sizes(C=pad_channels(p.C)), device_facts(device))
    return _explain(p, cost, device, backend, plan)


def _explain_shared_kv(*, backend: str | None, **arguments: Any) -> Explanation:
    problem, q, *_ = resolve_shared_kv(**arguments)
    return _explain_shared_problem(problem, q.device, backend)


def _explain_pack(*, backend: str | None, **arguments: Any) -> Explanation:
    packing = resolve_packing(**arguments)
    problem, content = packing.problem, packing.part.content
    if is_packed_already(content, problem):
        return Explanation(problem.OP, problem, None, {}, "a view of the content", 0.0, 0.0, 0.0)
    sizes = choice_sizes(content, packing.part.positions, packing.part.fourier)
    return _explain(problem, problem_pack_cost(problem), content.device, backend, sizes=sizes)


def _explain_attention_problem(p: AttentionProblem, device: torch.device, backend: str | None) -> Explanation:
    cost = attention_cost(p.B, p.H, p.Lq, p.Lk, p.d_qk, p.d_v, p.dtype.itemsize)
    return _explain(p, cost, device, backend, planning.plan_attention(p, device_facts(device)))


def _explain_attention(*, backend: str | None, **arguments: Any) -> Explanation:
    call = resolve_attention(**arguments)
    return _explain_attention_problem(call.problem, call.query.device, backend)


def _explain_rotary(*, backend: str | None, **arguments: Any) -> Explanation:
    call = rotary.resolve(**arguments)
    p, x, plan = call.problem, call.x, None
    if x.numel() > 0:
        plan = planning.plan_rotary(
            p.B, p.H, p.L, p.d, p.width, interleaved=call.interleaved, itemsize=p.dtype.itemsize, strides=used_strides(x),
            device=device_facts(x.device),
        )  # fmt: skip
    return _explain(p, rotary_cost(p), x.device, backend, plan)


def _explain_cross_attention(*, backend: str | None, **arguments: Any) -> Explanation:
    call = cross_attention.resolve(**arguments)
    p, source, device = call.problem, call.source, call.weights.w_k.device
    parts = []
    if call.chunks is not None:
        assert isinstance(source, InputArray)
        problem, part = chunked.pack_problem(source, call.chunks, device, min(call.chunks.chunk_size, p.M))
        problem, sizes = problem.with_sizes(M=p.M), choice_sizes(part.content, part.positions, part.fourier)
        parts.append(_explain(problem, problem_pack_cost(problem), device, backend, sizes=sizes))
    elif isinstance(source, InputArray):
        whole, normalize, eps = cross_attention.on_device(source, device), arguments["normalize"], arguments["eps"]
        parts.append(_explain_pack(backend=backend, content=whole, normalize=normalize, eps=eps, dtype=p.dtype))
    masked = source.key_mask is not None or source.lengths is not None
    dropout, needs_grad = arguments["dropout_p"] > 0, p.needs_grad or p.inputs_need_grad
    if call.method == "absorbed":
        cost = absorbed_cost(p)
        absorbed = SharedKVProblem(
            p.B, p.H * p.N, p.M, pad_channels(p.C), p.dtype, p.device_type, masked, dropout, call.chunks is not None,
            needs_grad,
        )  # fmt: skip
        parts.append(_explain_shared_problem(absorbed, device, backend))
    else:
        cost = projected_cost(p)
        projected = AttentionProblem(
            B=p.B, H=p.H, H_kv=p.H, Lq=p.N, Lk=p.M, Lk_first=p.M, d_qk=p.d_qk, d_v=p.d_v, dtype=p.dtype,
            device_type=p.device_type, key_mask=masked, dropout=dropout, needs_grad=needs_grad,
        )  # fmt: skip
        parts.append(_explain_attention_problem(projected, device, backend))
    facts = device_facts(device)
    seconds, plan = cost.seconds(facts, p.dtype), planning.plan_cross_attention(p, facts)
    return Explanation(p.OP, p, parts[-1].backend, {}, plan, cost.flops, cost.bytes, seconds * 1e3, None, tuple(parts))


def _explain_output_attention(*, backend: str | None, **arguments: Any) -> Explanation:
    call = output_attention.resolve(**arguments)
    p, source, device, absorbed = call.problem, call.source, call.key.device, call.method == "absorbed"
    parts = []
    if isinstance(source, InputArray) and p.C <= MAX_CHANNELS:
        packed = {"content": cross_attention.on_device(source, device), "dtype": p.dtype, "constants": call.constants}
        parts.append(_explain_pack(backend=backend, normalize=call.normalize, eps=call.eps, **packed))
    attending = AttentionProblem(
        B=p.B, H=p.H, H_kv=p.H, Lq=p.O, Lk=p.N, Lk_first=p.N, d_qk=p.channels if absorbed else p.d_qk,
        d_v=p.C_out if absorbed else p.d_v, dtype=p.dtype, device_type=p.device_type, key_mask=call.key_mask is not None,
        lengths=call.lengths is not None, query_mask=call.query_mask is not None, dropout=call.dropout_p > 0,
        needs_grad=p.needs_grad or p.queries_need_grad,
    )  # fmt: skip
    parts.append(_explain_attention_problem(attending, device, backend))
    facts, cost = device_facts(device), (output_absorbed_cost if absorbed else output_projected_cost)(p)
    seconds, plan = cost.seconds(facts, p.dtype), planning.plan_output_cross_attention(p, facts)
    return Explanation(p.OP, p, parts[-1].backend, {}, plan, cost.flops, cost.bytes, seconds * 1e3, None, tuple(parts))


_EXPLAINERS: dict[Callable[..., Any], Callable[..., Explanation]] = {
    attention: _explain_attention,
    pack_inputs: _explain_pack,
    rotary.rotary_embedding: _explain_rotary,
    shared_kv_attention: _explain_shared_kv,
    cross_attention.input_cross_attention: _explain_cross_attention,
    output_attention.output_cross_attention: _explain_output_attention,
}


def described(value: Any, mode: FakeTensorMode) -> Any:
    """``value`` with tensors that have every property but memory: what is computed from them costs nothing."""
    if isinstance(value, Tensor):
        # Nested ones cannot be described, and are refused as they are.
        return value if value.is_nested else mode.from_tensor(value)
    if isinstance(value, (tuple, list)):
        return type(value)(described(item, mode) for item in value)
    if isinstance(value, dict):
        return {name: described(item, mode) for name, item in value.items()}
    if isinstance(value, (InputArray, PackedInputs)):
        held = {item.name: getattr(value, item.name) for item in fields(value)}
        return replace(value, **{name: described(item, mode) for name, item in held.items()})
    return value


def explain(function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """What ``function(*args, **kwargs)`` would do: backend, plan, predicted FLOPs, bytes and time, and who refused and why.

    Args:
        function: ``attention``, ``pack_inputs``, ``rotary_embedding``, ``shared_kv_attention``, ``input_cross_attention`` or
            ``output_cross_attention``, or its name.
        *args: positional arguments of the call. Nothing is computed; tensors are only described.
        **kwargs: the other arguments of the call.

    Raises:
        ValueError: not one of these functions; or an argument that the call itself would refuse (then also TypeError).
            Backends that would refuse are listed instead.
    """
    named = {known.__name__: known for known in _EXPLAINERS}
    called = named.get(function) if isinstance(function, str) else next((f for f in _EXPLAINERS if f is function), None)
    if called is None:
        raise ValueError(f"function must be one of {', '.join(named)}, got {function!r}")
    call = inspect.signature(called).bind(*args, **kwargs)
    call.apply_defaults()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        explanation = _EXPLAINERS[called](**{name: described(value, mode) for name, value in call.arguments.items()})
    if isinstance(explanation.problem, AttentionProblem) and explanation.problem.packed:
        # Descriptions have no values to look at.
        masks = Masks(cu_seqlens_q=call.arguments["cu_seqlens_q"], cu_seqlens_k=call.arguments["cu_seqlens_k"])
        check_starts(masks, explanation.problem.Lq, explanation.problem.Lk)
    return explanation
