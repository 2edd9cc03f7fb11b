"""Attention calls to compare: tensors and masks of a case, results and gradients of a backend and of the specification."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import reference
from perceiver_kernels.dispatch import load
from perceiver_kernels.masks import NO_MASKS, Masks
from perceiver_kernels.ops import attention as op
from perceiver_kernels.problem import AttentionProblem
from perceiver_kernels.testing.accuracy import assert_as_accurate
from perceiver_kernels.testing.cases import AttentionCase
from perceiver_kernels.testing.targets import Target

Function = Callable[..., tuple[Tensor, Tensor | None]]
MASK_KINDS = (
    "none", "key_mask", "lengths", "query_mask", "boolean", "additive", "causal", "bottom_right", "packed", "packed causal"
)  # fmt: skip


@dataclass
class AttentionCall:
    """Tensors, gradients of the results, masks and options; ``segments`` is where the keys are cut in two, or 0."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    dlse: Tensor
    masks: Masks = NO_MASKS
    options: dict[str, Any] = field(default_factory=dict)
    segments: int = 0

    def cast(self, dtype: torch.dtype) -> AttentionCall:
        """The call in another dtype; statistics are fp32 or wider."""
        tensors = (tensor.to(dtype) for tensor in (self.query, self.key, self.value, self.dout))
        return AttentionCall(
            *tensors, self.dlse.to(torch.promote_types(dtype, torch.float32)), self.masks, self.options, self.segments
        )

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Keys or values in their segments."""
        cut = self.segments
        return (tensor[:, :, :cut], tensor[:, :, cut:]) if cut else (tensor,)

    def problem(self, *, needs_lse: bool = False) -> AttentionProblem:
        """What the call asks for."""
        dropout_p = self.options.get("dropout_p", 0.0)
        keys, values = self.parts(self.key), self.parts(self.value)
        return AttentionProblem.of(self.query, keys, values, self.masks, dropout_p, None, True, needs_lse)


def attention_call(
    case: AttentionCase, target: Target, *, H_kv: int | None = None, masks: Masks = NO_MASKS, segments: int = 0, **options: Any
) -> AttentionCall:
    """Random tensors of a case, the same on every device."""
    generator = torch.Generator().manual_seed(case.Lk + 3 * case.Lq)
    H_kv = case.H if H_kv is None else H_kv
    shapes = (
        (case.B, case.H, case.Lq, case.d_qk),
        (case.B, H_kv, case.Lk, case.d_qk),
        (case.B, H_kv, case.Lk, case.d_v),
        (case.B, case.H, case.Lq, case.d_v),
    )
    tensors = [torch.randn(shape, generator=generator).to(target.device, target.dtype) for shape in shapes]
    dlse = torch.randn(shapes[0][:3], generator=generator).to(target.device)
    options = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    on_device = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in vars(masks).items()}
    return AttentionCall(*tensors, dlse, Masks(**on_device), {"scale": case.d_qk**-0.5} | options, segments)


def masks_of(kind: str, case: AttentionCase, seed: int = 5) -> Masks:
    """Masks of one of MASK_KINDS for a case (packed ones want B = 1): some rows see little, some nothing."""
    generator = torch.Generator().manual_seed(seed)
    B, Lq, Lk = case.B, case.Lq, case.Lk

    def coin(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.5

    def starts(total: int) -> Tensor:
        cuts = torch.randint(0, total + 1, (3,), generator=generator).sort().values
        return torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([total])]).int()

    if kind == "key_mask":
        key_mask = coin(B, Lk)
        key_mask[-1] = False
        return Masks(key_mask=key_mask)
    if kind == "lengths":
        # Past the ends they mean all and nothing.
        lengths = torch.tensor([Lk // 2 + 3, 0, Lk + 9, -5, Lk, 1], dtype=torch.int32)
        return Masks(lengths=lengths[torch.arange(B) % 6])
    if kind == "query_mask":
        return Masks(query_mask=coin(B, Lq))
    if kind == "boolean":
        seen = coin(B, 1, Lq, Lk)
        seen[0, 0, Lq // 2] = False
        return Masks(attn_mask=seen)
    if kind == "additive":
        added = torch.randn(case.H, Lq, Lk, generator=generator)
        added[0, Lq // 2] = -torch.inf
        return Masks(attn_mask=added)
    if kind.startswith("packed"):
        return Masks(cu_seqlens_q=starts(Lq), cu_seqlens_k=starts(Lk), causal="bottom_right" if "causal" in kind else "none")
    return {"none": Masks(), "causal": Masks(causal="upper_left"), "bottom_right": Masks(causal="bottom_right")}[kind]


def specification(query: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], *, masks: Masks, **options: Any) -> Any:
    """(out, lse) of reference.attention, additive masks in the dtype of the scores."""
    given = dict(vars(masks))
    if masks.attn_mask is not None and masks.attn_mask.dtype != torch.bool and query.dtype == torch.float64:
        given["attn_mask"] = masks.attn_mask.double()
    return reference.attention(query, torch.cat(keys, 2), torch.cat(values, 2), **given, **options)


def function_of(target: Target) -> Function:
    """The backend's differentiable attention(query, keys, values, masks=, scale=, ...) to (out, lse or None)."""
    module = load("attention", target.backend)
    return module.attention if module.COMPOSITE else partial(_attend, target)


def _attend(
    target: Target, query: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], *, masks: Masks = NO_MASKS,
    dropout_p: float = 0.0, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = AttentionProblem.of(query, keys, values, masks, dropout_p, None, True)
    backends = target.passes_of(problem)
    return op.attention(query, keys, values, masks=masks, dropout_p=dropout_p, backends=backends, **options)


def attention_results(function: Function, call: AttentionCall) -> dict[str, Tensor]:
    """out, lse and the gradients of query, key and value, from the gradients of both results."""
    inputs = [tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)]
    out, lse = function(inputs[0], call.parts(inputs[1]), call.parts(inputs[2]), masks=call.masks, **call.options)
    outputs, gradients = [out], [call.dout]
    if lse is not None:
        # The lse of a row that sees nothing is a constant -inf, whose gradient is not defined: 0 here.
        outputs, gradients = [out, lse], [call.dout, call.dlse.masked_fill(lse == -torch.inf, 0)]
    found = dict(zip(("dquery", "dkey", "dvalue"), torch.autograd.grad(outputs, inputs, gradients), strict=True))
    found |= {"out": out} | ({} if lse is None else {"lse": lse})
    return {name: value.detach() for name, value in found.items()}


def check_attention(target: Target, call: AttentionCall) -> dict[str, Tensor]:
    """Compare everything that the backend returns with the specification in fp64; the results, for further questions."""
    actual = attention_results(function_of(target), call)
    if "lse" not in actual:
        call = replace(call, dlse=torch.zeros_like(call.dlse))
    eager, oracle = (attention_results(specification, call.cast(dtype)) for dtype in (target.dtype, torch.float64))
    terms = attention_gradient_terms(call)
    for name, value in actual.items():
        assert_as_accurate(value, eager[name], oracle[name], f"{target} {name}", terms=terms.get(name))
    return actual


def attention_gradient_terms(call: AttentionCall) -> dict[str, Tensor]:
    """Terms of dquery, dkey and dvalue, for accuracy.compare: the products they add up, with absolute values of all factors.

    ds_ij = p_ij (dout_i . v_j - dout_i . out_i) cancels in a row that sees one key, almost. Weights are recomputed from lse,
    which is kept in fp32: one rounding of |lse|, beside the four of the accuracy rule's floor, is an error of p.

    Source: Dao et al., arXiv 2205.14135, appendix B.2.
    """
    wide = call.cast(torch.float64)
    with torch.no_grad():
        options = {name: value for name, value in wide.options.items() if name == "scale"}
        keys, values = wide.parts(wide.key), wide.parts(wide.value)
        eye = torch.eye(wide.key.shape[2], dtype=torch.float64, device=wide.key.device).expand(*wide.key.shape[:3], -1)
        p, lse = specification(wide.query, keys, (eye,), masks=wide.masks, **options)  # p v with v = 1: the weights
        out, _ = specification(wide.query, keys, values, masks=wide.masks, **options)
        p = p * (1 + lse.abs().nan_to_num(posinf=0.0) / 4)[..., None]
        groups = wide.query.shape[1] // wide.key.shape[1]
        q, k, v, dout, out = (t.abs().nan_to_num(0.0, 0.0, 0.0) for t in (wide.query, wide.key, wide.value, wide.dout, out))
        keep = 1.0 / (1.0 - wide.options.get("dropout_p", 0.0))
        k_all, v_all = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        ds = p * (keep * dout @ v_all.mT + (dout * out).sum(-1, keepdim=True) + wide.dlse.abs()[..., None])
        scale = abs(options["scale"])
        dkey, dvalue = scale * ds.mT @ q, keep * p.mT @ dout
        shape = (k.shape[0], k.shape[1], groups)
        return {
            "dquery": scale * ds @ k_all, "dkey": dkey.unflatten(1, shape[1:]).sum(2),
            "dvalue": dvalue.unflatten(1, shape[1:]).sum(2),
        }  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One generated call: sizes, heads that share keys, mask, dropout, cut."""

    case: AttentionCase
    H_kv: int
    mask: str
    dropout_p: float
    segments: int
    dtype: torch.dtype

    def __str__(self) -> str:
        c = self.case
        return (
            f"{c.name} B{c.B} H{c.H}/{self.H_kv} {c.Lq}x{c.Lk} d{c.d_qk}/{c.d_v} {self.mask} p{self.dropout_p} "
            f"cut{self.segments} {str(self.dtype).removeprefix('torch.')}"
        )


_WIDTHS = (1, 7, 16, 32, 48, 64, 64, 96, 128, 160, 200, 256)


def generated(
    count: int, dtypes: tuple[torch.dtype, ...], longest: int, heads: int, *, sizes_each: int = 1
) -> list[Sample]:
    """``count`` calls of all regimes, masks, widths and dtypes, up to ``longest`` tokens and ``heads`` key heads.

    ``sizes_each`` in a row differ in sizes alone: kernels are compiled anew for widths, masks and dtypes.
    """
    draw = random.Random(count)
    samples = []
    for index in range(count):
        if index % sizes_each == 0:
            kind = index // sizes_each
            mask, dtype = MASK_KINDS[kind % len(MASK_KINDS)], dtypes[kind % len(dtypes)]
            d_qk = draw.choice(_WIDTHS)
            d_v = draw.choice([d_qk, d_qk, draw.choice(_WIDTHS)])
            two_segments = draw.random() < 0.15 and not mask.startswith("packed")
            dropout_p = draw.choice([0.0, 0.0, 0.0, 0.3])
        short, long = draw.randint(1, 70), draw.randint(1, longest)
        Lq, Lk = draw.choice([(short, long), (long, short), (long, long), (short, short)])
        H_kv = draw.randint(1, heads)
        H = H_kv * draw.choice([1, 1, 2, 4])
        B = 1 if mask.startswith("packed") else draw.randint(1, min(heads + 1, 3))
        segments = draw.randint(0, Lk) if two_segments else 0
        case = AttentionCase(f"sample-{index}", B, H, Lq, Lk, d_qk, d_v)
        samples.append(Sample(case, H_kv, mask, dropout_p, segments, dtype))
    return samples
