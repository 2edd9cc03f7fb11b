"""attention at the published sizes on a GPU: the same bits in every run of each regime."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from perceiver_kernels.masks import Masks
from perceiver_kernels.ops import attention as op
from perceiver_kernels.problem import AttentionProblem
from perceiver_kernels.testing import DECODE, ENCODE_KV, PROCESS, AttentionCase, runs_that_differ
from perceiver_kernels.testing.attention import attention_call, check_attention, masks_of
from perceiver_kernels.testing.targets import Target

pytestmark = pytest.mark.gpu

OP = "attention"
PARTIAL = True
RUNS = {"cuda": 1000, "triton": 100}
# Each regime, with all keys (queries) of a head in shared memory and without; heads over 256, in chunks of queries and of keys;
# slices of the last chunk that are empty (decode-h1); several heads a program.
CASES = (
    ENCODE_KV["kv-64x16k-h16-d64"], replace(ENCODE_KV["kv-512x50k-d128"], B=2), replace(ENCODE_KV["kv-512x50k-h8-d64"], B=1),
    PROCESS["imagenet"], PROCESS["language"],
    replace(DECODE["decode-h8"], Lq=2**18), DECODE["decode-h1"], DECODE["flow"],
    AttentionCase("wide encode", B=1, H=1, Lq=784, Lk=50_000, d_qk=704, d_v=704),
    AttentionCase("small", B=4096, H=16, Lq=3, Lk=13, d_qk=64, d_v=64),
)  # fmt: skip


def wanted(target: Target) -> bool:
    return target.is_kernel and target.dtype == torch.bfloat16


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_many_runs_give_the_same_bits(target: Target, case: AttentionCase) -> None:
    """Splits meet in a fixed order and nothing is added atomically; other work on the GPU shifts when programs run."""
    problem = AttentionProblem(
        B=case.B, H=case.H, H_kv=case.H, Lq=case.Lq, Lk=case.Lk, Lk_first=case.Lk, d_qk=case.d_qk, d_v=case.d_v,
        dtype=target.dtype, device_type="cuda", needs_grad=True,
    )  # fmt: skip
    if reasons := target.refusals(problem):
        pytest.skip(f"{target.backend}: {'; '.join(reasons)}")
    generator = torch.Generator("cuda").manual_seed(0)
    widths = ((case.Lq, case.d_qk), (case.Lk, case.d_qk), (case.Lk, case.d_v), (case.Lq, case.d_v))
    query, key, value, dout = (
        torch.randn(case.B, case.H, *size, device="cuda", dtype=target.dtype, generator=generator) for size in widths
    )
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]

    def run() -> list[torch.Tensor]:
        out, _ = op.attention(leaves[0], (leaves[1],), (leaves[2],), scale=case.d_qk**-0.5, backends=target.passes_of(problem))
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    first, different = runs_that_differ(run, RUNS[target.backend])
    assert all(torch.isfinite(tensor).all() for tensor in first)
    assert different == [0, 0, 0, 0], "out, dquery, dkey, dvalue differed in so many runs"


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["none", "key_mask", "lengths", "query_mask"])
@pytest.mark.parametrize(("d_qk", "d_v"), [(200, 7), (256, 256), (256, 16), (224, 8), (7, 200), (128, 7), (128, 16), (64, 7)])
def test_rows_that_tma_cannot_read(target: Target, d_qk: int, d_v: int, kind: str, dropout_p: float) -> None:
    """Odd widths and hidden keys are read through pointers, by other machine code than the rest."""
    case = AttentionCase("pointers", B=2, H=2, Lq=150, Lk=200, d_qk=d_qk, d_v=d_v)
    masks = Masks() if kind == "none" else masks_of(kind, case)
    options = {"dropout_p": dropout_p, "dropout_seed": torch.tensor([3])} if dropout_p else {}
    call = attention_call(case, target, masks=masks, **options)
    if reasons := target.refusals(call.problem()):
        pytest.skip(f"{target.backend}: {'; '.join(reasons)}")
    check_attention(target, call)
