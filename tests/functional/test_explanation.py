"""explain: what a call would do, in words and numbers, without doing it; it may not differ from the call."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import dispatch, reference
from perceiver_kernels.cost import absorbed_cost, problem_pack_cost, projected_cost, rotary_cost, shared_kv_cost
from perceiver_kernels.device import CPU

B, H, N, M, C = 2, 2, 3, 11, 21
FOURIER = pk.FourierPositions(2, (11.0,))


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BYTES = pk.InputArray.image(ones(B, 3, 2, 4, dtype=torch.uint8), pk.FourierPositions(2, (2.0, 4.0)))
MASK = torch.ones(B, M, dtype=torch.bool)
CROSS = (ones(B, H, N, 4), ones(B, M, C), ones(8, C), ones(6, C))
DECODE = (ones(B, M, C), ones(B, 1, N, 4), ones(B, 1, N, 6), ones(4, C), ones(5, 6))
HEADS = (ones(1, M, C), ones(B, H, N, 4), ones(B, H, N, 6), ones(8, C), ones(5, 12))
ATTENTION = {"absorbed": "shared_kv_attention", "projected": "attention"}
CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "attention": (pk.attention, (ones(B, H, N, 4), ones(B, H, M, 4), ones(B, H, M, 6)), {}),
    "attention, lse": (pk.attention, (ones(B, H, N, 4), ones(B, H, M, 4), ones(B, H, M, 6)), {"return_lse": True}),
    "shared": (pk.shared_kv_attention, (ones(B, N, 32), ones(B, M, 32)), {}),
    "shared, odd channels": (pk.shared_kv_attention, (ones(B, N, C), ones(B, M, C)), {"key_mask": MASK}),
    "shared, lse": (pk.shared_kv_attention, (ones(B, N, 32), ones(B, M, 32)), {"return_lse": True, "scale": 0.1}),
    "shared, packed": (pk.shared_kv_attention, (ones(B, N, 32), pk.PackedInputs(ones(B, M, 32), C, True, MASK)), {}),
    "pack": (pk.pack_inputs, (ones(B, M, C),), {}),
    "pack, positions": (pk.pack_inputs, (ones(B, M, C), ones(M, 4)), {"key_mask": MASK}),
    "pack, fourier": (pk.pack_inputs, (ones(B, M, C), FOURIER), {"dtype": torch.float16}),
    "pack, coordinates": (pk.pack_inputs, (ones(B, M, C), FOURIER), {"coordinates": ones(M, 1)}),
    "pack, image": (pk.pack_inputs, (pk.InputArray.image(ones(B, 3, 2, 4)),), {}),
    "pack, bytes": (pk.pack_inputs, (pk.InputArray.image(ones(B, 3, 2, 4, dtype=torch.uint8)),), {}),
    "rotary": (pk.rotary_embedding, (ones(B, H, M, 10), ones(M, 3), ones(M, 3)), {}),
    "rotary, batched": (pk.rotary_embedding, (ones(B, H, M, 10), ones(B, M, 5), ones(B, M, 5)), {"interleaved": True}),
    "cross": (pk.input_cross_attention, CROSS, {}),
    "cross, absorbed": (pk.input_cross_attention, CROSS, {"method": "absorbed", "key_mask": MASK}),
    "cross, projected": (pk.input_cross_attention, CROSS, {"method": "projected"}),
    "cross, dropout": (pk.input_cross_attention, CROSS, {"method": "absorbed", "dropout_p": 0.5}),
    "cross, packed": (pk.input_cross_attention, (CROSS[0], pk.PackedInputs(ones(B, M, 32), C, True), *CROSS[2:]), {}),
    "cross, chunked": (pk.input_cross_attention, CROSS, {"chunk_size": 4}),
    "cross, bytes": (pk.input_cross_attention, (CROSS[0], BYTES, ones(8, 13), ones(6, 13)), {}),
    "cross, bytes in chunks": (pk.input_cross_attention, (CROSS[0], BYTES, ones(8, 13), ones(6, 13)), {"chunk_size": 4}),
    "decode, absorbed": (pk.output_cross_attention, DECODE, {"method": "absorbed", "b_q": ones(4), "dropout_p": 0.5}),
    "decode, projected": (pk.output_cross_attention, DECODE, {"method": "projected", "query_mask": MASK}),
    "decode, heads": (pk.output_cross_attention, HEADS, {"lengths": ones(B, dtype=torch.int32)}),
    "decode, packed": (pk.output_cross_attention, (pk.PackedInputs(ones(B, M, 32), C, True), *DECODE[1:]), {}),
}  # fmt: skip


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(operation, backend) of every choice that a call makes."""
    choices: list[tuple[str, str]] = []

    def select(problem: Any, backend: str | None = None) -> str:
        name = dispatch.select(problem, backend)
        choices.append((problem.OP, name))
        return name

    def select_passes(problem: Any, backend: str | None = None) -> tuple[str, str]:
        names = dispatch.select_passes(problem, backend)
        choices.append((problem.OP, names[0]))  # of two alternatives there are none without a GPU
        return names

    # Calls like earlier ones are not checked again.
    monkeypatch.setattr(sys.modules["perceiver_kernels.functional.attention"], "_served", {})
    for name in ("attention", "packing", "chunked", "rotary"):
        monkeypatch.setattr(sys.modules[f"perceiver_kernels.functional.{name}"], "select", select, raising=False)
        monkeypatch.setattr(sys.modules[f"perceiver_kernels.functional.{name}"], "select_passes", select_passes, raising=False)
    return choices


@pytest.mark.parametrize("name", CALLS)
def test_backend_is_the_one_that_would_be_called(name: str, selected: list[tuple[str, str]]) -> None:
    function, args, kwargs = CALLS[name]
    explanation = pk.explain(function, *args, **kwargs)
    assert selected == []
    function(*args, **kwargs)
    assert [(part.op, part.backend) for part in explanation.parts or (explanation,)] == selected


@pytest.mark.parametrize("name", CALLS)
def test_text_says_what_and_why(name: str) -> None:
    function, args, kwargs = CALLS[name]
    explanation = pk.explain(function, *args, **kwargs)
    text = str(explanation)
    lines = text.splitlines()
    assert lines[0].startswith(f"{function.__name__} on {explanation.backend}: ")
    assert "GFLOP" in lines[1] and "MiB through device memory" in lines[1] and " ms at the device's ceilings" in lines[1]
    for part in (explanation, *explanation.parts):
        for backend, reasons in part.refused.items():
            assert reasons and f"not {backend}: {'; '.join(reasons)}" in text
    assert explanation.flops > 0 and explanation.bytes > 0 and explanation.time_ms > 0


@pytest.mark.parametrize("name", CALLS)
def test_names_serve_as_well_as_functions(name: str) -> None:
    function, args, kwargs = CALLS[name]
    assert str(pk.explain(function.__name__, *args, **kwargs)) == str(pk.explain(function, *args, **kwargs))


def test_numbers_are_those_of_the_planner() -> None:
    shared = pk.explain("shared_kv_attention", ones(B, N, 32), ones(B, M, 32))
    cost = shared_kv_cost(B, N, M, 32, 4)
    assert (shared.flops, shared.bytes) == (cost.flops, cost.bytes)
    assert shared.time_ms == 1e3 * cost.seconds(CPU, torch.float32)
    pack = pk.explain("pack_inputs", pk.InputArray.tokens(ones(B, M, C)))
    assert pack.bytes == problem_pack_cost(pack.problem).bytes
    turned = pk.explain("rotary_embedding", ones(B, H, M, 10), ones(B, M, 3), ones(B, M, 3))
    assert turned.bytes == rotary_cost(turned.problem).bytes == 4 * (2 * B * H * M * 10 + 2 * B * M * 3)
    for method, cost_of in (("absorbed", absorbed_cost), ("projected", projected_cost)):
        cross = pk.explain("input_cross_attention", *CROSS, method=method)
        assert cross.flops == cost_of(cross.problem).flops
        assert [part.op for part in cross.parts] == ["pack_inputs", ATTENTION[method]]
        assert cross.parts[0].bytes == problem_pack_cost(cross.parts[0].problem).bytes


def test_refusals_of_an_explicit_backend_are_shown_not_raised() -> None:
    explanation = pk.explain("shared_kv_attention", ones(B, N, 32), ones(B, M, 32), return_lse=True, backend="sdpa")
    assert explanation.backend is None and explanation.refused == {"sdpa": ["sdpa does not return lse"]}
    assert str(explanation).startswith("shared_kv_attention on no backend")


def test_only_kernels_have_tiles_and_splits() -> None:
    """A CPU's call shows no plan of another machine's kernels; the choice of a method is a plan anywhere."""
    arguments = ones(B, N, 32), ones(B, M, 32)
    assert pk.explain("shared_kv_attention", *arguments, backend="reference").plan is None
    cross = pk.explain("input_cross_attention", *CROSS, method="absorbed", backend="reference")
    assert cross.plan is not None and cross.parts[-1].plan is None and "Tile" not in str(cross)


def test_a_view_is_explained_as_nothing_to_do() -> None:
    explanation = pk.explain("pack_inputs", ones(B, M, 32), normalize=False)
    assert (explanation.backend, explanation.bytes, explanation.plan) == (None, 0.0, "a view of the content")


def test_nothing_is_computed() -> None:
    """Bytes of a terabyte, as they are in float32, positions of all of their tokens, autocast's copies."""
    huge = torch.ones(1, 1, 3, dtype=torch.uint8).expand(10**4, 10**8, 3)
    raw = pk.InputArray.tokens(huge, pk.FourierPositions(2, (11.0,)))
    assert pk.explain("pack_inputs", raw).bytes > 1e13
    x = ones(1, 1, 16).expand(10**4, 10**8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert pk.explain("shared_kv_attention", x[:, :2], x).problem.dtype == torch.bfloat16
        assert pk.explain("attention", x[:, None, :2], x[:, None], x[:, None]).problem.dtype == torch.bfloat16


def test_gradients_are_seen() -> None:
    """What a call differentiates decides about backends and costs: coordinates count as the inputs do."""
    points = pk.InputArray.points(ones(B, M, 1).requires_grad_(), None, pk.FourierPositions(10, (9.0,)))
    cross = pk.explain("input_cross_attention", CROSS[0], points, *CROSS[2:], method="absorbed")
    assert cross.problem.inputs_need_grad and all(part.problem.needs_grad for part in cross.parts)


def test_use_backend_is_respected() -> None:
    with pk.use_backend("reference"):
        explanation = pk.explain("shared_kv_attention", ones(B, N, 32), ones(B, M, 32))
    assert explanation.backend == "reference" and explanation.refused == {}


@pytest.mark.parametrize("sizes", [(0, N, M), (B, 0, M), (B, N, 0)], ids=str)
def test_empty_calls_are_explained_too(sizes: tuple[int, int, int]) -> None:
    b, r, m = sizes
    assert pk.explain("shared_kv_attention", ones(b, r, 32), ones(b, m, 32)).flops == 0
    assert pk.explain("input_cross_attention", ones(b, H, r, 4), ones(b, m, C), ones(8, C), ones(6, C)).backend


BAD: list[tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("softmax", (), {}, ValueError, "function must be one of attention, pack_inputs"),
    ("shared_kv_attention", (ones(B, N, 32), ones(B, M, 16)), {}, ValueError, "x must be"),
    ("shared_kv_attention", (ones(B, N, 32), ones(B, M, 32)), {"backend": "best"}, ValueError, "backend must name"),
    ("pack_inputs", (ones(B, M, C, dtype=torch.int64),), {}, TypeError, "content must be"),
    ("input_cross_attention", CROSS, {"method": "fused"}, ValueError, "method must be"),
    ("input_cross_attention", CROSS, {"dropout_p": 1.5}, ValueError, "dropout_p must be"),
    ("input_cross_attention", CROSS, {"scale": float("nan")}, ValueError, "scale must be"),
    ("input_cross_attention", CROSS, {"chunk_size": 0}, ValueError, "chunk_size must be"),
    ("input_cross_attention", CROSS, {"chunks": 3}, TypeError, "chunks"),
    ("attention", (ones(B, H, N, 4),), {}, TypeError, "missing a required argument: 'key'"),
    (reference.attention, (), {}, ValueError, "function must be one of .*, got <function attention"),
    (None, (), {}, ValueError, "function must be one of .*, got None"),
    ([], (), {}, ValueError, r"function must be one of .*, got \[\]"),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "error", "message"), BAD, ids=[f"{i}-{b[4]}" for i, b in enumerate(BAD)])
def test_what_the_call_would_refuse_is_refused(
    name: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pk.explain(name, *args, **kwargs)
