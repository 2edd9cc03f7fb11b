"""attention whose heads are too wide for one accumulator: weights of a chunk of queries or keys, then products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from perceiver_kernels import plan as planning
from perceiver_kernels.testing import LAYOUTS, AttentionCase
from perceiver_kernels.testing.attention import attention_call, masks_of
from perceiver_kernels.testing.targets import Target
from tests.backends.test_attention import check

OP = "attention"
# Queries are taken in chunks, or keys; the first two in whole 16 bytes, the others not.
CASES = (
    AttentionCase("decode", B=2, H=2, Lq=200, Lk=70, d_qk=272, d_v=304),
    AttentionCase("encode", B=2, H=2, Lq=70, Lk=300, d_qk=272, d_v=288),
    AttentionCase("decode, odd", B=1, H=2, Lq=140, Lk=65, d_qk=261, d_v=322),
    AttentionCase("encode, odd", B=1, H=2, Lq=65, Lk=280, d_qk=322, d_v=261),
)
KINDS = ("none", "key_mask", "lengths", "query_mask", "boolean", "causal", "bottom_right", "packed")


def wanted(target: Target) -> bool:
    """Kernels alone: compositions have no chunks."""
    return target.is_kernel


@pytest.fixture(params=["one chunk", "a tile a chunk"], autouse=True)
def workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The workspace holds all weights, or those of one tile of queries or keys."""
    if request.param != "one chunk":
        monkeypatch.setattr(planning.splits, "WEIGHTS_BYTES", 1)
    planning.plan_attention.cache_clear()
    yield
    planning.plan_attention.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_masks(target: Target, case: AttentionCase, kind: str) -> None:
    case = replace(case, B=1) if kind == "packed" else case
    check(target, attention_call(case, target, masks=masks_of(kind, case)))


@pytest.mark.parametrize("case", CASES[2:], ids=lambda case: case.name)
def test_rows_of_odd_length(target: Target, case: AttentionCase) -> None:
    check(target, attention_call(case, target))


@pytest.mark.parametrize("H_kv", [1, 2])
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_grouped_heads_and_segments(target: Target, case: AttentionCase, H_kv: int) -> None:
    check(target, attention_call(replace(case, B=1, H=4), target, H_kv=H_kv, segments=case.Lk // 3))


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_dropout(target: Target, case: AttentionCase) -> None:
    check(target, attention_call(case, target, dropout_p=0.4, dropout_seed=torch.tensor([7])))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_layouts(target: Target, case: AttentionCase, layout: str) -> None:
    call = attention_call(case, target)
    check(target, replace(call, **{name: LAYOUTS[layout](getattr(call, name)) for name in ("query", "key", "value", "dout")}))
