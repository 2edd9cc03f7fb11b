"""Machine code that touches registers of a running wgmma is found, and code that waits is not."""

from __future__ import annotations

import pytest

from perceiver_kernels.testing.sass import early_accesses, global_access_bits

LOOP = """
.L_x_0:
        /*0000*/                   {load} ;
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR24].tnspB, R24, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, {allowed} ;
        /*0040*/               @P5 BRA `(.L_x_0) ;
        /*0050*/                   {after} ;
        /*0060*/                   EXIT ;
"""
LOAD = "LDSM.16.M88.4 R152, [R11+UR8+0x18000]"


def early(load: str = "NOP", allowed: str = "0x1", after: str = "NOP") -> list[str]:
    return early_accesses(LOOP.format(load=load, allowed=allowed, after=after))


def test_the_next_iteration_loads_over_an_operand() -> None:
    assert early(LOAD) == [LOAD]


@pytest.mark.parametrize(
    "load",
    [
        "LDS.128 R149, [R4]", "LDS.64 R151, [R4]", "HMUL2.BF16_V2 R155, R155, R22.reuse.H1_H1",
        "SHFL.BFLY PT, R154, R5, 0x1, 0x1f", "LOP3.LUT P6, R153, R19, 0x80, R8, 0xc8, !PT",
    ],
)  # fmt: skip
def test_any_of_the_four_registers(load: str) -> None:
    assert early(load) == [load]


@pytest.mark.parametrize(
    "load",
    [
        "LDS.128 R156, [R4]", "LDS.64 R22, [R4]", "STS [R4], R152", "UIADD3 UR24, UR25, 0x1, URZ",
        "ISETP.NE.AND P6, PT, R153, RZ, PT", "R2UR UR4, R152",
    ],
)  # fmt: skip
def test_neighbours_and_readers_are_free(load: str) -> None:
    assert early(load) == []


def test_a_wait_for_everything() -> None:
    assert early(LOAD, allowed="0x0", after="FMUL R24, R24, R9") == []


def test_a_wait_that_retires_the_older_of_two_groups() -> None:
    sass = """
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, R152, gdesc[UR24], R24, gsb0 ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, R156, gdesc[UR24], R24, gsb0 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/                   MOV R153, R4 ;
        /*0040*/                   MOV R157, R4 ;
        /*0050*/                   EXIT ;
    """
    assert early_accesses(sass) == ["MOV R157, R4"]


@pytest.mark.parametrize("after", ["FMUL R5, R151, R9", "FMUL R24, R5, R9", "STG.E [R4.64], R100"])
def test_an_accumulator_is_neither_read_nor_written(after: str) -> None:
    assert early(after=after) == [after]


def test_a_group_that_nothing_committed_yet() -> None:
    sass = LOOP.format(load="NOP", allowed="0x0", after="MOV R24, R4").replace(", gsb0 ;\n        /*0030", " ;\n        /*0030")
    assert early_accesses(sass) == ["MOV R24, R4"]


def test_only_paths_that_exist() -> None:
    sass = """
        /*0000*/                   BRA `(.L_x_1) ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, R152, gdesc[UR24], R24, gsb0 ;
.L_x_1:
        /*0020*/                   MOV R152, R4 ;
        /*0030*/                   EXIT ;
    """
    assert early_accesses(sass) == []


def test_widths_of_global_accesses() -> None:
    """A load that names no width is of 32 bits; shared memory and asynchronous copies to it are not counted."""
    instructions = (
        "LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.U16 R4, desc[UR4][R2.64]", "LDG.E.U8 R4, desc[UR4][R2.64]",
        "LDG.E R4, desc[UR4][R2.64]", "@P0 STG.E.64 desc[UR4][R2.64], R4", "@!P1 STG.E.128 desc[UR4][R2.64], R4",
        "LDS.128 R4, [R2]", "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]",
    )  # fmt: skip
    sass = "\n".join(f"        /*{16 * at:04x}*/                   {text} ;" for at, text in enumerate(instructions))
    assert global_access_bits(sass) == {128: 2, 16: 1, 8: 1, 32: 1, 64: 1}
