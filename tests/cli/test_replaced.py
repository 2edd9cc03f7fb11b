"""Models before and after a replacement: every case at sizes for a CPU, what is judged, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from perceiver_kernels.cli import main
from perceiver_kernels.cli.gate import Gate
from perceiver_kernels.cli.regimes import REGIMES
from perceiver_kernels.cli.replaced import REPLACED, ReplacedWorkload
from perceiver_kernels.cli.stock import Peer

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def small(name: str, dtype: torch.dtype = torch.float32) -> ReplacedWorkload:
    package = REPLACED[name].package.replace("-", "_")
    pytest.importorskip(package, reason=f"{package} is not installed")
    return ReplacedWorkload(REGIMES["replaced"].sizes(name, CPU, None), CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", REPLACED)
def test_as_accurate_as_the_original(name: str, dtype: torch.dtype) -> None:
    work = small(name, dtype)
    assert type(work.stock) is type(work.exact) and work.report.converted
    for which in work.case.passes:
        calls = work.calls(which, work.peers(None, compiled=False))
        assert list(calls) == ["ours", "original"]
        verdicts = Gate(work).judge(which, work.results(which, calls))
        assert verdicts["ours"].failure is None and list(verdicts["ours"].errors) == work.names(which)
        assert verdicts["original"].failure is None
        assert work.flops(which, "ours") == (3 if which == "training" else 1) * work.flops("forward", "original") > 0
        flops, moved = work.least(which)
        assert flops == work.flops(which, "ours") and moved > 0


@pytest.mark.parametrize("which", ["forward", "training"])
def test_a_wrong_result_does_not_pass(which: str) -> None:
    work = small("torch-512x50k-c512-h8")
    right = work.ours(which)

    def wrong() -> Any:
        outputs = right()
        if which == "forward":
            return [1.001 * output for output in outputs]
        work.replaced.out_proj.weight.grad *= 1.01
        return outputs

    failure = Gate(work).judge(which, work.results(which, {"ours": wrong}))["ours"].failure
    assert failure is not None and failure.startswith("out: " if which == "forward" else "gradients: ")


def test_a_norm_at_the_end_hides_no_gradient() -> None:
    """Ones at a LayerNorm's output have no gradient before it: nothing of the resampler would be judged."""
    work = small("flamingo-resampler-b32")
    right = work.ours("training")

    def wrong() -> Any:
        outputs = right()
        next(p for name, p in work.replaced.named_parameters() if "to_q" in name or "q_proj" in name).grad *= 2
        return outputs

    failure = Gate(work).judge("training", work.results("training", {"ours": wrong}))["ours"].failure
    assert failure is not None and failure.startswith("gradients: ")


def test_other_peers_are_refused() -> None:
    work = small("torch-512x50k-c512-h8")
    assert [peer.name for peer in work.peers(None, compiled=False)] == ["original"]
    assert [peer.name for peer in work.peers(None, compiled=True)] == ["original", "compiled-original"]
    with pytest.raises(ValueError, match="flash has no such model: torch-512x50k-c512-h8 is measured beside original"):
        work.calls("forward", [Peer.parse("flash")])["flash"]()


def test_a_model_with_nothing_to_replace_is_no_case() -> None:
    case = dataclasses.replace(REGIMES["replaced"].sizes("torch-512x50k-c512-h8", CPU, None), build=lambda: nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to convert"):
        ReplacedWorkload(case, CPU, torch.float32)


def test_rows(tmp_path: Path) -> None:
    path = tmp_path / "replaced.json"
    call = ["bench", "replaced", "--device", "cpu", "--seconds", "0.005", "--case", "torch-512x50k-c261-h1"]
    assert main([*call, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["pass"], row["implementation"]) for row in rows] == [
        ("forward", "ours"), ("forward", "original"), ("training", "ours"), ("training", "original")
    ]  # fmt: skip
    assert all(row["kind"] == "model" and row["failure"] is None and row["p50_ms"] > 0 for row in rows)
    told = "bench replaced --case torch-512x50k-c261-h1 --passes forward --device cpu --seconds 0.005 --peers original"
    assert rows[1]["command"].endswith(told)
