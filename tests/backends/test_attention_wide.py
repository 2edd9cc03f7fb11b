"""attention whose heads are too wide for one accumulator: weights of a chunk of queries or keys, then products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from perceiver_kernels.masks import Masks
from perceiver_kernels.testing import LAYOUTS, AttentionCase
from perceiver_kernels.testing.attention import attention_call, masks_of
from perceiver_kernels.testing.targets import Target, machine, only
from tests.backends.test_attention import check, check_one_projection

OP = "attention"
# Queries are taken in chunks, or keys; rows of whole 16 bytes, or not.
HEADS = 1 if machine() == "interpreter" else 2
DECODE = AttentionCase("decode", B=2, H=HEADS, Lq=100, Lk=40, d_qk=272, d_v=304)
ENCODE = AttentionCase("encode", B=2, H=HEADS, Lq=40, Lk=150, d_qk=288, d_v=272)
BOTH = (DECODE, ENCODE)
ODD = (replace(DECODE, name="decode, odd", d_qk=261, d_v=322), replace(ENCODE, name="encode, odd", d_qk=322, d_v=261))
# In the interpreter each mask takes one of the cases.
KINDS = ("none", "key_mask", "lengths", "query_mask", "boolean", "additive", "causal", "bottom_right", "packed")


def wanted(target: Target) -> bool:
    """Kernels alone: compositions have no chunks."""
    return target.is_kernel


@pytest.fixture(params=[1])
def workspace(request: pytest.FixtureRequest, weights_bytes: Callable[[int], None]) -> None:
    """The workspace holds no more than these bytes, or the weights of one tile of queries or keys."""
    weights_bytes(request.param)


@pytest.mark.parametrize("workspace", [1, 1 << 30], ids=["a tile a chunk", "one chunk"], indirect=True)
@pytest.mark.parametrize("case", (*BOTH, *ODD), ids=lambda case: case.name)
def test_chunks(target: Target, workspace: None, case: AttentionCase) -> None:
    check(target, attention_call(case, target))


@only(torch.float16, torch.bfloat16)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_masks(target: Target, workspace: None, case: AttentionCase, kind: str) -> None:
    if machine() == "interpreter" and BOTH[KINDS.index(kind) % 2] is not case:
        pytest.skip("the other case has this mask in the interpreter")
    case = replace(case, B=1) if kind == "packed" or (machine() == "interpreter" and kind != "lengths") else case
    check(target, attention_call(case, target, masks=masks_of(kind, case)))


@only(torch.float16, torch.bfloat16)
@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_grouped_heads_and_segments(target: Target, workspace: None, case: AttentionCase) -> None:
    case = replace(case, B=1, H=4, Lk=70) if machine() == "interpreter" else replace(case, B=1, H=4)
    check(target, attention_call(case, target, H_kv=2, segments=case.Lk // 3))


@only(torch.float16, torch.bfloat16)
@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_dropout(target: Target, workspace: None, case: AttentionCase) -> None:
    check(target, attention_call(case, target, dropout_p=0.4, dropout_seed=torch.tensor([7])))


@only(torch.float16, torch.bfloat16)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target: Target, workspace: None, layout: str) -> None:
    call = attention_call(replace(ENCODE, B=2, H=2, Lk=70), target)
    check(target, replace(call, **{name: LAYOUTS[layout](getattr(call, name)) for name in ("query", "key", "value", "dout")}))


@only(torch.float16, torch.bfloat16)
@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("together", [2, 3], ids=["keys and values", "queries too"])
def test_one_projection(target: Target, workspace: None, together: int) -> None:
    check_one_projection(target, replace(ENCODE, B=1, Lk=70), together)


@pytest.mark.parametrize("workspace", [1, 1 << 30], ids=["a tile a chunk", "one chunk"], indirect=True)
def test_rows_of_the_lowest_number(target: Target, workspace: None) -> None:
    """Beside finfo.min neither a power of two nor log Lk is left: such a row is the mean of the values all the same."""
    dtype = torch.float32 if target.dtype == torch.float16 else target.dtype
    case = replace(ENCODE, B=1, H=1)
    added = torch.zeros(case.Lq, case.Lk, dtype=dtype)
    added[::2] = torch.finfo(dtype).min
    added[1::4, : case.Lk // 2] = torch.finfo(dtype).min
    call = attention_call(case, target, masks=Masks(attn_mask=added))
    found = check(target, replace(call, dlse=torch.zeros_like(call.dlse)))
    mean = call.value.double().mean(2)
    assert (found["out"][:, :, ::2].double() - mean[:, :, None]).abs().max() <= 4 * torch.finfo(target.dtype).eps
