"""The Triton kernels of attention compiled for an H200 and an A100, without one: every tile, mask and option that is planned.

What is refused is that of test_offline_compile.py: spilled registers beyond a budget, too much shared memory, kernels without
tensor cores, and accesses to registers of a wgmma that is still running.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from perceiver_kernels.device import A100, H200
from perceiver_kernels.testing import AttentionCase
from perceiver_kernels.testing.targets import why_not_offline

pytest.importorskip("triton")
if reason := why_not_offline():
    pytest.skip(reason, allow_module_level=True)

from perceiver_kernels.masks import NO_MASKS
from perceiver_kernels.testing.attention import masks_of
from perceiver_kernels.testing.offline import Resources, compile_attention

DEVICES = {"H200": H200, "A100": A100}
# Keys split; all queries in shared memory; neither; all keys in shared memory. Two chunks of wide heads at least.
REGIMES = {
    "encode": AttentionCase("encode", B=2, H=4, Lq=256, Lk=16_384, d_qk=64, d_v=64),
    "few queries": AttentionCase("few queries", B=2, H=4, Lq=64, Lk=16_384, d_qk=64, d_v=64),
    "process": AttentionCase("process", B=2, H=4, Lq=512, Lk=512, d_qk=64, d_v=64),
    "decode": AttentionCase("decode", B=2, H=4, Lq=16_384, Lk=256, d_qk=64, d_v=64),
}
BF16 = torch.bfloat16


def wide(case: AttentionCase, d: int) -> AttentionCase:
    return replace(case, d_qk=d, d_v=d)


def stack_budget(launch: Resources, dtype: torch.dtype, crowded: bool) -> int:
    """Bytes a thread may spill: dk and dv fill the registers of a warp group, and masks or dropout come on top."""
    if dtype == torch.float32:
        # Exact products are computed in registers.
        return 384 if launch.kernel == "_wide_weights_fwd_kernel" else 16
    if launch.kernel == "_attention_bwd_dkv_kernel":
        return 256 if crowded else 80
    if launch.kernel == "_wide_values_kernel":
        # Rows of odd widths are stored element by element, once.
        return 176
    return 64 if crowded or launch.kernel == "_attention_encode_bwd_kernel" else 0


def broken(launches: list[Resources], device: str, dtype: torch.dtype, crowded: bool = False) -> list[str]:
    found = []
    for launch in launches:
        name = f"{launch.kernel} {launch.constants}"
        if launch.shared > DEVICES[device].smem_bytes:
            found.append(f"{name}: shared {launch.shared}")
        if launch.stack > (limit := stack_budget(launch, dtype, crowded)):
            found.append(f"{name}: stack {launch.stack}, limit {limit}")
        if launch.early:
            found.append(f"{name}: touches registers of a running wgmma: {launch.early[0]}")
        if launch.kernel.startswith(("_attention", "_wide")) and dtype.itemsize == 2 and not launch.mma:
            found.append(f"{name}: no tensor-core instruction")
    return found


def kernels(launches: list[Resources]) -> set[str]:
    return {launch.kernel for launch in launches}


CASES = [
    *(("H200", regime, d) for d in (64, 128, 192, 256) for regime in REGIMES),
    *(("H200", "process", d) for d in (261, 322, 512)),
    *(("A100", regime, d) for d in (64, 128, 256) for regime in ("process", "decode")),
    ("A100", "process", 512),
]


@pytest.mark.parametrize(("device", "regime", "d"), CASES)
def test_every_tile(device: str, regime: str, d: int) -> None:
    launches = compile_attention(wide(REGIMES[regime], d), BF16, DEVICES[device])
    assert broken(launches, device, BF16) == []
    if device == "H200" and d == 64:
        own = {"few queries": "_attention_encode_bwd_kernel", "decode": "_attention_decode_bwd_dq_kernel"}
        assert own.get(regime, "_attention_bwd_dq_kernel") in kernels(launches)
    for launch in launches:
        if device == "H200" and d % 8 == 0 and launch.kernel.startswith(("_attention", "_wide")):
            assert launch.wgmma and launch.tma_loads, launch


MASKS = [
    *(("process", 128, kind) for kind in ("key_mask", "lengths", "query_mask", "boolean", "additive")),
    *(("process", 128, kind) for kind in ("causal", "packed causal")),
    *(("decode", 64, kind) for kind in ("key_mask", "causal")),
    *(("process", 512, kind) for kind in ("query_mask", "boolean", "additive")),
]


@pytest.mark.parametrize(("regime", "d", "kind"), MASKS)
def test_masks(regime: str, d: int, kind: str) -> None:
    case = wide(REGIMES[regime], d)
    case = replace(case, B=1) if kind.startswith("packed") else case
    launches = compile_attention(case, BF16, H200, masks=masks_of(kind, case))
    assert broken(launches, "H200", BF16, crowded=True) == []


@pytest.mark.parametrize(("regime", "d"), [("few queries", 64), ("process", 128), ("decode", 64), ("process", 512)])
def test_dropout(regime: str, d: int) -> None:
    launches = compile_attention(wide(REGIMES[regime], d), BF16, H200, dropout=True)
    assert broken(launches, "H200", BF16, crowded=True) == []


@pytest.mark.parametrize(("regime", "d"), [("process", 64), ("process", 512)])
def test_shared_heads_and_segments(regime: str, d: int) -> None:
    for options in ({"H_kv": 1}, {"segments": 2}):
        launches = compile_attention(wide(REGIMES[regime], d), BF16, H200, **options)  # type: ignore[arg-type]
        assert broken(launches, "H200", BF16, crowded=True) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d", [64, 512])
@pytest.mark.parametrize("kind", ["none", "additive"])
def test_float32(device: str, d: int, kind: str) -> None:
    case = wide(REGIMES["process"], d)
    launches = compile_attention(case, torch.float32, DEVICES[device], masks=masks_of(kind, case))
    assert broken(launches, device, torch.float32) == []


SMALL = [
    *((device, BF16, sizes) for device in DEVICES for sizes in ((3, 13, 64), (16, 16, 128), (32, 32, 48))),
    ("H200", torch.float32, (3, 13, 64)),
]


@pytest.mark.parametrize(("device", "dtype", "sizes"), SMALL, ids=str)
def test_small_problems(device: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    case = AttentionCase("small", 256, 16, *sizes, d_v=sizes[2])
    masks = masks_of("key_mask", case) if sizes != (3, 13, 64) else NO_MASKS
    launches = compile_attention(case, dtype, DEVICES[device], masks=masks)
    assert kernels(launches) == {"_attention_small_fwd_kernel", "_attention_small_bwd_kernel"}
    assert broken(launches, device, dtype, crowded=sizes != (3, 13, 64)) == []


def test_only_the_first_grid_dimension_grows_with_the_batch() -> None:
    """The others end at 65,535: pytorch#142228, xformers#845 and flashinfer#3125 launched nothing, or something wrong."""
    for case in (AttentionCase("many heads", B=70_000, H=2, Lq=3, Lk=5, d_qk=16, d_v=16),
                 AttentionCase("many heads", B=70_000, H=1, Lq=40, Lk=8, d_qk=16, d_v=16)):  # fmt: skip
        launches = compile_attention(case, BF16, H200)
        assert all(launch.grid[0] < 2**31 and set(launch.grid[1:]) <= {1} for launch in launches)
