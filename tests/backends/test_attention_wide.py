"""attention whose heads are too wide for one accumulator: weights of a chunk of queries or keys, then products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import perceiver_kernels as pk
from perceiver_kernels import plan as planning
from perceiver_kernels.testing import LAYOUTS, AttentionCase
from perceiver_kernels.testing.attention import attention_call, masks_of
from perceiver_kernels.testing.targets import Target, only
from tests.backends.test_attention import check

OP = "attention"
# Queries are taken in chunks, or keys; rows of whole 16 bytes, or not.
DECODE = AttentionCase("decode", B=2, H=2, Lq=100, Lk=40, d_qk=272, d_v=304)
ENCODE = AttentionCase("encode", B=2, H=2, Lq=40, Lk=150, d_qk=288, d_v=272)
BOTH = (DECODE, ENCODE)
ODD = (replace(DECODE, name="decode, odd", d_qk=261, d_v=322), replace(ENCODE, name="encode, odd", d_qk=322, d_v=261))
KINDS = ("none", "key_mask", "lengths", "query_mask", "boolean", "causal", "bottom_right", "packed")


def wanted(target: Target) -> bool:
    """Kernels alone: compositions have no chunks."""
    return target.is_kernel


@pytest.fixture(params=[1])
def workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The workspace holds no more than these bytes, or the weights of one tile of queries or keys."""
    monkeypatch.setattr(planning.splits, "WEIGHTS_BYTES", request.param)
    planning.plan_attention.cache_clear()
    yield
    planning.plan_attention.cache_clear()


@pytest.mark.parametrize("workspace", [1, 1 << 30], ids=["a tile a chunk", "one chunk"], indirect=True)
@pytest.mark.parametrize("case", (*BOTH, *ODD), ids=lambda case: case.name)
def test_chunks(target: Target, workspace: None, case: AttentionCase) -> None:
    check(target, attention_call(case, target))


@only(torch.float16, torch.bfloat16)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_masks(target: Target, workspace: None, case: AttentionCase, kind: str) -> None:
    case = replace(case, B=1) if kind == "packed" else case
    check(target, attention_call(case, target, masks=masks_of(kind, case)))


@only(torch.float16, torch.bfloat16)
@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_grouped_heads_and_segments(target: Target, workspace: None, case: AttentionCase) -> None:
    check(target, attention_call(replace(case, B=1, H=4), target, H_kv=2, segments=case.Lk // 3))


@only(torch.float16, torch.bfloat16)
@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_dropout(target: Target, workspace: None, case: AttentionCase) -> None:
    check(target, attention_call(case, target, dropout_p=0.4, dropout_seed=torch.tensor([7])))


@only(torch.float16, torch.bfloat16)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target: Target, workspace: None, layout: str) -> None:
    call = attention_call(replace(ENCODE, B=2, H=2, Lk=70), target)
    check(target, replace(call, **{name: LAYOUTS[layout](getattr(call, name)) for name in ("query", "key", "value", "dout")}))


def test_an_additive_mask_is_refused_by_name(target: Target) -> None:
    """Its rows of finfo.min need the maximum of the whole row, which tiles of wide heads do not have."""
    call = attention_call(DECODE, target, masks=masks_of("additive", DECODE))
    assert any("additive attn_mask" in reason for reason in target.refusals(call.problem()))
    with pytest.raises((ValueError, NotImplementedError), match="additive attn_mask"):
        pk.attention(call.query, call.key, call.value, attn_mask=call.masks.attn_mask, backend=target.backend)
