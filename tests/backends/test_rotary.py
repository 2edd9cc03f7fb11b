"""rotary_embedding on every backend: one body, whose sizes and backends the machine decides."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.problem import RotaryProblem
from perceiver_kernels.testing import (
    LAYOUTS,
    assert_as_accurate,
    broadcast,
    column_major,
    permuted,
    poisoned_memory,
    same_bits,
)
from perceiver_kernels.testing.targets import Target, machine, only

OP = "rotary_embedding"
FORMS = [(False, False), (False, True), (True, False), (True, True)]
FORM_IDS = ["half-split", "half-split, inverse", "interleaved", "interleaved, inverse"]
# H, d, rotary width.
PUBLISHED = {
    "perceiver-ar": (8, 64, 32), "poyo": (2, 64, 32), "gpt-j": (16, 256, 64), "gpt-neox": (8, 96, 24), "llama": (8, 128, 128),
}  # fmt: skip
# Powers of two and not, widths that divide by 8, 4, 2 and 1, odd d, one pair, the widest.
WIDTHS = [
    (2, 2), (3, 2), (5, 4), (8, 8), (10, 6), (16, 2), (20, 20), (40, 24), (72, 72), (80, 60), (96, 96), (261, 64), (261, 260),
    (322, 322), (1023, 1022), (1024, 1024), (1024, 2),
]  # fmt: skip
# Longest sequence, most heads, generated calls.
LONG, MOST_HEADS, SAMPLES = {"gpu": (4099, 16, 200), "cpu": (300, 16, 20), "interpreter": (21, 2, 8)}[machine()]


@dataclass
class Call:
    """One rotation: tensors, the gradient of the result, options."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    dout: Tensor
    options: dict[str, Any]

    def wide(self) -> Call:
        """The same values in fp64."""
        return Call(self.x.double(), self.cos.double(), self.sin.double(), self.dout.double(), self.options)


def call_of(
    target: Target, B: int, H: int, L: int, d: int, width: int, *, batched: bool = False,
    table_dtype: torch.dtype = torch.float32, **options: bool,
) -> Call:  # fmt: skip
    generator = torch.Generator().manual_seed(L + d)
    times = 300 * torch.rand((B, L) if batched else (L,), generator=generator)
    tables = (table.to(target.device, table_dtype) for table in pk.rotary_tables(times, width))
    x, dout = (torch.randn(B, H, L, d, generator=generator).to(target.device, target.dtype) for _ in range(2))
    return Call(x, *tables, dout, {"interleaved": False, "inverse": False} | options)


def specified(x: Tensor, cos: Tensor, sin: Tensor, **options: bool) -> Tensor:
    return reference.rotary_embedding(x, cos.unsqueeze(-3), sin.unsqueeze(-3), **options)


def skip_if_refused(target: Target, call: Call) -> None:
    if reasons := target.refusals(RotaryProblem.of(call.x.detach().requires_grad_(), call.cos, call.sin)):
        pytest.skip(f"{target.backend}: {'; '.join(reasons)}")


def results(function: Any, call: Call, **options: Any) -> dict[str, Tensor]:
    x = call.x.detach().requires_grad_()
    out = function(x, call.cos, call.sin, **call.options, **options)
    return {"out": out.detach(), "dx": torch.autograd.grad(out, x, call.dout)[0]}


def actual_results(target: Target, call: Call) -> dict[str, Tensor]:
    return results(pk.rotary_embedding, call, backend=target.backend)


def check(target: Target, call: Call) -> dict[str, Tensor]:
    skip_if_refused(target, call)
    actual, eager, oracle = actual_results(target, call), results(specified, call), results(specified, call.wide())
    for name, value in actual.items():
        assert value.dtype == target.dtype
        assert_as_accurate(value, eager[name], oracle[name], f"{target} {name}")
    return actual


@pytest.mark.parametrize(("interleaved", "inverse"), FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_families(target: Target, name: str, interleaved: bool, inverse: bool) -> None:
    H, d, width = PUBLISHED[name]
    form = {"interleaved": interleaved, "inverse": inverse}
    call = call_of(target, 2, min(H, MOST_HEADS), LONG, d, width, batched=name == "poyo", **form)
    check(target, replace(call, x=permuted(call.x), dout=permuted(call.dout)))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize(("d", "width"), WIDTHS)
def test_widths(target: Target, d: int, width: int, interleaved: bool) -> None:
    call = call_of(target, 2, 2, 3, d, width, interleaved=interleaved)
    found = check(target, call)
    assert torch.equal(found["out"][..., width:], call.x[..., width:])
    assert torch.equal(found["dx"][..., width:], call.dout[..., width:])


@only(torch.float32)
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 7, 13])
@pytest.mark.parametrize("inside", [False, True], ids=["heads apart", "heads inside rows"])
def test_heads(target: Target, heads: int, inside: bool) -> None:
    """Heads are taken in groups; the last may be short."""
    call = call_of(target, 2, heads, 19, 24, 16, batched=True)
    check(target, replace(call, x=permuted(call.x)) if inside else call)


@pytest.mark.parametrize(("B", "H", "L"), [(0, 2, 5), (2, 0, 5), (2, 2, 0), (1, 1, 1), (3, 1, 2), (1, 2, 257)])
@pytest.mark.parametrize("batched", [False, True], ids=["shared", "batched"])
def test_sizes(target: Target, B: int, H: int, L: int, batched: bool) -> None:
    check(target, call_of(target, B, H, L, 12, 8, batched=batched))


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_of_tables(target: Target, table_dtype: torch.dtype) -> None:
    """Models in 16 bits keep their tables so, too; products are in fp32 all the same."""
    check(target, call_of(target, 2, 2, 9, 16, 8, table_dtype=table_dtype))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "column major"])
def test_layouts(target: Target, layout: str, interleaved: bool) -> None:
    """Any strides, of x, its gradient and the tables; in the interpreter, which fuses no multiply and add, the same bits."""
    call = call_of(target, 3, 2, 11, 24, 16, batched=True, interleaved=interleaved)
    skip_if_refused(target, call)
    lay = {**LAYOUTS, "column major": column_major}[layout]
    laid_out = Call(*(lay(tensor) for tensor in (call.x, call.cos, call.sin, call.dout)), call.options)
    found = check(target, laid_out)
    if machine() != "gpu":
        plain = actual_results(target, call)
        assert [name for name in plain if not same_bits(plain[name], found[name])] == []


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "heads", "tokens"])
def test_broadcast_axes_are_not_copied(target: Target, axis: int) -> None:
    call = call_of(target, 3, 2, 11, 16, 8)
    check(target, replace(call, x=broadcast(call.x, axis), dout=broadcast(call.dout, axis)))


def test_result_lies_in_memory_as_x_does(target: Target) -> None:
    """Heads of [B, L, H d] are split, turned and merged without a copy."""
    call = call_of(target, 2, 3, 9, 16, 8)
    skip_if_refused(target, call)
    assert actual_results(target, call)["out"].is_contiguous()
    found = actual_results(target, replace(call, x=permuted(call.x), dout=permuted(call.dout)))
    assert found["out"].transpose(1, 2).is_contiguous() and found["dx"].transpose(1, 2).is_contiguous()


def test_tables_that_repeat_their_columns(target: Target) -> None:
    """transformers keeps [B, L, r], both halves alike: the first half of it is a table, no copy of one."""
    call = call_of(target, 2, 3, 9, 16, 12, batched=True)
    twice = replace(call, **{name: torch.cat([getattr(call, name)] * 2, -1)[..., :6] for name in ("cos", "sin")})
    assert twice.cos.stride() != call.cos.stride()
    check(target, twice)


def test_shared_tables_may_have_a_batch_axis(target: Target) -> None:
    call = call_of(target, 3, 2, 9, 16, 12)
    skip_if_refused(target, call)
    found, expected = (
        actual_results(target, each) for each in (replace(call, cos=call.cos[None], sin=call.sin[None]), call)
    )
    assert all(same_bits(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_fresh_memory_and_repetition_change_no_bit(target: Target, interleaved: bool) -> None:
    call = call_of(target, 2, 5, 21, 40, 24, interleaved=interleaved)
    skip_if_refused(target, call)
    first = actual_results(target, call)
    with poisoned_memory():
        poisoned = actual_results(target, call)
    again = actual_results(target, call)
    for other in (poisoned, again):
        assert [name for name in first if not same_bits(first[name], other[name])] == []


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_what_passes_keeps_its_bits_and_nan_stays_in_its_pair(target: Target, interleaved: bool) -> None:
    call = call_of(target, 1, 1, 5, 13, 8, interleaved=interleaved)
    skip_if_refused(target, call)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-7]).to(call.x)
    call.x[..., 8:] = special
    call.x[0, 0, 3, 2] = float("nan")
    out = actual_results(target, call)["out"]
    assert same_bits(out[..., 8:], call.x[..., 8:])
    pair = [2, 3] if interleaved else [2, 6]
    assert out[0, 0, 3, :8].isnan().nonzero().flatten().tolist() == pair and not out[0, 0, [0, 1, 2, 4], :8].isnan().any()


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_turning_back_gives_x_and_length_is_kept(target: Target, interleaved: bool) -> None:
    call = call_of(target, 2, 2, 33, 20, 14, interleaved=interleaved)
    skip_if_refused(target, call)
    out = actual_results(target, call)["out"]
    back = pk.rotary_embedding(out, call.cos, call.sin, interleaved=interleaved, inverse=True, backend=target.backend)
    eps = torch.finfo(target.dtype).eps
    assert (back.double() - call.x.double()).abs().max() <= 2 * eps * call.x.abs().max()
    norms = [tensor.double().norm(dim=-1) for tensor in (out, call.x)]
    assert ((norms[0] - norms[1]).abs() <= 2 * eps * norms[1]).all()


@only(torch.float32)
def test_position_zero_changes_no_bit(target: Target) -> None:
    call = call_of(target, 2, 2, 4, 12, 8)
    skip_if_refused(target, call)
    cos, sin = pk.rotary_tables(torch.zeros(4, device=target.device), 8)
    assert torch.equal(pk.rotary_embedding(call.x, cos, sin, backend=target.backend), call.x)


@only(torch.float32)
def test_trained_tables(target: Target) -> None:
    """A composition differentiates them; a kernel says that it does not, and leaves the call to one."""
    call = call_of(target, 2, 2, 9, 16, 8)
    cos, sin = (table.clone().requires_grad_() for table in (call.cos, call.sin))
    if target.is_kernel:
        with pytest.raises(ValueError, match="gives no gradient to the tables cos and sin"):
            pk.rotary_embedding(call.x, cos, sin, backend=target.backend)
        out = pk.rotary_embedding(call.x, cos, sin)
    else:
        out = pk.rotary_embedding(call.x, cos, sin, backend=target.backend)
    found = torch.autograd.grad(out, (cos, sin), call.dout)
    x1, x2 = call.x[..., :4], call.x[..., 4:8]
    y1, y2 = call.dout[..., :4], call.dout[..., 4:8]
    torch.testing.assert_close(found[0], (x1 * y1 + x2 * y2).sum((0, 1)))
    torch.testing.assert_close(found[1], (x1 * y2 - x2 * y1).sum((0, 1)))


@pytest.mark.parametrize("seed", range(SAMPLES))
def test_generated(target: Target, seed: int) -> None:
    """Sizes, widths and layouts in combinations that nobody chose."""
    rng = random.Random(seed)
    d = rng.choice([rng.randint(2, 40), 8 * rng.randint(1, 20), rng.randint(2, 1024)])
    width = rng.choice([d - d % 2, 2 * rng.randint(1, d // 2)])
    B, H, L = rng.randint(1, 3), rng.randint(1, 6), rng.randint(1, LONG if d < 100 else min(LONG, 40))
    flags = {name: rng.random() < 0.5 for name in ("batched", "interleaved", "inverse")}
    call = call_of(target, B, H, L, d, width, **flags)
    lay_x, lay_tables = (LAYOUTS[rng.choice(list(LAYOUTS))] for _ in range(2))
    if flags["batched"]:
        call = replace(call, cos=lay_tables(call.cos), sin=lay_tables(call.sin))
    check(target, replace(call, x=lay_x(call.x), dout=lay_x(call.dout)))
