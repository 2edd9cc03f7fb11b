"""What an installation knows of its build: whether the CUDA library was built, for which GPUs; if not, why.

Imports the standard library only: setup.py loads this file before anything is installed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
FILE_NAME = "_build_info.json"
SOURCE_SUFFIXES = (".cpp", ".cu", ".cuh", ".h")
NOT_BUILT = {"cuda_built": False, "reason": "the CUDA library was never built in this source tree"}


def source_hash(root: Path) -> str:
    """A hash of the CUDA sources and their build file under the source tree ``root``."""
    digest = hashlib.sha256()
    sources = (path for path in (root / "csrc").rglob("*") if path.suffix in SOURCE_SUFFIXES)
    for path in [root / "CMakeLists.txt", *sorted(sources)]:
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write(package: Path, info: dict[str, Any]) -> None:
    (package / FILE_NAME).write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")


def read() -> dict[str, Any]:
    """The record that setup.py left in the package.

    Returns:
        ``cuda_built`` (bool), ``reason`` (a sentence, or None when built), and when built ``archs`` (such as
        "80", "90a"), ``nvcc``, ``source_hash`` and ``kernels`` (what ptxas reported of them).
    """
    path = PACKAGE / FILE_NAME
    return json.loads(path.read_text()) if path.is_file() else dict(NOT_BUILT)


def is_stale(info: dict[str, Any]) -> bool:
    """Whether CUDA sources lie beside the package and are no longer those that were built."""
    root = PACKAGE.parent
    return info["cuda_built"] and (root / "csrc").is_dir() and info["source_hash"] != source_hash(root)
