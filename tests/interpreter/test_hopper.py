"""The plan of an H200 in the interpreter: its tiles, its splits over 132 multiprocessors, and TMA descriptors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from perceiver_kernels.backends.triton import pack, shared_kv, wide_shared_kv
from perceiver_kernels.device import H200
from perceiver_kernels.testing import ENCODE, EncodeCase, gapped_rows, misaligned, nan_tail, same_bits
from perceiver_kernels.testing.targets import Target, one_for_each_width, sized
from tests.backends import test_pack as pack_bodies
from tests.backends import test_shared_kv as bodies

OP = "shared_kv_attention"
FAMILIES = one_for_each_width(ENCODE.values())


def wanted(target: Target) -> bool:
    """The tables differ from other devices' for 16-bit elements."""
    return target.dtype == torch.float16


@pytest.fixture(autouse=True)
def described(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Plans are an H200's; the list collects the shapes that were described to TMA."""
    shapes: list[tuple[int, ...]] = []

    def record(can_describe):
        def wrapper(tensor):
            possible = can_describe(tensor)
            if possible:
                shapes.append(tuple(tensor.shape))
            return possible

        return wrapper

    for module in (shared_kv, pack):
        monkeypatch.setattr(module, "device_facts", lambda device: H200)
    for module in (shared_kv, wide_shared_kv):
        monkeypatch.setattr(module, "can_describe", record(module.can_describe))
    yield shapes


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_published_families(target: Target, case: EncodeCase, described: list[tuple[int, ...]]) -> None:
    case = sized(case)
    bodies.check(target, bodies.call_of(case, target))
    assert (case.B, case.M, case.C_padded) in described


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["all", "key_mask", "lengths"])
@pytest.mark.parametrize("case", [bodies.MASKED, bodies.WIDE], ids=lambda case: case.name)
def test_masks_and_dropout(target: Target, case: EncodeCase, kind: str, p: float) -> None:
    bodies.check(target, bodies.call_of(case, target, **bodies.visibility(kind, case), **bodies.dropout(p)))


@pytest.mark.parametrize("M", [1, 63, 64, 65, 129, 257])
@pytest.mark.parametrize("C", [32, 272, 352])
def test_ragged_tiles(target: Target, C: int, M: int) -> None:
    bodies.check(target, bodies.call_of(replace(bodies.MASKED, B=1, M=M, C=C, N=1), target))


@pytest.mark.parametrize("M", [130, 1025])
def test_long_inputs_are_split_over_the_device(target: Target, M: int) -> None:
    """Key tiles go to different multiprocessors, the last split is short: the plan, then the numbers."""
    case = replace(bodies.MASKED, B=1, M=M, N=1)
    call = bodies.call_of(case, target)
    plan = shared_kv._plan(call.q, call.x)
    assert plan.tma and plan.forward_splits == -(-M // plan.forward_keys_per_split) > 1
    bodies.check(target, call)


@pytest.mark.parametrize("case", bodies.BOTH, ids=lambda case: case.name)
def test_descriptors_of_strided_inputs(target: Target, case: EncodeCase, described: list[tuple[int, ...]]) -> None:
    """Row gaps and longer batches are described as they lie: NaN beside the values changes no bit."""
    call = bodies.call_of(case, target)
    plain = bodies.results(bodies.function_of(target), call)
    for layout in (nan_tail, gapped_rows):
        described.clear()
        found = bodies.results(bodies.function_of(target), replace(call, x=layout(call.x)))
        assert [name for name in plain if not same_bits(plain[name], found[name])] == []
        assert tuple(call.x.shape) in described


@pytest.mark.parametrize("case", bodies.BOTH, ids=lambda case: case.name)
def test_inputs_that_tma_cannot_read_take_pointers(target: Target, case: EncodeCase, described: list[tuple[int, ...]]) -> None:
    """An odd address, or one token array for the whole batch (stride 0)."""
    call = bodies.call_of(case, target)
    shared = call.x[:1].expand_as(call.x)
    for x in (misaligned(call.x), gapped_rows(call.x)[..., :], shared):
        described.clear()
        bodies.check(target, replace(call, x=x))
        if x is shared or x.data_ptr() % 16:
            assert tuple(x.shape) not in described


@pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointers"])
def test_wide_passes_with_different_key_tiles(target: Target, weights_bytes: Callable[[int], None], tma: bool) -> None:
    """The forward's key tile is wider than the backward's: several of each, in several chunks."""
    case = replace(bodies.WIDE, B=2, M=700, N=32)
    weights_bytes(case.B * case.R * 256 * 2)
    call = bodies.call_of(case, target)
    sizes = shared_kv._plan(call.q, call.x).wide
    assert sizes.weights.columns != sizes.weights_backward.columns
    assert max(sizes.chunk, sizes.chunk_dq, sizes.chunk_dx) < case.M
    bodies.check(target, call if tma else replace(call, x=call.x[:1].expand_as(call.x)))


@pytest.mark.parametrize("positions", pack_bodies.POSITIONS)
def test_pack(target: Target, positions: str) -> None:
    """With many multiprocessors a batch is dealt to several programs, which share positions no longer."""
    target = replace(target, op="pack_inputs")
    pack_bodies.check(target, pack_bodies.call_of(target, 7, 5, 19, positions, masked=True))
