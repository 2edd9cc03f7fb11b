"""attention over separate keys and values on every backend: one body, whose sizes and backends the machine decides.

Errors are judged against fp64 by testing.accuracy's rule, forward and every gradient, lse's included. What a backend does not
serve it says itself (reasons_against); such a combination is skipped with its sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import perceiver_kernels as pk
from perceiver_kernels.device import device_facts
from perceiver_kernels.functional.heads import merge_heads, split_projection
from perceiver_kernels.layouts import rows_of_heads
from perceiver_kernels.masks import Masks
from perceiver_kernels.nn import CrossAttention, SelfAttention
from perceiver_kernels.plan import plan_attention
from perceiver_kernels.testing import DECODE, ENCODE_KV, LAYOUTS, PROCESS, AttentionCase, poisoned_memory, same_bits
from perceiver_kernels.testing.attention import (
    MASK_KINDS,
    AttentionCall,
    Sample,
    attention_call,
    attention_results,
    check_attention,
    function_of,
    generated,
    masks_of,
)
from perceiver_kernels.testing.targets import Target, machine, only, targets

OP = "attention"
PARTIAL = True
SMALL = AttentionCase("small", B=3, H=2, Lq=9, Lk=21, d_qk=8, d_v=12)
# One of each regime; on kernels: split keys, queries in shared memory, neither, keys in shared memory.
REGIMES = (
    AttentionCase("encode", B=2, H=2, Lq=70, Lk=300, d_qk=16, d_v=16),
    AttentionCase("few queries", B=2, H=2, Lq=20, Lk=150, d_qk=16, d_v=24),
    AttentionCase("process", B=2, H=2, Lq=90, Lk=75, d_qk=16, d_v=16),
    AttentionCase("decode", B=2, H=2, Lq=150, Lk=37, d_qk=16, d_v=24),
)
if machine() == "interpreter":
    # Programs run one after the other there.
    smaller = {"encode": {"H": 1, "Lq": 40, "Lk": 170}, "few queries": {"H": 1}, "process": {}, "decode": {"H": 1}}
    REGIMES = tuple(replace(case, **smaller[case.name]) for case in REGIMES)
CASES = [
    replace(case, name=f"{kind} {case.name}")
    for kind, row in (("decode", DECODE), ("process", PROCESS), ("encode", ENCODE_KV))
    for case in row.values()
]
SIZES = ({"B": 0}, {"Lq": 0}, {"Lk": 0}, {"Lk": 1}, {"Lq": 1}, {"d_qk": 1, "d_v": 1}, {"H": 1}, {"d_qk": 24, "d_v": 8})
WIDTHS = (
    (261, 261), (322, 322), (704, 704), (32, 160), (32, 96), (512, 512), (96, 96), (48, 48), (160, 160), (256, 64), (1, 33)
)  # fmt: skip
# Generated calls, their longest side, their most key heads, calls that share kernels (which only a GPU's must be compiled).
SAMPLES = {"gpu": (1000, 700, 3, 8), "interpreter": (150, 100, 1, 1), "cpu": (60, 200, 3, 1)}[machine()]


def wanted(target: Target) -> bool:
    """Not torch's fp32 attention on a GPU: its memory-efficient kernel exceeds the rule by up to 7 % (torch 2.11, H200)."""
    return not (machine() == "gpu" and target.backend == "sdpa" and target.dtype == torch.float32)


def skip_if_refused(target: Target, call: AttentionCall) -> None:
    if reasons := target.refusals(call.problem()):
        pytest.skip(f"{target.backend}: {'; '.join(reasons)}")


def skip_if_atomic(target: Target) -> None:
    if machine() == "gpu" and target.backend == "sdpa":
        pytest.skip("torch's fused backward adds atomically, deterministic algorithms asked for or not (torch 2.11)")


def check(target: Target, call: AttentionCall) -> dict[str, torch.Tensor]:
    skip_if_refused(target, call)
    return check_attention(target, call)


def sized(case: AttentionCase) -> AttentionCase:
    return case.scaled(max_length=100, max_batch=1, max_heads=2) if machine() == "interpreter" else case.scaled()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_published_families(target: Target, case: AttentionCase) -> None:
    check(target, attention_call(sized(case), target))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(target: Target, sizes: dict[str, int]) -> None:
    found = check(target, attention_call(replace(SMALL, **sizes), target))
    if sizes == {"Lk": 0}:
        assert not found["out"].any()


@pytest.mark.parametrize(("d_qk", "d_v"), WIDTHS)
def test_widths(target: Target, d_qk: int, d_v: int) -> None:
    heads = {"B": 1, "H": 1} if machine() == "interpreter" else {}
    check(target, attention_call(replace(SMALL, Lq=33, Lk=70, d_qk=d_qk, d_v=d_v, **heads), target))


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("case", REGIMES, ids=lambda case: case.name)
def test_masks(target: Target, case: AttentionCase, kind: str) -> None:
    """A query that sees no key gives 0 and zero gradients."""
    case = replace(case, B=1) if kind.startswith("packed") else case
    masks = masks_of(kind, case)
    found = check(target, attention_call(case, target, masks=masks))
    if kind == "key_mask":
        assert not any(found[name][-1].any() for name in ("out", "dquery", "dkey", "dvalue"))
    if kind == "boolean":
        assert not found["out"][0, :, case.Lq // 2].any() and not found["dquery"][0, :, case.Lq // 2].any()
    if kind == "query_mask":
        hidden = ~masks.query_mask.to(target.device)[:, None, :, None]  # type: ignore[union-attr]
        assert not found["out"].masked_select(hidden).any() and not found["dquery"].masked_select(hidden).any()


@pytest.mark.parametrize(("entries", "kind"), [(1, "key_mask"), (2, "none")])
def test_ds_kept_for_dq(target: Target, weights_bytes: Callable[[int], None], entries: int, kind: str) -> None:
    """As many keys as queries, wide heads: the kernel of dk and dv leaves ds of some batch entries."""
    heads = 180 if machine() == "gpu" else 2  # enough for one entry to fill the device
    case = AttentionCase("kept", B=2, H=heads, Lq=150, Lk=140, d_qk=72, d_v=16)
    weights_bytes(entries * case.H * 256 * 192 * 2)
    call = attention_call(case, target, masks=masks_of(kind, case))
    if target.backend == "triton" and target.dtype.itemsize == 2:
        plan = plan_attention(call.problem(), device_facts(torch.device(target.device)))
        assert plan.stored is not None and plan.stored.entries == entries
    check(target, call)


@pytest.mark.parametrize("masks", [("lengths", "query_mask"), ("key_mask", "additive"), ("lengths", "causal")], ids=str)
def test_masks_together(target: Target, masks: tuple[str, str]) -> None:
    first, second = (vars(masks_of(kind, REGIMES[2])) for kind in masks)
    both = Masks(**{name: value if value not in (None, "none") else second[name] for name, value in first.items()})
    check(target, attention_call(REGIMES[2], target, masks=both))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("shape", [(), (SMALL.Lk,)], ids=["one number", "of the keys"])
def test_masks_of_less_than_two_axes(target: Target, shape: tuple[int, ...], kind: str) -> None:
    added = torch.linspace(-1, 1, SMALL.Lk)[slice(None) if shape else 7].view(shape)
    mask = added > -0.5 if kind == "boolean" else added
    check(target, attention_call(SMALL, target, masks=Masks(attn_mask=mask)))


@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0])
def test_scale(target: Target, scale: float) -> None:
    check(target, attention_call(SMALL, target, scale=scale))


@pytest.mark.parametrize("H_kv", [1, 2])
@pytest.mark.parametrize("case", REGIMES, ids=lambda case: case.name)
def test_grouped_heads(target: Target, case: AttentionCase, H_kv: int) -> None:
    check(target, attention_call(replace(case, H=4), target, H_kv=H_kv))


@pytest.mark.parametrize("kind", ["none", "key_mask", "bottom_right"])
@pytest.mark.parametrize("cut", [0.3, 1.0], ids=["two", "second empty"])
@pytest.mark.parametrize("case", REGIMES, ids=lambda case: case.name)
def test_segments(target: Target, case: AttentionCase, cut: float, kind: str) -> None:
    """Two segments are one concatenation that is not made; an empty one takes no part."""
    masks = masks_of(kind, case)
    whole, halves = (attention_call(case, target, masks=masks, segments=size) for size in (0, int(case.Lk * cut)))
    found = check(target, halves)
    if machine() == "cpu":
        expected = attention_results(function_of(target), whole)
        assert all(same_bits(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", REGIMES, ids=lambda case: case.name)
def test_layouts(target: Target, case: AttentionCase, layout: str) -> None:
    call = attention_call(case, target)
    check(target, replace(call, **{name: LAYOUTS[layout](getattr(call, name)) for name in ("query", "key", "value", "dout")}))


def check_one_projection(target: Target, case: AttentionCase, together: int) -> None:
    """Of operands that one product gave the gradients lie side by side too, and are those of operands that lie apart."""
    call = attention_call(replace(case, Lq=case.Lk) if together == 3 else case, target)
    skip_if_refused(target, call)
    apart = {name: LAYOUTS["permuted"](getattr(call, name)) for name in ("query", "key", "value")}
    names = list(apart)[3 - together :]
    rows = torch.cat([merge_heads(apart[name]) for name in names], -1)
    parts = split_projection(rows, [call.dout.shape[1] * apart[name].shape[3] for name in names], case.H)
    beside = {**apart, **dict(zip(names, parts, strict=True))}
    found = check(target, replace(call, **beside))
    if not target.is_kernel:
        return
    expected = attention_results(function_of(target), replace(call, **apart))
    assert [name for name in expected if not same_bits(expected[name], found[name])] == []
    gradient = rows_of_heads([found[f"d{name}"] for name in names])
    assert gradient is not None and gradient.shape == rows.shape and gradient.is_contiguous()


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("together", [2, 3], ids=["keys and values", "queries too"])
@pytest.mark.parametrize("case", [*REGIMES, replace(SMALL, d_qk=16, d_v=16)], ids=lambda case: case.name)
def test_one_projection(target: Target, case: AttentionCase, together: int) -> None:
    check_one_projection(target, case, together)


def test_result_lies_in_memory_as_the_queries_do(target: Target) -> None:
    """Heads of a [B, L, H d] sequence are split and merged without a copy; compositions over torch promise nothing."""
    call = attention_call(SMALL, target)
    with pk.use_backend(*target.passes):
        out = pk.attention(LAYOUTS["permuted"](call.query), call.key, call.value)
    assert out.shape == call.dout.shape and (not target.is_kernel or out.transpose(1, 2).is_contiguous())


@pytest.mark.parametrize("axis", [0, 1], ids=["batch", "heads"])
def test_queries_shared_by_the_batch_are_not_copied(target: Target, axis: int) -> None:
    """Latents are the same for every input: stride 0 along batch (or heads), and their gradient is summed."""
    call = attention_call(SMALL, target)
    skip_if_refused(target, call)
    call = replace(call, dlse=torch.zeros_like(call.dlse))
    query = call.query.narrow(axis, 0, 1).detach().requires_grad_()
    out, _ = function_of(target)(query.expand_as(call.query), (call.key,), (call.value,), masks=call.masks, **call.options)
    (dquery,) = torch.autograd.grad(out, query, call.dout)
    found = check(target, replace(call, query=query.detach().expand_as(call.query)))
    assert torch.equal(out, found["out"])
    eps = torch.finfo(target.dtype).eps
    expected = found["dquery"].double().sum(axis, keepdim=True)
    assert (dquery.double() - expected).abs().max() <= 4 * eps * found["dquery"].double().abs().sum(axis).max()


def test_a_batch_of_none_reads_a_shared_one_and_is_read_by_it(target: Target) -> None:
    none, one = (attention_call(replace(SMALL, B=size), target) for size in (0, 1))
    skip_if_refused(target, none)
    for asked, read in ((none, one), (one, none)):
        leaves = [tensor.detach().requires_grad_() for tensor in (asked.query, read.key, read.value)]
        out = pk.attention(*leaves, backend=target.backend)
        assert out.shape == (0, SMALL.H, SMALL.Lq, SMALL.d_v)
        out.sum().backward()
        assert not any(leaf.grad.any() for leaf in leaves)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["none", "key_mask", "lengths", "causal"])
@pytest.mark.parametrize("case", REGIMES, ids=lambda case: case.name)
def test_fresh_memory_and_repetition_change_no_bit(target: Target, case: AttentionCase, kind: str) -> None:
    skip_if_atomic(target)
    call = attention_call(case, target, masks=masks_of(kind, case))
    skip_if_refused(target, call)
    function = function_of(target)
    first = attention_results(function, call)
    with poisoned_memory():
        poisoned = attention_results(function, call)
    # Programs run one after the other in the interpreter: nothing there could be different the second time.
    others = [poisoned] if machine() == "interpreter" else [poisoned, attention_results(function, call)]
    for other in others:
        assert [name for name in first if not same_bits(first[name], other[name])] == []


@pytest.mark.parametrize("kind", ["key_mask", "lengths", "query_mask"])
@pytest.mark.parametrize("case", REGIMES, ids=lambda case: case.name)
def test_what_hidden_tokens_hold_changes_no_bit(target: Target, case: AttentionCase, kind: str) -> None:
    """0 * NaN is NaN: a hidden value must be left out, not weighted with 0."""
    skip_if_atomic(target)
    call = attention_call(case, target, masks=masks_of(kind, case))
    skip_if_refused(target, call)
    masks = call.masks
    dirty = call
    if kind == "query_mask":
        hidden = ~masks.query_mask[:, None, :, None]  # type: ignore[index]
        dirty = replace(call, query=call.query.masked_fill(hidden, float("nan")))
    else:
        seen = masks.key_mask
        if seen is None:
            seen = torch.arange(case.Lk, device=call.key.device) < masks.lengths[:, None]  # type: ignore[index]
        hidden = ~seen[:, None, :, None]
        key, value = call.key.masked_fill(hidden, float("nan")), call.value.masked_fill(hidden, float("inf"))
        dirty = replace(call, key=key, value=value)
    found = [attention_results(function_of(target), each) for each in (call, dirty)]
    assert [name for name in found[0] if not same_bits(found[0][name], found[1][name])] == []


@pytest.mark.parametrize("case", REGIMES, ids=lambda case: case.name)
def test_dropout_is_the_specifications(target: Target, case: AttentionCase) -> None:
    """Backends that take a seed reproduce the specification's mask; sdpa draws from torch's generator."""
    call = attention_call(case, target, dropout_p=0.4, dropout_seed=torch.tensor([99]))
    if target.backend == "sdpa":
        results = [function_of(target)(call.query, (call.key,), (call.value,), dropout_p=0.4)[0] for _ in range(2)]
        assert results[0].isfinite().all() and not torch.equal(*results)
    else:
        check(target, call)


def test_rows_of_the_lowest_number(target: Target) -> None:
    """Masked with finfo.min, as transformers does, a row is the mean of the values, and its weights are 1/Lk in the backward.

    log Lk is lost beside such a maximum in any float: lse alone would make weights of 1 of them.
    """
    if target.backend == "sdpa":
        pytest.skip("torch's CPU attention keeps lse alone: its dvalue is Lk times too large in such rows")
    # The lowest float16 is not low enough to swallow a score.
    dtype = torch.float32 if target.dtype == torch.float16 else target.dtype
    masks = Masks(attn_mask=torch.full((SMALL.Lq, SMALL.Lk), torch.finfo(dtype).min, dtype=dtype))
    call = attention_call(SMALL, target, masks=masks)
    found = check(target, replace(call, dlse=torch.zeros_like(call.dlse)))
    mean = call.value.double().mean(2, keepdim=True)
    assert (found["out"].double() - mean).abs().max() <= 4 * torch.finfo(target.dtype).eps * call.value.abs().max()


def test_hidden_blocks_below_a_low_lse(target: Target) -> None:
    """cuDNN (torch 2.11) gives NaN in dquery with a mask, Lk % 128 == 64 and lse below -88.7: pytorch#196678."""
    case = AttentionCase("low lse", B=2, H=2, Lq=64, Lk=192, d_qk=64, d_v=64)
    call = attention_call(case, target, masks=masks_of("key_mask", case), scale=1.0)
    call = replace(call, query=call.query.abs() + 2, key=-call.key.abs() - 1)
    found = check(target, call)
    assert all(value.isfinite().all() for name, value in found.items() if name != "lse")
    if "lse" in found:
        assert found["lse"].max() < -88.7


DTYPES = (torch.float32, torch.float16, torch.float16 if machine() == "interpreter" else torch.bfloat16)


@pytest.mark.parametrize(
    "sample", generated(SAMPLES[0], DTYPES, SAMPLES[1], heads=SAMPLES[2], sizes_each=SAMPLES[3]), ids=str
)
def test_generated(sample: Sample) -> None:
    """Every regime, mask, width and dtype in combinations that nobody chose, on kernels where there are any."""
    found = [target for target in targets(OP) if target.dtype == sample.dtype]
    masks = masks_of(sample.mask, sample.case, seed=sample.case.Lq)
    options: dict[str, Any] = {}
    if sample.dropout_p:
        options = {"dropout_p": sample.dropout_p, "dropout_seed": torch.tensor([sample.case.Lk])}
    for target in [target for target in found if target.is_kernel] or found:
        if target.backend == "sdpa" and options:
            continue
        check(target, attention_call(sample.case, target, H_kv=sample.H_kv, masks=masks, segments=sample.segments, **options))


# What serves the rest of a layer where a backend has attention alone.
BESIDE = () if machine() == "cpu" else ("triton",)


class Copies(TorchDispatchMode):
    """Counts arrays that are laid side by side."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.cat.default, torch.ops.aten.stack.default)
        return func(*args, **(kwargs or {}))


@only(torch.float16, torch.bfloat16)
@pytest.mark.parametrize("joins", [True, False])
def test_a_layer_copies_no_gradient(target: Target, joins: bool, request: pytest.FixtureRequest) -> None:
    """On kernels: neither self-attention's projection of queries, keys and values nor cross-attention's of keys and values."""
    if joins:
        request.getfixturevalue("joined")
    torch.manual_seed(0)
    where: dict[str, Any] = {"device": target.device, "dtype": target.dtype}
    x = torch.randn(2, 128, 128, **where)
    attention = SelfAttention(128, 2, **where)
    reading = CrossAttention(128, 128, num_heads=2, method="projected", **where)
    with pk.use_backend(*target.passes, *BESIDE):
        for layer in (lambda: attention(x), lambda: reading(x[:, :64], x)):
            out = layer()
            with Copies() as counted:
                out.sum().backward()
            assert counted.count == (0 if joins and target.is_kernel else 1)
