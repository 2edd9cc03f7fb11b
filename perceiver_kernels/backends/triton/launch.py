"""Launching a kernel for less: what Triton derives from the arguments of a launch is derived once.

JITFunction.run looks at every argument of every launch, for its type, alignment and divisibility. Equal sizes, strides and
constants, types and alignments compile to the same kernel: launches alike in those go straight to its launcher, with addresses
in place of tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class Launch(NamedTuple):
    """A launch as it was asked for: arguments and constants in the kernel's order, with tensors and descriptors in them."""

    kernel: Any
    programs: int
    arguments: list[Any]


class DirectLauncher(NamedTuple):
    """Triton's launcher of a compiled kernel: ``start`` takes three grid sizes, stream, function, ``settings``, arguments.

    In the place of a descriptor it takes an encoded one, its shape and its strides.
    """

    start: Callable[..., None]
    settings: tuple[Any, ...]
    metadata: list[Any]

    @classmethod
    def of(cls, kernel: Any) -> DirectLauncher | None:
        """The launcher of ``kernel``; None if it wants memory of its own."""
        run = kernel.run
        if run.global_scratch_size or run.profile_scratch_size:
            return None
        start, metadata = run.launch, []
        if closure := getattr(start, "__closure__", None):
            # A wrapper that encodes the descriptors of every launch.
            names = dict(zip(start.__code__.co_freevars, (cell.cell_contents for cell in closure), strict=True))
            start, metadata = names["launcher"], names["tensordesc_meta"]
        settings = (run.launch_cooperative_grid, run.launch_pdl, None, None, kernel.packed_metadata, None, None, None)
        return cls(start, settings, metadata)

    def encoder(self, index: int, descriptor: Descriptor) -> Callable[[int], Any]:
        """A function from an address to what ``start`` takes for the kernel's descriptor ``index``."""
        from triton.backends.nvidia.driver import make_tensordesc_arg

        metadata = self.metadata[index]
        # Not the descriptor itself: its tensor would live as long as the function.
        of_nothing = descriptor._replace(base=_Address(0))
        return lambda address: make_tensordesc_arg(of_nothing._replace(base=_Address(address)), metadata)[0]


class _Address(NamedTuple):
    """What a descriptor asks of a tensor."""

    value: int

    def data_ptr(self) -> int:
        return self.value


_observed = threading.local()


@contextmanager
def observed_launches(observe: Callable[[Launch], None]) -> Iterator[None]:
    """Call ``observe`` with every launch of this thread, before it starts."""
    outer = getattr(_observed, "observe", None)
    _observed.observe = observe
    try:
        yield
    finally:
        _observed.observe = outer


def can_launch_directly() -> bool:
    """Whether launches may go past Triton's own path, which calls the hooks of profilers."""
    return _DIRECT and not (knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def launch(function: Any, programs: int, *args: Any, **options: Any) -> None:
    """Run ``function`` with ``programs`` programs: ``args`` in its order, then constants and launch options by name.

    Tensors may be on a CPU, where the interpreter, or an offline compiler, takes Triton's own path.
    """
    tensor = _a_tensor(args)
    if not (tensor.is_cuda and can_launch_directly()):
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
        kernel = _compiled[found] = _launch_as_triton(function, programs, args, options)
        _tell_observer(function, kernel, programs, args, options)
        return
    _tell_observer(function, kernel, programs, args, options)
    given += [options[name] for name in function.arg_names[len(args) :]]
    stream = torch._C._cuda_getCurrentRawStream(device)
    kernel.run(programs, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *given)


def _tell_observer(function: Any, kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    observe = getattr(_observed, "observe", None)
    if observe is not None:
        constants = [options[name] for name in function.arg_names[len(args) :]]
        observe(Launch(kernel, programs, [*args, *constants]))


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
