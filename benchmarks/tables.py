"""Tables of documents from benchmarks/results/<GPU>/*.json and examples/results; `python benchmarks/tables.py` rewrites them.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; all between is generated. With
`--check` nothing is written; the exit code is 1 when a table is not what the JSON gives.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))

from perceiver_kernels.cli import reading  # noqa: E402
from perceiver_kernels.cli.measure import kernel_name  # noqa: E402
from perceiver_kernels.cli.report import CommandError  # noqa: E402

RESULTS = ROOT / "results"
GPUS = ("h200", "h100")
"""Folders of RESULTS, in the order in which a table takes its figures from them."""
EXAMPLES = ROOT.parent / "examples"
"""Its folder results holds the result.json of a run of each example, by the name of its picture."""
DOCUMENTS = (
    ROOT.parent / "README.md", EXAMPLES / "README.md",
    *(ROOT.parent / "docs" / name for name in ("attention.md", "integrations/index.md", "kernels.md", "models.md")),
)  # fmt: skip
OURS_NAMES = ("ours", "ours-chunked", "ours-triton")
PASS_TITLES = {
    "pack": "pack",
    "attend": "forward",
    "attend-masked": "forward, a fifth hidden",
    "dq": "backward to the queries",
    "dx": "backward to the inputs",
    "forward": "forward",
    "forward-packed": "forward, packed once",
    "backward": "forward + backward, inputs need no gradient",
    "backward-inputs": "forward + backward, inputs too",
}
ATTENTION_TITLES = {"forward": "forward", "backward": "backward"}
"""Of attention over given keys and values, whose backward starts from a saved forward."""
MODEL_TITLES = {"forward": "forward", "training": "forward + backward"}
ATTENTION_PARTS = ("decode", "process", "encode-kv")
HOST_PEERS = ("flash", "cudnn", "efficient")
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NOT_MEASURED = "_Not measured yet: `make gpu-bench` on a GPU fills this in._"

Results = dict[str, dict[str, Any]]


def load(folder: Path) -> Results:
    """Return part name -> report, for every JSON file of a folder."""
    return {path.stem: reading.load(path, "--results") for path in sorted(folder.glob("*.json"))}


def published(folder: Path = RESULTS) -> Results:
    """Return part name -> report, of the first of GPUS that a part was measured on, and of the examples."""
    parts = {part: report for gpu in reversed(GPUS) for part, report in load(folder / gpu).items()}
    # What an example writes is a row, no report.
    return parts | {"examples": {"rows": [json.loads(path.read_text()) for path in sorted(EXAMPLES.glob("results/*.json"))]}}


def rewritten(text: str, results: Results) -> str:
    """Return a document with every marked table generated anew."""

    def table(match: re.Match[str]) -> str:
        lines = TABLES[match["name"]](results) or [NOT_MEASURED]
        return match[1] + "\n".join(lines) + "\n" + match[3]

    return MARKED.sub(table, text)


def kernels(results: Results) -> list[str]:
    """Kernels by themselves: time, rate, share of the floor, and stock attention given keys and values."""
    return _beside_stock(results, "kernels", ("pack", "attend", "attend-masked", "dq", "dx"))


def layers(results: Results) -> list[str]:
    """Whole layers beside the best stock implementation."""
    return _beside_stock(results, "layers", ("forward", "forward-packed", "backward", "backward-inputs"))


def memory(results: Results) -> list[str]:
    """Extra peak memory, forward and backward, against M."""
    rows = [row for row in _rows(results, "memory") if row["pass"] == "backward"]
    if not rows:
        return []
    # What runs at no size has no column.
    names = list(dict.fromkeys(row["implementation"] for row in rows if row["peak_extra_bytes"] is not None))
    cells = {(row["M"], row["implementation"]): row for row in rows}
    table = [
        [f"{M:,}", *(_memory_cell(cells.get((M, name))) for name in names)]
        for M in dict.fromkeys(row["M"] for row in rows)
    ]
    return [_where(results["memory"]), "", *_markdown(["inputs M", *names], table)]


def large(results: Results) -> list[str]:
    """Ten and a hundred million inputs."""
    table = []
    for row in _rows(results, "ten-million"):
        if row.get("kind") == "bench" and row.get("p50_ms") is not None:
            title = f"{row['shape']['M']:,} x {row['shape']['C']}, {PASS_TITLES[row['pass']]}"
            table.append([title, row["implementation"], _ms(row["p50_ms"]), _bytes(row["peak_extra_bytes"])])
    for row in _rows(results, "hundred-million"):
        title = f"{row['M']:,} x {row['C']} from host memory, {PASS_TITLES[row['pass']]}"
        seconds, peak = _ms(1e3 * row["seconds"]), _bytes(row["peak_extra_bytes"])
        table.append([title, row["implementation"], seconds, peak])
    if not table:
        return []
    measured = (results[part] for part in ("ten-million", "hundred-million") if part in results)
    where = dict.fromkeys(_where(report | {"ceilings": None}) for report in measured)
    return [*where, "", *_markdown(["inputs, pass", "implementation", "ms", "extra peak memory"], table)]


def attention(results: Results) -> list[str]:
    """Attention over given keys and values, in every regime that was measured."""
    header, table = _attention_comparison(results)
    where = dict.fromkeys(_where(results[part]) for part in ATTENTION_PARTS if _rows(results, part))
    return [*where, "", *_markdown(header, table)] if table else []


def models(results: Results) -> list[str]:
    """Whole models beside their originals."""
    return _whole_models(results, "models")


def relatives(results: Results) -> list[str]:
    """Whole models beside themselves through PyTorch's attention."""
    return _whole_models(results, "grids", "relatives")


def _whole_models(results: Results, *names: str) -> list[str]:
    """Milliseconds of every implementation, and memory of ours."""
    rows, where = _joined(results, *names)
    # Ours first: as called, as a graph, compiled.
    others = sorted(dict.fromkeys(name for _, _, name in rows if name != "ours"), key=lambda name: not name.startswith("ours"))

    def cell(row: dict[str, Any] | None, show: Callable[[dict[str, Any]], str]) -> str:
        return "-" if row is None else "cannot" if row["failure"] else show(row)

    table = []
    for case, which in dict.fromkeys((case, which) for case, which, _ in rows):
        ours = rows.get((case, which, "ours"))
        times = [cell(rows.get((case, which, name)), lambda row: _ms(row["p50_ms"])) for name in ("ours", *others)]
        table.append([case, MODEL_TITLES[which], *times, cell(ours, lambda row: _bytes(row["peak_extra_bytes"]))])
    header = ["case", "pass", "ours, ms", *others, "our extra memory"]
    return [*where, "", *_markdown(header, table)] if table else []


def _joined(results: Results, *names: str) -> tuple[dict[tuple[str, str, str], dict[str, Any]], list[str]]:
    """Rows of the parts that were measured, by case, pass and implementation; and the lines that say where, no two alike."""
    parts = [part for part in names if _rows(results, part)]
    rows = {(row["case"], row["pass"], row["implementation"]): row for part in parts for row in _rows(results, part)}
    return rows, list(dict.fromkeys(_where(results[part] | {"ceilings": None}) for part in parts))


def replaced(results: Results) -> list[str]:
    """What other libraries have before and after a replacement: milliseconds as called, as graphs and compiled, memory."""
    rows, where = _joined(results, "replaced", "replaced-layers")
    table = []
    for case, which in dict.fromkeys((case, which) for case, which, _ in rows):
        before, after = (rows.get((case, which, name), {}) for name in ("original", "ours"))
        times = [row.get("p50_ms") for row in (before, after)]
        speedup = f"{times[0] / times[1]:.1f}" if all(times) else "-"
        names = "original-graphed", "ours-graphed", "original-compiled", "ours-compiled"
        others = [rows.get((case, which, name)) for name in names]
        cells = ["-" if row is None else "cannot" if row["failure"] else _ms(row["p50_ms"]) for row in others]
        memory = [_bytes(row.get("peak_extra_bytes")) for row in (before, after)]
        told = ["-" if time is None else _ms(time) for time in times]
        table.append([case, MODEL_TITLES[which], *told, speedup, *cells, *memory])
    header = [
        "case", "pass", "before, ms", "after", "times faster", "graph before", "graph after", "compiled before",
        "compiled after", "memory before", "after",
    ]  # fmt: skip
    return [*where, "", *_markdown(header, table)] if table else []


def examples(results: Results) -> list[str]:
    """What a run of each example gave."""
    rows = _rows(results, "examples")
    table = [[f"`{' '.join(row['command'])}`", row["statement"], f"{row['seconds']:.0f}"] for row in rows]
    where = ", ".join(sorted({f"{row['device']}, torch {row['torch']}" for row in rows}))
    return [f"{where}.", "", *_markdown(["command", "result", "seconds"], table)] if table else []


def host(results: Results) -> list[str]:
    """What the host takes to enqueue one eager call, in microseconds, beside torch's own attention."""
    rows = [row for row in _rows(results, "process") if row.get("host_us") is not None]
    names = [name for name in ("ours", *HOST_PEERS) if any(row["implementation"] == name for row in rows)]
    cells = {(row["case"], row["pass"], row["implementation"]): f"{row['host_us']:.0f}" for row in rows}
    calls = dict.fromkeys((row["case"], row["pass"]) for row in rows)
    table = [
        [case, ATTENTION_TITLES[which], *(cells.get((case, which, name), "-") for name in names)]
        for case, which in calls
    ]
    where = _where(results["process"] | {"ceilings": None}) if table else ""
    return [where, "", *_markdown(["case", "pass", *names], table)] if table else []


def attention_kernels(results: Results) -> list[str]:
    """What the kernels of each call of ours take."""
    table = [
        [f"{part}: {row['case']}", ATTENTION_TITLES[row["pass"]], _ms(row["p50_ms"]), ", ".join(map(_kernel, row["kernels"]))]
        for part in ATTENTION_PARTS
        for row in _rows(results, part)
        if row["implementation"] == "ours" and row.get("kernels")
    ]
    where = dict.fromkeys(_where(results[part] | {"ceilings": None}) for part in ATTENTION_PARTS if _rows(results, part))
    return [*where, "", *_markdown(["case", "pass", "ms", "of which kernels, ms (launches)"], table)] if table else []


def two_backends(results: Results) -> list[str]:
    """CUDA C++ beside Triton, in one run, where the cuda backend was chosen."""
    table, where = [], {}
    for part in ("kernels", *ATTENTION_PARTS):
        rows = {(row["case"], row["pass"], row["implementation"]): row for row in _rows(results, part)}
        for (case, which, name), row in rows.items():
            ours = rows.get((case, which, "ours"))
            if name != "ours-triton" or row.get("p50_ms") is None or ours is None or ours.get("p50_ms") is None:
                continue
            where[_where(results[part] | {"ceilings": None})] = None
            title = {**PASS_TITLES, **ATTENTION_TITLES}[which]
            rate = f"{ours['tflops']:.0f}" if ours["flops"] else "-"
            share = f"{100 * ours['of_floor']:.0f} %"
            table.append([f"{part}: {case}", title, _ms(ours["p50_ms"]), rate, share, _ms(row["p50_ms"])])
    header = ["case", "pass", "CUDA C++, ms", "TFLOP/s", "of floor", "Triton, ms"]
    return [*where, "", *_markdown(header, table)] if table else []


def _kernel(entry: dict[str, Any]) -> str:
    launches = "" if entry["launches"] == 1 else f" ({entry['launches']:g})"
    return f"{kernel_name(entry['kernel'])} {_ms(entry['us'] / 1e3)}{launches}"


def summary(results: Results) -> list[str]:
    """Return the short table that a benchmark run prints last, as aligned text."""
    rows = [row for part in ("kernels", "layers", "ten-million") for row in _rows(results, part)]
    header, table = _comparison(rows)
    table += _attention_comparison(results)[1]
    widths = [max(len(line[i]) for line in [header, *table]) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in [header, *table]
    ]


TABLES: dict[str, Callable[[Results], list[str]]] = {
    "kernels": kernels,
    "layers": layers,
    "memory": memory,
    "large": large,
    "attention": attention,
    "attention-kernels": attention_kernels,
    "two-backends": two_backends,
    "host": host,
    "models": models,
    "relatives": relatives,
    "replaced": replaced,
    "examples": examples,
}


def _beside_stock(results: Results, part: str, passes: Iterable[str]) -> list[str]:
    rows = [row for row in _rows(results, part) if row.get("pass") in passes]
    header, table = _comparison(rows)
    return [_where(results[part]), "", *_markdown(header, table)] if table else []


def _attention_comparison(results: Results) -> tuple[list[str], list[list[str]]]:
    """Each regime by itself, as two may have a case of one name."""
    table: list[list[str]] = []
    for part in ATTENTION_PARTS:
        header, lines = _comparison(_rows(results, part), ATTENTION_TITLES)
        table += [[f"{part}: {case}", *cells] for case, *cells in lines]
    return header, table


def _comparison(
    rows: list[dict[str, Any]], titles: dict[str, str] = PASS_TITLES
) -> tuple[list[str], list[list[str]]]:
    """One line for each case and pass: ours, and the fastest stock implementation whose result is of use."""
    header = [
        "case",
        "pass",
        "ms",
        "TFLOP/s",
        "of floor",
        "extra memory",
        "fastest stock",
        "its ms",
        "its memory",
    ]
    timed = [row for row in rows if row.get("p50_ms") is not None]
    table = []
    for ours in (row for row in timed if row["implementation"] == "ours"):
        same = [row for row in timed if (row["case"], row["pass"]) == (ours["case"], ours["pass"])]
        if ours["pass"] == "forward-packed":
            # Stock PyTorch has no packed form: its forward is what this replaces.
            same = [row for row in timed if (row["case"], row["pass"]) == (ours["case"], "forward")]
        stock = [row for row in same if row["implementation"] not in OURS_NAMES and not row.get("inaccurate")]
        best = min(stock, key=lambda row: row["p50_ms"], default=None)
        rate = f"{ours['tflops']:.0f}" if ours["flops"] else "-"
        peer = (
            [best["implementation"], _ms(best["p50_ms"]), _bytes(best["peak_extra_bytes"])]
            if best
            else ["-"] * 3
        )
        own = [_ms(ours["p50_ms"]), rate, f"{100 * ours['of_floor']:.0f} %", _bytes(ours["peak_extra_bytes"])]
        table.append([ours["case"], titles[ours["pass"]], *own, *peer])
    return header, table


def _rows(results: Results, part: str) -> list[dict[str, Any]]:
    return results.get(part, {}).get("rows", [])


def _where(report: dict[str, Any]) -> str:
    """One sentence: on what this was measured, and the ceilings found there."""
    environment, ceilings = report["environment"], report.get("ceilings")
    gpus, torch = environment["gpus"], environment["torch"]["version"]
    device = gpus[0]["name"] if gpus else "a CPU"
    sentence = f"{device}, {report.get('dtype', 'bfloat16')}, torch {torch}, triton {environment['triton']}"
    if ceilings:
        sentence += (
            f"; ceilings {ceilings['tflops']:.0f} TFLOP/s and {ceilings['gbytes_per_s'] / 1e3:.1f} TB/s"
        )
    return f"{sentence}, {report['started'][:10]}."


def _memory_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["failure"]:
        return "out of memory" if row["failure"].startswith("out of memory") else "cannot"
    return _bytes(row["peak_extra_bytes"])


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def _markdown(header: list[str], table: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *table]
    return ["| " + " | ".join(line) + " |" for line in lines]


def main(argv: list[str] | None = None) -> int:
    """Rewrite the tables, or check them."""
    parser = argparse.ArgumentParser(description="Generate the tables of README.md and docs/.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 when a table is out of date"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of one folder for each GPU")
    arguments = parser.parse_args(argv)
    try:
        results, stale = published(arguments.results), False
    except CommandError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    for document in DOCUMENTS:
        text = document.read_text()
        new = rewritten(text, results)
        if new == text:
            continue
        stale = True
        print(f"{'out of date' if arguments.check else 'rewritten'}: {document.name}")
        if not arguments.check:
            document.write_text(new)
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
