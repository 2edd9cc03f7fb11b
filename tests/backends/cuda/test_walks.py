"""What a program of attention in CUDA C++ walks: one to five tiles of keys an item, one to three blocks of queries, few items
and many; every order in which stages are handed back has to end, and to be right."""

from __future__ import annotations

import pytest
import torch

from perceiver_kernels.backends.cuda import attention_plans as plans
from perceiver_kernels.device import device_facts
from perceiver_kernels.testing import AttentionCase
from perceiver_kernels.testing.attention import attention_call, check_attention
from perceiver_kernels.testing.targets import Target

pytestmark = pytest.mark.gpu


def check(case: AttentionCase) -> None:
    target = Target("attention", "cuda", "cuda", torch.bfloat16)
    call = attention_call(case, target)
    if reasons := target.refusals(call.problem()):
        pytest.skip(f"{target.backend}: {'; '.join(reasons)}")
    check_attention(target, call)


@pytest.mark.parametrize("queries", [60, 128, 190])
@pytest.mark.parametrize("heads", [1, 140, 280])
@pytest.mark.parametrize("columns", [64, 128, 256])
def test_tiles_and_blocks(columns: int, heads: int, queries: int) -> None:
    """With as many heads as programs, or more, keys are not split: a program walks all tiles of a head, and then another's."""
    for keys in (64, 129, 300, 640):
        check(AttentionCase("walk", 1, heads, queries, keys, columns, columns))


@pytest.mark.parametrize("columns", [64, 128])
def test_slices_of_one_block(columns: int) -> None:
    """A decoder's slices of the queries, each of one block, over three tiles of keys."""
    case = AttentionCase("slices", B=1, H=1, Lq=8000, Lk=384, d_qk=columns, d_v=columns)
    made = plans.plan_backward(1, 1, 1, case.Lq, case.Lk, columns, columns, device_facts(torch.device("cuda")))
    assert made.slices == made.query_blocks
    check(case)


@pytest.mark.parametrize("columns", [64, 128])
def test_balanced_tiles(columns: int) -> None:
    """As many tiles a program, of two heads where they must be, the last one ragged; one block of queries and several."""
    device, balanced = device_facts(torch.device("cuda")), 0
    for heads, queries, keys in ((7, 60, 4733), (19, 130, 1661), (37, 130, 893), (45, 60, 1277)):
        balanced += plans.plan_backward(1, heads, heads, queries, keys, columns, columns, device).balanced
        check(AttentionCase("balanced", 1, heads, queries, keys, columns, columns))
    assert balanced
