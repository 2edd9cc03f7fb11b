"""`perceiver-kernels check --kernels`: what the compiler made of the CUDA C++ kernels that are built here.

Registers, spills and instructions are read from the library's machine code by the CUDA toolkit's cuobjdump, which Triton's
package brings too.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perceiver_kernels import build_info
from perceiver_kernels.backends.cuda import binding
from perceiver_kernels.cli.console import Console, format_bytes
from perceiver_kernels.cli.report import CommandError, Report

LIBRARY = build_info.PACKAGE / "libperceiver_kernels.so"
# Machine instructions: warpgroup products, bulk copies of tiles and of runs, accesses of spilled registers.
_COUNTED = {"wgmma": ("HGMMA",), "tma": ("UTMALDG", "UBLKCP"), "spills": ("STL", "LDL")}


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture; ``shared_bytes`` a block is None where it depends on the call."""

    name: str
    variant: str
    arch: str
    registers: int
    stack_bytes: int
    shared_bytes: int | None
    wgmma: int
    tma: int
    spills: int


def disassembler() -> Path | None:
    """Return cuobjdump, of the CUDA toolkit or of Triton's package; None where neither is here."""
    triton = importlib.util.find_spec("triton")
    places = [Path(os.environ.get(name, "")) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places.append(Path("/usr/local/cuda/bin"))
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    on_path = shutil.which("cuobjdump")
    found = [Path(on_path)] if on_path else [place / "cuobjdump" for place in places if (place / "cuobjdump").is_file()]
    return found[0] if found else None


def built_kernels() -> list[Kernel]:
    """Return every kernel of the library.

    Raises:
        CommandError: there is no library, or nothing that reads it.
    """
    if not build_info.read()["cuda_built"]:
        raise CommandError(f"--kernels: the CUDA library is not built: {build_info.read()['reason']}")
    tool = disassembler()
    if tool is None:
        raise CommandError("--kernels: cuobjdump is not here; the CUDA toolkit and the package triton bring it")
    usage, code = (
        subprocess.run([tool, option, LIBRARY], check=True, capture_output=True, text=True).stdout
        for option in ("-res-usage", "-sass")
    )
    counts = instructions(code)
    return [_kernel(arch, symbol, used, counts[arch, symbol]) for (arch, symbol), used in resources(usage).items()]


def resources(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """Return (architecture, symbol) -> REG and STACK, of what `cuobjdump -res-usage` prints."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    arch = symbol = ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match.group(1)
        elif match := re.match(r" *Function (\w+):", line):
            symbol = match.group(1)
        elif match := re.match(r" *REG:(\d+) STACK:(\d+)", line):
            found[arch, symbol] = {"REG": int(match.group(1)), "STACK": int(match.group(2))}
    return found


def instructions(text: str) -> collections.defaultdict[tuple[str, str], collections.Counter[str]]:
    """Return (architecture, symbol) -> how often each of _COUNTED occurs, of what `cuobjdump -sass` prints."""
    found: collections.defaultdict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    arch = symbol = ""
    pattern = re.compile(r"/\*[0-9a-f]+\*/ +(?:@!?U?P\w+ +)?([A-Z]\w*)")
    kinds = {name: kind for kind, names in _COUNTED.items() for name in names}
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function : (\w+)", line):
            symbol = match.group(1)
        elif (match := pattern.search(line)) and match.group(1) in kinds:
            found[arch, symbol][kinds[match.group(1)]] += 1
    return found


def _kernel(arch: str, symbol: str, used: dict[str, int], counts: collections.Counter[str]) -> Kernel:
    name, variant = split_symbol(symbol)
    columns = re.search(r"ShapeOfILi(\d+)E", symbol)
    of_shape = f"{name}_long" if "LongShapeOf" in symbol else name
    shared = int(binding().shared_bytes(of_shape, int(columns.group(1)))) or None if columns else None
    return Kernel(name, variant, arch, used["REG"], used["STACK"], shared, counts["wgmma"], counts["tma"], counts["spills"])


def split_symbol(symbol: str) -> tuple[str, str]:
    """Return a kernel's name and what tells it from its like: the columns of a Hopper kernel, element types, a mask."""
    match = re.match(r"_ZN9perceiver(\d+)(\w+)", symbol)
    if match is None:
        return symbol, ""
    length = int(match.group(1))
    name, rest = match.group(2)[:length].removesuffix("_kernel"), match.group(2)[length:]
    parts = [columns.group(1) for columns in re.finditer(r"ShapeOfILi(\d+)E", rest)]
    parts += ["long"] if "LongShapeOf" in rest else []
    parts += [{"13__nv_bfloat16": "bf16", "6__half": "fp16"}[found] for found in re.findall(r"13__nv_bfloat16|6__half", rest)]
    if rest.startswith("If") or "EfE" in rest:
        parts.append("fp32")
    return name, " ".join([*parts, *(["masked"] if "ELb1E" in rest else [])])


def show(console: Console, report: Report) -> None:
    """Print a row for each kernel of Hopper's own, one for the instances of each other kernel; the report gets them all."""
    kernels = built_kernels()
    for kernel in kernels:
        report.add(kind="kernel", **asdict(kernel))
    console.heading(f"CUDA C++ kernels of {LIBRARY.name}")
    groups: dict[tuple[str, ...], list[Kernel]] = {}
    for kernel in sorted(kernels, key=_order):
        key = (kernel.name, kernel.arch, kernel.variant if kernel.wgmma else "")
        groups.setdefault(key, []).append(kernel)
    rows = [[name, variant or f"{len(of)} instances", arch, *_cells(of)] for (name, arch, variant), of in groups.items()]
    console.table(["kernel", "variant", "arch", "registers", "spills", "shared", "wgmma", "TMA"], rows)


def _order(kernel: Kernel) -> tuple[Any, ...]:
    columns, *rest = kernel.variant.split() or ["0"]
    return kernel.arch, kernel.name, int(columns) if columns.isdigit() else 0, rest


def _cells(kernels: list[Kernel]) -> list[Any]:
    registers = [kernel.registers for kernel in kernels]
    few, many = min(registers), max(registers)
    (shared,) = {kernel.shared_bytes for kernel in kernels}
    return [
        str(many) if few == many else f"{few}..{many}", str(sum(kernel.spills for kernel in kernels)),
        "-" if shared is None else format_bytes(shared), str(max(kernel.wgmma for kernel in kernels)),
        str(max(kernel.tma for kernel in kernels)),
    ]  # fmt: skip
