"""Layers of other packages: the same weights, the same results, and where their classes do not fit."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from perceiver_kernels.cli import measure
from perceiver_kernels.cli.gate import Gate
from perceiver_kernels.cli.stock import ORIGINALS, Peer
from perceiver_kernels.cli.workload import Workload
from perceiver_kernels.testing.cases import EncodeCase

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = EncodeCase("even", B=2, M=65, C=21, N=9, D=32, H=2, d_qk=12, d_v=12)
MODULES = {"transformers": "transformers", "perceiver-pytorch": "perceiver_pytorch"}


def workload(case: EncodeCase = CASE) -> Workload:
    return Workload(case, torch.device("cpu"), torch.float32, regime="layers")


@pytest.mark.parametrize("which", ["forward", "backward", "backward-inputs"])
@pytest.mark.parametrize("name", ORIGINALS)
class TestResults:
    def test_are_ours(self, name: str, which: str) -> None:
        """Outputs and every gradient, of weights that they hold together too, under our names."""
        pytest.importorskip(MODULES[name])
        work = workload()
        mine, theirs = work.ours(which)(), work.stock(which, Peer(name))()
        assert len(mine) == len(theirs) == len(work.names(which))
        for what, a, b in zip(work.names(which), mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda told, what=what: f"{what}: {told}")

    def test_pass_the_gate(self, name: str, which: str) -> None:
        pytest.importorskip(MODULES[name])
        work = workload()
        assert not Gate(work).judge(which, {name: work.stock(which, Peer(name))})[name].is_wrong


def test_two_widths_fit_transformers_only() -> None:
    pytest.importorskip("transformers"), pytest.importorskip("perceiver_pytorch")
    work = workload(replace(CASE, d_v=20))
    assert measure.attempt(work.stock("backward", Peer("transformers"))) is None
    told = measure.attempt(work.stock("backward", Peer("perceiver-pytorch")))
    assert told == "perceiver-pytorch has heads of one width for queries, keys and values, got 12 and 20"


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_package_that_is_not_there_is_a_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    for module in [module for module in sys.modules if module.startswith(f"{MODULES[name]}.")]:
        monkeypatch.delitem(sys.modules, module)
    told = measure.attempt(workload().stock("forward", Peer(name)))
    assert told is not None and told.startswith(f"{name} cannot be imported: ")


@pytest.mark.parametrize("name", ORIGINALS)
def test_kernels_have_no_such_peer(name: str) -> None:
    told = measure.attempt(workload().stock("attend", Peer(name)))
    assert told == f"{name} has no attention over given queries, keys and values"


def test_a_gpu_measures_layers_beside_them() -> None:
    work = workload()
    work.device = torch.device("cuda")
    assert set(ORIGINALS) < {peer.name for peer in work.peers(None, compiled=False)}
    work.regime = "encode"
    assert not set(ORIGINALS) & {peer.name for peer in work.peers(None, compiled=False)}
