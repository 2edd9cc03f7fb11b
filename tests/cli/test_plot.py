"""Plots: one colour for one implementation, names at the ends of lines, and words that are true of what is drawn."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from perceiver_kernels.cli import curves, main, plot, reading, series

figure_module = pytest.importorskip("matplotlib.figure")
text_module = pytest.importorskip("matplotlib.text")
colors = pytest.importorskip("matplotlib.colors")

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "h200"
SHAPE = {"B": 1, "C": 8, "N": 4}


def memory_row(name: str, M: int, peak: int | None, **more: Any) -> dict[str, Any]:
    return {
        "kind": "memory", "case": "small", "implementation": name, "pass": "forward", "M": M, "shape": {**SHAPE, "M": M},
        "peak_extra_bytes": peak, "failure": None if peak else "out of memory: needs much", "predicted_bytes": None, **more,
    }  # fmt: skip


def bench_row(name: str, ms: float | None, *, which: str = "forward", **sizes: int) -> dict[str, Any]:
    spread = {} if ms is None else {"p20_ms": 0.9 * ms, "p80_ms": 3 * ms}
    return {
        "kind": "bench", "case": "small", "implementation": name, "pass": which, "shape": {**SHAPE, **sizes}, "p50_ms": ms,
        **spread, "peak_extra_bytes": 100, "failure": None,
    }  # fmt: skip


def report(*rows: dict[str, Any], gpu: str | None = None, **more: Any) -> dict[str, Any]:
    return {"schema": 1, "rows": list(rows), "environment": {"gpus": [{"name": gpu}] if gpu else []}, **more}


def written(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is saved."""
    found: list[Any] = []
    save = figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda figure, *a, **k: (found.append(figure), save(figure, *a, **k))
    )
    return found


def line_of(axes: Any, label: str) -> Any:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line


class TestMainJob:
    @pytest.fixture
    def panels(self, tmp_path: Path, figures: list[Any]) -> list[Any]:
        """The axes of a figure with both panels."""
        memory = [memory_row(name, M, 100 * M) for name in ("ours", "flash") for M in (10, 100)]
        memory.append(memory_row("flash", 1000, None))
        times = [
            bench_row(name, ms, which=which, M=4096) | {"shape": {"B": 2, "M": 4096}}
            for which in ("forward", "backward")
            for name, ms in (("ours", 1.5), ("eager", 12.25), ("flash", 3.0))
        ]
        told = plot.save(tmp_path / "plot.png", memory=memory, times=times, title="widths")
        assert told == f"plot: {tmp_path / 'plot.png'}"
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        return figures[0].axes

    def test_an_implementation_has_one_colour(self, panels: list[Any]) -> None:
        """Colours were dealt out by panel: flash was the first stock implementation of one, the second of the other."""
        memory, times = panels
        bars = [colors.to_hex(bar.get_facecolor()) for bar in times.patches]
        assert bars[0] == bars[3] == colors.to_hex(line_of(memory, "ours").get_color())
        assert bars[2] == bars[5] == colors.to_hex(line_of(memory, "flash").get_color())
        assert len({bars[0], bars[1], bars[2]}) == 3

    def test_titles_tell_what_is_drawn(self, panels: list[Any]) -> None:
        memory, times = panels
        assert memory.get_title(loc="left") == "extra peak memory, forward"
        assert times.get_title(loc="left") == "time of a layer, B=2, 4,096 inputs"
        assert memory.figure.get_suptitle() == "widths"
        assert memory.figure.get_supxlabel() == "cross: out of memory at the next size"

    def test_medians_are_named_where_the_bars_are(self, panels: list[Any]) -> None:
        """The median was written at p80, where it read as p80."""
        _, times = panels
        assert [label.get_text() for label in times.get_yticklabels()][:2] == ["ours: 1.50 ms", "eager: 12.2 ms"]
        assert list(times.get_yticks()) == [1, 2, 3, 5, 6, 7]

    def test_a_pass_is_named_above_its_bars(self, panels: list[Any]) -> None:
        """Beside each bar the names of passes left two fifths of the picture empty."""
        _, times = panels
        assert [(text.get_text(), text.get_position()[1]) for text in times.texts] == [
            ("forward", 0), ("forward + backward", 4),
        ]  # fmt: skip
        assert times.get_position().width > 0.35 and times.get_ylim() == (7.6, -0.6)
        renderer = times.figure.canvas.get_renderer()
        assert not times.texts[0].get_window_extent(renderer).overlaps(times._left_title.get_window_extent(renderer))

    def test_a_cross_stands_at_the_end_of_a_line_that_ran_out_of_memory(self, panels: list[Any]) -> None:
        memory, _ = panels
        cross = line_of(memory, "flash, out of memory")
        assert cross.get_marker() == "x"
        assert [(float(x), float(y)) for x, y in zip(*cross.get_data(), strict=True)] == [(100.0, 10_000.0)]


class TestCommand:
    def draw(self, tmp_path: Path, *reports: dict[str, Any], name: str = "out.png") -> int:
        files = [written(tmp_path / f"{i}.json", each) for i, each in enumerate(reports)]
        return main(["plot", *files, "--output", str(tmp_path / name)])

    def test_time_and_memory_of_two_reports(self, tmp_path: Path, figures: list[Any]) -> None:
        bench = report(*(bench_row(n, m / f, M=m) for n, f in (("ours", 9), ("eager", 1)) for m in (64, 256)), gpu="H200")
        rows = [memory_row("ours", M, 10 * M, saved_bytes=M, predicted_bytes=11 * M) for M in (64, 1024)]
        assert self.draw(tmp_path, bench, report(*rows, gpu="H200")) == 0
        axes = figures[0].axes
        assert [each.get_title(loc="left") for each in axes] == [
            "time, forward", "extra peak memory, forward", "memory kept for the backward",
        ]  # fmt: skip
        assert [(each.get_xlabel(), each.get_ylabel().split()[0]) for each in axes] == [
            ("inputs M", "milliseconds"), ("inputs M", "bytes"), ("inputs M", "bytes"),
        ]  # fmt: skip
        assert figures[0].get_suptitle() == "H200; small: B=1, C=8, N=4"
        peaks = line_of(axes[1], "ours")
        # Of the size that both have, the later report's.
        assert list(zip(*peaks.get_data(), strict=True)) == [(64, 640), (256, 100), (1024, 10_240)]
        assert line_of(axes[1], "ours, closed form").get_linestyle() == "--"
        assert figures[0].get_figwidth() * plot.DOTS_PER_INCH == 1200

    def test_lines_are_named(self, tmp_path: Path, figures: list[Any]) -> None:
        names = ["ours", *(f"peer{i}" for i in range(5))]
        rows = [memory_row(name, M, 1000 * M + i) for i, name in enumerate(names) for M in (10, 100)]
        assert self.draw(tmp_path, report(*rows)) == 0
        (axes,) = figures[0].axes
        texts = {text.get_text(): text for text in axes.texts}
        assert set(texts) == set(names) and axes.get_legend() is None
        assert texts["ours"].get_fontweight() == "bold" and texts["peer0"].get_fontweight() == "normal"
        assert line_of(axes, "ours").get_linewidth() > 2 * line_of(axes, "peer0").get_linewidth()
        assert colors.to_hex(texts["peer3"].get_color()) == colors.to_hex(line_of(axes, "peer3").get_color())

    def test_predictions_are_dashed_and_called_so(self, tmp_path: Path, figures: list[Any]) -> None:
        rows = [memory_row("ours", M, M, predicted=True, predicted_bytes=M) for M in (10, 100)]
        assert self.draw(tmp_path, report(*rows, predicted=True)) == 0
        (axes,) = figures[0].axes
        assert axes.get_title(loc="left") == "extra peak memory, forward, predicted"
        assert [line.get_linestyle() for line in axes.lines] == ["--", ":"]
        assert figures[0].get_suptitle().startswith("fake tensors; ")
        assert "predicted with fake tensors; dotted: closed form" in figures[0].get_supxlabel()

    def test_two_gpus_in_one_chart_are_told_apart(self, tmp_path: Path, figures: list[Any]) -> None:
        each = [report(*(memory_row("ours", M, M) for M in (10, 100)), gpu=gpu) for gpu in ("A", "B")]
        assert self.draw(tmp_path, *each) == 0
        assert [text.get_text() for text in figures[0].axes[0].texts] == ["ours, A", "ours, B"]
        assert figures[0].get_suptitle().startswith("A and B; ")

    @pytest.mark.parametrize(
        ("change", "title"),
        [
            ({"shape": {"N": 99}}, "small: B=1, C=8, N=99, float32"),
            ({"shape": {"D": 7}}, "small: B=1, C=8, N=4, D=7, float32"),
            ({"dtype": "bfloat16"}, "small: B=1, C=8, N=4, bfloat16"),
        ],
    )
    def test_other_problems_are_other_charts(
        self, change: dict[str, Any], title: str, tmp_path: Path, figures: list[Any]
    ) -> None:
        """Two reports of one case's name were lines of one chart, under the title of the first."""
        rows = [memory_row("ours", M, M, dtype="float32") for M in (10, 100)]
        others = [{**row, **change, "shape": {**row["shape"], **change.get("shape", {})}} for row in rows]
        assert self.draw(tmp_path, report(*rows), report(*others)) == 0
        assert {each.get_title(loc="left") for each in figures[0].axes} == {
            f"{case}\nextra peak memory, forward" for case in ("small: B=1, C=8, N=4, float32", title)
        }
        assert figures[0].get_suptitle() == "CPU" and all(len(each.texts) == 1 for each in figures[0].axes)
        # In one report as in two.
        assert {chart.case for chart in series.charts([report(*rows, *others)])} == {"small: B=1, C=8, N=4, float32", title}

    def test_other_regimes_are_other_charts(self) -> None:
        each = [[bench_row("ours", 1, M=M) | {"regime": regime} for M in (8, 32)] for regime in ("decode", "layers")]
        found = series.charts([report(*rows) for rows in each])
        assert [chart.title for chart in found if chart.quantity == "p50_ms"] == [
            "attention over given keys and values, forward", "forward",
        ]  # fmt: skip

    def test_a_dtype_beside_the_rows_is_theirs(self) -> None:
        each = [report(*(bench_row("ours", 1, M=M) for M in (8, 32)), dtype=dtype) for dtype in ("float32", "bfloat16")]
        assert {chart.case for chart in series.charts(each)} == {
            f"small: B=1, C=8, N=4, {dtype}" for dtype in ("float32", "bfloat16")
        }

    def test_a_length_that_stays_is_told(self) -> None:
        rows = [bench_row("ours", 1, Lq=Lq, Lk=64) for Lq in (8, 32)]
        (chart,) = [chart for chart in series.charts([report(*rows)]) if chart.quantity == "p50_ms"]
        assert (chart.axis, chart.case) == ("queries", "small: B=1, C=8, N=4, Lk=64")

    def test_a_chart_is_predicted_where_all_of_it_is(self, tmp_path: Path, figures: list[Any]) -> None:
        rows = [memory_row("ours", M, M, predicted_bytes=M) for M in (10, 100)]
        fake = [{**row, "predicted": True} for row in rows]
        assert self.draw(tmp_path, report(*rows, gpu="H200"), report(*fake, predicted=True)) == 0
        (axes,) = figures[0].axes
        assert axes.get_title(loc="left") == "extra peak memory, forward"
        assert line_of(axes, "ours, fake tensors").get_linestyle() == "--"
        assert figures[0].get_supxlabel() == (
            "dashed lines are predicted with fake tensors; thin dashes or dotted: closed form"
        )

    @pytest.mark.parametrize(
        ("sizes", "axis"),
        [({"O": 1}, "output queries O"), ({"Lq": 3, "Lk": 3}, "keys"), ({"M": 1}, "inputs M")],
    )
    def test_axes(self, sizes: dict[str, int], axis: str) -> None:
        rows = [bench_row("ours", 1.0, **{name: factor * size for name, size in sizes.items()}) for factor in (1, 2)]
        assert series.charts([report(*rows)])[0].axis == axis

    @pytest.mark.parametrize(
        ("regime", "which", "title"),
        [
            ("layers", "backward-inputs", "forward + backward, inputs too"),
            ("decode", "backward", "attention over given keys and values, backward from a saved forward"),
            ("of tomorrow", "backward", "forward + backward"),
        ],
    )
    def test_passes_are_told_in_the_words_of_their_regime(self, regime: str, which: str, title: str) -> None:
        rows = [bench_row("ours", 1, which=which, M=M) | {"regime": regime} for M in (8, 32)]
        assert {chart.title for chart in series.charts([report(*rows)])} == {title}

    def test_what_has_no_line_takes_no_colour(self, tmp_path: Path, figures: list[Any]) -> None:
        stock = [f"stock-{i}" for i in range(5)]
        rows = [bench_row(name, 1 + i, M=M) for M in (8, 32) for i, name in enumerate(stock)]
        rows += [bench_row(f"cannot-{i}", None, M=8) | {"peak_extra_bytes": None} for i in range(5)]
        plot.draw(tmp_path / "p.png", [report(*rows)])
        colours = {line_of(figures[0].axes[0], name).get_color() for name in stock}
        assert len(colours) == 5

    def test_what_hardly_differs_looks_so(self, tmp_path: Path, figures: list[Any]) -> None:
        rows = [bench_row("ours", 10 + 0.01 * (M == 8), M=M) for M in (8, 32)]
        plot.draw(tmp_path / "p.png", [report(*rows)])
        low, high = figures[0].axes[0].get_ylim()
        assert low < 10 < high and high / low >= curves.LEAST_SPAN

    def test_json_lists_what_was_drawn(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = written(tmp_path / "0.json", report(*(memory_row("ours", M, M) for M in (10, 100))))
        assert main(["plot", path, "--output", str(tmp_path / "out.png"), "--json", "-"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert (row["quantity"], row["pass"], row["lines"]) == ("peak_extra_bytes", "forward", ["ours"])

    def test_svg_holds_its_words(self, tmp_path: Path) -> None:
        rows = [memory_row("ours-chunked", M, M) for M in (10, 100)]
        assert self.draw(tmp_path, report(*rows), name="out.svg") == 0
        assert ">ours-chunked<" in (tmp_path / "out.svg").read_text()

    @pytest.mark.parametrize(
        ("content", "name", "told"),
        [
            ("no json", "out.png", "0.json is not a report: it is no JSON"),
            ("[1]", "out.png", "0.json is not a report: it has no schema"),
            ('{"schema": 2, "rows": []}', "out.png", "0.json must have schema 1, got 2"),
            ('{"schema": 1, "rows": [1]}', "out.png", "0.json is not a report: it has no rows"),
            ('{"schema": 1, "rows": [{"shape": {"M": []}}]}', "out.png", "shape of row 1 must be an object of whole numbers"),
            (json.dumps(report(bench_row("ours", 1.0, M=3))), "out.png", "0.json has no sizes to draw: one of M, O, Lk, Lq"),
            (json.dumps(report(*(memory_row("ours", M, M) for M in (1, 2)))), "out.pdf", "must end in .png or .svg, got"),
        ],
    )
    def test_wrong_requests_are_one_line(
        self, content: str, name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "0.json").write_text(content)
        assert main(["plot", str(tmp_path / "0.json"), "--output", str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert told in captured.err and captured.err.count("\n") == 1 and captured.out == ""
        assert [path.name for path in tmp_path.iterdir()] == ["0.json"]

    def test_a_missing_file_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plot", str(tmp_path / "none.json"), "--output", str(tmp_path / "x.png")]) == 2
        assert f"argument FILE.json: {tmp_path / 'none.json'} cannot be read: No such file" in capsys.readouterr().err

    @pytest.mark.parametrize("option", ["--json", "--output"])
    def test_a_report_is_not_written_over(
        self, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = written(tmp_path / "0.json", report(*(memory_row("ours", M, M) for M in (1, 2))))
        given = {"--output": str(tmp_path / "p.png"), option: path}
        assert main(["plot", path, *(word for pair in given.items() for word in pair)]) == 2
        assert f"argument {option}: must be another file than that of FILE.json, got {path}" in capsys.readouterr().err
        assert len(reading.load(Path(path), "FILE.json")["rows"]) == 2

    def test_without_matplotlib(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
        assert self.draw(tmp_path, report(*(memory_row("ours", M, M) for M in (1, 2)))) == 2
        assert "matplotlib is not installed" in capsys.readouterr().err


class TestReadable:
    """Measured after drawing: all words are within the picture, and none lie on others."""

    def check(self, figure: Any) -> None:
        renderer, (width, height) = figure.canvas.get_renderer(), figure.bbox.size
        for axes in figure.axes:
            ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
            words = [*axes.texts, *ticks, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
            # Of an annotation the words alone, without what leads to them.
            boxes = {word: text_module.Text.get_window_extent(word, renderer) for word in words if word.get_text()}
            for word, box in [*boxes.items(), *((text, text.get_window_extent(renderer)) for text in axes.texts)]:
                assert min(box.min) >= 0 and box.x1 <= width and box.y1 <= height, word
            largest = max(line.get_xdata()[-1] for line in axes.lines)
            right = axes.transData.transform((largest, axes.get_ylim()[0]))[0]
            assert all(boxes[text].x0 > right for text in axes.texts)
            for (word, box), (other, its) in itertools.combinations(boxes.items(), 2):
                assert not box.overlaps(its), (word, other)
            assert 3 <= len(axes.get_yticks()) <= curves.MOST_TICKS and len(axes.get_xticks()) >= 2

    @pytest.mark.parametrize("name", ["memory", "sizes"])
    def test_published(self, name: str, tmp_path: Path, figures: list[Any]) -> None:
        plot.draw(tmp_path / "p.png", [reading.load(RESULTS / f"{name}.json", "FILE.json")])
        self.check(figures[0])

    @pytest.mark.parametrize("span", [1.01, 2, 9, 40, 10**3, 10**6, 10**9])
    def test_three_sizes(self, span: float, tmp_path: Path, figures: list[Any]) -> None:
        rows = [
            bench_row(name, 0.7 * part * span**power, M=M) | {"peak_extra_bytes": 3000 * part * span**power}
            for part, name in enumerate(["ours", "ours-chunked", "eager"], 2)
            for power, M in ((0, 512), (0.5, 1024), (1, 2048))
        ]
        plot.draw(tmp_path / "p.png", [report(*rows)])
        self.check(figures[0])

    def test_many_long_names(self, tmp_path: Path, figures: list[Any]) -> None:
        """Two GPUs, whose names follow those of implementations that take nearly the same."""
        each = [
            report(*(memory_row(f"implementation-{i}", M, 1000 * M + i) for i in range(15) for M in sizes), gpu=gpu)
            for gpu in ("NVIDIA RTX 6000 Ada Generation", "NVIDIA H200")
            for sizes in [(1000, 1024, *(2**power for power in range(14, 27)))]
        ]
        plot.draw(tmp_path / "p.png", each)
        self.check(figures[0])

    def test_several_problems(self, tmp_path: Path, figures: list[Any]) -> None:
        rows = [memory_row("ours", M, M, dtype=dtype) for dtype in ("float32", "bfloat16") for M in (1024, 4096)]
        plot.draw(tmp_path / "p.png", [report(*rows)])
        self.check(figures[0])

    def test_a_long_title(self, tmp_path: Path, figures: list[Any]) -> None:
        rows = [bench_row("ours", M, which="forward and then backward " * 3, M=M) for M in (8, 32)]
        plot.draw(tmp_path / "p.png", [report(*rows)])
        self.check(figures[0])


@pytest.mark.parametrize("quantity", curves.LADDERS)
@pytest.mark.parametrize("low", [0.11, 1, 3.3, 77])
def test_ticks_are_enough_and_not_too_many(quantity: str, low: float) -> None:
    for power in range(1, 12):
        found = curves.steps(low, low * 10**power, quantity)
        assert 3 <= len(found) <= curves.MOST_TICKS and low <= found[0] < found[-1] <= low * 10**power * (1 + 1e-9)
    assert curves.steps(0.9, 11, quantity) == ([1, 2, 5, 10] if quantity == "p50_ms" else [1, 2, 4, 8])


def test_labels_are_spread_within_their_column() -> None:
    assert curves.spread([10, 30, 50], 10, 100) == [10, 30, 50]
    assert curves.spread([51, 50, 20], 10, 100) == [55.5, 45.5, 20]
    assert curves.spread([99, 99.5, 1], 10, 100) == [85, 95, 5]
    # Pushed apart they come upon a third.
    assert curves.spread([50, 50, 44], 10, 100) == [48, 58, 38]


@pytest.mark.parametrize(("count", "told"), [(65_536, "64K"), (50_176, "49K"), (1000, "1000"), (2**20, "1M"), (2**31, "2G")])
def test_counts_as_people_say_them(count: int, told: str) -> None:
    assert curves.short_count(count) == told
