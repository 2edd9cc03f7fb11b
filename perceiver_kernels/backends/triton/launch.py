"""Launching a kernel for less: what Triton derives from the arguments of a launch is derived once.

JITFunction.run looks at every argument of every launch, for its type, alignment and divisibility. Equal sizes, strides and
constants, types and alignments compile to the same kernel: launches alike in those go straight to its launcher, with addresses
in place of tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor


class Descriptor(NamedTuple):
    """A TMA descriptor of ``base`` with tiles of ``block_shape``, with the fields of the TensorDescriptor that it becomes."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    padding: str = "zero"

    def for_triton(self) -> TensorDescriptor:
        return TensorDescriptor(self.base, list(self.shape), list(self.strides), list(self.block_shape))


# Private parts of Triton: versions that were looked at. Others launch as Triton does.
_DIRECT = triton.__version__.startswith("3.6.")
_CAPACITY = 4096
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(function: Any, programs: int, *args: Any, **options: Any) -> None:
    """Run ``function`` with ``programs`` programs: ``args`` in its order, then constants and launch options by name.

    Tensors may be on a CPU, where the interpreter, or an offline compiler, takes Triton's own path.
    """
    tensor = _a_tensor(args)
    hooks = knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls
    if hooks or not (_DIRECT and tensor.is_cuda):
        _launch_as_triton(function, programs, args, options)
        return
    device = torch.cuda.current_device()
    key: list[Any] = [function, device, *options.values()]
    given: list[Any] = []
    _look_at(args, key, given)
    found = tuple(key)
    kernel = _compiled.get(found)
    if kernel is None:
        if len(_compiled) >= _CAPACITY:
            _compiled.clear()
        _compiled[found] = _launch_as_triton(function, programs, args, options)
        return
    given += [options[name] for name in function.arg_names[len(args) :]]
    stream = torch._C._cuda_getCurrentRawStream(device)
    kernel.run(programs, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *given)


def _a_tensor(args: tuple[Any, ...]) -> Tensor:
    """The first tensor among arguments that may be nested."""
    first = args[0]
    while not isinstance(first, Tensor):
        first = first[0]
    return first


def _look_at(args: tuple[Any, ...], key: list[Any], given: list[Any]) -> None:
    """Add to ``key`` what a kernel is compiled for, and to ``given`` what its launcher takes: addresses instead of tensors."""
    for value in args:
        if isinstance(value, Tensor):
            address = value.data_ptr()
            key.append((value.dtype, address % 16 == 0))
            given.append(address)
        elif type(value) is tuple:
            inner: list[Any] = []
            _look_at(value, key, inner)
            given.append(tuple(inner))
        elif type(value) is Descriptor:
            key.append((value.base.dtype, value[1:]))
            given.append(value)
        else:
            key.append(value if type(value) is not float else float)
            given.append(value)


def _for_triton(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(map(_for_triton, value))
    return value.for_triton() if type(value) is Descriptor else value


def _launch_as_triton(function: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return function[(programs,)](*map(_for_triton, args), **options)
