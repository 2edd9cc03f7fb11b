"""Memory in closed form, held against what a CPU, fake tensors and an H200 took."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from perceiver_kernels.cli import fake, measure
from perceiver_kernels.cli.saved import saved_bytes
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.workload import Workload
from perceiver_kernels.device import H200
from perceiver_kernels.plan.footprint import Footprint, eager_footprint, layer_footprint
from perceiver_kernels.problem import CrossAttentionProblem
from perceiver_kernels.testing.cases import EncodeCase

CPU = torch.device("cpu")
CASES = [
    EncodeCase("one-head", B=1, M=6000, C=69, N=64, D=128, H=1, d_qk=69, d_v=69),
    EncodeCase("widths", B=2, M=6000, C=69, N=64, D=128, H=1, d_qk=24, d_v=40),
    EncodeCase("heads-of-a-batch", B=2, M=6000, C=30, N=32, D=64, H=2, d_qk=16, d_v=24),
    EncodeCase("four-heads", B=1, M=8000, C=128, N=24, D=96, H=4, d_qk=32, d_v=32),
    EncodeCase("few-latents", B=3, M=3000, C=261, N=8, D=32, H=1, d_qk=261, d_v=261),
]
CHUNKS = 3
NAMES = ["ours", "chunked", "eager"]


def problem(case: Any, dtype: torch.dtype, which: str, device: str = "cpu") -> CrossAttentionProblem:
    return CrossAttentionProblem(
        B=case.B, H=case.H, N=case.N, M=case.M, C=case.C, d_qk=case.d_qk, d_v=case.d_v, dtype=dtype, device_type=device,
        packed=False, needs_grad=which == "backward", inputs_need_grad=False,
    )  # fmt: skip


def closed_form(name: str, case: Any, dtype: torch.dtype, which: str, *, composed: bool) -> Footprint:
    asked = problem(case, dtype, which)
    if name == "eager":
        return eager_footprint(asked, case.D)
    chunk = case.M // CHUNKS if name == "chunked" else None
    return layer_footprint(asked, case.D, chunk_size=chunk, composed=composed)


def measured(name: str, case: Any, dtype: torch.dtype, which: str, *, real: bool) -> tuple[int, int]:
    """Peak and kept bytes, of the absorbed form."""
    with contextlib.nullcontext() if real else fake.tensors():
        work = (Workload if real else fake.FakeWorkload)(case, CPU, dtype, chunk=case.M // CHUNKS)
        work.layer.method = "absorbed"
        layers = {"ours": lambda: work.layer, "chunked": lambda: work.chunked_layer}
        layer = work.stock_layer(Peer("eager")) if name == "eager" else layers[name]()
        call = work.layer_call(which, layer, work.inputs)
        peak = measure.peak_extra_bytes(call, CPU) if real else fake.peak_extra_bytes(call)
        if which == "forward":
            return peak, 0
        latents = work.latents.detach().requires_grad_()
        return peak, saved_bytes(lambda: layer(latents, work.inputs), [latents, work.inputs, *layer.parameters()])


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), (CASES[0], torch.bfloat16), (CASES[4], torch.bfloat16)],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("name", NAMES)
def test_a_cpu_takes_what_is_predicted(name: str, case: Any, dtype: torch.dtype, which: str) -> None:
    """Where inputs outweigh latents and weights: peaks within 8 %, kept bytes within 2 %.

    What oneDNN takes for itself is not in it: a fifth more in 16 bits where heads are narrow, which is left out here.
    """
    peak, saved = measured(name, case, dtype, which, real=True)
    expected = closed_form(name, case, dtype, which, composed=True)
    assert expected.peak == pytest.approx(peak, rel=0.08)
    assert expected.saved == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_take_what_is_predicted(name: str, case: Any, dtype: torch.dtype, which: str) -> None:
    """The kernels' operators at sizes that only fake tensors have: within 2 %, both."""
    case = replace(case, M=1_000_000)
    peak, saved = measured(name, case, dtype, which, real=False)
    expected = closed_form(name, case, dtype, which, composed=False)
    assert expected.peak == pytest.approx(peak, rel=0.02)
    assert expected.saved == pytest.approx(saved, rel=0.02)


# NVIDIA H200, bfloat16, torch 2.11, Triton's kernels: extra peak bytes, forward and forward + backward.
ON_H200 = {
    ("ours", 1_024): (13_066_240, 15_860_224),
    ("ours", 16_384): (32_215_040, 34_943_488),
    ("ours", 262_144): (164_855_808, 168_071_680),
    ("ours", 16_777_216): (9_196_605_440, 9_196_609_536),
    ("chunked", 1_024): (13_070_336, 16_142_848),
    ("chunked", 16_384): (32_280_576, 35_287_552),
    ("chunked", 262_144): (59_211_776, 61_657_600),
    ("chunked", 16_777_216): (57_962_496, 60_408_320),
    ("eager", 1_024): (5_016_576, 8_711_168),
    ("eager", 16_384): (60_527_616, 95_802_368),
    ("eager", 16_777_216): (60_634_174_464, 95_129_719_808),
}


@pytest.mark.parametrize(("name", "M"), ON_H200)
def test_an_h200_took_what_is_predicted(name: str, M: int) -> None:
    """Within 6 %: the allocator's rounding, and what it leaves of a larger block, are not in it."""
    case = EncodeCase("imagenet", B=1, M=M, C=261, N=512, D=1024, H=1, d_qk=261, d_v=261)
    for which, peak in zip(("forward", "backward"), ON_H200[name, M], strict=True):
        asked = problem(case, torch.bfloat16, which, "cuda")
        chunk = 65_536 if name == "chunked" else None
        found = eager_footprint(asked, 1024) if name == "eager" else layer_footprint(asked, 1024, chunk_size=chunk, device=H200)
        assert found.peak == pytest.approx(peak, rel=0.06)


def test_what_grows_with_the_inputs() -> None:
    """The table of the module, to the byte."""
    small, large = (problem(replace(CASES[0], M=M), torch.bfloat16, "backward") for M in (10**6, 2 * 10**6))
    M, C, P, S = 10**6, 69, 80, 64 * 10**6

    def growth(form: Any, **options: Any) -> tuple[int, int]:
        less, more = (form(each, 128, **options) for each in (small, large))
        return more.peak - less.peak, more.saved - less.saved

    assert growth(layer_footprint) == (M * (2 * P + 4), M * 2 * P)
    assert growth(layer_footprint, chunk_size=1000) == (0, 0)
    assert growth(eager_footprint) == (2 * M * 4 * C + 4 * M + 2 * 2 * S, 2 * M * 3 * C + 4 * M + 2 * S)


def test_wide_kernels_count_their_workspace() -> None:
    asked = problem(replace(CASES[0], C=704, d_qk=704, d_v=704), torch.bfloat16, "backward", "cuda")
    alone, with_it = (layer_footprint(asked, 128, device=device) for device in (None, H200))
    assert with_it.peak > alone.peak and with_it.saved == alone.saved


def test_a_call_without_gradient_keeps_nothing() -> None:
    asked = problem(CASES[0], torch.float32, "forward")
    assert layer_footprint(asked, 128).saved == eager_footprint(asked, 128).saved == 0


@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        ({"packed": True}, {}, "problem must have raw inputs without gradient, got packed=True, inputs_need_grad=False"),
        ({"inputs_need_grad": True}, {}, "got packed=False, inputs_need_grad=True"),
        ({}, {"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({}, {"chunk_size": 0}, "chunk_size must be None or at least 1, got 0"),
    ],
)
def test_refusals(changes: dict[str, Any], options: dict[str, Any], told: str) -> None:
    asked = replace(problem(CASES[0], torch.float32, "backward"), **changes)
    with pytest.raises(ValueError, match=told):
        layer_footprint(asked, **{"latent_dim": 128, **options})
