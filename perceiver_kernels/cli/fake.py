"""Sizes that fit no machine: the sweep's calls over fake tensors, which have shapes and no bytes.

A fake tensor's storage has a size, though nothing is behind it; who allocates and who lets go is the same program that
runs on a device. So a call's peak is that of live storages, counted as they come and go. What is inside one operator is
not seen: scratch of a library's product, partial results that our kernels' splits write and add up. Our operators are
those of the fused kernels, with the results that they allocate on a GPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perceiver_kernels.cli.measure import Call
from perceiver_kernels.cli.workload import Workload
from perceiver_kernels.device import device_facts
from perceiver_kernels.dispatch import FUSED, fused_operators
from perceiver_kernels.nn import CrossAttention
from perceiver_kernels.plan import plan_cross_attention
from perceiver_kernels.problem import CrossAttentionProblem

BACKEND = FUSED
"""What rows of ours name: the fused kernels, whichever backend's."""


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operators allocate in the body, while they live; `peak` is the most there were.

    Storages that the body is given are not counted. Works on real tensors too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            self._meet(given, counted=False)
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            self._meet(result, counted=True)
        return results

    def _meet(self, value: Any, *, counted: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0

        def release(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, release)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_extra_bytes(call: Call) -> int:
    """Return the most bytes that storages allocated during a call took at once; its result is held until the end."""
    with LiveStorages() as storages:
        result = call()
    del result
    return storages.peak


@contextlib.contextmanager
def tensors() -> Iterator[None]:
    """Make every tensor of the body fake, and our operators those of the fused kernels."""
    with FakeTensorMode(), fused_operators():
        yield


class FakeWorkload(Workload):
    """A workload inside `tensors`."""

    def _our_layer(self, **changes: Any) -> CrossAttention:
        # Initial weights are drawn until they fit, which asks for their values; on the meta device nothing is drawn.
        layer = super()._our_layer(**{**changes, "device": "meta"})
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device=self.device)))
        return layer

    def choice(self, which: str) -> tuple[Literal["absorbed", "projected"], str]:
        """Return the method that the layer will choose; no backend serves fake tensors."""
        return plan_cross_attention(layer_problem(self, which), device_facts(self.device)).method, BACKEND


def layer_problem(work: Workload, which: str) -> CrossAttentionProblem:
    """Return what a layer pass, whose inputs need no gradient, asks of the planner."""
    case = work.case
    return CrossAttentionProblem(
        B=case.B, H=case.H, N=case.N, M=case.M, C=case.C, d_qk=case.d_qk, d_v=case.d_v, dtype=work.dtype,
        device_type=work.device.type, packed=False, needs_grad=which.startswith("backward"), inputs_need_grad=False,
    )  # fmt: skip
