"""Builds the package: pure Python, and where nvcc is found the CUDA library and its binding (no torch).

PERCEIVER_KERNELS_BUILD_CUDA  auto (default): where the tools are, else record why not; 1: or fail; 0: never.
PERCEIVER_KERNELS_CUDA_ARCHS  CUDA architectures as CMake takes them (default "80;90a").
MAX_JOBS                      compilers at once (default: by cores and memory).

A compile error always fails: auto covers missing tools only.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90a"
# nvcc takes below 1 GiB per file of csrc; twice that leaves room for the rest of the machine.
GIB_PER_JOB = 2


def load_build_info():
    """perceiver_kernels/build_info.py by path: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("build_info", ROOT / "perceiver_kernels" / "build_info.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_info = load_build_info()


class MissingTool(Exception):
    """A tool of the CUDA build is not there; the message is a sentence."""


@dataclass(frozen=True)
class Tools:
    nvcc: str
    cmake: str
    ninja: str
    pybind11_include: str

    @classmethod
    def find(cls) -> Tools:
        return cls(find_nvcc(), find_program("cmake"), find_program("ninja"), find_pybind11())


def find_nvcc() -> str:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    under_homes = [f"{home}/bin/nvcc" for home in homes if home]
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *under_homes]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise MissingTool("no CUDA compiler: nvcc is neither on PATH nor under CUDA_HOME or /usr/local/cuda")


def find_program(name: str) -> str:
    # A virtual environment's programs are found also when it is not activated.
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        raise MissingTool(f"{name} is not on PATH (pip install {name})")
    return path


def find_pybind11() -> str:
    """pybind11's headers: the package's own, or the copy that every torch carries (which is not imported)."""
    for package, subfolder in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            include = Path(spec.origin).parent / subfolder
            if (include / "pybind11" / "pybind11.h").is_file():
                return str(include)
    raise MissingTool("the headers of pybind11 are not installed (pip install pybind11)")


def cuda_tools() -> tuple[Tools | None, str | None]:
    """The tools to build with, or None and the reason for building without CUDA."""
    choice = os.environ.get("PERCEIVER_KERNELS_BUILD_CUDA", "auto")
    if choice not in ("auto", "1", "0"):
        raise SystemExit(f"PERCEIVER_KERNELS_BUILD_CUDA must be auto, 1 or 0, got {choice!r}")
    if choice == "0":
        return None, "PERCEIVER_KERNELS_BUILD_CUDA=0 was set when the package was installed"
    try:
        return Tools.find(), None
    except MissingTool as missing:
        if choice == "1":
            raise SystemExit(f"PERCEIVER_KERNELS_BUILD_CUDA=1, but {missing}") from None
        return None, f"{missing}, when the package was installed"


TOOLS, REASON = cuda_tools()


def cuda_archs() -> str:
    return os.environ.get("PERCEIVER_KERNELS_CUDA_ARCHS") or DEFAULT_ARCHS


def job_count() -> int:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory_gib / GIB_PER_JOB)))


def nvcc_version(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"release [\d.]+, V([\d.]+)", output)
    return match.group(1) if match else "unknown"


def run_logged(command: list[str], log: Path) -> None:
    """Run ``command``, append its output to ``log``; show progress and complaints, on failure all of it."""
    lines = []
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with log.open("a") as file, subprocess.Popen(command, **pipe) as process:
        for line in process.stdout:
            file.write(line)
            lines.append(line)
            if line.startswith("[") or "warning" in line.lower() or "error" in line.lower():
                print(line, end="", flush=True)
    if process.returncode != 0:
        raise SystemExit("".join(lines) + f"\nthe CUDA build failed: {' '.join(command)}")


def ptxas_report(log: Path) -> dict:
    """Registers, spills and warnings of the kernels in the build log; a kernel's last compilation counts."""
    entry = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
    spill = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
    usage = re.compile(r"Used (\d+) registers")
    kernels: dict[tuple[str, str], dict[str, int]] = {}
    warnings: list[str] = []
    current: dict[str, int] = {}
    for line in log.read_text().splitlines():
        if match := entry.search(line):
            current = kernels[match.group(1), match.group(2)] = {"registers": 0, "spill_bytes": 0}
        elif match := spill.search(line):
            current["spill_bytes"] = int(match.group(1)) + int(match.group(2))
        elif match := usage.search(line):
            current["registers"] = int(match.group(1))
        elif "ptxas" in line and ("warning" in line or "Performance Loss" in line):
            warnings.append(line.strip())
    spilling = [f"{name} {arch}" for (name, arch), kernel in kernels.items() if kernel["spill_bytes"]]
    return {
        "count": len(kernels),
        "max_registers": max((kernel["registers"] for kernel in kernels.values()), default=0),
        "spilling": sorted(spilling),
        "warnings": warnings,
    }


class CMakeExtension(Extension):
    """The binding module; CMake builds it together with the library beside it."""

    def __init__(self, name: str):
        super().__init__(name, sources=[])


class BuildExtension(build_ext):
    def run(self) -> None:
        package = Path(self.get_ext_fullpath("perceiver_kernels._C")).resolve().parent
        package.mkdir(parents=True, exist_ok=True)
        if TOOLS is None:
            build_info.write(package, {"cuda_built": False, "reason": REASON})
            print(f"building without CUDA: {REASON}")
            return
        # In place, objects are kept beside the sources: the next build compiles only what changed.
        tag = f"cmake-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / tag if self.inplace else Path(self.build_temp).resolve() / tag
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "build.log"
        if not (folder / "CMakeCache.txt").exists():
            log.unlink(missing_ok=True)
        archs, source_hash = cuda_archs(), build_info.source_hash(ROOT)
        print(f"building the CUDA library for {archs} with {TOOLS.nvcc}, log in {log}", flush=True)
        settings = {
            "CMAKE_CUDA_COMPILER": TOOLS.nvcc,
            "CMAKE_MAKE_PROGRAM": TOOLS.ninja,
            "PERCEIVER_CUDA_ARCHS": archs,
            "PERCEIVER_OUTPUT_DIR": package,
            "PERCEIVER_PYBIND11_INCLUDE": TOOLS.pybind11_include,
            "Python_EXECUTABLE": sys.executable,
        }
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        run_logged([TOOLS.cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *definitions], log)
        run_logged([TOOLS.cmake, "--build", str(folder), "--parallel", str(job_count())], log)
        info = {
            "cuda_built": True,
            "reason": None,
            "archs": archs.split(";"),
            "nvcc": nvcc_version(TOOLS.nvcc),
            "source_hash": source_hash,
            "kernels": ptxas_report(log),
        }
        build_info.write(package, info)


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        if TOOLS is None:
            root = ROOT if self.editable_mode else Path(self.build_lib)
            build_info.write(root / "perceiver_kernels", {"cuda_built": False, "reason": REASON})


setup(
    # Here and not in pyproject.toml, whose form for it changed between the setuptools versions in use.
    license="Apache-2.0",
    ext_modules=[CMakeExtension("perceiver_kernels._C")] if TOOLS else [],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
