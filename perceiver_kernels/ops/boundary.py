"""What every operation's boundary shares: definition, the double-backward refusal, folding of mapped axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import Parameter

_NAMESPACE = "perceiver_kernels"


class Operation:
    """An operator of torch that skips torch's dispatcher where nothing but its implementation is to be found there.

    The way through it and back into Python costs the host about as much as all of torch's own attention does.
    """

    def __init__(self, overload: Any, implementation: Any) -> None:
        self.overload, self.implementation = overload, implementation

    def __call__(self, *args: Any) -> Any:
        """The operator of positional arguments; gradients are not recorded through it."""
        return self.implementation(*args) if is_plain_call(args) else self.overload(*args)


_PLAIN_TYPES = frozenset({type(None), bool, int, float, str, torch.dtype})


def is_plain_call(args: tuple[Any, ...]) -> bool:
    """Whether no compiler, mode, transform, profiler or subclass of Tensor has a say, and tensors are what memory holds.

    The imaginary part of a conjugate is not: torch negates it where it dispatches.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or transforms_active():
        return False
    return not torch.autograd._profiler_enabled() and _are_plain(args)


def _are_plain(values: Sequence[Any]) -> bool:
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if value.is_neg():
                return False
        elif kind not in _PLAIN_TYPES and not (kind in (list, tuple) and _are_plain(value)):
            return False
    return True


def define(name: str, schema: str, implementation: Any, fake: Any) -> Operation:
    """Define an operator with one implementation for every device, and what it gives for fake tensors."""
    qualified = f"{_NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "CPU", implementation)
    torch.library.impl(qualified, "CUDA", implementation)
    torch.library.register_fake(qualified, fake)
    return Operation(getattr(getattr(torch.ops, _NAMESPACE), name).default, implementation)


class _NoDoubleBackward(Function):
    """Identity whose gradient raises: kernel backwards are not differentiable themselves.

    torch.func.grad always records its backward, so this runs under functorch too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "perceiver_kernels: kernel backends and chunk_size have no second derivative; leave chunk_size None and "
            'pass backend="reference" or use_backend("reference"), whose double backward torch derives'
        )


def refuse_double_backward(gradient: Tensor | None, *sources: Tensor | None) -> Tensor | None:
    """``gradient``, through which no gradient passes to any of the ``sources`` that it was computed from."""
    if gradient is None or not torch.is_grad_enabled():
        return gradient
    differentiable = [source for source in sources if source is not None and source.requires_grad]
    return _NoDoubleBackward.apply(gradient, *differentiable) if differentiable else gradient


def transforms_active() -> bool:
    """Whether torch.func or forward-mode differentiation has a say, which not every autograd.Function here is made for."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class BatchFold:
    """Folds a mapped axis of size ``size`` into batch axis 0 of size ``batch``: [V, B, ...] -> [V*B, ...]."""

    def __init__(self, size: int, batch: int) -> None:
        self.size, self.batch = size, batch

    def __call__(self, tensor: Tensor, dim: int | None, rank: int | None = None) -> Tensor:
        tensor = tensor.expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        if rank is not None and tensor.ndim == rank:
            tensor = tensor[:, None].expand(self.size, self.batch, *tensor.shape[1:])
        return tensor.flatten(0, 1)
