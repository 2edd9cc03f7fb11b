"""Operators under autograd and functorch: gradients of all results, transforms, checkpointing, autocast, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.ops import pack as pack_op
from perceiver_kernels.ops import shared_kv as shared_op
from perceiver_kernels.testing import same_bits
from perceiver_kernels.testing.targets import Target

OP = "shared_kv_attention"
B, R, M, C, V = 2, 3, 7, 16, 4
SEED = torch.tensor([5])


def wanted(target: Target) -> bool:
    """The specification behind the operator, and kernels; the reference is also run in fp64, where gradcheck works."""
    return (target.is_kernel or target.backend == "reference") and target.dtype == torch.float32


def randn(target: Target, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(target.device)


def attend(target: Target, q: Tensor, x: Tensor, key_mask: Any = None, seed: Any = None, p: float = 0.0) -> tuple[Tensor, ...]:
    return shared_op.shared_kv_attention(q, x, key_mask, None, seed, 0.3, p, target.passes)


def loss(target: Target, q: Tensor, x: Tensor, key_mask: Any = None) -> Tensor:
    z, lse, _ = attend(target, q, x, key_mask)
    return z.square().sum() + lse.sin().sum()


def specified(q: Tensor, x: Tensor, key_mask: Any = None) -> Tensor:
    z, lse, _ = reference.shared_kv_attention(q, x, key_mask=key_mask, scale=0.3)
    return z.square().sum() + lse.sin().sum()


close = partial(torch.testing.assert_close, rtol=2e-4, atol=2e-5)


class TestGradcheck:
    """In fp64, through the operator and its autograd.Function, against finite differences."""

    @pytest.mark.parametrize("kind", ["plain", "mask", "dropout", "lengths"])
    def test_all_results(self, kind: str) -> None:
        q, x = (torch.randn(B, rows, 4, dtype=torch.float64, requires_grad=True) for rows in (R, M))
        mask = torch.rand(B, M, generator=torch.Generator().manual_seed(1)) < 0.6 if kind == "mask" else None
        lengths = torch.tensor([3, M], dtype=torch.int32) if kind == "lengths" else None
        seed, p = (SEED, 0.3) if kind == "dropout" else (None, 0.0)

        def function(q: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            return shared_op.shared_kv_attention(q, x, mask, lengths, seed, 0.3, p, ("reference", "reference"))

        assert gradcheck(function, (q, x))

    @pytest.mark.parametrize("normalize", [True, False])
    def test_pack(self, normalize: bool) -> None:
        content, positions = torch.randn(B, M, 5, dtype=torch.float64, requires_grad=True), torch.randn(M, 2).double()

        def function(content: Tensor) -> Tensor:
            return pack_op.pack_inputs(content, positions, None, None, normalize, 1e-5, torch.float64, ("reference",) * 2)[0]

        assert gradcheck(function, (content,))

    def test_composite_backends_have_a_second_derivative(self) -> None:
        q, x = (torch.randn(1, rows, 3, dtype=torch.float64, requires_grad=True) for rows in (2, 4))
        function = partial(pk.shared_kv_attention, scale=0.5, return_lse=True, backend="reference")
        assert gradgradcheck(function, (q, x))


@pytest.mark.parametrize("incoming", ["of the inputs", "constant"])
@pytest.mark.parametrize("of", ["q", "x", "content"])
def test_second_derivative_is_refused_with_a_way_out(target: Target, of: str, incoming: str) -> None:
    """Whether or not the incoming gradient is differentiable: a sum's is not, but q, x and content always are.

    Else a penalty on a gradient, as of a critic, would silently be trained without its second derivative.
    """
    leaves = {"q": randn(target, B, R, C), "x": randn(target, B, M, C), "content": randn(target, B, M, 5)}
    q, x, content = (leaf.requires_grad_() for leaf in leaves.values())
    if of == "content":
        result, _ = pack_op.pack_inputs(content, None, None, None, True, 1e-5, content.dtype, (target.backend,) * 2)
    else:
        result, _, _ = attend(target, q, x)
    total = result.sum() if incoming == "constant" else result.square().sum()
    (gradient,) = torch.autograd.grad(total, leaves[of], create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative.*backend="reference" or use_backend\\("reference"\\)'):
        gradient.square().sum().backward()


def test_gradients_are_computed_only_where_they_are_needed(target: Target) -> None:
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is shared_op.BACKWARD.overload:
                needs.append(args[12:14])
            return func(*args, **(kwargs or {}))

    for wants_q, wants_x in ((True, False), (False, True)):
        needs: list[Any] = []
        q, x = randn(target, B, R, C).requires_grad_(wants_q), randn(target, B, M, C).requires_grad_(wants_x)
        with Calls():
            loss(target, q, x).backward()
        assert needs == [(wants_q, wants_x)] and (q.grad is None, x.grad is None) == (not wants_q, not wants_x)


def test_gradient_of_lse_alone_is_the_mean_token(target: Target) -> None:
    """d lse_i / d q_i = scale sum_j p_ij x_j, which is scale z_i."""
    q, x = randn(target, B, R, C).requires_grad_(), randn(target, B, M, C)
    z, lse, rho = attend(target, q, x)
    (dq,) = torch.autograd.grad(lse.sum(), q)
    close(dq, 0.3 * z.detach())
    assert rho.requires_grad and not torch.autograd.grad(attend(target, q, x)[2].sum(), q)[0].any()


class TestFunctorch:
    def test_grad(self, target: Target) -> None:
        q, x = randn(target, B, R, C), randn(target, B, M, C)
        for found, expected in zip(
            torch.func.grad(partial(loss, target), (0, 1))(q, x), torch.func.grad(specified, (0, 1))(q, x), strict=True
        ):
            close(found, expected)

    @pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (1, None), (2, 1), (None, 3)], ids=str)
    def test_vmap(self, target: Target, dims: tuple[int | None, int | None]) -> None:
        """Over mapped inputs the axis joins the batch, over shared inputs the query rows."""
        q, x = randn(target, V, B, R, C), randn(target, V, B, M, C)
        q, x = (t.movedim(0, dim) if dim is not None else t[0] for t, dim in zip((q, x), dims, strict=True))
        outputs = torch.func.vmap(partial(attend, target), dims)(q, x)
        for v in range(V):
            here = [t if dim is None else t.select(dim, v) for t, dim in zip((q, x), dims, strict=True)]
            for found, expected in zip(outputs, attend(target, *here), strict=True):
                close(found[v], expected)

    @pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0)], ids=str)
    def test_gradients_of_each(self, target: Target, dims: tuple[int | None, int | None]) -> None:
        """vmap(grad): the backward sees mapped tensors whose memory is not in the order of their axes."""
        q, x = (
            t if dim == 0 else t[0] for t, dim in zip((randn(target, V, B, R, C), randn(target, V, B, M, C)), dims, strict=True)
        )
        found = torch.func.vmap(torch.func.grad(partial(loss, target), (0, 1)), dims)(q, x)
        expected = torch.func.vmap(torch.func.grad(specified, (0, 1)), dims)(q, x)
        for a, b in zip(found, expected, strict=True):
            close(a, b)

    @pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (None, 0, 0), (0, None, 1)], ids=str)
    def test_dropout_of_each(self, target: Target, dims: tuple[int | None, ...]) -> None:
        """vmap(grad) and grad of a vmap: what the forward drops the backward drops too, with one seed or one for each."""
        seeds = torch.arange(3, 3 + V, device=target.device)[:, None]  # [V, 1]
        tensors = [randn(target, V, B, R, C), randn(target, V, B, M, C), seeds]
        given = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(tensors, dims, strict=True)]

        def dropped(attention: Callable[..., Any], q: Tensor, x: Tensor, seed: Tensor) -> Tensor:
            return attention(q, x, seed)[0].square().sum()

        def actual(q: Tensor, x: Tensor, seed: Tensor) -> Any:
            return attend(target, q, x, None, seed, 0.4)

        def expected(q: Tensor, x: Tensor, seed: Tensor) -> Any:
            return reference.shared_kv_attention(q, x, scale=0.3, dropout_p=0.4, dropout_seed=seed)

        each = torch.func.vmap(torch.func.grad(partial(dropped, actual), (0, 1)), dims)(*given)
        summed = torch.func.grad(lambda *t: torch.func.vmap(partial(dropped, actual), dims)(*t).sum(), (0, 1))(*given)
        loops = [
            torch.func.grad(partial(dropped, expected), (0, 1))(
                *(t if dim is None else t.select(dim, v) for t, dim in zip(given, dims, strict=True))
            )
            for v in range(V)
        ]
        for i, wanted in enumerate(zip(*loops, strict=True)):
            close(each[i], torch.stack(wanted))
            close(summed[i], sum(wanted) if dims[i] is None else torch.stack(wanted, dims[i]))

    def test_masks_are_mapped(self, target: Target) -> None:
        q, x = randn(target, B, R, C), randn(target, B, M, C)
        masks = torch.rand(V, B, M, generator=torch.Generator().manual_seed(2)).to(target.device) < 0.7
        hidden = ~masks[..., None]
        found = torch.func.vmap(partial(attend, target), (None, 0, 0))(q, x.expand(V, -1, -1, -1).masked_fill(hidden, 0), masks)
        for v in range(V):
            expected = reference.shared_kv_attention(q, x, key_mask=masks[v], scale=0.3)
            for a, b in zip(found, expected, strict=True):
                close(a[v], b)

    def test_jacobian(self, target: Target) -> None:
        q, x = randn(target, 1, 2, C), randn(target, 1, 3, C)
        close(torch.func.jacrev(partial(loss_vector, target))(q, x), torch.func.jacrev(partial(loss_vector, None))(q, x))

    def test_pack(self, target: Target) -> None:
        content, mask = randn(target, V, B, M, 5), randn(target, B, M) > 0

        def packed(content: Tensor) -> Tensor:
            backends = (target.backend, target.backend)
            return pack_op.pack_inputs(content, None, None, mask, True, 1e-5, torch.float32, backends, constants=2)[0]

        def total(function: Callable[[Tensor], Tensor], content: Tensor) -> Tensor:
            return (function(content) * torch.arange(16, device=content.device)).sin().sum()

        def expected(content: Tensor) -> Tensor:
            return reference.pack_inputs(content, key_mask=mask, constants=2)[0]

        close(torch.func.vmap(packed)(content), torch.stack([expected(c) for c in content]))
        each = torch.func.vmap(torch.func.grad(partial(total, packed)))(content)
        close(each, torch.stack([torch.func.grad(partial(total, expected))(c) for c in content]))


def loss_vector(target: Target | None, q: Tensor, x: Tensor) -> Tensor:
    z = reference.shared_kv_attention(q, x, scale=0.3)[0] if target is None else attend(target, q, x)[0]
    return z.square().sum((0, 2))


class TestCheckpoint:
    def test_recomputation_draws_the_same_dropout(self, target: Target) -> None:
        def run(wrap: bool) -> list[Tensor]:
            torch.manual_seed(3)
            q, x = randn(target, B, R, C).requires_grad_(), randn(target, B, M, C).requires_grad_()
            function = partial(pk.shared_kv_attention, scale=0.3, dropout_p=0.4, backend=target.backend)
            z = checkpoint(function, q, x, use_reentrant=False) if wrap else function(q, x)
            return [z.detach(), *torch.autograd.grad(z.square().sum(), (q, x))]

        assert all(same_bits(a, b) for a, b in zip(run(True), run(False), strict=True))

    @pytest.mark.parametrize("keep", [True, False])
    def test_selective(self, target: Target, keep: bool) -> None:
        """A policy that saves the operator's results runs it once, another runs it again in the backward."""
        calls: list[Any] = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                calls.extend([func] if func is shared_op.FORWARD.overload else [])
                return func(*args, **(kwargs or {}))

        def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            saved = keep and operator is shared_op.FORWARD.overload
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

        q, x = randn(target, B, R, C).requires_grad_(), randn(target, B, M, C).requires_grad_()
        with Count():
            out = checkpoint(
                partial(loss, target), q * 1.0, x, use_reentrant=False,
                context_fn=partial(create_selective_checkpoint_contexts, policy),
            )  # fmt: skip
            found = torch.autograd.grad(out, (q, x))
        assert len(calls) == (1 if keep else 2)
        for a, b in zip(found, torch.autograd.grad(loss(target, q, x), (q, x)), strict=True):
            close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(target: Target, dtype: torch.dtype) -> None:
    """Public functions compute in autocast's dtype; gradients come back in that of the leaves."""
    if target.is_kernel and target.device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    q, x = randn(target, B, R, C).requires_grad_(), randn(target, B, M, C).requires_grad_()
    with torch.autocast(target.device, dtype=dtype):
        z, lse = pk.shared_kv_attention(q, x, scale=0.3, return_lse=True, backend=target.backend)
        packed = pk.pack_inputs(x, backend=target.backend)
    assert (z.dtype, lse.dtype, packed.data.dtype) == (dtype, torch.float32, dtype)
    expected = pk.shared_kv_attention(q.to(dtype), x.to(dtype), scale=0.3, backend=target.backend)
    assert same_bits(z, expected)
    dq, dx = torch.autograd.grad(z.float().sum() + packed.data.float().square().sum(), (q, x))
    assert dq.dtype == dx.dtype == torch.float32 and dx.isfinite().all()
    with torch.autocast(target.device, dtype=dtype, enabled=False):
        assert pk.shared_kv_attention(q, x, backend=target.backend).dtype == torch.float32


@pytest.mark.parametrize("sizes", [{"B": 0}, {"R": 0}, {"M": 0}, {"B": 0, "M": 0}], ids=str)
def test_nothing_to_do(target: Target, sizes: dict[str, int]) -> None:
    b, r, m = (sizes.get(axis, size) for axis, size in (("B", B), ("R", R), ("M", M)))
    q, x = randn(target, b, r, C).requires_grad_(), randn(target, b, m, C).requires_grad_()
    z, lse = pk.shared_kv_attention(q, x, return_lse=True, backend=target.backend)
    assert z.shape == q.shape and lse.shape == (b, r) and not z.any()
    assert m or (lse == -torch.inf).all()
    dq, dx = torch.autograd.grad(z.sum() + lse.sum(), (q, x))
    assert dq.shape == q.shape and dx.shape == x.shape and not dq.any() and not dx.any()
    packed = pk.pack_inputs(x, backend=target.backend)
    assert packed.data.shape == (b, m, C)
    assert torch.autograd.grad(packed.data.sum(), x)[0].shape == x.shape
