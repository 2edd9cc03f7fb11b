"""`check --kernels`: what is read from the machine code is what it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perceiver_kernels import build_info
from perceiver_kernels.backends.cuda import attention, shared_kv
from perceiver_kernels.cli import kernels, main

WHY_NOT = build_info.read()["reason"] or (None if kernels.disassembler() else "cuobjdump is not here")

USAGE = """
Fatbin elf code:
arch = sm_80
 Function one:
  REG:30 STACK:0 SHARED:0 LOCAL:0
arch = sm_90a
 Function one:
  REG:168 STACK:8 SHARED:1024 LOCAL:0
"""
CODE = """
arch = sm_80
        Function : one
        /*0010*/                   STL [R1], R2 ;
arch = sm_90a
        Function : one
        /*0000*/                   UTMALDG.4D [UR8], [UR4] ;
        /*0010*/              @!P0 BRA 0x10 ;
        /*0020*/                   HGMMA.64x80x16.F32 R24, gdesc[UR12], RZ, !UPT ;
        /*0030*/               @P1 LDL R3, [R1] ;
        /*0040*/              @UP0 UBLKCP [UR1], [UR2] ;
"""


def test_figures_are_those_of_each_architecture() -> None:
    assert kernels.resources(USAGE) == {("sm_80", "one"): {"REG": 30, "STACK": 0}, ("sm_90a", "one"): {"REG": 168, "STACK": 8}}
    counts = kernels.instructions(CODE)
    assert counts["sm_80", "one"] == {"spills": 1}
    assert counts["sm_90a", "one"] == {"tma": 2, "wgmma": 1, "spills": 1}


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN9perceiver20shared_kv_fwd_kernelI13__nv_bfloat16NS_15SharedKVShapeOfILi272EEELb1EEEvNS_12Maps", "272 bf16 masked"),
        ("_ZN9perceiver20shared_kv_fwd_kernelI6__halfNS_15SharedKVShapeOfILi64EEELb0EEEvNS_12Maps", "64 fp16"),
        ("_ZN9perceiver20shared_kv_fwd_kernelIfE", "fp32"),
    ],
)
def test_symbols_are_told_apart(symbol: str, name: str) -> None:
    assert kernels.split_symbol(symbol) == ("shared_kv_fwd", name)


@pytest.mark.skipif(WHY_NOT is not None, reason=f"no kernels to read: {WHY_NOT}")
def test_hopper_kernels_use_its_instructions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every one of them multiplies with wgmma, brings tiles in by TMA, spills nothing and has its row."""
    if "90a" not in build_info.read()["archs"]:
        pytest.skip("built without 90a")
    path = tmp_path / "kernels.json"
    assert main(["check", "--kernels", "--plain", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert all(row["spills"] == 0 and row["registers"] > 0 for row in rows)
    names = ("shared_kv_fwd", "shared_kv_fwd_wide", "attention_fwd", "attention_bwd")
    hopper = {(row["name"], row["variant"]): row for row in rows if row["name"] in names}
    widths = 2 * len(shared_kv.BLOCK_KV) + len(attention.BLOCK_KV) + len(attention.BACKWARD_BLOCK_Q)
    assert len(hopper) == 2 * widths
    for row in hopper.values():
        assert row["wgmma"] > 0 and row["tma"] > 0 and 0 < row["shared_bytes"] <= 232_448 and row["arch"] == "sm_90a"
    printed = capsys.readouterr().out
    assert "272 bf16 masked" in printed and "90 instances" in printed


def test_without_a_library_it_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build_info, "read", lambda: {"cuda_built": False, "reason": "no nvcc in sight"})
    assert main(["check", "--kernels"]) == 2
    assert "no nvcc in sight" in "".join(capsys.readouterr())
