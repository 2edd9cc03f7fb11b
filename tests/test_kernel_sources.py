"""Rules for the source of the Triton kernels whose breach no test on a CPU would show."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import perceiver_kernels

KERNELS = sorted((Path(perceiver_kernels.__file__).parent / "backends" / "triton").glob("*kernels.py"))


def divisions_by_what_a_loop_runs_over(source: str) -> Iterator[str]:
    """Divisions of a loop's index by a value of the program: primitives.loop_indices says what comes of them."""
    for loop in ast.walk(ast.parse(source)):
        if not (isinstance(loop, ast.For) and isinstance(loop.target, ast.Name)):
            continue
        for node in ast.walk(loop):
            if not (isinstance(node, ast.BinOp) and isinstance(node.op, (ast.FloorDiv, ast.Mod))):
                continue
            names = {name.id for name in ast.walk(node.left) if isinstance(name, ast.Name)}
            constant = isinstance(node.right, ast.Constant) or (isinstance(node.right, ast.Name) and node.right.id.isupper())
            if loop.target.id in names and not constant:
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_loops_do_not_divide_by_what_may_be_zero(path: Path) -> None:
    assert list(divisions_by_what_a_loop_runs_over(path.read_text())) == []


def test_such_a_division_is_found() -> None:
    source = "for t in tl.range(0, n * G):\n    a = t // BLOCK + t % 4\n    b = (t + 1) % n\n"
    assert list(divisions_by_what_a_loop_runs_over(source)) == ["line 3: (t + 1) % n"]
    assert len(KERNELS) > 5
