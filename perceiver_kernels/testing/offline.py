"""Compilation of the Triton kernels without a GPU, and what the compiler says of the result.

The real launchers run on CPU tensors under a stand-in for Triton's driver: every launch is compiled exactly as the GPU named
would compile it (types, divisibility, constants, options) and then not executed. So all that a launcher launches is covered,
and nothing here repeats a kernel's signature. Triton does not fail when a kernel asks for more shared memory than the device
has: callers compare ``Resources.shared`` with the device's limit.

Must run in a process without TRITON_INTERPRET. It patches private parts of Triton 3.6 (the one pinned for tests).
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import make_launcher
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from perceiver_kernels.backends.triton import attention, attention_call, pack, rotary, shared_kv
from perceiver_kernels.device import DeviceFacts
from perceiver_kernels.masks import NO_MASKS, Masks
from perceiver_kernels.positions import FourierPositions, rotary_tables
from perceiver_kernels.testing.cases import AttentionCase
from perceiver_kernels.testing.sass import early_accesses, global_access_bits

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """One compiled launch: registers and spilled bytes a thread, shared memory a block, counts of SASS instructions.

    ``stack`` is what ptxas could not keep in registers; ``mma`` counts tensor-core instructions of either generation, and
    ``wgmma_waits`` the waits for asynchronous ones; ``early`` are the instructions that did not wait
    for one. ``accesses`` counts loads from and stores to global memory by their width in bits.
    """

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, Any]
    registers: int
    stack: int
    shared: int
    mma: int
    wgmma: int
    wgmma_waits: int
    tma_loads: int
    early: tuple[str, ...]
    accesses: dict[int, int]

    @property
    def serialized(self) -> bool:
        """Whether ptxas waits after every single wgmma (its warnings C7510 to C7519): their latencies add up."""
        return self.wgmma > 1 and self.wgmma_waits >= self.wgmma


class _Driver:
    """What JITFunction.run asks of the active driver."""

    def __init__(self, facts: DeviceFacts) -> None:
        major, minor = facts.capability
        self.target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Kernels keep what they compiled by device: one number for each target.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.lru_cache(maxsize=512)
def _machine_code(cubin: bytes) -> dict[str, Any]:
    """What the machine code of one kernel says, as fields of Resources; chunks launch the same one many times."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [[TOOLS / "cuobjdump", "-res-usage", file.name], [TOOLS / "nvdisasm", "-c", "-ndf", file.name]]
        usage, sass = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    counted = {
        "mma": r"\bHG?MMA", "wgmma": r"\bHGMMA", "wgmma_waits": r"\bWARPGROUP\.DEPBAR", "tma_loads": r"\bUTMALDG",
    }  # fmt: skip
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in counted.items()}
    found = {"early": tuple(early_accesses(sass)), "accesses": global_access_bits(sass)}
    return {"registers": int(match[1]), "stack": int(match[2])} | found | counts


def _resources(function: JITFunction, compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> Resources:
    return Resources(
        kernel=function.fn.__name__,
        grid=grid,
        constants={name: value for name, value in arguments.items() if name.isupper() or name == "num_warps"},
        shared=compiled.metadata.shared,
        **_machine_code(compiled.asm["cubin"]),
    )


def _write_launcher(compiled: Any) -> None:
    """Triton writes a launcher when a kernel first runs: it refuses arguments that compile, such as nested descriptors."""
    constants = {(names.index(key),) if isinstance(key, str) else key: value for names in [compiled.src.fn.arg_names]
                 for key, value in compiled.src.constants.items()}  # fmt: skip
    signature = dict(compiled.src.signature.items())
    make_launcher(constants, signature, getattr(compiled.metadata, "tensordesc_meta", None))


@contextmanager
def offline(facts: DeviceFacts) -> Iterator[list[Resources]]:
    """Launchers plan for ``facts`` and compile for its capability; the list collects each launch instead of running it."""
    launches: list[Resources] = []
    saved_run, saved_driver = JITFunction.run, driver._active
    saved_facts = {module: module.device_facts for module in (shared_kv, pack, attention_call, rotary)}

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = saved_run(self, *args, grid=grid, warmup=True, **kwargs)
        _write_launcher(compiled)
        launches.append(_resources(self, compiled, tuple(grid), kwargs))
        return compiled

    JITFunction.run, driver._active = run, _Driver(facts)
    for module in saved_facts:
        module.device_facts = lambda device: facts
    try:
        yield launches
    finally:
        JITFunction.run, driver._active = saved_run, saved_driver
        for module, function in saved_facts.items():
            module.device_facts = function


def compile_shared_kv(
    C: int, dtype: torch.dtype, facts: DeviceFacts, *, masked: bool = False, lengths: bool = False, dropout: bool = False,
    passes: tuple[str, ...] = ("forward", "dq", "dx"), sizes: tuple[int, int, int] = (2, 64, 8192),
) -> list[Resources]:  # fmt: skip
    """Every launch of shared-KV attention with ``C`` (padded) channels: its forward, and backwards for q and for x.

    ``sizes`` are B, R and M. Triton compiles anew for sizes that 16 divides and for sizes of 1; those given divide by 16, as
    real ones do, and make several splits, chunks and tiles.
    """
    B, R, M = sizes
    q, x = torch.empty(B, R, C, dtype=dtype), torch.empty(B, M, C, dtype=dtype)
    key_mask = torch.ones(B, M, dtype=torch.bool) if masked else None
    seen = torch.ones(B, dtype=torch.int32) if lengths else None
    options: dict[str, Any] = {
        "scale": 1.0,
        "dropout_p": 0.1 if dropout else 0.0,
        "dropout_seed": torch.zeros(1, dtype=torch.int64) if dropout else None,
        "key_offset": 0,
    }
    rows = torch.empty(q.shape[:2])
    with offline(facts) as launches:
        if "forward" in passes:
            shared_kv.shared_kv_attention_forward(q, x, key_mask, seen, **options)
        for name in ("dq", "dx"):
            if name in passes:
                drho = rows if dropout else None
                delta = shared_kv.shared_kv_attention_delta(q, q.float(), None, drho, rows)
                shared_kv.shared_kv_attention_backward(
                    q, delta, drho, q, x, rows, key_mask, seen, **options, needs_dq=name == "dq", needs_dx=name == "dx"
                )
    return launches


def compile_attention(
    case: AttentionCase, dtype: torch.dtype, facts: DeviceFacts, *, masks: Masks = NO_MASKS, dropout: bool = False,
    segments: int = 1, H_kv: int | None = None,
) -> list[Resources]:  # fmt: skip
    """Every launch of attention, forward and backward, at the sizes of ``case``."""
    query, key, value = (
        torch.empty(case.B, heads, length, width, dtype=dtype)
        for heads, length, width in (
            (case.H, case.Lq, case.d_qk), (H_kv or case.H, case.Lk, case.d_qk), (H_kv or case.H, case.Lk, case.d_v)
        )
    )  # fmt: skip
    keys, values = (tuple(part.chunk(segments, 2)) for part in (key, value))
    options: dict[str, Any] = {
        "scale": 0.1,
        "dropout_p": 0.1 if dropout else 0.0,
        "dropout_seed": torch.zeros(1, dtype=torch.int64) if dropout else None,
    }
    with offline(facts) as launches:
        out, lse, statistics = attention.attention_forward(query, keys, values, masks, **options)
        dout = torch.empty_like(out, dtype=dtype)
        attention.attention_backward(dout, None, out, lse, statistics, query, keys, values, masks, **options)
    return launches


def compile_pack(
    C_content: int, dtype: torch.dtype, facts: DeviceFacts, *, positions: str = "none", masked: bool = False,
    constants: int = 0,
) -> list[Resources]:  # fmt: skip
    """Every launch of pack_inputs, forward and backward; positions: "none", "shared", "batched" or "fourier"."""
    B, M = 8, 1024
    table = FourierPositions(64, (224.0, 224.0)).table() if positions == "fourier" else None
    given = {"none": None, "shared": torch.empty(M, 16), "batched": torch.empty(B, M, 16), "fourier": torch.empty(M, 2)}[
        positions
    ]
    content = torch.empty(B, M, C_content, dtype=dtype)
    key_mask = torch.ones(B, M, dtype=torch.bool) if masked else None
    channels = C_content + (0 if given is None else given.shape[-1] if table is None else table.shape[-1])
    with offline(facts) as launches:
        packed, rstd = pack.pack_inputs_forward(
            content, given, table, key_mask, normalize=True, eps=1e-5, dtype=dtype, constants=constants
        )
        pack.pack_inputs_backward(
            packed, packed, rstd, content_channels=C_content, channels=channels, normalize=True, dtype=dtype
        )
    return launches


def compile_rotary(
    B: int, H: int, L: int, d: int, width: int, dtype: torch.dtype, facts: DeviceFacts, *, interleaved: bool = False,
    heads_inside_rows: bool = True, table_dtype: torch.dtype = torch.float32,
) -> Resources:  # fmt: skip
    """The launch of rotary_embedding on x [B, H, L, d], which lies in memory as [B, L, H * d] unless told."""
    x = torch.empty(B, L, H, d, dtype=dtype).transpose(1, 2) if heads_inside_rows else torch.empty(B, H, L, d, dtype=dtype)
    cos, sin = (table.to(table_dtype) for table in rotary_tables(L, width))
    with offline(facts) as launches:
        rotary.rotary_embedding(x, cos, sin, interleaved=interleaved, inverse=False)
    return launches[0]
