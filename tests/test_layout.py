"""Rules of the source tree that a reader relies on and no linter knows: sizes, layers, words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "perceiver_kernels"
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 400, 60, 120
CODE = (".py", ".cu", ".cuh", ".cpp", ".h")


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in CODE and "__pycache__" not in p.parts)


def modules(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if "__pycache__" not in path.parts]


def test_files_have_one_subject() -> None:
    folders = ("perceiver_kernels", "csrc", "tests", "benchmarks", "examples")
    lengths = {path: len(path.read_text().splitlines()) for path in sources(*folders)}
    assert len(lengths) > 50
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_FILE} == {}


def test_functions_fit_a_screen() -> None:
    long = {}
    for path in modules(PACKAGE):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                jitted = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                lines = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
                if lines > (MAX_KERNEL if jitted else MAX_FUNCTION):
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert long == {}


@pytest.mark.parametrize("folder", ["nn", "models"])
def test_layers_and_models_do_not_choose_kernels(folder: str) -> None:
    """How an operation is computed is decided below: model code never says the word."""
    found = modules(PACKAGE / folder)
    assert found
    assert [str(path) for path in found if re.search("backend", path.read_text(), re.IGNORECASE)] == []


def texts_made_at_every_call(source: str) -> Iterator[str]:
    """Layouts of check_tensor that are no constants, nor picked from some."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "check_tensor":
            for layout in node.args[2:3]:
                if not isinstance(layout, (ast.Constant, ast.Subscript)):
                    yield f"line {node.lineno}: {ast.unparse(layout)}"


def test_sizes_are_told_when_they_are_wrong() -> None:
    """torch.compile makes a constant of a size that a text tells, and would compile again for every other one."""
    assert {str(path): found for path in modules(PACKAGE) if (found := list(texts_made_at_every_call(path.read_text())))} == {}
    source = 'check_tensor("x", x, f"[B] with B={B}", (B,))\ncheck_tensor("x", x, "[B]", (B,))\n'
    assert list(texts_made_at_every_call(source)) == ["line 1: f'[B] with B={B}'"]


def test_contracts_of_imports_name_every_module() -> None:
    """A list that forbids, or is forbidden, lacks a new module until somebody thinks of it."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    listed = {contract["name"]: contract for contract in contracts}
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    core = {f"perceiver_kernels.{name}" for name in names - {"__init__", "__main__", "cli", "testing"}}
    specification = listed["The specification imports torch alone"]
    assert core == {*specification["source_modules"], *specification["forbidden_modules"]}
    assert core == {*listed["The core knows neither the command line nor the tests' helpers"]["source_modules"]}


def test_cuda_sources_know_nothing_of_torch() -> None:
    """Kernels take plain structs; only names in comments may mention it."""
    found = list(sources("csrc"))
    assert found
    pattern = re.compile(r"#include\s*[<\"](torch|ATen|c10)|\b(at|c10|torch)::")
    assert [str(path) for path in found if pattern.search(path.read_text())] == []


def test_triton_is_imported_by_its_own_modules_alone() -> None:
    """The package works where Triton is not installed."""
    allowed = {PACKAGE / "backends" / "triton", PACKAGE / "testing"}
    importing = [
        str(path.relative_to(ROOT))
        for path in modules(PACKAGE)
        if re.search(r"^\s*(import|from) triton", path.read_text(), re.MULTILINE) and not allowed & set(path.parents)
    ]
    assert importing == []
    assert not re.search(r"^(import|from) triton", (PACKAGE / "backends" / "triton" / "__init__.py").read_text(), re.MULTILINE)


def test_nothing_is_added_atomically() -> None:
    """Results are the same bits in every run: partials are reduced in a fixed order."""
    found = [
        path for path in sources("perceiver_kernels/backends", "csrc") if re.search(r"atomic_?add", path.read_text(), re.I)
    ]
    assert [str(path) for path in found] == []


def test_one_environment_variable_chooses_at_run_time() -> None:
    """Others may be read where things are built or where Triton itself defines them."""
    read = {}
    for path in modules(PACKAGE):
        for name in re.findall(r"environ(?:\.get\(|\[)\s*[\"']([A-Z_]+)", path.read_text()):
            read.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    assert {name for name in read if name.startswith("PERCEIVER")} <= {"PERCEIVER_KERNELS_BACKEND"}
    assert 'ENVIRONMENT_VARIABLE = "PERCEIVER_KERNELS_BACKEND"' in (PACKAGE / "dispatch.py").read_text()
