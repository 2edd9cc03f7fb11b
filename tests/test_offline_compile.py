"""Every Triton configuration compiled for an H200 and an A100, without one: shared memory, registers, spills, instructions.

Widths are read from the plan: the widest row that each tile of the tables serves, which is the worst for registers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perceiver_kernels.device import A100, H200, DeviceFacts
from perceiver_kernels.testing.targets import why_not_offline
from perceiver_kernels.tiles import Kind, fused_tile

pytest.importorskip("triton")
if reason := why_not_offline():
    pytest.skip(reason, allow_module_level=True)

from perceiver_kernels.testing.offline import Resources, compile_pack, compile_shared_kv, offline

DEVICES = {"H200": H200, "A100": A100}
SMEM = {"H200": 232_448, "A100": 166_912}
KINDS: tuple[Kind, ...] = ("forward", "dq", "dx")
PASSES = {"_shared_kv_fwd_kernel": "forward", "_shared_kv_bwd_dq_kernel": "dq", "_shared_kv_bwd_dx_kernel": "dx"}


def widest_of_each_tile(facts: DeviceFacts) -> list[int]:
    """The widest row of every entry of the fused tables, and the narrowest row that no entry of a table serves."""
    widest: dict[Any, int] = {}
    for kind in KINDS:
        for channels in range(16, 1025, 16):
            tile = fused_tile(kind, channels, 2, facts)
            entry = (kind, tile and (tile.block_q, tile.block_kv, tile.num_warps, tile.num_stages))
            widest[entry] = max(channels, widest.get(entry, 0)) if tile else widest.get(entry, channels)
    return sorted({16, 272, *widest.values()})


def stack_budget(launch: Resources, device: str, dtype: torch.dtype, dropout: bool) -> int:
    """Bytes a thread may spill. Zero where the tables are tuned; elsewhere what was measured to cost little."""
    kind = PASSES.get(launch.kernel)
    if device == "A100" and dtype != torch.float32:
        # Synchronous matrix instructions keep operands in registers beside a full-width accumulator.
        return 1024 if kind else 0
    if dtype == torch.float32:
        # Exact fp32 products are computed in registers.
        return 384 if launch.kernel.startswith("_wide_weights") else 16
    if dropout and (kind or launch.kernel.startswith("_wide_weights")):
        # Ten rounds of Philox beside the scores.
        return 320
    if kind is None:
        # Sines of 1024 columns in one warp.
        return 160 if launch.constants.get("FOURIER") else 0
    return {
        "forward": 0 if sum(launch.constants["PIECES"]) <= 336 else 256,
        # The order of products that needs no stack is 4 % slower.
        "dq": 32 if launch.constants.get("TAIL") else 0,
        "dx": 16,
    }[kind]


def broken_limits(launches: list[Resources], device: str, dtype: torch.dtype, dropout: bool = False) -> list[str]:
    found = []
    for launch in launches:
        limits = {
            "shared": SMEM[device], "registers": 255, "stack": stack_budget(launch, device, dtype, dropout),
        }  # fmt: skip
        found += [
            f"{launch.kernel} {launch.constants}: {name} {getattr(launch, name)}, limit {limit}"
            for name, limit in limits.items()
            if getattr(launch, name) > limit
        ]
        multiplies = launch.kernel.startswith(("_shared_kv", "_wide"))
        if multiplies and dtype.itemsize == 2 and not launch.mma:
            found.append(f"{launch.kernel}: no tensor-core instruction")
        if multiplies and dtype.itemsize == 2 and device == "H200" and not (launch.wgmma and launch.tma_loads):
            found.append(f"{launch.kernel}: wgmma {launch.wgmma}, TMA loads {launch.tma_loads}")
        if launch.early:
            found.append(f"{launch.kernel} {launch.constants}: touches registers of a running wgmma: {launch.early[0]}")
        if launch.kernel in PASSES and launch.serialized:
            found.append(f"{launch.kernel} {launch.constants}: {launch.wgmma_waits} waits for {launch.wgmma} wgmma")
    return found


def names(launches: list[Resources]) -> set[str]:
    return {launch.kernel for launch in launches}


CASES = [(device, channels) for device, facts in DEVICES.items() for channels in widest_of_each_tile(facts)]


@pytest.mark.parametrize(("device", "channels"), CASES)
def test_every_tile(device: str, channels: int) -> None:
    facts = DEVICES[device]
    launches = compile_shared_kv(channels, torch.bfloat16, facts)
    for kernel, kind in PASSES.items():
        assert (kernel in names(launches)) == (fused_tile(kind, channels, 2, facts) is not None)
    assert broken_limits(launches, device, torch.bfloat16) == []


@pytest.mark.parametrize(
    ("channels", "sizes"),
    [
        *((channels, (3, 77, 5001)) for channels in (272, 768)),
        *((272, sizes) for sizes in ((1, 1, 1), (32, 64, 128))), (768, (1, 1, 1)),
    ],
    ids=str,
)
def test_sizes_that_compile_differently(channels: int, sizes: tuple[int, int, int]) -> None:
    """A size of 1 becomes a constant, and ptxas orders a loop of known length otherwise."""
    launches = compile_shared_kv(channels, torch.bfloat16, H200, sizes=sizes)
    assert sum(launch.wgmma for launch in launches) > 0 and [launch.early for launch in launches if launch.early] == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [64, 1024])
def test_float32(device: str, channels: int) -> None:
    launches = compile_shared_kv(channels, torch.float32, DEVICES[device])
    assert broken_limits(launches, device, torch.float32) == []


@pytest.mark.parametrize("channels", [272, 1024])
def test_float16_is_as_bfloat16(channels: int) -> None:
    launches = compile_shared_kv(channels, torch.float16, H200)
    assert broken_limits(launches, "H200", torch.float16) == []


@pytest.mark.parametrize(
    ("channels", "flag"),
    [
        *((channels, flag) for channels in (272, 512) for flag in ("masked", "lengths", "dropout")),
        (128, "dropout"), (336, "masked"),
    ],
)
def test_masks_and_dropout(channels: int, flag: str) -> None:
    launches = compile_shared_kv(channels, torch.bfloat16, H200, **{flag: True})
    assert broken_limits(launches, "H200", torch.bfloat16, dropout=flag == "dropout") == []


@pytest.mark.parametrize(
    ("device", "dtype", "channels", "flag"),
    [("A100", torch.bfloat16, 128, "masked"), ("H200", torch.float32, 64, "dropout")], ids=str,
)  # fmt: skip
def test_masks_and_dropout_elsewhere(device: str, dtype: torch.dtype, channels: int, flag: str) -> None:
    launches = compile_shared_kv(channels, dtype, DEVICES[device], **{flag: True})
    assert broken_limits(launches, device, dtype, dropout=flag == "dropout") == []


@pytest.mark.parametrize("positions", ["none", "shared", "batched", "fourier"])
@pytest.mark.parametrize(("content", "dtype"), [(3, torch.float32), (487, torch.bfloat16), (700, torch.bfloat16)], ids=str)
def test_pack(content: int, dtype: torch.dtype, positions: str) -> None:
    for device, constants in (("A100", 0), ("H200", 2)):
        launches = compile_pack(content, dtype, DEVICES[device], positions=positions, masked=True, constants=constants)
        assert len(names(launches)) == 2 and broken_limits(launches, device, dtype) == []


def test_only_the_first_grid_dimension_grows_with_the_batch() -> None:
    """The others end at 65,535: pytorch#142228, xformers#845 and flashinfer#3125 launched nothing, or something wrong."""
    B = 70_000
    q, x = torch.empty(B, 1, 32, dtype=torch.bfloat16), torch.empty(B, 16, 32, dtype=torch.bfloat16)
    rows = torch.empty(B, 1)
    options: dict[str, Any] = {"scale": 1.0, "dropout_p": 0.0, "dropout_seed": None, "key_offset": 0}
    with offline(H200) as launches:
        from perceiver_kernels.backends.triton import pack, shared_kv

        shared_kv.shared_kv_attention_forward(q, x, None, None, **options)
        delta = shared_kv.shared_kv_attention_delta(q, q, None, None, rows)
        shared_kv.shared_kv_attention_backward(
            q, delta, None, q, x, rows, None, None, **options, needs_dq=True, needs_dx=True
        )
        for positions in (None, torch.empty(16, 3)):
            packed, rstd = pack.pack_inputs_forward(
                torch.empty(B, 16, 3), positions, None, None, normalize=True, eps=1e-5, dtype=torch.bfloat16
            )
        pack.pack_inputs_backward(packed, packed, rstd, content_channels=3, channels=6, normalize=True, dtype=torch.float32)
    too_large = [(launch.kernel, launch.grid) for launch in launches if any(size > 65_535 for size in launch.grid[1:])]
    assert too_large == []
    assert all(0 < launch.grid[0] < 2**31 for launch in launches)
