"""Addresses: offsets past 2^31 elements, and not one element past the end of any tensor (see guarded.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).with_name("guarded.py")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mmap and mprotect as Linux has them")


def run(what: str, *places: str) -> subprocess.CompletedProcess[str]:
    """One process for all places: starting it takes longer than what it does at one of them."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-X", "faulthandler", str(CHILD), what, *places]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def planned(*places: str) -> list[str]:
    """Every place with the plan of this machine and that of an H200."""
    return [f"{place}/{plan}" for place in places for plan in ("cpu", "h200")]


@pytest.mark.parametrize("what", ["fused", "wide", "float32"])
def test_shared_kv_offsets_past_31_bits(what: str) -> None:
    """Products of an index and a stride that both fit in 32 bits do not: fla#1080 and many others read elsewhere silently."""
    done = run(what, *planned("rows", "batches"))
    assert done.returncode == 0, done.stderr.split("Extension modules")[0][-1500:]


def test_pack_offsets_past_31_bits() -> None:
    done = run("pack", "batches", "channels")
    assert done.returncode == 0, done.stderr.split("Extension modules")[0][-1500:]


def test_rotary_offsets_past_31_bits_and_past_the_ends() -> None:
    done = run("rotary", "rows", "heads", "batches", "after", "before")
    assert done.returncode == 0, done.stderr.split("Extension modules")[0][-1500:]


@pytest.mark.parametrize("what", ["fused", "wide", "float32", "pack"])
def test_nothing_is_read_or_written_outside_of_tensors(what: str) -> None:
    """Inputs, results and workspaces lie next to a page that may not be touched."""
    done = run(what, *planned("after", "before"))
    assert done.returncode == 0, done.stderr.split("Extension modules")[0][-1500:]


def test_the_trap_works() -> None:
    assert run("control", "after").returncode == -signal.SIGSEGV
