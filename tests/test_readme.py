"""The tables of the README and other documents are what the measurements give, and their links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from perceiver_kernels.dispatch import BACKENDS, TABLE

ROOT = Path(__file__).resolve().parents[1]


def load_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tables"] = module
    spec.loader.exec_module(module)
    return module


tables = load_tables()


def test_ten_lines_print_what_was_chosen() -> None:
    """That they run is seen in test_docs.py, with the code of all documents."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), {"__name__": "example"})
    assert "pack_inputs on" in printed.getvalue()


def test_ten_lines_are_ten_lines() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) == 10


def test_tables_are_what_the_results_give() -> None:
    for document in tables.DOCUMENTS:
        text = document.read_text()
        assert tables.rewritten(text, tables.published()) == text, "run python benchmarks/tables.py"


def test_every_table_that_was_measured_has_a_place_in_the_readme() -> None:
    marked = {match["name"] for document in tables.DOCUMENTS for match in tables.MARKED.finditer(document.read_text())}
    results = tables.published()
    assert {name for name, table in tables.TABLES.items() if table(results)} <= marked <= set(tables.TABLES)


def test_links_lead_somewhere() -> None:
    documents = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in ("benchmarks", "examples"))]
    for path in (*documents, *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def row(implementation: str, ms: float | None, **more: Any) -> dict[str, Any]:
    known = {
        "kind": "bench", "case": "imagenet", "pass": "forward", "implementation": implementation,
        "failure": None if ms else "cannot", "flops": 10**12, "tflops": 500.0, "of_floor": 0.5,
        "peak_extra_bytes": 2**28, "shape": {"M": 50_176, "C": 261},
    }  # fmt: skip
    return known | ({"p50_ms": ms} if ms else {}) | more


def report(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    environment = {"gpus": [{"name": "A GPU"}], "torch": {"version": "2.11"}, "triton": "3.6"}
    return {
        "started": "2026-11-23T00:00:00Z",
        "environment": environment,
        "dtype": "bfloat16",
        "rows": list(rows),
        **more,
    }


def test_layer_table_names_the_fastest_stock_that_ran() -> None:
    rows = [
        row("ours", 0.5),
        row("ours-chunked", 0.4),
        row("eager", 9.0),
        row("cudnn", 4.0),
        row("flash", None),
    ]
    rows.append(row("ours", 0.25, **{"pass": "forward-packed"}))
    lines = tables.layers({"layers": report(*rows, ceilings={"tflops": 788.0, "gbytes_per_s": 4300.0})})
    assert (
        lines[0] == "A GPU, bfloat16, torch 2.11, triton 3.6; ceilings 788 TFLOP/s and 4.3 TB/s, 2026-11-23."
    )
    assert lines[-2].split(" | ")[1:] == [
        "forward",
        "0.5",
        "500",
        "50 %",
        "0.25 GiB",
        "cudnn",
        "4",
        "0.25 GiB |",
    ]
    # Stock PyTorch has no packed form: it is compared with its forward.
    assert lines[-1].split(" | ")[1:3] == ["forward, packed once", "0.25"] and "| cudnn | 4 |" in lines[-1]


def test_a_useless_result_is_not_the_fastest() -> None:
    rows = [row("ours", 0.5), row("cudnn", 0.1, inaccurate="out: relative L2 error nan"), row("eager", 9.0)]
    lines = tables.layers({"layers": report(*rows)})
    assert "| eager | 9 |" in lines[-1]


def test_attention_table_holds_the_regimes_that_were_measured() -> None:
    """Two regimes have a case of one name: each is compared with its own stock rows."""
    backward = {"pass": "backward"}
    ceilings = {"tflops": 788.0, "gbytes_per_s": 4300.0}
    results = {
        "decode": report(row("ours", 1.5), row("cudnn", 1.6), row("ours", 3.6, **backward), ceilings=ceilings),
        "process": report(row("ours", 0.06), row("flash", 0.07), row("math", 0.9), ceilings=ceilings),
    }
    lines = tables.attention(results)
    assert lines[0].startswith("A GPU, bfloat16") and lines[1] == ""
    assert lines[2] == (
        "| case | pass | ms | TFLOP/s | of floor | extra memory | fastest stock | its ms | its memory |"
    )
    assert lines[4:] == [
        "| decode: imagenet | forward | 1.5 | 500 | 50 % | 0.25 GiB | cudnn | 1.6 | 0.25 GiB |",
        "| decode: imagenet | backward | 3.6 | 500 | 50 % | 0.25 GiB | - | - | - |",
        "| process: imagenet | forward | 0.06 | 500 | 50 % | 0.25 GiB | flash | 0.07 | 0.25 GiB |",
    ]
    assert tables.attention({}) == []
    assert len(tables.summary(results)) == 1 + 3


def test_memory_table_says_out_of_memory() -> None:
    def point(name: str, M: int, peak: int | None) -> dict[str, Any]:
        failure = None if peak else "out of memory"
        return {
            "pass": "backward",
            "implementation": name,
            "M": M,
            "peak_extra_bytes": peak,
            "failure": failure,
        }

    rows = [
        point("ours", 1024, 2**20),
        point("eager", 1024, 2**29),
        point("ours", 4096, 2**21),
        point("eager", 4096, None),
    ]
    assert tables.memory({"memory": report(*rows)})[-2:] == [
        "| 1,024 | 1.0 MiB | 0.50 GiB |",
        "| 4,096 | 2.0 MiB | out of memory |",
    ]


def test_large_table_says_where_once() -> None:
    """Both parts are measured on one machine on one day, with ceilings that no column refers to."""
    large = row("ours-chunked", None, seconds=1.5, M=100, C=261, **{"pass": "backward"})
    results = {"ten-million": report(row("ours", 12.0), ceilings={"tflops": 788.0}), "hundred-million": report(large)}
    lines = tables.large(results)
    assert lines[:3] == [
        "A GPU, bfloat16, torch 2.11, triton 3.6, 2026-11-23.",
        "",
        "| inputs, pass | implementation | ms | extra peak memory |",
    ]
    assert len(lines) == 6 and lines[-1].startswith("| 100 x 261 from host memory, ")
    assert tables.large({}) == []


def test_backends_that_serve_one_operation_are_told() -> None:
    for name in BACKENDS:
        served = [operation for operation, modules in TABLE.items() if name in modules]
        (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{name}` |")]
        assert (f"of `{served[0]}` only" in line) == (len(served) == 1)


def test_exit_codes_are_told() -> None:
    (told,) = re.findall(r"Exit codes: (.+?)\.", (ROOT / "README.md").read_text(), re.DOTALL)
    assert re.findall(r"\b\d+\b", told) == ["0", "1", "2", "130"]


def test_no_results_say_so() -> None:
    text = "<!-- table: layers -->\nold\n<!-- end of table -->"
    assert (
        tables.rewritten(text, {}) == f"<!-- table: layers -->\n{tables.NOT_MEASURED}\n<!-- end of table -->"
    )
