"""attention over small problems in large batches: several heads share a program and must not see each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from perceiver_kernels import plan as planning
from perceiver_kernels.device import H200
from perceiver_kernels.testing import LAYOUTS, AttentionCase, poisoned_memory, same_bits
from perceiver_kernels.testing.attention import (
    attention_call,
    attention_results,
    check_attention,
    function_of,
    masks_of,
)
from perceiver_kernels.testing.targets import Target, only
from tests.backends.test_attention import MASK_KINDS

OP = "attention"
# 15 and 21 problems: the last program has fewer than the others.
ENCODER = AttentionCase("encoder", B=3, H=5, Lq=3, Lk=13, d_qk=64, d_v=64)
DECODER = AttentionCase("decoder", B=7, H=3, Lq=13, Lk=3, d_qk=32, d_v=48)
BOTH = (ENCODER, DECODER)
LENGTHS = ((1, 1), (3, 3), (1, 32), (32, 1), (8, 9), (17, 32), (32, 32))
KINDS = tuple(kind for kind in MASK_KINDS if not kind.startswith("packed"))


def wanted(target: Target) -> bool:
    """Kernels alone: compositions know no programs."""
    return target.is_kernel


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(target: Target, lengths: tuple[int, int]) -> None:
    case = AttentionCase("small", B=3, H=3, Lq=lengths[0], Lk=lengths[1], d_qk=24, d_v=40)
    check_attention(target, attention_call(case, target))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_masks(target: Target, case: AttentionCase, kind: str) -> None:
    check_attention(target, attention_call(case, target, masks=masks_of(kind, case)))


@only(torch.float16, torch.bfloat16)
@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_dropout(target: Target, case: AttentionCase) -> None:
    check_attention(target, attention_call(case, target, dropout_p=0.4, dropout_seed=torch.tensor([7])))


@only(torch.float16, torch.bfloat16)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target: Target, layout: str) -> None:
    call = attention_call(ENCODER, target)
    call = replace(call, **{name: LAYOUTS[layout](getattr(call, name)) for name in ("query", "key", "value", "dout")})
    check_attention(target, call)


@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_neighbours_change_no_bit(target: Target, case: AttentionCase) -> None:
    """A problem whose numbers are not finite leaves those beside it alone; so does fresh memory."""
    call = attention_call(case, target)
    clean = attention_results(function_of(target), call)
    dirty = replace(call, **{name: getattr(call, name).clone() for name in ("query", "key", "value", "dout")})
    for name in ("query", "key", "value", "dout"):
        getattr(dirty, name)[1, 1] = float("nan")
    with poisoned_memory():
        found = attention_results(function_of(target), dirty)
    rest = torch.ones(case.B, case.H, dtype=torch.bool)
    rest[1, 1] = False
    assert [name for name in clean if not same_bits(clean[name][rest], found[name][rest])] == []


def test_only_queries_need_a_gradient(target: Target) -> None:
    call = attention_call(ENCODER, target)
    expected = attention_results(function_of(target), replace(call, dlse=torch.zeros_like(call.dlse)))
    query = call.query.detach().requires_grad_()
    out, _ = function_of(target)(query, (call.key,), (call.value,), masks=call.masks, **call.options)
    (dquery,) = torch.autograd.grad(out, query, call.dout)
    assert same_bits(dquery, expected["dquery"])


def test_plan() -> None:
    """Aurora's shapes share programs; longer, wider or grouped heads, segments and packed sequences do not."""

    def small(case: AttentionCase, **changes: object) -> object:
        target = Target(OP, "triton", "cpu", torch.bfloat16)
        problem = attention_call(case, target).problem()
        return planning.plan_attention(replace(problem, **changes), H200).small  # type: ignore[arg-type]

    assert small(ENCODER) and small(DECODER)
    assert not any(small(ENCODER, **changes) for changes in (
        {"Lk": 33}, {"Lq": 40}, {"d_v": 129}, {"H_kv": 1}, {"segments": 2, "Lk_first": 6}, {"packed": True}, {"Lk": 0},
    ))  # fmt: skip
