"""Which backend serves a call: the table's modules keep the contract, refusals are sentences, nothing falls back silently."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.dispatch import BACKENDS, TABLE, backends, load, select, use_backend
from perceiver_kernels.problem import AttentionProblem, PackProblem, RotaryProblem, SharedKVProblem

SHARED = SharedKVProblem(2, 3, 4, 16, torch.float32, "cpu", False, False, False, False)
PACK = PackProblem(2, 4, 3, 0, torch.float32, torch.float32, "cpu", False, False, True, False, False)
ATTENTION = AttentionProblem(B=2, H=2, H_kv=2, Lq=3, Lk=4, Lk_first=4, d_qk=8, d_v=8, dtype=torch.float32, device_type="cpu")
ROTARY = RotaryProblem(2, 2, 4, 8, 8, torch.float32, torch.float32, "cpu", False, False, False)
PROBLEMS = {"shared_kv_attention": SHARED, "pack_inputs": PACK, "attention": ATTENTION, "rotary_embedding": ROTARY}

STATE = ("scale", "dropout_p", "dropout_seed", "key_offset")
MASKS = ("key_mask", "lengths")
# What ops/ and functional/ pass: function -> (positional names, keyword names).
PAIRS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "pack_inputs": {
        "pack_inputs_forward": (("content", "positions", "fourier", "key_mask"), ("normalize", "eps", "dtype", "constants")),
        "pack_inputs_backward": (("dpacked", "packed", "rstd"), ("content_channels", "channels", "normalize", "dtype")),
    },
    "shared_kv_attention": {
        "shared_kv_attention_forward": (("q", "x", *MASKS), (*STATE, "state", "out_dtype")),
        "shared_kv_attention_delta": (("dz", "z", "dlse", "drho", "rho"), ()),
        "shared_kv_attention_backward": (
            ("dz", "delta", "drho", "q", "x", "lse", *MASKS), (*STATE, "needs_dq", "needs_dx", "dq_sum"),
        ),
    },
    "attention": {
        "attention_forward": (("query", "keys", "values", "masks"), ("scale", "dropout_p", "dropout_seed")),
        "attention_backward": (
            ("dout", "dlse", "out", "lse", "statistics", "query", "keys", "values", "masks"),
            ("scale", "dropout_p", "dropout_seed", "needs_dq", "needs_dkv", "into"),
        ),
    },
    # A rotation is differentiated by another one.
    "rotary_embedding": {"rotary_embedding": (("x", "cos", "sin"), ("interleaved", "inverse"))},
}  # fmt: skip
COMPOSITES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pack_inputs": (("content", "positions", "fourier"), ("key_mask", "normalize", "eps", "dtype", "constants")),
    "shared_kv_attention": (("q", "x"), (*MASKS, "scale", "dropout_p", "dropout_seed", "key_offset")),
    "attention": (("query", "keys", "values"), ("masks", "dropout_p", "dropout_seed", "scale")),
    "rotary_embedding": (("x", "cos", "sin"), ("interleaved", "inverse")),
}
ENTRIES = [(op, name) for op, row in TABLE.items() for name in row]


def check_signature(function: Any, positional: tuple[str, ...], keywords: tuple[str, ...]) -> None:
    parameters = inspect.signature(function).parameters
    assert tuple(parameters)[: len(positional)] == positional
    assert set(keywords) <= set(parameters)
    extra = [p for name, p in parameters.items() if name not in (*positional, *keywords)]
    assert all(p.default is not p.empty for p in extra), f"{function.__name__} asks for more: {extra}"


@pytest.mark.parametrize(("op", "name"), ENTRIES)
def test_module_keeps_the_contract(op: str, name: str) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    module = load(op, name)
    assert isinstance(module.COMPOSITE, bool)
    reasons = module.reasons_against(PROBLEMS[op])
    assert isinstance(reasons, list) and all(isinstance(reason, str) for reason in reasons)
    if module.COMPOSITE:
        check_signature(getattr(module, op), *COMPOSITES[op])
    else:
        for function, (positional, keywords) in PAIRS[op].items():
            if hasattr(module, function) or name != "cuda":
                check_signature(getattr(module, function), positional, keywords)


def test_table_is_in_order_of_preference_and_ends_with_the_specification() -> None:
    for row in TABLE.values():
        assert list(row) == sorted(row, key=BACKENDS.index) and list(row)[-1] == "reference"


def test_reference_has_the_pairs_that_chunks_need() -> None:
    for op in ("pack_inputs", "shared_kv_attention"):
        for function, (positional, keywords) in PAIRS[op].items():
            check_signature(getattr(load(op, "reference"), function), positional, keywords)


def test_kernels_without_a_gradient_refuse_to_be_trained() -> None:
    """A kernel module without a backward must say so in reasons_against, not fail in the backward."""
    for op, name in ENTRIES:
        if name == "triton":
            pytest.importorskip("triton")
        module = load(op, name)
        backward = f"{op}_backward"
        if not module.COMPOSITE and backward in PAIRS[op] and not hasattr(module, backward):
            problem = PROBLEMS[op].__class__(**{**vars(PROBLEMS[op]), "needs_grad": True})
            assert any("gradient" in reason for reason in module.reasons_against(problem)), name


@pytest.mark.parametrize("op", TABLE)
def test_the_reference_serves_everything(op: str) -> None:
    assert dispatch.refusals(PROBLEMS[op], "reference") == []


def test_backends_say_why_they_are_not_available() -> None:
    found = backends()
    assert tuple(found) == BACKENDS
    for name, (available, reason) in found.items():
        assert reason == "available" if available else len(reason.split()) >= 3, name
    assert found["sdpa"][0] and found["reference"][0]


def test_automatic_choice_takes_the_first_that_serves() -> None:
    assert select(SHARED) == next(name for name in TABLE[SHARED.OP] if not dispatch.refusals(SHARED, name))
    with_lse = SharedKVProblem(**{**vars(SHARED), "needs_lse": True})
    with use_backend("sdpa", "reference"):
        assert (select(SHARED), select(with_lse)) == ("sdpa", "reference")


@pytest.mark.parametrize("op", TABLE)
@pytest.mark.parametrize("name", BACKENDS)
def test_explicit_backend_serves_or_raises_every_reason(op: str, name: str) -> None:
    problem = PROBLEMS[op]
    reasons = dispatch.refusals(problem, name)
    if not reasons:
        assert select(problem, name) == name
        return
    with pytest.raises(ValueError, match=f"no backend can serve {op} as asked") as raised:
        select(problem, name)
    assert f"  {name}: {'; '.join(reasons)}" in str(raised.value)


def test_refusals_collect_all_sentences_of_a_backend() -> None:
    problem = SharedKVProblem(**{**vars(SHARED), "needs_lse": True, "dropout": True})
    assert len(dispatch.refusals(problem, "sdpa")) == 2
    assert dispatch.refusals(ROTARY, "cuda") == ["cuda has no rotary_embedding"]


def test_no_backend_in_force_can_serve() -> None:
    q = x = torch.zeros(1, 2, 16)
    with use_backend("sdpa"), pytest.raises(ValueError, match="sdpa does not return lse"):
        pk.shared_kv_attention(q, x, return_lse=True)


def test_triton_refusals_are_sentences() -> None:
    pytest.importorskip("triton")
    module = load("shared_kv_attention", "triton")
    problem = SharedKVProblem(**{**vars(SHARED), "dtype": torch.float64, "device_type": "mps"})
    text = "; ".join(module.reasons_against(problem))
    assert "got mps" in text and "got float64" in text


class TestUseBackend:
    def test_restricts_and_nests(self) -> None:
        with use_backend("sdpa"):
            assert select(SHARED) == "sdpa"
            with use_backend("reference"):
                assert select(SHARED) == "reference"
            assert select(SHARED) == "sdpa"
        assert dispatch._in_force() is None

    def test_is_put_back_after_an_error(self) -> None:
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        assert dispatch._in_force() is None

    def test_blocks_of_two_threads_leave_nothing_behind(self) -> None:
        """The first to begin is the first to end."""
        begun, inside, ended = threading.Event(), threading.Event(), threading.Event()

        def first() -> None:
            with use_backend("reference"):
                begun.set()
                inside.wait(10)
            ended.set()

        thread = threading.Thread(target=first)
        thread.start()
        assert begun.wait(10)
        with use_backend("sdpa"):
            inside.set()
            assert ended.wait(10)
            assert select(SHARED) == "sdpa"
        thread.join()
        assert dispatch._in_force() is None

    def test_explicit_argument_wins(self) -> None:
        with use_backend("sdpa"):
            assert select(SHARED, "reference") == "reference"

    def test_order_of_names_is_order_of_preference(self) -> None:
        with use_backend("reference", "sdpa"):
            assert select(SHARED) == "reference"

    def test_passes_over_a_backend_that_lacks_the_operation(self) -> None:
        with use_backend("cuda", "reference"):
            assert select(ROTARY) == "reference"
        with use_backend("cuda"), pytest.raises(ValueError, match="cuda has no rotary_embedding"):
            select(ROTARY)

    @pytest.mark.parametrize("names", [(), ("flash",), ("sdpa", "Triton")])
    def test_refuses_names(self, names: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match="backend"), use_backend(*names):
            pass


CHILD = """
import json, sys
{prelude}
import torch, perceiver_kernels as pk
result = {{"kernels imported": any(name.startswith("perceiver_kernels.backends.triton.") for name in sys.modules),
           "testing imported": any(name.startswith("perceiver_kernels.testing") for name in sys.modules),
           "cli imported": any(name.startswith("perceiver_kernels.cli") for name in sys.modules)}}
result["backends"] = pk.backends()
def attempt(name, call):
    try:
        result[name] = call()
    except Exception as error:
        result[name] = f"{{type(error).__name__}}: {{error}}"
q, x = torch.randn(1, 2, 16), torch.randn(1, 3, 16)
attempt("served by", lambda: pk.explain("shared_kv_attention", q, x).backend)
attempt("sum", lambda: bool(pk.shared_kv_attention(q, x).isfinite().all()))
attempt("lse", lambda: pk.explain("shared_kv_attention", q, x, return_lse=True).backend)
attempt("triton", lambda: bool(pk.shared_kv_attention(q, x, backend="triton").isfinite().all()))
print(json.dumps(result))
"""


def in_child(prelude: str = "", **environment: str) -> dict[str, Any]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", **environment}
    environment.pop("PERCEIVER_KERNELS_BACKEND", None) if "PERCEIVER_KERNELS_BACKEND" not in environment else None
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(prelude=prelude)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_environment_variable_restricts_a_process() -> None:
    result = in_child(PERCEIVER_KERNELS_BACKEND="reference")
    assert result["served by"] == "reference" and result["sum"] is True
    result = in_child(PERCEIVER_KERNELS_BACKEND="sdpa, reference")
    assert (result["served by"], result["lse"]) == ("sdpa", "reference")


def test_environment_variable_with_a_wrong_name_is_an_error_that_names_it() -> None:
    result = in_child(PERCEIVER_KERNELS_BACKEND="sdpa,fastest")
    assert result["sum"].startswith("ValueError: PERCEIVER_KERNELS_BACKEND must name backends") and "fastest" in result["sum"]


def test_package_works_without_triton_and_without_gpu() -> None:
    result = in_child('sys.modules["triton"] = None')
    assert result["backends"]["triton"] == [False, "triton is not installed"]
    assert not result["backends"]["cuda"][0]
    assert result["served by"] == "sdpa" and result["sum"] is True
    assert result["triton"].startswith("ValueError: no backend can serve") and "triton is not installed" in result["triton"]


def test_import_is_lean() -> None:
    result = in_child()
    assert not any(result[name] for name in ("kernels imported", "testing imported", "cli imported"))
    assert not result["backends"]["triton"][0] and "TRITON_INTERPRET" in result["backends"]["triton"][1]


class TestPasses:
    """The forward and the backward are chosen apart: here cuda has no gradient, triton serves everything."""

    @pytest.fixture(autouse=True)
    def two_kernels(self, monkeypatch: pytest.MonkeyPatch, forgotten_choices: None) -> None:
        def refusals(problem: Any, name: str) -> list[str]:
            return ["no gradient"] if name == "cuda" and problem.needs_grad else []

        kernels = {"cuda", "triton"}
        monkeypatch.setattr(dispatch, "refusals", refusals)
        monkeypatch.setattr(dispatch, "load", lambda op, name: SimpleNamespace(COMPOSITE=name not in kernels))

    def test_sizes_decide_between_two_forwards(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the automatic choice, or the caller's list, has another kernel backend for the calls that are left to it."""

        def load(op: str, name: str) -> SimpleNamespace:
            def leaves(sizes: tuple[int, ...]) -> str | None:
                return "small" if max(sizes) < 100 else None

            small = {"leaves": leaves, "leaves_backward": lambda sizes: "slow"} if name == "cuda" else {}
            return SimpleNamespace(COMPOSITE=name not in ("cuda", "triton"), **small)

        monkeypatch.setattr(dispatch, "load", load)
        training = replace(SHARED, needs_grad=True)
        assert dispatch.select_passes(SHARED) == ("cuda,triton", "cuda,triton")
        assert dispatch.select_passes(training) == ("cuda,triton", "triton")
        assert dispatch.select_passes(SHARED, "cuda") == ("cuda", "cuda")
        with use_backend("cuda", "reference"):
            assert dispatch.select_passes(SHARED) == ("cuda", "cuda")
        assert dispatch.serving("shared_kv_attention", "cuda,triton", (1, 2, 3)) == "triton"
        assert dispatch.serving("shared_kv_attention", "cuda,triton", (1, 2, 300)) == "cuda"
        assert dispatch.serving("shared_kv_attention", "cuda", (1, 2, 3)) == "cuda"
        assert dispatch.serving("shared_kv_attention", "cuda,triton", (1, 2, 300), "leaves_backward") == "triton"

    def test_a_forward_without_gradient_may_have_anothers(self) -> None:
        training = replace(SHARED, needs_grad=True)
        assert dispatch.select_passes(SHARED) == ("cuda", "cuda")
        assert dispatch.select_passes(training) == ("cuda", "triton")
        with use_backend("triton", "cuda"):
            assert dispatch.select_passes(training) == ("triton", "triton")

    def test_an_explicit_backend_serves_both_or_raises(self) -> None:
        training = replace(SHARED, needs_grad=True)
        assert dispatch.select_passes(training, "triton") == ("triton", "triton")
        with pytest.raises(ValueError, match="cuda: no gradient"):
            dispatch.select_passes(training, "cuda")

    def test_a_composition_serves_both_or_neither(self) -> None:
        training = replace(SHARED, needs_grad=True)
        with use_backend("cuda", "sdpa"):
            assert dispatch.select_passes(training) == ("sdpa", "sdpa")
        with use_backend("sdpa", "cuda"):
            assert dispatch.select_passes(SHARED) == ("sdpa", "sdpa")


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_fused_operators_need_no_backend(problem: Any) -> None:
    """Fake tensors go through the kernels' operators, whose fakes give their results; outside nothing has changed."""
    before = dispatch.select_passes(problem)
    with dispatch.fused_operators():
        assert dispatch.select_passes(problem) == (dispatch.FUSED, dispatch.FUSED)
        assert not dispatch.is_composite(problem.OP, dispatch.FUSED)
    assert dispatch.select_passes(problem) == before
