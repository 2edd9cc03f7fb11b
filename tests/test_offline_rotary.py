"""The rotary kernel compiled for an H200 and an A100, without one: registers, stack, widths of memory accesses."""

from __future__ import annotations

import pytest
import torch

from perceiver_kernels.device import A100, H200
from perceiver_kernels.testing.targets import why_not_offline

pytest.importorskip("triton")
if reason := why_not_offline():
    pytest.skip(reason, allow_module_level=True)

from perceiver_kernels.backends.triton import rotary
from perceiver_kernels.testing.offline import Resources, compile_rotary, offline

# B, H, L, d, rotary width: whole vectors, vectors of 8 bytes in one form, of 4, single elements, one head of few tokens.
SIZES = [
    (4, 8, 4096, 64, 64), (4, 8, 4096, 64, 32), (4, 6, 4096, 96, 96), (4, 16, 4096, 256, 64), (1, 1, 64, 1024, 1024),
    (2, 8, 4096, 72, 72), (4, 8, 4096, 80, 20), (2, 8, 4096, 261, 64), (1, 8, 4096, 1024, 2),
]  # fmt: skip


def stays_in_registers(launch: Resources, *, whole: bool) -> bool:
    """No stack in any form; where vectors are whole, no data is exchanged between threads either."""
    return launch.stack == 0 and launch.registers <= 255 and not (whole and launch.shared)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_access_widths(sizes: tuple[int, int, int, int, int], interleaved: bool) -> None:
    """16 bytes at a time wherever a pair's channels begin at multiples of them."""
    *_, d, width = sizes
    whole = d % 8 == 0 and width % (8 if interleaved else 16) == 0
    for facts, inside in ((H200, True), (A100, False)):
        launch = compile_rotary(*sizes, torch.bfloat16, facts, interleaved=interleaved, heads_inside_rows=inside)
        assert stays_in_registers(launch, whole=whole), launch
        assert (launch.accesses.keys() == {128}) == whole, launch.accesses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    for facts, interleaved in ((H200, False), (H200, True), (A100, False), (A100, True)):
        launch = compile_rotary(4, 8, 4096, 64, 32, dtype, facts, interleaved=interleaved, table_dtype=dtype)
        assert stays_in_registers(launch, whole=True), launch
        # Tables as narrow as x are read in half vectors where the two channels of a pair share one: x's are whole.
        assert launch.accesses[128] >= 2 * launch.constants["HEADS"]


def test_only_the_first_grid_dimension_grows_with_the_batch() -> None:
    """The others end at 65,535."""
    table = torch.empty(1, 4)
    with offline(H200) as launches:
        rotary.rotary_embedding(torch.empty(70_000, 1, 1, 32), table, table, interleaved=False, inverse=False)
    (launch,) = launches
    assert launch.grid[0] == 70_000 and set(launch.grid[1:]) <= {1}
