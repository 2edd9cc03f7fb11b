"""CUDA C++ kernels of libperceiver_kernels.so, through the binding _C: sm_80 and newer; bf16, fp16, fp32.

This module imports without the binding, which is loaded on first use; `unavailable` says why it cannot be.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import build_info
from perceiver_kernels.layouts import can_describe, describable, unit_stride

# The element types of the kernels and their codes in csrc/include/perceiver/params.h.
ELEMENT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_CHANNELS = 1024
MIN_CAPABILITY = (8, 0)
HOPPER = (9, 0)
LOG2_E = 1.4426950408889634
LEAST_FLOPS = 5e9
"""The automatic choice leaves smaller calls of attention to the next backend.

4 x 128 x 4,096 of 256 channels, 2 GFLOP, took 0.027 ms, and 0.022 on Triton (H200)."""
REBUILD = "rebuild it with `python setup.py build_ext --inplace`"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The binding, or None and why it cannot be used."""
    info = build_info.read()
    if not info["cuda_built"]:
        return None, f"the CUDA library is not built: {info['reason']}"
    try:
        module = importlib.import_module("perceiver_kernels._C")
    except ImportError as error:
        return None, f"the CUDA binding does not load: {error}"
    ours, theirs = module.ABI_VERSION, module.library_abi_version()
    if ours != theirs or module.layout() != module.library_layout():
        return None, (
            f"the CUDA binding has ABI version {ours} and libperceiver_kernels.so {theirs}, "
            f"or their structs differ; {REBUILD}"
        )
    if build_info.is_stale(info):
        warnings.warn(f"csrc/ changed since the CUDA library was built; {REBUILD}", stacklevel=2)
    return module, None


def binding() -> ModuleType:
    """The module _C.

    Raises:
        RuntimeError: it cannot be loaded; the message says why.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def has_code_for(capability: tuple[int, int], archs: list[str]) -> bool:
    """Whether a library built for ``archs`` runs on a GPU of ``capability``.

    "80" holds machine code for 8.x and PTX that newer GPUs compile, "80-real" only the former, "80-virtual"
    only the latter; "90a" runs on 9.0 alone. Names without a number ("native", "all") are taken to fit.
    """
    for arch in archs:
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
        if match is None:
            return True
        built, kind = (int(match.group(1)), int(match.group(2))), match.group(4)
        if match.group(3):
            fits = capability == built
        else:
            machine_code = capability[0] == built[0] and capability >= built
            fits = machine_code if kind == "-real" else capability >= built
        if fits:
            return True
    return False


def unavailable() -> str | None:
    """Why no CUDA C++ kernel can run in this process, or None."""
    _, reason = _load()
    if reason is not None:
        return reason
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"the CUDA kernels need compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    archs = build_info.read()["archs"]
    if not has_code_for(capability, archs):
        return (
            f"the CUDA library was built for {', '.join(archs)}, the GPU is {capability[0]}.{capability[1]}; "
            "set PERCEIVER_KERNELS_CUDA_ARCHS and rebuild"
        )
    return None


def reasons_against_device_and_dtype(device_type: str, *dtypes: torch.dtype) -> list[str]:
    """What every CUDA kernel asks of its tensors."""
    reasons = []
    if device_type != "cuda":
        reasons.append(f"cuda takes CUDA tensors, got {device_type}")
    for dtype in dict.fromkeys(dtypes):
        if dtype not in ELEMENT_TYPES:
            name = str(dtype).removeprefix("torch.")
            reasons.append(f"cuda takes bfloat16, float16 and float32, got {name}")
    return reasons


def reasons_against_attending(device_type: str, dtype: torch.dtype) -> list[str]:
    """What the kernels of Hopper's own instructions ask of tensors, of the GPU and of the build."""
    reasons = reasons_against_device_and_dtype(device_type, dtype) or reasons_against_hopper()
    if dtype == torch.float32:
        reasons.append("cuda attends in bfloat16 and float16, got float32")
    return reasons


def reasons_against_hopper() -> list[str]:
    """What is missing of the GPU and of the build."""
    if torch.cuda.get_device_capability() != HOPPER:
        return ["cuda attends on compute capability 9.0 alone"]
    if "90a" not in build_info.read()["archs"]:
        return ["the CUDA library was built without 90a, which holds the kernels for Hopper"]
    return []


def address(tensor: Tensor | None) -> int:
    """A tensor's data pointer; 0, the null pointer, for no tensor and for an empty one."""
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def filled(params: Any, fields: dict[str, Any]) -> Any:
    """``params`` with every field set by name; a name that the struct lacks is an AttributeError."""
    for name, value in fields.items():
        setattr(params, name, value)
    return params


@functools.lru_cache(maxsize=4096)
def _fits(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether the copy engine can read such a tensor from an address of 16 bytes: can_describe, asked once."""
    *leading, last = strides
    return last == 1 and all(
        stride * itemsize % 16 == 0 and (stride > 0 or size == 1) for stride, size in zip(leading, shape, strict=False)
    )


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that the copy engine can read, even of one that repeats an axis."""
    if tensor.data_ptr() % 16 == 0 and _fits(tensor.shape, tensor.stride(), tensor.element_size()):
        return tensor
    tensor = describable(unit_stride(tensor))
    return tensor if can_describe(tensor) or tensor.numel() == 0 else tensor.contiguous()


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context whose device is the tensor's; nothing where that is the current one."""
    if torch._C._cuda_getDevice() == tensor.get_device():
        return nullcontext()
    return torch.cuda.device_of(tensor)


def stream_of(tensor: Tensor) -> int:
    """The handle of the current stream on the tensor's device; torch.cuda.current_stream takes ten times as long."""
    return int(torch._C._cuda_getCurrentRawStream(tensor.get_device()))
