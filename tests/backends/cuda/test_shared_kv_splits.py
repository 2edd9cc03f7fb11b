"""Shared-KV attention in CUDA C++ under plans that sizes alone would not lead to: few tiles a split, odd and even, and none."""

from __future__ import annotations

import pytest
import torch

from perceiver_kernels import reference
from perceiver_kernels.backends.cuda import shared_kv
from perceiver_kernels.testing import assert_as_accurate, same_bits

pytestmark = pytest.mark.gpu


def call(columns, R, M, dtype, masks):
    """Two entries: of the first one all tokens count, or few, which leaves splits without any."""
    generator = torch.Generator().manual_seed(7 * M + R)
    q, x = (torch.randn(2, rows, columns, generator=generator).to(dtype).cuda() for rows in (R, M))
    # Maxima grow along the tokens, so that sums have to be brought to new ones in most tiles.
    x *= torch.linspace(0.1, 2.0, M, device="cuda")[:, None].to(dtype)
    options = {"scale": 4 * columns**-0.5, "dropout_p": 0.0}
    if masks == "key_mask":
        options["key_mask"] = torch.rand(2, M, generator=generator).cuda() < 0.5
        options["key_mask"][0, : M // 2] = False
    elif masks == "lengths":
        options["lengths"] = torch.tensor([M // 3, 0], dtype=torch.int32, device="cuda")
    return q, x, options


@pytest.mark.parametrize("masks", ["all", "key_mask", "lengths"])
@pytest.mark.parametrize("rows", [1, 64, 65, 129, 200])
@pytest.mark.parametrize("columns", shared_kv.BLOCK_KV)
def test_tiles_of_a_split(columns, rows, masks, monkeypatch):
    """One to five tiles in one to three splits, the last tile whole or of one token, twice: right, and the same bits."""
    if reasons := shared_kv.reasons_against_attending("cuda", torch.bfloat16):
        pytest.skip("; ".join(reasons))
    block_kv = shared_kv.BLOCK_KV[columns]
    for splits, tiles, left_out in ((1, 1, 0), (1, 2, 1), (1, 3, 0), (1, 4, block_kv - 1), (2, 1, 1), (2, 5, 0), (3, 2, 7)):
        M = splits * tiles * block_kv - left_out
        dtype = (torch.bfloat16, torch.float16)[(tiles + rows) % 2]
        q, x, options = call(columns, rows, M, dtype, masks)
        made = shared_kv.ForwardPlan(block_kv, splits, tiles * block_kv)
        monkeypatch.setattr(shared_kv, "plan_forward", lambda *_, made=made: made)
        given = {"key_mask": None, "lengths": None, "dropout_seed": None, "key_offset": 0} | options
        key_mask, lengths = given.pop("key_mask"), given.pop("lengths")
        found, again = (shared_kv.shared_kv_attention_forward(q, x, key_mask, lengths, **given) for _ in range(2))
        eager = reference.shared_kv_attention(q, x, **options)
        oracle = reference.shared_kv_attention(q.double(), x.double(), **options)
        for name, ours, second, theirs, exact in zip(("z", "lse", "rho"), found, again, eager, oracle, strict=True):
            assert same_bits(ours, second), f"{name}, {splits} splits of {tiles} tiles"
            terms = 1 + oracle[1].abs().nan_to_num(posinf=0.0) if name == "rho" else None
            assert_as_accurate(ours, theirs, exact, f"{name}, {splits} splits of {tiles} tiles", terms=terms)
