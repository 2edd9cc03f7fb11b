"""`perceiver-kernels info`: what is installed here, which backends can run, and why the others cannot.

Every probe is guarded: a broken driver, a missing compiler or a half-installed package is a line in the
answer, never an error.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_kernels.cli.console import Console

HELP = "explain the environment: versions, GPU, backends and why some are not available; never fails"
EXTRAS = {
    "rich": "coloured tables and progress bars",
    "matplotlib": "plots",
    "scikit-image": "the default photographs of `run`",
    "psutil": "free memory on systems without /proc",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments: none of its own."""


def execute(arguments: argparse.Namespace, console: Console) -> int:
    """Print the environment; exit code 0 whatever is missing."""
    from perceiver_kernels.cli.report import Report

    with Report("info", arguments.json) as report:
        show(report.content["environment"], console)
    return 0


def collect() -> dict[str, Any]:
    """Return the environment as plain values; a probe that fails leaves its reason as text."""
    return {
        "perceiver_kernels": _guard(_version),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _guard(_cpu),
        "torch": _guard(_torch),
        "triton": _guard(_version_of, "triton"),
        "numpy": _guard(_version_of, "numpy"),
        "nvcc": _guard(_nvcc),
        "gpus": _guard(_gpus),
        "driver": _guard(_driver),
        "build": _guard(_build),
        "backends": _guard(_backends),
        "allowed_backends": _guard(_allowed_backends),
        "environment_variables": {k: v for k, v in os.environ.items() if k.startswith("PERCEIVER_KERNELS_")},
        "extras": {name: _guard(_version_of, name) for name in EXTRAS},
    }


def show(environment: dict[str, Any], console: Console) -> None:
    """Print what `collect` returned."""
    console.heading("Environment")
    rows = [
        [name, _sentence(environment[name])] for name in ("perceiver_kernels", "python", "platform", "cpu")
    ]
    rows += [[name, _sentence(environment[name])] for name in ("torch", "triton", "numpy", "nvcc", "driver")]
    rows.append(["CUDA library", _build_sentence(environment["build"])])
    gpus = environment["gpus"]
    rows += (
        [["gpu", _sentence(gpu)] for gpu in gpus] if isinstance(gpus, list) and gpus else [["gpu", "none"]]
    )
    rows += [[name, value] for name, value in environment["environment_variables"].items()]
    console.table(["what", "found"], rows)
    console.heading("Backends")
    show_backends(environment["backends"], console)
    console.line(f"\nallowed, in this order: {environment['allowed_backends']}")
    console.heading("Optional packages")
    console.table(
        ["package", "version", "for"],
        [[name, version, EXTRAS[name]] for name, version in environment["extras"].items()],
    )


def show_backends(backends: Any, console: Console) -> None:
    """Print the table of backends: available or why not."""
    if not isinstance(backends, dict):
        console.warn(str(backends))
        return
    rows = [
        [name, "yes" if entry["available"] else "no", entry["reason"]] for name, entry in backends.items()
    ]
    console.table(["backend", "available", "why"], rows)


def device_line(environment: dict[str, Any]) -> str:
    """Return one line naming the device and the versions that a measurement depends on."""
    gpus, torch_facts = environment["gpus"], environment["torch"]
    cpu = environment["cpu"]
    host = f"CPU with {cpu['cores']} cores, {cpu['threads']} threads" if isinstance(cpu, dict) else "CPU"
    device = gpus[0]["name"] if isinstance(gpus, list) and gpus else host
    version = torch_facts["version"] if isinstance(torch_facts, dict) else torch_facts
    return f"{device}; torch {version}, triton {environment['triton']}"


def _guard(probe: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return probe(*arguments)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"not found out: {type(error).__name__}: {error}".splitlines()[0]


def _version() -> str:
    from perceiver_kernels.version import __version__

    return __version__


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        module = {"scikit-image": "skimage"}.get(distribution, distribution.replace("-", "_"))
        if importlib.util.find_spec(module) is None:
            return "not installed"
        return str(getattr(importlib.import_module(module), "__version__", "installed, version unknown"))


def _cpu() -> dict[str, Any]:
    import torch

    from perceiver_kernels.cli.measure import free_bytes

    free = free_bytes(torch.device("cpu"))
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "free_bytes": free}


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "cuda_available": torch.cuda.is_available(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "l2_bytes": properties.L2_cache_size,
            }
        )
    return gpus


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "no nvidia-smi"
    query = ["--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    answer = subprocess.run([program, *query], capture_output=True, text=True, timeout=20, check=False)
    line = (answer.stdout or answer.stderr).strip().splitlines()[0]
    return line if answer.returncode else "{} (now at SM {}, memory {})".format(*re.split(r",\s*", line))


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if program is None:
        return "not found on PATH or in CUDA_HOME"
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False)
    release = re.search(r"release ([\d.]+)", answer.stdout)
    return release.group(1) if release else "found, version unknown"


def _build() -> Any:
    from perceiver_kernels import build_info

    facts = build_info.read()
    return facts | {"stale": build_info.is_stale(facts)}


def _build_sentence(facts: Any) -> str:
    if not isinstance(facts, dict):
        return str(facts)
    if not facts["cuda_built"]:
        return f"not built: {facts['reason']}"
    stale = "; csrc has changed since: build again" if facts["stale"] else ""
    return f"built for {', '.join(facts['archs'])} with nvcc {facts['nvcc']}{stale}"


def _backends() -> dict[str, dict[str, Any]]:
    from perceiver_kernels.dispatch import backends

    return {name: {"available": found, "reason": reason} for name, (found, reason) in backends().items()}


def _allowed_backends() -> str:
    """What calls may use that name no backend themselves."""
    from perceiver_kernels.dispatch import ENVIRONMENT_VARIABLE, candidates

    if not os.environ.get(ENVIRONMENT_VARIABLE, "").strip():
        return "whatever is available"
    try:
        return f"{', '.join(candidates('attention', None))} (by {ENVIRONMENT_VARIABLE})"
    except ValueError as error:
        return str(error)


def _sentence(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(
        f"{name.replace('_', ' ')} {_readable(name, item)}"
        for name, item in value.items()
        if item is not None
    )


def _readable(name: str, value: Any) -> str:
    from perceiver_kernels.cli.console import format_bytes

    return format_bytes(value) if name.endswith("bytes") and isinstance(value, int) else str(value)
