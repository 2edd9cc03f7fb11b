"""Calling a backend function again for less: its allocations and launches are recorded once, and then repeated.

Planning, descriptors and the arguments of a launch follow from the shapes, strides, types and alignment of the tensors and from
a call's numbers. Calls alike in those differ in addresses only. The first of them runs as it is written, under an observer of
everything that torch is asked for. Where that was nothing but fresh memory, views and kernels of ours, the calls after it
allocate the same memory in the same order, for as long as it is used, and start the same kernels with new addresses, which
takes the host a fraction of the time. Any other operation, or more than MOST_LAUNCHES, leaves a call as it is written for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from perceiver_kernels.backends.triton.launch import (
    Descriptor,
    DirectLauncher,
    Launch,
    can_launch_directly,
    observed_launches,
)

Result = TypeVar("Result")

MOST_LAUNCHES = 1024
_CAPACITY = 4096
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
}  # fmt: skip

_repeatable: dict[tuple[Any, ...], _Recorded | None] = {}


def repeated(
    name: str, numbers: tuple[Any, ...], tensors: tuple[Tensor | None, ...], run: Callable[[], Result]
) -> Result:
    """``run()``, which launches kernels, or the repetition of an earlier call alike.

    Args:
        name: of the calling function.
        numbers: everything beside the tensors that the call depends on.
        tensors: every tensor that it reads, on one device; None has its place, but not the first.
    """
    first = tensors[0]
    if first is None or not first.is_cuda or not can_launch_directly():
        return run()
    device = torch._C._cuda_getDevice()
    if first.get_device() != device:
        return run()
    key: list[Any] = [name, numbers, device, torch.get_float32_matmul_precision()]
    addresses: list[int] = []
    starts = set()
    for tensor in tensors:
        if tensor is None:
            key.append(None)
            addresses.append(0)
            continue
        address = tensor.data_ptr()
        key += (tensor.shape, tensor.stride(), tensor.dtype, address % 16)
        addresses.append(address)
        if address in starts and address:
            # Tensors that share memory are not told apart by their addresses: which ones do is part of the key.
            key.append(addresses.index(address))
        starts.add(address)
    found = tuple(key)
    recorded = _repeatable.get(found, _NEVER)
    if recorded is None:
        return run()
    if recorded is not _NEVER:
        return recorded.repeat(tensors, addresses)
    if len(_repeatable) >= _CAPACITY:
        _repeatable.clear()
    result, _repeatable[found] = _observe(run, tensors, device)
    return result


def forget() -> None:
    """Drop all recordings: whoever changes how calls are planned calls this."""
    _repeatable.clear()


def _observe(
    run: Callable[[], Result], tensors: tuple[Tensor | None, ...], device: int
) -> tuple[Result, _Recorded | None]:
    recorder = _Recorder(tensors, device)
    with _Observer(recorder), observed_launches(recorder.launch):
        result = run()
    return result, recorder.recorded(result)


class _Observer(TorchDispatchMode):
    """Sees what torch does while a call runs: fresh memory is noted, views are nothing, anything else spoils the recording."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.recorder.allocated(result)
        elif not func.is_view:
            self.recorder.repeatable = False
        return result


class _Place(NamedTuple):
    """Bytes behind the start of an input or of fresh memory; ``base`` counts the inputs first."""

    base: int
    offset: int


def _filled(value: Any, addresses: list[int]) -> Any:
    """A nested argument with addresses in their places."""
    if type(value) is _Place:
        return addresses[value.base] + value.offset
    return tuple([_filled(each, addresses) for each in value]) if type(value) is tuple else value


def _places(value: Any) -> list[_Place]:
    if type(value) is _Place:
        return [value]
    return [place for each in value for place in _places(each)] if type(value) is tuple else []


@dataclass
class _Launch:
    """One launch: what its launcher takes, and the memory that it is the first or the last to use.

    Where addresses go: plain ones (index, base, offset), nested ones (index, argument), and those of TMA descriptors (index,
    base, offset, what makes a descriptor of an address, the descriptors made so far).
    """

    start: Callable[..., None]
    programs: int
    function: Any
    settings: tuple[Any, ...]
    arguments: list[Any]
    plain: list[tuple[int, int, int]] = field(default_factory=list)
    nested: list[tuple[int, Any]] = field(default_factory=list)
    described: list[tuple[int, int, int, Callable[[int], Any], dict[int, Any]]] = field(default_factory=list)
    allocate: list[int] = field(default_factory=list)
    release: list[int] = field(default_factory=list)

    def bases(self) -> set[int]:
        """Inputs and fresh memory that it reads or writes."""
        inside = {place.base for _, value in self.nested for place in _places(value)}
        return inside | {entry[1] for entry in (*self.plain, *self.described)}


class _Fresh(NamedTuple):
    """Memory as torch.empty_strided allocates it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


_MOST_DESCRIPTORS = 16


@dataclass
class _Recorded:
    """What a call does, without its addresses.

    ``outputs`` are inputs and fresh memory by their base, -1 for None; ``pack`` makes the result of them.
    """

    device: torch.device
    inputs: int
    memory: list[_Fresh]
    launches: list[_Launch]
    outputs: list[int]
    unused: list[int]
    pack: Callable[[list[Any]], Any]

    def repeat(self, tensors: tuple[Tensor | None, ...], addresses: list[int]) -> Any:
        """Allocate, launch, release; the result as the call's."""
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        nothing = len(self.memory)
        held: list[Tensor | None] = [*tensors, *(None,) * (nothing + 1)]
        addresses = addresses + [0] * nothing
        for launch in self.launches:
            if launch.allocate:
                self._allocate(launch.allocate, held, addresses)
            arguments = launch.arguments.copy()
            for i, base, offset in launch.plain:
                arguments[i] = addresses[base] + offset
            for i, base, offset, encode, known in launch.described:
                address = addresses[base] + offset
                if (found := known.get(address)) is None:
                    if len(known) >= _MOST_DESCRIPTORS:
                        known.clear()
                    found = known[address] = encode(address)
                arguments[i] = found
            for i, value in launch.nested:
                arguments[i] = _filled(value, addresses)
            launch.start(launch.programs, 1, 1, stream, launch.function, *launch.settings, *arguments)
            for base in launch.release:
                held[base] = None
        if self.unused:
            self._allocate(self.unused, held, addresses)
        return self.pack([held[base] for base in self.outputs])

    def _allocate(self, which: list[int], held: list[Tensor | None], addresses: list[int]) -> None:
        for base in which:
            shape, stride, dtype = self.memory[base - self.inputs]
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device=self.device)
            held[base], addresses[base] = tensor, tensor.data_ptr()


_NEVER = _Recorded(torch.device("cpu"), 0, [], [], [], [], list)


def _bytes(tensor: Tensor) -> int:
    """From the first element to the end of the last one."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class _Allocation(NamedTuple):
    """Fresh memory as long as somebody holds it."""

    storage: StorageWeakRef
    address: int
    end: int


class _Recorder:
    """Notes what a call allocates and launches, and finds the place of every address that it uses."""

    def __init__(self, tensors: tuple[Tensor | None, ...], device: int) -> None:
        self.tensors = tensors
        self.device = torch.device("cuda", device)
        self.inputs = len(tensors)
        self.memory: list[_Fresh] = []
        self.allocations: list[_Allocation] = []
        self.launches: list[_Launch] = []
        self.repeatable = True

    def allocated(self, tensor: Tensor) -> None:
        """Note fresh memory."""
        self.memory.append(_Fresh(tuple(tensor.shape), tensor.stride(), tensor.dtype))
        address = tensor.data_ptr()
        self.allocations.append(_Allocation(StorageWeakRef(tensor.untyped_storage()), address, address + _bytes(tensor)))

    def launch(self, launch: Launch) -> None:
        """Note a launch, while the memory that it uses is held."""
        if self.repeatable and len(self.launches) < MOST_LAUNCHES:
            made = self._launch(launch)
            self.repeatable = made is not None
            self.launches += [made] if made is not None else []
        else:
            self.repeatable = False

    def recorded(self, result: Any) -> _Recorded | None:
        """What was noted of a call that gave ``result``; None if it cannot be repeated."""
        single = isinstance(result, Tensor)
        outputs = [self._output(each) for each in ([result] if single else result)]
        if not (self.repeatable and self.launches) or None in outputs:
            return None
        bases = [base for base in outputs if base is not None]
        used: dict[int, list[_Launch]] = {}
        for launch in self.launches:
            for base in launch.bases():
                if base >= self.inputs:
                    used.setdefault(base, []).append(launch)
        for base, users in used.items():
            users[0].allocate.append(base)
            if base not in bases:
                users[-1].release.append(base)
        unused = [base for base in bases if base >= self.inputs and base not in used]
        pack: Callable[[list[Any]], Any] = (lambda tensors: tensors[0]) if single else type(result)
        return _Recorded(self.device, self.inputs, self.memory, self.launches, bases, unused, pack)

    def _place(self, tensor: Tensor) -> _Place | int | None:
        address = tensor.data_ptr()
        if address == 0:
            return 0
        starts = [(base, t.data_ptr(), t) for base, t in enumerate(self.tensors) if t is not None]
        for base, start, _ in starts:
            if start == address:
                return _Place(base, 0)
        around = [(base, start) for base, start, t in starts if start <= address < start + _bytes(t)]
        around += [
            (self.inputs + i, each.address)
            for i, each in enumerate(self.allocations)
            if each.address <= address < each.end and not each.storage.expired()
        ]
        return _Place(around[0][0], address - around[0][1]) if len(around) == 1 else None

    def _launch(self, launch: Launch) -> _Launch | None:
        launcher = DirectLauncher.of(launch.kernel)
        if launcher is None:
            return None
        made = _Launch(launcher.start, launch.programs, launch.kernel.function, launcher.settings, [])
        for value in launch.arguments:
            i = len(made.arguments)
            if type(value) is Descriptor:
                place = self._place(value.base)
                if type(place) is not _Place:
                    return None
                made.described.append((i, *place, launcher.encoder(len(made.described), value), {}))
                made.arguments += [None, *value.shape, *value.strides]
                continue
            try:
                found = self._argument(value)
            except LookupError:
                return None
            if type(found) is _Place:
                made.plain.append((i, *found))
            elif _places(found):
                made.nested.append((i, found))
            made.arguments.append(found)
        return made

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            place = self._place(value)
            if place is None:
                raise LookupError("memory of unknown origin")
            return place
        return tuple(map(self._argument, value)) if type(value) is tuple else value

    def _output(self, result: Any) -> int | None:
        """The input, or fresh memory as a whole, that a result is; -1 for None."""
        if result is None:
            return -1
        for base, tensor in enumerate(self.tensors):
            if result is tensor:
                return base
        # Not by address: all empty tensors have the same.
        storage = StorageWeakRef(result.untyped_storage())
        for i, (each, fresh) in enumerate(zip(self.allocations, self.memory, strict=True)):
            whole = result.storage_offset() == 0 and result.numel() == math.prod(fresh.shape) and result.dtype == fresh.dtype
            if whole and each.storage == storage:
                self.memory[i] = _Fresh(tuple(result.shape), result.stride(), result.dtype)
                return self.inputs + i
        return None
