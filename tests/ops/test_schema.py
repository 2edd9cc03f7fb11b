"""The operators torch sees: schema, aliasing, fakes and dispatch (torch.library.opcheck), in permuted dense layouts too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from perceiver_kernels.ops import attention as attention_op
from perceiver_kernels.ops import pack as pack_op
from perceiver_kernels.ops import rotary as rotary_op
from perceiver_kernels.ops import shared_kv as shared_op
from perceiver_kernels.positions import FourierPositions
from perceiver_kernels.testing import permuted, same_bits
from perceiver_kernels.testing.targets import Target

OP = "shared_kv_attention"
B, R, M, C = 2, 5, 21, 32
FOURIER = FourierPositions(3, (4.0, 5.0))


def wanted(target: Target) -> bool:
    """Backends that are called through operators; one dtype stands for all."""
    return (target.is_kernel or target.backend == "reference") and target.dtype == torch.float32


def randn(target: Target, *shape: int) -> Tensor:
    return torch.randn(shape).to(target.device, target.dtype)


def rows(target: Target, *shape: int) -> Tensor:
    return torch.randn(shape).to(target.device)


def shared_cases(target: Target) -> dict[str, tuple[Any, ...]]:
    """Arguments of shared_kv_attention_forward."""
    q, x = randn(target, B, R, C), randn(target, B, M, C)
    mask = torch.rand(B, M, device=target.device) < 0.5
    x_masked = x.masked_fill(~mask[..., None], 0)
    lengths = torch.tensor([3, M], dtype=torch.int32, device=target.device)
    seed = torch.tensor([1], device=target.device)
    state = randn(target, B, R, C).float(), rows(target, B, R), rows(target, B, R).abs()
    plain = (None, None, None, 0.2, 0.0, 0)
    nothing = (None, None, None, None, target.backend)
    return {
        "plain": (q, x, *plain, *nothing),
        "permuted": (permuted(q), permuted(x), *plain, *nothing),
        "mask": (q, x_masked, mask, None, None, 0.2, 0.0, 0, *nothing),
        "lengths": (q, x, None, lengths, None, 0.2, 0.0, 0, *nothing),
        "dropout": (q, x, None, None, seed, 0.2, 0.5, 3, *nothing),
        "state": (q, x, *plain, *state, torch.float32, target.backend),
        "no rows": (q[:, :0], x, *plain, *nothing),
        "no keys": (q, x[:, :0], *plain, *nothing),
        "no keys, state": (q, x[:, :0], *plain, *state, torch.float32, target.backend),
    }


def backward_cases(target: Target) -> dict[str, tuple[Any, ...]]:
    """Arguments of shared_kv_attention_backward."""
    q, x, dz = randn(target, B, R, C), randn(target, B, M, C), randn(target, B, R, C)
    _, lse, _ = shared_op.FORWARD(q, x, None, None, None, 0.2, 0.0, 0, None, None, None, None, target.backend)
    delta, drho = rows(target, B, R), rows(target, B, R)
    rest = (None, None, None, 0.2, 0.0, 0)
    swapped = [t.mT.contiguous().mT for t in (delta, lse)]
    return {
        "both": (dz, delta, None, q, x, lse, *rest, True, True, target.backend),
        "dq": (dz, delta, drho, q, x, lse, *rest, True, False, target.backend),
        "dx": (dz, delta, None, q, x, lse, *rest, False, True, target.backend),
        "permuted": (
            permuted(dz), swapped[0], None, permuted(q), permuted(x), swapped[1], *rest, True, True, target.backend,
        ),
    }  # fmt: skip


def backward_add_cases(target: Target) -> dict[str, tuple[Any, ...]]:
    (dz, delta, _, q, x, lse, *_), dq_sum = backward_cases(target)["both"], rows(target, B, R, C)
    drho, end = rows(target, B, R), (None, None, 0.2, 0.0, 7)
    return {
        "both": (dq_sum, dz, delta, None, q, x, lse, *end, True, target.backend),
        "dq": (dq_sum, dz, delta, drho, q, x, lse, *end, False, target.backend),
        "dx": (None, dz, delta, None, q, x, lse, *end, True, target.backend),
    }


def delta_cases(target: Target) -> dict[str, tuple[Any, ...]]:
    dz, z = randn(target, B, R, C), rows(target, B, R, C)
    dlse, drho, rho = (rows(target, B, R) for _ in range(3))
    swapped = [t.mT.contiguous().mT for t in (dlse, drho, rho)]
    return {
        "all": (dz, z, dlse, drho, rho, target.backend),
        "alone": (dz, z, None, None, rho, target.backend),
        "permuted": (permuted(dz), permuted(z), *swapped, target.backend),
        "no rows": (dz[:, :0], z[:, :0], None, None, rho[:, :0], target.backend),
    }


def pack_cases(target: Target) -> dict[str, tuple[Any, ...]]:
    content, table = randn(target, B, M, 3), FOURIER.table(target.device)
    mask = torch.rand(B, M, device=target.device) < 0.5
    end = (1e-5, target.dtype, target.backend)
    return {
        "plain": (content, None, None, None, True, *end),
        "permuted": (permuted(content), None, None, None, True, *end),
        "positions": (content, randn(target, M, 2), None, mask, True, *end),
        "fourier": (content, rows(target, B, M, 2), table, None, True, *end),
        "raw": (content, None, None, None, False, *end),
        "raw, no padding": (randn(target, B, M, 16), None, None, None, False, *end),
        "cast": (content, None, None, None, True, 1e-5, torch.float16, target.backend),
        "empty": (content[:, :0], None, None, None, True, *end),
        "ones": (randn(target, B, M, 15), None, None, mask, True, *end, 2),
    }


def pack_backward_cases(target: Target) -> dict[str, tuple[Any, ...]]:
    packed, dpacked, rstd = randn(target, B, M, 16), randn(target, B, M, 16), rows(target, B, M).abs()
    none = rows(target, 0)
    return {
        "normalized": (dpacked, packed, rstd, 3, 9, True, target.dtype, target.backend),
        "all channels": (dpacked, packed, rstd, 16, 16, True, target.dtype, target.backend),
        "raw": (dpacked, packed, none, 3, 9, False, target.dtype, target.backend),
        "raw, all channels": (dpacked, packed, none, 16, 16, False, target.dtype, target.backend),
        "cast": (dpacked, packed, rstd, 3, 9, True, torch.float32, target.backend),
        "permuted": (permuted(dpacked), packed, rstd, 3, 9, True, target.dtype, target.backend),
    }


H, LQ, LK = 4, 9, 21
NO_OPTIONS = (None, None, None, None, None, None, "none", None, 0.3, 0.0)


def attention_tensors(target: Target) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return randn(target, B, H, LQ, 8), [randn(target, B, 2, LK, 8)], [randn(target, B, 2, LK, 12)]


def attention_cases(target: Target) -> dict[str, tuple[Any, ...]]:
    """Arguments of attention_forward."""
    q, k, v = attention_tensors(target)
    mask = torch.rand(B, LK, device=target.device) < 0.5
    seen = torch.rand(B, LQ, device=target.device) < 0.5
    lengths = torch.tensor([3, LK], dtype=torch.int32, device=target.device)
    starts = [torch.tensor([0, 4, size], dtype=torch.int32, device=target.device) for size in (LQ, LK)]
    seed, end = torch.tensor([1], device=target.device), ("none", None, 0.3, 0.0, target.backend)
    single = [tensors[0][:1] for tensors in ([q], k, v)]
    return {
        "plain": (q, k, v, *NO_OPTIONS, target.backend),
        "permuted": (permuted(q), [permuted(k[0])], [permuted(v[0])], *NO_OPTIONS, target.backend),
        "two segments": (q, [k[0], k[0][:, :, :5]], [v[0], v[0][:, :, :5]], *NO_OPTIONS, target.backend),
        "masks": (q, k, v, mask, None, seen, None, None, None, *end),
        "additive": (q, k, v, None, lengths, None, rows(target, LQ, LK), None, None, *end),
        "packed": (single[0], [single[1]], [single[2]], None, None, None, None, *starts, *end),
        "dropout": (q, k, v, *(None,) * 6, "upper_left", seed, 0.3, 0.5, target.backend),
        "no queries": (q[:, :, :0], k, v, *NO_OPTIONS, target.backend),
        "no keys": (q, [k[0][:, :, :0]], [v[0][:, :, :0]], *NO_OPTIONS, target.backend),
    }


def attention_backward_cases(target: Target) -> dict[str, tuple[Any, ...]]:
    q, k, v = attention_tensors(target)
    results = attention_op.FORWARD(q, k, v, *NO_OPTIONS, target.backend)
    dout, dlse = torch.randn_like(results[0]), torch.randn_like(results[1])
    swapped = attention_op.FORWARD(permuted(q), [permuted(k[0])], [permuted(v[0])], *NO_OPTIONS, target.backend)
    return {
        "all": (dout, dlse, *results, q, k, v, *NO_OPTIONS, target.backend, True, True),
        "dquery": (dout, None, *results, q, k, v, *NO_OPTIONS, target.backend, True, False),
        "dkey, dvalue": (dout, None, *results, q, k, v, *NO_OPTIONS, target.backend, False, True),
        "permuted": (
            permuted(dout), None, *swapped, permuted(q), [permuted(k[0])], [permuted(v[0])], *NO_OPTIONS, target.backend, True,
            True,
        ),
    }  # fmt: skip


def attention_backward_into_cases(target: Target) -> dict[str, tuple[Any, ...]]:
    every = attention_backward_cases(target)

    def into(case: str) -> tuple[Any, ...]:
        *operands, _, _ = every[case]
        return (*map(torch.empty_like, (operands[5], operands[6][0], operands[7][0])), *operands)

    return {"plain": into("all"), "permuted": into("permuted")}


def rotary_cases(target: Target) -> dict[str, tuple[Any, ...]]:
    x, shared, batched = randn(target, B, H, LQ, 10), (LQ, 3), (B, LQ, 5)
    tables = {shape: (randn(target, *shape), randn(target, *shape)) for shape in (shared, batched)}
    return {
        "plain": (x, *tables[shared], False, False, target.backend),
        "permuted": (permuted(x), *tables[batched], True, True, target.backend),
        "cast": (x, *(table.half() for table in tables[shared]), False, True, target.backend),
        "no tokens": (x[:, :, :0], *(table[:0] for table in tables[shared]), False, False, target.backend),
    }


OPERATORS = {
    "attention_forward": (attention_op.FORWARD, attention_cases, (
        "plain", "permuted", "two segments", "masks", "additive", "packed", "dropout", "no queries", "no keys",
    )),
    "attention_backward": (attention_op.BACKWARD, attention_backward_cases, ("all", "dquery", "dkey, dvalue", "permuted")),
    "attention_backward_into": (attention_op.BACKWARD_INTO, attention_backward_into_cases, ("plain", "permuted")),
    "shared_kv_attention_forward": (shared_op.FORWARD, shared_cases, (
        "plain", "permuted", "mask", "lengths", "dropout", "state", "no rows", "no keys", "no keys, state",
    )),
    "shared_kv_attention_backward": (shared_op.BACKWARD, backward_cases, ("both", "dq", "dx", "permuted")),
    "shared_kv_attention_backward_add": (shared_op.BACKWARD_ADD, backward_add_cases, ("both", "dq", "dx")),
    "shared_kv_attention_delta": (shared_op.DELTA, delta_cases, ("all", "alone", "permuted", "no rows")),
    "pack_inputs_forward": (pack_op.PACK_FORWARD, pack_cases, (
        "plain", "permuted", "positions", "fourier", "raw", "raw, no padding", "cast", "empty", "ones",
    )),
    "pack_inputs_backward": (pack_op.PACK_BACKWARD, pack_backward_cases, (
        "normalized", "all channels", "raw", "raw, all channels", "cast", "permuted",
    )),
    "rotary_embedding": (rotary_op.ROTARY, rotary_cases, ("plain", "permuted", "cast", "no tokens")),
}  # fmt: skip
CASES = [(name, case) for name, (_, _, cases) in OPERATORS.items() for case in cases]


def skip_composites(target: Target, name: str) -> None:
    if name.startswith("attention_") and not target.is_kernel:
        pytest.skip("the specification of attention is differentiated by torch: it is no pair of operators")


@pytest.mark.parametrize(("name", "case"), CASES)
def test_opcheck(target: Target, name: str, case: str) -> None:
    skip_composites(target, name)
    operator, cases, _ = OPERATORS[name]
    opcheck(operator.overload, cases(target)[case])


@pytest.mark.parametrize(("name", "case"), CASES)
def test_fake_results_are_laid_out_as_real_ones(target: Target, name: str, case: str) -> None:
    skip_composites(target, name)
    operator, cases, _ = OPERATORS[name]
    arguments = cases(target)[case]
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
    for a, b in zip(*((each,) if isinstance(each, Tensor) else each or () for each in (real, fake)), strict=True):
        described = [(t.shape, t.dtype, t.stride() if t.numel() else None, t.device) for t in (a, b)]
        assert described[0] == described[1]


@pytest.mark.parametrize("name", ["shared_kv_attention_forward", "pack_inputs_forward", "rotary_embedding"])
def test_fakes_of_fp64_are_fp64_too(name: str) -> None:
    """Statistics are as wide as what they are of; only the specification takes fp64."""
    target = Target(OP, "reference", "cpu", torch.float64)
    operator, cases, _ = OPERATORS[name]
    opcheck(operator.overload, cases(target)["plain"])


def test_every_operator_is_covered() -> None:
    names = {
        str(name).split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if str(name).startswith("perceiver_kernels::")
    }
    assert {name.split(".")[0] for name in names} == OPERATORS.keys()


def test_tensors_that_are_negated_lazily(target: Target) -> None:
    """The memory of a conjugate's imaginary part holds the number's own: plain calls, which nobody dispatches, read it."""
    spectrum = torch.complex(rows(target, B, M, 7), rows(target, B, M, 7))
    q, x, dz = (torch._neg_view(randn(target, B, length, C)) for length in (R, M, R))

    def results(content: Tensor, q: Tensor, x: Tensor, dz: Tensor) -> list[Tensor]:
        packed, _ = pack_op.PACK_FORWARD(content, None, None, None, True, 1e-5, target.dtype, target.backend)
        leaves = [tensor.detach().requires_grad_() for tensor in (q, x)]
        out, *_ = shared_op.shared_kv_attention(*leaves, None, None, None, 0.2, 0.0, target.passes)
        with torch.no_grad():
            plain, *_ = shared_op.shared_kv_attention(q, x, None, None, None, 0.2, 0.0, target.passes)
        return [packed, plain, out, *torch.autograd.grad(out, leaves, dz)]

    lazy = spectrum.conj().imag, q, x, dz
    assert all(tensor.is_neg() for tensor in lazy)
    for found, expected in zip(results(*lazy), results(*(tensor.resolve_neg() for tensor in lazy)), strict=True):
        assert same_bits(found, expected)
