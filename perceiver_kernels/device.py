"""Facts about a device that planning depends on; the only module that queries the hardware."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Shared memory one thread block may use, by compute capability (CUDA C++ Programming Guide, compute capabilities).
_SMEM_BYTES = {(8, 0): 166_912, (8, 6): 101_376, (8, 7): 166_912, (8, 9): 101_376, (9, 0): 232_448, (12, 0): 101_376}

# Dense 16-bit matrix FLOPs per clock and multiprocessor, by major compute capability.
_MATMUL_FLOPS_PER_CLOCK = {8: 2048, 9: 4096, 10: 8192, 12: 2048}


@dataclass(frozen=True)
class DeviceFacts:
    """What the planner needs to know of one device; rates are ceilings that large library kernels reach."""

    name: str
    type: str
    capability: tuple[int, int]
    sm_count: int
    smem_bytes: int
    matmul_flops: float
    """Dense bf16 products per second, in FLOP/s."""
    memory_bandwidth: float
    """Device copy, bytes read plus bytes written per second."""

    @property
    def has_tma(self) -> bool:
        """Whether bulk tensor copies (TMA descriptors) exist."""
        return self.type == "cuda" and self.capability >= (9, 0)


# 788 TFLOP/s (8192^3 bf16 product, random data) and 4.3 TB/s (8.6 GB copy) were measured on an H200.
H200 = DeviceFacts("NVIDIA H200", "cuda", (9, 0), 132, 232_448, 788e12, 4.3e12)
# The same on an H100 SXM: 785 TFLOP/s and 3.0 TB/s.
H100 = DeviceFacts("NVIDIA H100", "cuda", (9, 0), 132, 232_448, 785e12, 3.0e12)
# 0.8 of the published peaks of an A100-SXM4-80GB: 312 TFLOP/s and 2.04 TB/s.
A100 = DeviceFacts("NVIDIA A100", "cuda", (8, 0), 108, 166_912, 250e12, 1.7e12)
# Two desktop cores with AVX2: a scale, so that plans can be compared on a machine without GPU.
CPU = DeviceFacts("cpu", "cpu", (0, 0), 1, 1 << 30, 0.1e12, 20e9)


# A plain dictionary, because torch.compile reads one but sees through functools.cache.
_cuda_facts: dict[int, DeviceFacts] = {}


def _query_cuda(index: int) -> DeviceFacts:
    properties = torch.cuda.get_device_properties(index)
    for known in (H200, H100):
        if known.name in properties.name and properties.multi_processor_count == known.sm_count:
            return known
    capability = (properties.major, properties.minor)
    clock = getattr(properties, "clock_rate", 1_500_000) * 1e3
    flops = _MATMUL_FLOPS_PER_CLOCK.get(properties.major, 1024) * properties.multi_processor_count * clock
    bus = getattr(properties, "memory_bus_width", 4096) / 8 * getattr(properties, "memory_clock_rate", 1_600_000) * 2e3
    return DeviceFacts(
        name=properties.name,
        type="cuda",
        capability=capability,
        sm_count=properties.multi_processor_count,
        smem_bytes=_SMEM_BYTES.get(capability, getattr(properties, "shared_memory_per_block_optin", 49_152)),
        matmul_flops=0.8 * flops,
        memory_bandwidth=0.85 * bus,
    )


def device_facts(device: torch.device) -> DeviceFacts:
    """Facts of ``device``; a CPU gets nominal figures, so that plans can be made and read anywhere."""
    if device.type != "cuda":
        return CPU
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in _cuda_facts:
        _cuda_facts[index] = _query_cuda(index)
    return _cuda_facts[index]


def float32_precision() -> str:
    """How float32 products are computed: ``"tf32"`` where torch allows it for matmul, else ``"ieee"``."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
