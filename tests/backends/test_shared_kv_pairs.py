"""The forward and backward pairs under shared_kv_attention: splits, chunks, continued states, what is returned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from perceiver_kernels import reference
from perceiver_kernels.backends import composite
from perceiver_kernels.dispatch import load, refusals
from perceiver_kernels.problem import SharedKVProblem
from perceiver_kernels.testing import assert_as_accurate, same_bits, shared_kv_gradient_terms
from perceiver_kernels.testing.targets import Target

OP = "shared_kv_attention"
PARTIAL = True
B, R, M = 2, 9, 200
WIDTHS = (32, 352)
"""One that is served by the fused kernels in 16 bits, one that is too wide for a full-width accumulator."""


def wanted(target: Target) -> bool:
    """sdpa has no pair: torch differentiates it."""
    return hasattr(load(OP, target.backend), "shared_kv_attention_forward")


def module_of(target: Target) -> ModuleType:
    return load(OP, target.backend)


def tensors(target: Target, C: int, p: float = 0.0, *, M: int = M) -> tuple[Tensor, Tensor, Tensor]:
    """q, x and dz of a call with dropout ``p``, where the backend serves it and its gradients."""
    generator = torch.Generator().manual_seed(C)
    shapes = (B, R, C), (B, M, C), (B, R, C)
    q, x, dz = (torch.randn(shape, generator=generator).to(target.device, target.dtype) for shape in shapes)
    problem = SharedKVProblem.of(q.clone().requires_grad_(), x, None, None, 1.0, p, True)
    if reasons := refusals(problem, target.backend):
        pytest.skip(f"{target.backend}: {'; '.join(reasons)}")
    return q, x, dz


def options(C: int, p: float = 0.0, **more: Any) -> dict[str, Any]:
    seed = torch.tensor([7], dtype=torch.int64) if p else None
    return {"scale": C**-0.5, "dropout_p": p, "dropout_seed": seed, "key_offset": 0} | more


def forward(
    module: ModuleType, q: Tensor, x: Tensor, key_mask: Tensor | None = None, lengths: Any = None, **kwargs: Any
) -> Any:
    if kwargs["dropout_seed"] is not None:
        kwargs["dropout_seed"] = kwargs["dropout_seed"].to(q.device)
    return module.shared_kv_attention_forward(q, x, key_mask, lengths, **kwargs)


def backward(
    module: ModuleType, dz: Tensor, dlse: Any, drho: Any, q: Tensor, x: Tensor, z: Tensor, lse: Tensor, rho: Tensor, *,
    key_mask: Any = None, needs_dq: bool = True, needs_dx: bool = True, **kwargs: Any,
) -> Any:  # fmt: skip
    if kwargs["dropout_seed"] is not None:
        kwargs["dropout_seed"] = kwargs["dropout_seed"].to(q.device)
    delta = module.shared_kv_attention_delta(dz, z, dlse, drho, rho)
    return module.shared_kv_attention_backward(
        dz, delta, drho, q, x, lse, key_mask, None, needs_dq=needs_dq, needs_dx=needs_dx, **kwargs
    )


def judge(target: Target, actual: dict[str, Tensor], q: Tensor, x: Tensor, dz: Tensor, kwargs: dict[str, Any]) -> None:
    """z, lse, rho, dq and dx (those that are given) against fp64."""
    names = ("scale", "dropout_p", "dropout_seed", "key_mask")
    known = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    judged: dict[str, dict[str, Tensor]] = {}
    for dtype in (target.dtype, torch.float64):
        leaves = q.detach().to(dtype).requires_grad_(), x.detach().to(dtype).requires_grad_()
        z, lse, rho = reference.shared_kv_attention(*leaves, **known)
        dq, dx = torch.autograd.grad(z, leaves, dz.to(dtype))
        judged[str(dtype)] = {"z": z, "lse": lse, "rho": rho, "dq": dq, "dx": dx}
    mask = known.get("key_mask")
    terms = dict(zip(("dq", "dx"), shared_kv_gradient_terms(q, x, dz, key_mask=mask, scale=kwargs["scale"]), strict=True))
    # rho adds up exp(lse of a part - lse): differences of numbers as large as lse.
    terms["rho"] = 1 + judged[str(torch.float64)]["lse"].abs().nan_to_num(posinf=0.0)
    for name, value in actual.items():
        eager, oracle = judged[str(target.dtype)][name], judged[str(torch.float64)][name]
        assert_as_accurate(value, eager, oracle, f"{target} {name}", terms=terms.get(name))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("cuts", [(140,), (64, 65, 199)], ids=str)
def test_chunks_of_keys_merge_to_the_whole(target: Target, C: int, p: float, cuts: tuple[int, ...]) -> None:
    """Each chunk continues the softmax state of those before it; its gradients need only the merged (z, lse, rho)."""
    module, (q, x, dz), kwargs = module_of(target), tensors(target, C, p), options(C, p)
    bounds = list(zip((0, *cuts), (*cuts, M), strict=True))
    state: Any = None
    for start, stop in bounds:
        here = kwargs | {"key_offset": start}
        state = forward(module, q, x[:, start:stop], state=state, out_dtype=torch.float32, **here)
        assert all(part.dtype == torch.float32 for part in state)
    dq, dx = torch.zeros(q.shape, device=q.device), []
    for start, stop in bounds:
        here = kwargs | {"key_offset": start}
        added, part = backward(module, dz, None, None, q, x[:, start:stop], *state, dq_sum=dq, **here)
        assert added is dq and part.dtype == target.dtype
        dx.append(part)
    z, lse, rho = state
    actual = {"z": z.to(target.dtype), "lse": lse, "rho": rho, "dq": dq.to(target.dtype), "dx": torch.cat(dx, 1)}
    judge(target, actual, q, x, dz, kwargs)


@pytest.mark.parametrize("empty", ["first", "last", "only"])
def test_chunks_without_a_visible_key_change_nothing(target: Target, empty: str) -> None:
    module, (q, x, _), kwargs = module_of(target), tensors(target, 32, M=40), options(32)
    hidden = torch.zeros(B, 40, dtype=torch.bool, device=q.device)
    whole = forward(module, q, x, out_dtype=torch.float32, **kwargs)
    nothing = {"out_dtype": torch.float32, "key_mask": hidden, **kwargs}
    none = torch.zeros_like(x)
    if empty == "first":
        found = forward(module, q, x, state=forward(module, q, none, **nothing), out_dtype=torch.float32, **kwargs)
    elif empty == "last":
        found = forward(module, q, none, state=whole, **nothing)
    else:
        found = forward(module, q, none, state=forward(module, q, none, **nothing), **nothing)
        assert not found[0].any() and (found[1] == -torch.inf).all() and not found[2].any()
        return
    for name, value, expected in zip(("z", "lse", "rho"), found, whole, strict=True):
        assert_as_accurate(value, expected, expected.double(), f"{target} {name}")


def test_outputs_share_no_memory_with_inputs(target: Target) -> None:
    """Also where nothing is computed: an op that returns its input breaks functionalization."""
    module, kwargs = module_of(target), options(32)
    for tokens in (0, 40):
        q, x, dz = tensors(target, 32, M=tokens)
        state = forward(module, q, x, out_dtype=torch.float32, **kwargs)
        again = forward(module, q, x, state=state, out_dtype=torch.float32, **kwargs)
        gradients = backward(module, dz, None, None, q, x, state[0].to(q.dtype), *state[1:], **kwargs)
        inputs = {t.untyped_storage().data_ptr() for t in (q, x, dz, *state) if t.numel()}
        assert not any(t.untyped_storage().data_ptr() in inputs for t in (*again, *gradients) if t.numel())


@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize(("needs_dq", "needs_dx"), [(True, False), (False, True), (False, False)])
def test_gradients_that_are_not_needed_are_none(target: Target, C: int, needs_dq: bool, needs_dx: bool) -> None:
    """And the other one has the same bits as when both are computed."""
    module, (q, x, dz), kwargs = module_of(target), tensors(target, C, M=70), options(C)
    saved = forward(module, q, x, **kwargs)
    both = backward(module, dz, None, None, q, x, *saved, **kwargs)
    found = backward(module, dz, None, None, q, x, *saved, needs_dq=needs_dq, needs_dx=needs_dx, **kwargs)
    for needed, value, expected in zip((needs_dq, needs_dx), found, both, strict=True):
        assert value is None if not needed else same_bits(value, expected)


@pytest.mark.parametrize("C", WIDTHS)
def test_gradient_of_lse_and_rho(target: Target, C: int) -> None:
    """Without dz: delta = drho rho - dlse alone carries the gradient."""
    module, (q, x, dz), kwargs = module_of(target), tensors(target, C, 0.3, M=70), options(C, 0.3)
    dlse, drho = (torch.randn(B, R, generator=torch.Generator().manual_seed(s)).to(q.device) for s in (1, 2))
    saved = forward(module, q, x, **kwargs)
    found = backward(module, torch.zeros_like(dz), dlse, drho, q, x, *saved, **kwargs)
    known = {name: kwargs[name] for name in ("scale", "dropout_p", "dropout_seed")}
    judged = []
    for dtype in (target.dtype, torch.float64):
        leaves = q.to(dtype).requires_grad_(), x.to(dtype).requires_grad_()
        _, lse, rho = reference.shared_kv_attention(*leaves, **known)
        judged.append(torch.autograd.grad((lse, rho), leaves, (dlse.to(lse), drho.to(rho))))
    for name, value, eager, oracle in zip(("dq", "dx"), found, *judged, strict=True):
        assert_as_accurate(value, eager, oracle, f"{target} {name}", terms=4 * oracle.abs().amax().expand(oracle.shape))


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_number_of_splits_does_not_matter(target: Target, splits: int) -> None:
    """The same keys in 1, 2 or 5 splits, the last of them short: fused kernels, 16 bits."""
    module, (q, x, dz), kwargs = module_of(target), tensors(target, 32), options(32)
    if target.backend != "triton" or target.dtype == torch.float32:
        pytest.skip("the splits of the fused kernels are chosen by a plan: triton's 16-bit kernels alone take one")
    plan = module._plan(q, x)
    assert plan.forward is not None and plan.dq is not None

    def keys_of(tile: int) -> int:
        tiles = -(-M // tile)
        return -(-tiles // splits) * tile

    keys, dq_keys = keys_of(plan.forward.block_kv), keys_of(plan.dq.block_kv)
    plan = replace(
        plan, forward_keys_per_split=keys, forward_splits=-(-M // keys), dq_keys_per_split=dq_keys, dq_splits=-(-M // dq_keys)
    )
    saved = forward(module, q, x, plan=plan, **kwargs)
    dq, dx = backward(module, dz, None, None, q, x, *saved, plan=plan, **kwargs)
    names = ("z", "lse", "rho", "dq", "dx")
    judge(target, dict(zip(names, (*saved, dq, dx), strict=True)), q, x, dz, kwargs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_wide_rows_in_many_chunks(target: Target, weights_bytes: Callable[[int], None], p: float, masked: bool) -> None:
    weights_bytes(1)  # every key tile is a chunk of its own
    module, C = module_of(target), 352
    if not target.is_kernel:
        pytest.skip("only kernels keep weights in a workspace")
    (q, x, dz), kwargs = tensors(target, C, p), options(C, p)
    mask = (torch.rand(B, M, generator=torch.Generator().manual_seed(0)) < 0.5).to(q.device) if masked else None
    x = x if mask is None else x.masked_fill(~mask[..., None], 0)
    saved = forward(module, q, x, mask, **kwargs)
    dq, dx = backward(module, dz, None, None, q, x, *saved, key_mask=mask, **kwargs)
    judge(target, {"z": saved[0], "lse": saved[1], "rho": saved[2], "dq": dq, "dx": dx}, q, x, dz, kwargs | {"key_mask": mask})


def test_composite_backward_is_autograd_of_the_specification() -> None:
    """The formulas that kernels are written from, in fp64: with masks, dropout, and gradients of z, lse and rho."""
    generator = torch.Generator().manual_seed(0)
    q, x, dz = (torch.randn(2, rows, 5, generator=generator, dtype=torch.float64) for rows in (4, 7, 4))
    dlse, drho = (torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 7, generator=generator) < 0.6
    x = x.masked_fill(~mask[..., None], 0)
    known = {"scale": 0.7, "dropout_p": 0.25, "dropout_seed": torch.tensor([5])}
    leaves = q.requires_grad_(), x.requires_grad_()
    outputs = reference.shared_kv_attention(*leaves, key_mask=mask, **known)
    expected = torch.autograd.grad(outputs, leaves, (dz, dlse, drho))
    saved = [value.detach() for value in outputs]
    found = backward(composite, dz, dlse, drho, q.detach(), x.detach(), *saved, key_mask=mask, **known, key_offset=0)
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth.masked_fill(~mask[..., None], 0) if truth.shape[1] == 7 else truth)
