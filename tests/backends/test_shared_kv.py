"""shared_kv_attention on every backend: one body, whose sizes and backends the machine decides.

Errors are judged against fp64 by testing.accuracy's rule, forward and every gradient. What a backend does not serve it says
itself (reasons_against); such a combination is skipped with its sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.dispatch import load
from perceiver_kernels.ops import shared_kv as op
from perceiver_kernels.problem import SharedKVProblem
from perceiver_kernels.testing import (
    EDGE,
    ENCODE,
    LAYOUTS,
    EncodeCase,
    assert_as_accurate,
    broadcast,
    column_major,
    poisoned_memory,
    same_bits,
    shared_kv_gradient_terms,
)
from perceiver_kernels.testing.targets import Target, machine, one_for_each_width, sized

OP = "shared_kv_attention"
PARTIAL = True
FAMILIES = list(ENCODE.values())
EDGES = [case for name, case in EDGE.items() if name[0] in "BMCNH"]
if machine() != "cpu":
    # A GPU compiles three kernels for each width, the interpreter takes seconds for the widest.
    EDGES = [case for case in EDGES if case.name[0] != "C" or case.C in (1, 16, 129, 257, 337, 513)]
if machine() == "interpreter":
    FAMILIES = one_for_each_width(FAMILIES)
    EDGES = [
        case for case in EDGES if case.name not in ("N=15", "N=16", "N=31", "N=32", "N=63", "N=64", "M=61", "M=127", "M=128")
    ]
MASKED = EncodeCase("masked", B=4, M=150, C=21, N=9, D=8, H=2, d_qk=8, d_v=8)
WIDE = replace(MASKED, name="wide", B=3, M=130, C=340, N=2)
if machine() == "interpreter":
    MASKED, WIDE = replace(MASKED, B=3, M=130), replace(WIDE, M=70)
BOTH = tuple(replace(case, B=2, M=70) for case in (MASKED, WIDE))


@dataclass
class Call:
    """One call: its tensors, gradients of its results, options."""

    q: Tensor
    x: Tensor
    dz: Tensor
    dlse: Tensor
    drho: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return self.options.get("scale", 1.0)

    def cast(self, dtype: torch.dtype) -> Call:
        wide = torch.promote_types(dtype, torch.float32)
        tensors = (self.q.to(dtype), self.x.to(dtype), self.dz.to(dtype), self.dlse.to(wide), self.drho.to(wide))
        return Call(*tensors, options=self.options)


def call_of(case: EncodeCase, target: Target, **options: Any) -> Call:
    """Random packed inputs of a case: channels past C and tokens that are not visible are zero, as pack_inputs leaves them."""
    generator = torch.Generator().manual_seed(case.M + 7 * case.R)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    padding = (0, case.C_padded - case.C)
    q, x, dz = (torch.nn.functional.pad(randn(case.B, rows, case.C), padding) for rows in (case.R, case.M, case.R))
    visible = reference.visible_keys(case.M, options.get("key_mask"), options.get("lengths"))
    x = x if visible is None else x.masked_fill(~visible[..., None], 0)
    options = {"scale": case.C**-0.5} | options
    call = Call(q.to(target.dtype), x.to(target.dtype), dz.to(target.dtype), randn(case.B, case.R), randn(case.B, case.R))
    for name in ("q", "x", "dz", "dlse", "drho"):
        setattr(call, name, getattr(call, name).to(target.device))
    call.options = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return call


def skip_if_refused(target: Target, call: Call, *, needs_lse: bool) -> None:
    options = call.options
    problem = SharedKVProblem.of(
        call.q, call.x, options.get("key_mask"), options.get("lengths"), call.scale, options.get("dropout_p", 0.0), needs_lse
    )
    if reasons := target.refusals(problem):
        pytest.skip(f"{target.backend}: {'; '.join(reasons)}")


Function = Callable[..., tuple[Tensor, Tensor | None, Tensor]]


def function_of(target: Target) -> Function:
    """The backend's differentiable function of (q, x, **options) to (z, lse or None, rho)."""
    module = load(OP, target.backend)
    if module.COMPOSITE:
        return module.shared_kv_attention

    def run(q: Tensor, x: Tensor, *, key_mask: Any = None, lengths: Any = None, scale: float = 1.0, dropout_p: float = 0.0,
            dropout_seed: Any = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        passes = target.passes_of(SharedKVProblem.of(q, x, key_mask, lengths, scale, dropout_p, True))
        return op.shared_kv_attention(q, x, key_mask, lengths, dropout_seed, scale, dropout_p, passes)

    return run


def results(function: Function, call: Call) -> dict[str, Tensor]:
    """z, lse, rho and the gradients of q and x, from the gradients of all results that the backend returns."""
    q, x = call.q.detach().requires_grad_(), call.x.detach().requires_grad_()
    z, lse, rho = function(q, x, **call.options)
    outputs, gradients = [z], [call.dz]
    if lse is not None:
        # The lse of an empty row is a constant -inf, whose gradient is not defined: 0 here.
        outputs, gradients = [*outputs, lse], [*gradients, call.dlse.masked_fill(lse == -torch.inf, 0)]
    if rho.requires_grad and call.options.get("dropout_p"):
        outputs, gradients = [*outputs, rho], [*gradients, call.drho]
    dq, dx = torch.autograd.grad(outputs, (q, x), gradients)
    found = {"z": z, "lse": lse, "rho": rho, "dq": dq, "dx": dx}
    return {name: value.detach() for name, value in found.items() if value is not None}


def check(target: Target, call: Call) -> dict[str, Tensor]:
    """Compare everything the backend returns with the specification; the results, for further questions."""
    skip_if_refused(target, call, needs_lse=False)
    actual = results(function_of(target), call)
    without_lse = replace(call, dlse=torch.zeros_like(call.dlse)) if "lse" not in actual else call
    eager = results(reference.shared_kv_attention, without_lse)
    oracle = results(reference.shared_kv_attention, without_lse.cast(torch.float64))
    visible = reference.visible_keys(call.x.shape[1], call.options.get("key_mask"), call.options.get("lengths"))
    terms = dict(
        zip(("dq", "dx"), shared_kv_gradient_terms(call.q, call.x, call.dz, key_mask=visible, scale=call.scale), strict=True)
    )
    # rho adds up exp(lse of a split - lse): differences of numbers as large as lse.
    terms["rho"] = 1 + oracle["lse"].abs().nan_to_num(posinf=0.0)
    for name, value in actual.items():
        assert_as_accurate(value, eager[name], oracle[name], f"{target} {name}", terms=terms.get(name))
    return actual


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_published_families(target: Target, case: EncodeCase) -> None:
    check(target, call_of(sized(case), target))


@pytest.mark.parametrize("case", EDGES, ids=lambda case: case.name)
def test_edges(target: Target, case: EncodeCase) -> None:
    check(target, call_of(case, target, scale=0.25))


@pytest.mark.parametrize("channels", [64, 128, 261, 322, 500])
def test_programs_walk(target: Target, channels: int) -> None:
    """One to many tiles of tokens an item, one to several of rows; on a GPU a head a program, whose items follow each other."""
    entries = {"gpu": 150, "interpreter": 1, "cpu": 2}[machine()]
    for rows, tokens in ((60, 64), (60, 640), (130, 300)) if machine() == "gpu" else ((20, 70),):
        case = EncodeCase("walk", B=entries, M=tokens, C=channels, N=rows, D=8, H=1, d_qk=8, d_v=8)
        check(target, call_of(case, target))


def visibility(kind: str, case: EncodeCase) -> dict[str, Tensor]:
    """The first entry sees a part, the second nothing, the last everything."""
    mask = torch.rand(case.B, case.M, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[0, :70], mask[1], mask[-1] = False, False, True
    # Past the ends they mean all and nothing.
    lengths = torch.tensor([case.M // 2 + 3, 0, case.M + 9, -5, case.M, 1], dtype=torch.int32)[: case.B]
    return {"all": {}, "key_mask": {"key_mask": mask}, "lengths": {"lengths": lengths}}[kind]


def dropout(p: float, seed: int = -(2**62) + 12345) -> dict[str, Any]:
    return {"dropout_p": p, "dropout_seed": torch.tensor([seed], dtype=torch.int64)} if p else {}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["all", "key_mask", "lengths"])
@pytest.mark.parametrize("case", [MASKED, WIDE], ids=lambda case: case.name)
def test_masks_and_dropout(target: Target, case: EncodeCase, kind: str, p: float) -> None:
    """A row without a visible token gives 0, lse -inf, rho 0 and zero gradients; dropout is the specification's Philox mask."""
    found = check(target, call_of(case, target, **visibility(kind, case), **dropout(p)))
    if kind != "all":
        assert not any(found[name][1].any() for name in ("z", "rho", "dq", "dx"))
        assert "lse" not in found or (found["lse"][1] == -torch.inf).all()


@pytest.mark.parametrize("p", [0.0, 2**-33, 0.9, 1 - 2**-31, 1 - 2**-34])
def test_dropout_probabilities(target: Target, p: float) -> None:
    """From almost nothing to everything dropped: at 1 - 2^-34 the threshold is one more than the largest 32-bit word."""
    check(target, call_of(replace(MASKED, B=1, M=70), target, **dropout(p)))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_a_row_that_sees_one_token_is_that_token(target: Target, case: EncodeCase, p: float) -> None:
    """z = x / (1 - p) or 0, rounded once at the end, and no gradient reaches q: the weight itself is never rounded."""
    call = call_of(case, target, lengths=torch.ones(case.B, dtype=torch.int32), **dropout(p))
    call = replace(call, dlse=torch.zeros_like(call.dlse), drho=torch.zeros_like(call.drho))
    skip_if_refused(target, call, needs_lse=False)
    found = results(function_of(target), call)
    token = (call.x[:, :1].double() / (1 - p)).expand(found["z"].shape)
    kept = found["z"].any(-1, keepdim=True)
    assert kept.any() and (p > 0 or kept.all())
    close = partial(torch.testing.assert_close, rtol=2 * torch.finfo(target.dtype).eps, atol=0)
    close(found["z"].double(), token.where(kept, 0))
    terms = call.scale * call.x[:, 0].double().square().amax() * call.dz.double().abs().sum(-1).amax() / (1 - p)
    assert found["dq"].abs().max() <= 8 * torch.finfo(torch.float32).eps * terms


def test_dropout_depends_on_the_seed_alone(target: Target) -> None:
    call = call_of(replace(MASKED, B=1), target, **dropout(0.5, 1))
    skip_if_refused(target, call, needs_lse=False)
    first, again = (results(function_of(target), call) for _ in range(2))
    call.options["dropout_seed"] = call.options["dropout_seed"] + 2**40
    other = results(function_of(target), call)
    assert all(same_bits(first[name], again[name]) for name in first)
    assert not torch.equal(first["z"], other["z"]) and torch.equal(first["lse"], other["lse"])


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-8, 3.0])
def test_scales(target: Target, scale: float) -> None:
    check(target, call_of(replace(MASKED, M=61), target, scale=scale))


@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target: Target, case: EncodeCase, layout: str) -> None:
    """Strides, and poison beside the values, change no bit (another base address may choose other instructions)."""
    call = call_of(case, target)
    skip_if_refused(target, call, needs_lse=False)
    plain = results(function_of(target), call)
    laid_out = replace(call, **{name: LAYOUTS[layout](getattr(call, name)) for name in ("q", "x", "dz")})
    if layout == "misaligned" or not target.is_kernel:
        check(target, laid_out)
    else:
        found = results(function_of(target), laid_out)
        assert [name for name in plain if not same_bits(plain[name], found[name])] == []


@pytest.mark.parametrize("layout", [column_major, broadcast], ids=lambda layout: layout.__name__)
def test_strides_that_kernels_cannot_read(target: Target, layout: Callable[[Tensor], Tensor]) -> None:
    """A last stride that is not 1, a batch stride of 0, and the expanded gradient that sum() sends back."""
    call = call_of(MASKED, target)
    check(target, replace(call, q=layout(call.q), x=layout(call.x), dz=layout(call.dz)))
    ones = torch.ones((), dtype=call.dz.dtype, device=call.dz.device).expand(call.dz.shape)
    check(target, replace(call, dz=ones))


@pytest.mark.parametrize("kind", ["all", "key_mask", "lengths"])
@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_fresh_memory_and_repetition_change_no_bit(target: Target, case: EncodeCase, kind: str) -> None:
    call = call_of(case, target, **visibility(kind, case))
    skip_if_refused(target, call, needs_lse=False)
    first = results(function_of(target), call)
    with poisoned_memory():
        poisoned = results(function_of(target), call)
    # Programs run one after the other in the interpreter: nothing there could be different the second time.
    others = [poisoned] if machine() == "interpreter" else [poisoned, results(function_of(target), call)]
    for other in others:
        assert [name for name in first if not same_bits(first[name], other[name])] == []


@pytest.mark.parametrize("kind", ["key_mask", "lengths"])
def test_what_hidden_tokens_hold_changes_no_bit(target: Target, kind: str) -> None:
    """The public function: NaN and inf where a token is not visible."""
    call = call_of(MASKED, target, **visibility(kind, MASKED))
    skip_if_refused(target, call, needs_lse=False)
    visible = reference.visible_keys(MASKED.M, call.options.get("key_mask"), call.options.get("lengths"))
    dirty = call.x.masked_fill(~visible[..., None], float("nan"))
    dirty[..., 1::2].masked_fill_(~visible[..., None], float("inf"))
    found = []
    for x in (call.x, dirty):
        q, x = call.q.detach().requires_grad_(), x.detach().requires_grad_()
        with pk.use_backend(*target.passes):
            z = pk.shared_kv_attention(q, x, **call.options)
        found.append((z.detach(), *torch.autograd.grad(z, (q, x), call.dz)))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
    assert not found[1][2].masked_fill(visible[..., None], 0).any()


def test_channels_are_padded_by_the_public_function(target: Target) -> None:
    call = call_of(replace(MASKED, B=1), target)
    skip_if_refused(target, call, needs_lse=False)
    narrow = pk.shared_kv_attention(call.q[..., :21], call.x[..., :21], scale=call.scale, backend=target.backend)
    padded = pk.shared_kv_attention(call.q, call.x, scale=call.scale, backend=target.backend)
    assert narrow.shape[-1] == 21 and torch.equal(narrow, padded[..., :21])


def test_bad_values_stay_in_their_row(target: Target) -> None:
    call = call_of(MASKED, target)
    skip_if_refused(target, call, needs_lse=False)
    if not target.is_kernel and target.device == "cpu" and target.dtype == torch.bfloat16:
        pytest.skip("torch 2.11's bf16 products on a CPU let NaN into rows beside it")
    clean = results(function_of(target), call)
    call.q = call.q.clone()
    call.q[0, 3], call.q[2, 5, 1] = float("nan"), float("inf")
    found = results(function_of(target), call)
    bad = torch.zeros(call.q.shape[:2], dtype=torch.bool, device=call.q.device)
    bad[0, 3] = bad[2, 5] = True
    for name in ("z", "lse", "dq"):
        if name in found:
            assert torch.equal(found[name][~bad], clean[name][~bad]), name
    assert found["z"][0, 3].isnan().all()
    assert torch.equal(found["dx"][1], clean["dx"][1])


def test_very_negative_lse_with_a_ragged_masked_tail(target: Target) -> None:
    """cuDNN of torch 2.11 returned NaN for dq with a mask, a key count of 64 modulo 128, and lse below -88.7."""
    case = replace(MASKED, M=192)
    call = call_of(case, target, **visibility("key_mask", case), scale=1.0)
    call.q, call.x = call.q * 0.1, call.x.clone()
    call.q[..., 0], call.x[..., 0] = -128.0, 1.0
    call.x.masked_fill_(~call.options["key_mask"][..., None], 0)
    found = check(target, call)
    assert "lse" not in found or float(found["lse"][0].max()) < -88.7


def test_huge_scores_choose_one_token(target: Target) -> None:
    """Scores near 1000, hundreds above the next: the other weights are exactly 0, whatever the scores' last bits."""
    call = call_of(replace(MASKED, M=70), target, scale=1.0)
    chosen = torch.arange(call.q.shape[1], device=target.device) * 7 % 70
    call.x = torch.nn.functional.normalize(call.x.float(), dim=-1).to(target.dtype)
    call.q = 1000 * call.x[:, chosen]
    found = check(target, call)
    expected = call.x[:, chosen]
    assert (found["z"] - expected).abs().max() <= torch.finfo(target.dtype).eps * expected.abs().max()


def test_weights_sum_to_one_and_constants_in_the_scores_cancel(target: Target) -> None:
    """A channel of ones in x comes out as 1; a constant that it adds to every score moves lse by that constant alone."""
    call = call_of(replace(MASKED, C=20), target)
    call.x = call.x.clone()
    call.x[..., 20] = 1.0
    plain = check(target, call)
    call.q = call.q.clone()
    call.q[..., 20] = 4.0
    shifted = check(target, call)
    # A sum of M weights in order carries up to M / 2 roundings of half an eps of 1, its square root where they are random.
    roundings = 4 + call.x.shape[1] ** 0.5 / 2
    for found in (plain, shifted):
        assert (found["z"][..., 20].float() - 1).abs().max() <= roundings * torch.finfo(target.dtype).eps
