"""Compilation of the Triton kernels without a GPU, and what the compiler says of the result.

``compile_kernel`` must run in a process without TRITON_INTERPRET. Triton does not fail when a kernel asks for more shared
memory than the device has: callers compare ``Resources.shared`` with the device's limit.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from perceiver_kernels.backends.triton import combine, pack_kernels, shared_kv_kernels
from perceiver_kernels.tiles import Tile

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_POINTERS = {
    "q": None, "dz": None, "z": "fp32", "dq": "fp32", "dx": None, "lse": "fp32", "rho": "fp32", "delta": "fp32", "drho": "fp32",
    "key_mask": "i1", "lengths": "i32", "seed": "i64",
}  # fmt: skip
_SCALARS = {"inverse_keep": "fp32", "scale": "fp32", "scale_log2": "fp32", "threshold": "i64"}


@dataclass(frozen=True)
class Resources:
    """Registers a thread, spill bytes a thread, shared memory a block, and counts of SASS instructions."""

    registers: int
    stack: int
    shared: int
    wgmma: int
    tma_loads: int
    asm: dict[str, Any]


def _inspect(kernel: Any) -> Resources:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True
        ).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Resources(
        registers,
        stack,
        kernel.metadata.shared,
        len(re.findall("HGMMA", sass)),
        len(re.findall("UTMALDG", sass)),
        kernel.asm,
    )


def _compile(
    fn: Any, signature: dict[str, Any], constants: dict[str, Any], capability: int, warps: int
) -> Resources:
    names = list(signature)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if str(signature[name]).startswith("*") or name.startswith("stride_") or name in ("C", "C_padded")
    }
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return _inspect(kernel)


KERNELS = {
    "forward": shared_kv_kernels._shared_kv_fwd_kernel,
    "dq": shared_kv_kernels._shared_kv_bwd_dq_kernel,
    "dx": shared_kv_kernels._shared_kv_bwd_dx_kernel,
}


def compile_shared_kv(
    kind: str, tile: Tile, dtype: torch.dtype, *, capability: int = 90, tma: bool = True, masked: bool = False,
    lengths: bool = False, dropout: bool = False, precision: str = "tf32",
) -> Resources:  # fmt: skip
    """Compile one shared-KV kernel ("forward", "dq" or "dx") with ``tile`` for ``capability`` (80, 90)."""
    fn, element = KERNELS[kind], TYPES[dtype]
    constants = {
        "PIECES": tile.pieces, "BLOCK_Q": tile.block_q, "BLOCK_KV": tile.block_kv, "STAGES": tile.num_stages, "TMA": tma,
        "MASKED": masked, "HAS_LENGTHS": lengths, "DROPOUT": dropout, "HAS_DRHO": dropout, "PRECISION": precision,
    }  # fmt: skip
    described = {"forward": ("x",), "dq": ("x",), "dx": ("rows",)}[kind] if tma else ()
    rows = 2 * tile.block_q if kind == "dx" else tile.block_kv
    absent = {
        name
        for name, on in (("key_mask", masked), ("lengths", lengths), ("seed", dropout), ("drho", dropout))
        if not on
    }
    signature: dict[str, Any] = {}
    for name in fn.arg_names:
        if name in constants or name in absent:
            signature[name] = "constexpr"
        elif name.split("_")[0] in described and name.split("_")[-1] in (*described, "1", "2"):
            piece = int(name[-1]) if name[-1].isdigit() else 0
            if piece < len(tile.pieces):
                signature[name] = f"tensordesc<{element}[1, {rows}, {tile.pieces[piece]}]>"
            else:
                signature[name] = "constexpr"
                absent.add(name)
        elif name[-2:] in ("_1", "_2"):
            signature[name] = "constexpr"
            absent.add(name)
        elif name in _POINTERS or name in ("x", "rows"):
            signature[name] = "*" + (_POINTERS.get(name) or element)
        else:
            signature[name] = _SCALARS.get(name, "i32")
    constants = {name: value for name, value in constants.items() if name in fn.arg_names} | dict.fromkeys(
        absent & set(fn.arg_names)
    )
    return _compile(fn, signature, constants, capability, tile.num_warps)
