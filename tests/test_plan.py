"""Plans as properties: column pieces and splits cover everything once, for any size, device and element size."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from perceiver_kernels import plan as planning
from perceiver_kernels.cost import absorbed_cost, projected_cost
from perceiver_kernels.device import A100, CPU, H200, DeviceFacts, device_facts
from perceiver_kernels.plan import (
    WidePlan,
    plan_attention,
    plan_cross_attention,
    plan_output_cross_attention,
    plan_pack,
    plan_rotary,
    plan_shared_kv,
)
from perceiver_kernels.problem import (
    AttentionProblem,
    CrossAttentionProblem,
    OutputCrossAttentionProblem,
    SharedKVProblem,
    pad_channels,
)
from perceiver_kernels.testing import ENCODE, PROCESS, EncodeCase
from perceiver_kernels.tiles import Kind, Tile, column_pieces, fused_tile

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies

DEVICES = (H200, A100, CPU)
PADDED = st.integers(1, 64).map(lambda units: 16 * units)
DTYPES = st.sampled_from((torch.bfloat16, torch.float16, torch.float32))
SMALL_GPU = dataclasses.replace(A100, name="few multiprocessors", sm_count=16, smem_bytes=101_376, capability=(8, 6))
settings = hypothesis.settings(max_examples=200, deadline=None, derandomize=True)


def shared_kv_problem(B: int, R: int, M: int, C: int, dtype: torch.dtype = torch.bfloat16) -> SharedKVProblem:
    return SharedKVProblem(B, R, M, C, dtype, "cuda", False, False, True, False)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("channels", range(16, 1025, 16))
def test_pieces_are_the_smallest_cover_by_three_powers_of_two(channels: int) -> None:
    pieces = column_pieces(channels)
    assert all(is_power_of_two(piece) and piece >= 16 for piece in pieces) and 1 <= len(pieces) <= 3
    assert list(pieces) == sorted(set(pieces), reverse=True)
    assert sum(pieces) >= channels
    assert not any(units.bit_count() <= 3 for units in range(channels // 16, sum(pieces) // 16))


@pytest.mark.parametrize(
    ("channels", "pieces"),
    [(272, (256, 16)), (336, (256, 64, 16)), (400, (256, 128, 16)), (496, (512,)), (704, (512, 128, 64))],
)
def test_pieces_of_published_widths(channels: int, pieces: tuple[int, ...]) -> None:
    assert column_pieces(channels) == pieces


def check_tile(tile: Tile, kind: Kind, channels: int, itemsize: int, device: DeviceFacts) -> None:
    assert tile.columns == sum(tile.pieces) >= channels
    # tl.dot and tl.arange take powers of two from 16 on; warps come in powers of two.
    assert all(is_power_of_two(size) and size >= 16 for size in (tile.block_q, tile.block_kv))
    assert tile.num_warps in (1, 2, 4, 8, 16) and tile.num_stages >= 1
    assert tile.shared_bytes(kind, itemsize) < device.smem_bytes
    # dq alone can keep a last piece of 16 columns out of the stages' shared memory.
    assert not tile.tail or kind == "dq" and tile.pieces[-1] == 16 and tile.shared_pieces == tile.pieces[:-1] != ()


@pytest.mark.parametrize(("channels", "tail", "shared"), [(272, True, 231_424), (336, True, 226_304), (320, False, 225_280)])
def test_a_tail_makes_room_for_a_third_stage_of_dq(channels: int, tail: bool, shared: int) -> None:
    tile = fused_tile("dq", channels, 2, H200)
    assert tile is not None and (tile.tail, tile.num_stages) == (tail, 3)
    # [q; dz] and three tiles of x without the tail, whose one buffer comes on top.
    assert tile.shared_bytes("dq", 2) == shared
    without = dataclasses.replace(tile, tail=False)
    assert (without.shared_bytes("dq", 2) > H200.smem_bytes) == tail


def check_wide(plan: WidePlan, B: int, R: int, M: int, itemsize: int) -> None:
    for tile in (plan.weights, plan.weights_backward, plan.values, plan.dx):
        assert all(is_power_of_two(size) and size >= 16 for size in (tile.rows, tile.columns, tile.inner))
    # The values kernel walks weights of whole key tiles, dx over whole row tiles: steps must divide them.
    assert plan.weights.columns % plan.values.inner == 0 and plan.weights_backward.columns % plan.values.inner == 0
    for tile, chunk, arrays in (
        (plan.weights, plan.chunk, 1), (plan.weights_backward, plan.chunk_dq, 1), (plan.weights_backward, plan.chunk_dx, 2),
    ):  # fmt: skip
        assert chunk >= tile.columns and chunk % tile.columns == 0 and chunk <= max(plan.padded(M), tile.columns)
        rows = math.ceil(R / tile.rows) * tile.rows
        assert B * rows * chunk * itemsize * arrays <= max(planning.WEIGHTS_BYTES, B * rows * tile.columns * itemsize * arrays)
        key_tiles = chunk // tile.columns
        splits = plan.splits(key_tiles)
        per_split = math.ceil(key_tiles / splits)
        assert splits >= 1 and splits * per_split >= key_tiles > (splits - 1) * per_split


@given(
    B=st.integers(1, 600), R=st.integers(1, 20_000), M=st.integers(0, 3_000_000), C=PADDED, dtype=DTYPES,
    device=st.sampled_from((*DEVICES, SMALL_GPU)),
)  # fmt: skip
@settings
def test_splits_and_chunks_cover_every_key_exactly_once(
    B: int, R: int, M: int, C: int, dtype: torch.dtype, device: DeviceFacts
) -> None:
    plan = plan_shared_kv(shared_kv_problem(B, R, M, C, dtype), device)
    assert plan.tma == device.has_tma
    check_wide(plan.wide, B, R, M, dtype.itemsize)
    if plan.dx is not None:
        check_tile(plan.dx, "dx", C, dtype.itemsize, device)
    for kind, tile, splits, keys in (
        ("forward", plan.forward, plan.forward_splits, plan.forward_keys_per_split),
        ("dq", plan.dq, plan.dq_splits, plan.dq_keys_per_split),
    ):
        if tile is None:
            continue
        check_tile(tile, kind, C, dtype.itemsize, device)
        # Split s reads keys s * keys .. min((s + 1) * keys, M): all of them, and no split is empty.
        assert keys % tile.block_kv == 0
        assert splits * keys >= M and (splits == 1 or (splits - 1) * keys < M)
        blocks = B * math.ceil(R / tile.block_q)
        assert splits == 1 or blocks * splits <= 4 * device.sm_count * tile.programs_per_sm(kind, dtype.itemsize, device)


@given(B=st.integers(1, 64), R=st.integers(1, 4096), M=st.integers(1, 200_000), C=PADDED, dtype=DTYPES)
@settings
def test_workspace_is_that_of_the_partials(B: int, R: int, M: int, C: int, dtype: torch.dtype) -> None:
    """fp32 z, lse and rho of every split, 4 B S R (C + 2) bytes, none for a single one; or the weights of one chunk."""
    plan = plan_shared_kv(shared_kv_problem(B, R, M, C, dtype), H200)
    S, wide = plan.forward_splits, plan.wide
    expected = 4 * (B * S * R * C + 2 * B * S * R) if S > 1 else 0
    if plan.forward is None:
        expected = B * math.ceil(R / wide.weights.rows) * wide.weights.rows * wide.chunk * dtype.itemsize
    assert plan.workspace_bytes(B, R, C, dtype.itemsize) == expected


@pytest.mark.parametrize("C", [272, 704])
def test_workspace_does_not_grow_with_the_inputs(C: int) -> None:
    sizes = [
        plan_shared_kv(shared_kv_problem(1, 512, M, C), H200).workspace_bytes(1, 512, C, 2)
        for M in (1_000_000, 10_000_000, 100_000_000)
    ]
    assert max(sizes) <= 512 << 20 and max(sizes) <= 1.1 * min(sizes)


@given(B=st.integers(1, 300), M=st.integers(1, 100_000), units=st.integers(1, 64), shared=st.booleans())
@settings
def test_pack_serves_every_batch_entry(B: int, M: int, units: int, shared: bool) -> None:
    plan = plan_pack(B, M, 16 * units, shared=shared, device=H200)
    assert sum(plan.pieces) >= 16 * units
    assert is_power_of_two(plan.block_m) and is_power_of_two(plan.num_warps)
    assert 1 <= plan.batch_per_program <= B
    assert math.ceil(B / plan.batch_per_program) * plan.batch_per_program >= B
    if not shared:
        assert plan.batch_per_program == 1


@given(
    B=st.integers(1, 300), H=st.integers(1, 64), L=st.integers(1, 200_000), d=st.integers(2, 1024), data=st.data(),
    interleaved=st.booleans(), dtype=DTYPES, device=st.sampled_from(DEVICES),
)  # fmt: skip
@settings
def test_rotary_serves_every_channel_of_every_head(
    B: int, H: int, L: int, d: int, data: Any, interleaved: bool, dtype: torch.dtype, device: DeviceFacts
) -> None:
    width, pitch = 2 * data.draw(st.integers(1, d // 2)), d + data.draw(st.integers(0, 16))
    strides = (0, pitch, H * pitch)
    plan = plan_rotary(B, H, L, d, width, interleaved=interleaved, itemsize=dtype.itemsize, strides=strides, device=device)
    assert is_power_of_two(plan.items) and is_power_of_two(plan.pairs) and plan.align * dtype.itemsize <= 16
    # Items of a row: whole vectors of pairs, then vectors of what passes, of which the last may be short.
    step = 2 * plan.pairs if interleaved else plan.pairs
    turned = width // 2 // plan.pairs
    assert turned * plan.pairs == width // 2
    assert 0 <= (plan.columns - turned) * step - (d - width) < step
    # A program holds whole rows, at least one, and items begin at multiples of ``align``.
    assert plan.block_l >= 1 and plan.block_l * plan.columns <= plan.items
    assert all(offset % plan.align == 0 for offset in (step, d, *strides, 0 if interleaved else width // 2))
    assert 1 <= plan.heads <= 4


@pytest.mark.parametrize(("d", "width"), [(64, 64), (64, 32), (128, 128), (96, 96), (256, 64), (72, 72)])
def test_rotary_of_published_heads_takes_whole_vectors(d: int, width: int) -> None:
    """16 bytes at a time, where a pair's two channels begin at multiples of them: half of 72 does not."""
    for interleaved in (False, True):
        strides = (4096 * 8 * d, d, 8 * d)
        plan = plan_rotary(8, 8, 4096, d, width, interleaved=interleaved, itemsize=2, strides=strides, device=H200)
        assert plan.align == (4 if d == 72 and not interleaved else 8) and plan.heads == 4


def test_plans_are_pure_frozen_and_kept() -> None:
    problem = shared_kv_problem(8, 512, 50_176, 272)
    plan = plan_shared_kv(problem, H200)
    assert plan_shared_kv(dataclasses.replace(problem, masked=True, needs_grad=True), H200) is plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.forward_splits = 3  # type: ignore[misc]
    assert hash(plan) == hash(dataclasses.replace(plan))


def test_large_inputs_fill_the_device() -> None:
    """One latent block over a long input: without splits one multiprocessor would work."""
    plan = plan_shared_kv(shared_kv_problem(1, 64, 1_048_576, 256), H200)
    assert plan.forward_splits >= 0.9 * H200.sm_count and plan.dq_splits >= 0.9 * H200.sm_count


ONE_HEAD = (
    "imagenet", "imagenet-learned", "imagenet-conv", "audioset", "audioset-mel", "modelnet", "flow", "flow-frames",
    "multimodal", "longctx", "c128", "c64", "shape2vecset", "set-transformer",
)  # fmt: skip
MANY_ROWS = ("language", "perceiver-ar", "rin", "pointcloud", "triposg")


def cross_problem(case: EncodeCase, **flags: bool) -> CrossAttentionProblem:
    values = {"packed": False, "needs_grad": False, "inputs_need_grad": False} | flags
    return CrossAttentionProblem(case.B, case.H, case.N, case.M, case.C, case.d_qk, case.d_v, torch.bfloat16, "cuda", **values)


@pytest.mark.parametrize("device", [H200, A100], ids=lambda device: device.name)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("name", "method"), [(name, "absorbed") for name in ONE_HEAD] + [(name, "projected") for name in MANY_ROWS]
)
def test_method_on_published_shapes(name: str, method: str, train: bool, device: DeviceFacts) -> None:
    """Rule of thumb: absorbed where H N < C + N, or where one head is as wide as the input."""
    plan = plan_cross_attention(cross_problem(ENCODE[name], needs_grad=train), device)
    assert plan.method == method
    assert (plan.absorbed_seconds <= plan.projected_seconds) == (method == "absorbed")


@given(
    name=st.sampled_from(sorted(ENCODE)), device=st.sampled_from(DEVICES), packed=st.booleans(), grad=st.booleans(),
    inputs=st.booleans(),
)  # fmt: skip
@settings
def test_method_is_that_of_the_smaller_time(name: str, device: DeviceFacts, packed: bool, grad: bool, inputs: bool) -> None:
    problem = cross_problem(ENCODE[name], packed=packed, needs_grad=grad, inputs_need_grad=inputs)
    plan = plan_cross_attention(problem, device)
    assert plan.absorbed_seconds > 0 and plan.projected_seconds > 0
    assert plan.method == ("absorbed" if plan.absorbed_seconds <= plan.projected_seconds else "projected")
    assert plan.absorbed_seconds == absorbed_cost(problem, effective=True).seconds(device, problem.dtype)
    assert plan.projected_seconds == projected_cost(problem, effective=True).seconds(device, problem.dtype)


FLOW = OutputCrossAttentionProblem(
    B=1, query_batch=1, H=1, O=182_528, N=2048, C=322, C_out=322, d_qk=512, d_v=512, dtype=torch.bfloat16, device_type="cuda",
    packed=False, constants=0, bias_channels=2, needs_grad=False, queries_need_grad=False,
)  # fmt: skip


@pytest.mark.parametrize("device", [H200, A100], ids=lambda device: device.name)
@pytest.mark.parametrize("flags", [{}, {"needs_grad": True}, {"needs_grad": True, "queries_need_grad": True}], ids=str)
@pytest.mark.parametrize(
    ("changes", "method", "reason"),
    [
        ({}, "absorbed", None),
        ({"packed": True, "constants": 2}, "absorbed", None),
        # Narrow heads in wide queries: their projection is less than what absorption adds to every score.
        ({"d_qk": 64, "d_v": 64}, "projected", None),
        ({"C": 1026, "C_out": 1026, "O": 803_297, "N": 784}, "projected", "more than 1024 channels, got 1040 and 1026"),
        ({"H": 8, "d_qk": 64, "d_v": 64}, "projected", "got H=8"),
        ({"packed": True}, "projected", r"pack_inputs(..., constants=2), got 0"),
    ],
)  # fmt: skip
def test_method_of_decoders(
    changes: dict[str, int], method: str, reason: str | None, flags: dict[str, bool], device: DeviceFacts
) -> None:
    """Optical flow's decoder is absorbed; multimodal's, of 1,026 channels, cannot be."""
    plan = plan_output_cross_attention(dataclasses.replace(FLOW, **changes, **flags), device)
    assert plan.method == method and (method == "absorbed") == (plan.absorbed_seconds <= plan.projected_seconds)
    assert all(reason in found for found in plan.against_absorption) if reason else not plan.against_absorption
    assert math.isinf(plan.absorbed_seconds) == (reason is not None)


@given(
    B=st.integers(1, 70), H=st.integers(1, 16), N=st.integers(1, 5000), d=st.integers(1, 256), d_v=st.integers(1, 256),
    device=st.sampled_from(DEVICES), dtype=DTYPES,
)  # fmt: skip
@settings
def test_ds_is_kept_whole_and_within_its_budget(
    B: int, H: int, N: int, d: int, d_v: int, device: DeviceFacts, dtype: torch.dtype
) -> None:
    problem = AttentionProblem(
        B=B, H=H, H_kv=H, Lq=N, Lk=N, Lk_first=N, d_qk=d, d_v=d_v, dtype=dtype, device_type="cuda"
    )  # fmt: skip
    plan = plan_attention(problem, device)
    stored = plan.stored
    assert stored is None or (plan.dkv is not None and d > 64 and dtype.itemsize == 2)
    skips: tuple[dict[str, Any], ...] = ({"lengths": True}, {"causal": "bottom_right"}, {"packed": True}, {"dropout": True})
    for skipping in (*skips, {"attn_mask": "boolean"}, {"query_mask": True}, {"segments": 2}):
        assert plan_attention(dataclasses.replace(problem, **skipping), device).stored is None
    if stored is not None:
        blocks = math.ceil(N / plan.dkv.block_kv)
        assert plan.dkv.block_kv % stored.product.inner == 0 and plan.dkv_slices.total == 1
        assert stored.slices.total * stored.slices.length >= N > (stored.slices.total - 1) * stored.slices.length
        assert 1 <= stored.entries <= B
        rows = math.ceil(N / stored.product.rows) * stored.product.rows
        assert stored.entries * H * rows * blocks * plan.dkv.block_kv * 2 <= planning.WEIGHTS_BYTES


@pytest.mark.parametrize("name", ["imagenet", "language"])
def test_processing_of_wide_heads_keeps_ds(name: str) -> None:
    case = PROCESS[name]
    problem = AttentionProblem(
        B=case.B, H=case.H, H_kv=case.H, Lq=case.Lq, Lk=case.Lk, Lk_first=case.Lk, d_qk=case.d_qk, d_v=case.d_v,
        dtype=torch.bfloat16, device_type="cuda",
    )  # fmt: skip
    assert plan_attention(problem, H200).stored is not None
    assert plan_attention(dataclasses.replace(problem, key_mask=True), H200).stored is not None


@pytest.mark.parametrize("case", ENCODE.values(), ids=lambda case: case.name)
def test_every_published_family_has_a_plan(case: EncodeCase) -> None:
    plan = plan_shared_kv(shared_kv_problem(case.B, case.R, case.M, pad_channels(case.C)), H200)
    rows = plan.forward.block_q if plan.forward else plan.wide.weights.rows
    splits = plan.forward_splits if plan.forward else math.ceil(plan.wide.chunk / plan.wide.weights.columns)
    assert case.B * math.ceil(case.R / rows) * splits < 2**31


def test_facts_of_a_cpu_are_nominal() -> None:
    assert device_facts(torch.device("cpu")) is CPU and not CPU.has_tma
    assert H200.has_tma and not A100.has_tma
