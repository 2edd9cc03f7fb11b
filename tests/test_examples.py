"""The examples run end to end in a few steps, write what they promise, and refuse what they cannot do."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
FIELDS = {
    "example", "statement", "result", "command", "arguments", "sizes", "seconds", "torch", "device", "curve",
}  # fmt: skip
SMALL = {
    "image_classification": "--data digits --latents 4 --latent-dim 16 --cross-attends 1",
    "language_modelling": "--latents 16 --prefixes 16,32 --dim 32 --layers 1 --windows 4 --sample 4",
    "point_clouds": "--points 8,16 --latents 4 --latent-dim 16",
    "image_autoencoder": "--latents 2,4 --latent-dim 8 --side 8 --squares 8",
    "working_memory": "--latents 2,4 --latent-dim 16 --channels 8 --episodes 1,2 --asked 2 --evaluated 8",
}
BAD = [
    ("image_classification", "--data", "cats"),
    ("image_classification", "--latent-dim", "6"),
    ("image_classification", "--steps", "0"),
    ("language_modelling", "--prefixes", "16,none"),
    ("language_modelling", "--prefixes", "16,10000000"),
    ("language_modelling", "--dim", "33"),
    ("language_modelling", "--dropout", "1"),
    ("point_clouds", "--points", "0"),
    ("point_clouds", "--device", "tpu9"),
    ("point_clouds", "--device", "cuda:99"),
    ("image_autoencoder", "--side", "5000"),
    ("image_autoencoder", "--learning-rate", "nan"),
    ("working_memory", "--episodes", "100000"),
    ("working_memory", "--channels", "3"),
    ("working_memory", "--output", ""),
]


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> object:
    """Import a module of examples/ as Python does when a script is run from there."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_every_example_is_tested() -> None:
    """A script is what can be run; every one is in the README."""
    scripts = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert scripts == set(SMALL)
    assert set(re.findall(r"^\| `(\w+)\.py`", (EXAMPLES / "README.md").read_text(), re.MULTILINE)) == scripts


def test_the_readme_names_the_fields() -> None:
    assert set(re.findall(r"`(\w+)`", (EXAMPLES / "README.md").read_text())) >= FIELDS


@pytest.mark.parametrize("name", sorted(SMALL))
def test_runs_and_writes(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / name
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *SMALL[name].split()]
    command += ["--steps", "4", "--batch-size", "4", "--seed", "3", "--device", "cpu", "--output", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in folder.iterdir()} == {"result.json", "curve.png"}
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "result.json").read_text())
    assert set(report) == FIELDS
    assert report["example"] == name and report["command"][1:] == command[1:]
    assert report["arguments"]["steps"] == 4 and report["arguments"]["seed"] == 3
    assert report["torch"] == torch.__version__ and report["device"] == "cpu" and report["seconds"] > 0
    assert report["result"] and report["sizes"]["parameters"]
    assert all(math.isfinite(point["loss"]) for point in report["curve"]) and report["curve"][-1]["step"] == 4
    assert done.stdout.splitlines()[-1].startswith(report["statement"])


@pytest.mark.parametrize(("name", "option", "value"), BAD)
def test_bad_values_are_named(
    name: str, option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", option, value])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"{name}.py: ") and option in line and (value in line or value.split(",")[-1] in line)


def test_a_folder_that_cannot_be_written_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["point_clouds.py", "--output", str(tmp_path / "file" / "runs")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "point_clouds.py"), run_name="__main__")
    assert ended.value.code == 2 and "cannot write" in capsys.readouterr().err


def paragraphs(topics: dict[str, str]) -> set[str]:
    return {" ".join(text.split()) for topic in topics.values() for text in re.split(r"\n\s*\n", topic.strip())}


def test_held_out_text_is_not_in_the_text_for_training(imported) -> None:
    shipped: ModuleType = imported("shipped")
    train, held_out = shipped.english()
    sizes = [sum(map(len, part.values())) for part in (train, held_out)]
    assert sizes[0] > 200_000 and 0.05 < sizes[1] / sum(sizes) < 0.2
    assert not paragraphs(train) & paragraphs(held_out)


def test_splits_are_disjoint_and_hold_every_class(imported) -> None:
    shipped: ModuleType = imported("shipped")
    labels = torch.arange(40) % 4
    train, test = shipped.split(labels, 0.3, seed=1)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(40))
    assert labels[test].bincount().tolist() == [3] * 4
    assert not torch.equal(test, shipped.split(labels, 0.3, seed=2)[1])


def test_points_lie_where_the_ink_is(imported) -> None:
    """A digit of one pixel gives points in that pixel, turned and scaled about the centre."""
    point_clouds: ModuleType = imported("point_clouds")
    images = torch.zeros(50, 1, 8, 8)
    images[:, 0, 1, 6] = 1.0
    points = point_clouds.points_of(images, 20, torch.Generator().manual_seed(0))
    radius = points.norm(dim=-1)
    near, far = torch.tensor([0.5, -0.5]).norm(), torch.tensor([0.75, -0.75]).norm()
    assert radius.min() >= near * (1 - point_clouds.SCALE) - 1e-5 and radius.max() <= far * (1 + point_clouds.SCALE) + 1e-5
    angle = torch.atan2(points[..., 1], points[..., 0]) + math.pi / 4
    widest = math.atan2(0.75, 0.5) - math.pi / 4 + point_clouds.TURN
    assert angle.abs().max() <= widest + 1e-5


def test_answers_of_the_working_memory_follow_from_its_history(imported) -> None:
    """Every answer is found again in the history that the model reads, by a plain search."""
    memory: ModuleType = imported("memory_task")
    records = memory.Records.read(True, torch.device("cpu"))
    history, queries, answers = memory.draw(records, 6, 3, 5, torch.Generator().manual_seed(0))
    seen = set()
    for b in range(6):
        keys, values, times = (part[b].tolist() for part in history["metadata"])
        assert times == sorted(times)
        for o, kind in enumerate(queries["kind"][b].tolist()):
            answer = answers[b, o].item()
            seen.add((kind, answer))
            if kind == 0:
                assert answer == [value for key, value in zip(keys, values, strict=True) if key == queries["key"][b, o]][-1]
            elif kind == 1:
                shown = (history["text"][1][b] == queries["hash"][b, o]).all(-1).any().item()
                assert answer == memory.VALUES + shown
            else:
                (place,) = (history["code"][1][b] == queries["time"][b, o]).nonzero()[:, 0].tolist()
                same = (records.snippets == history["code"][0][b, place]).all(-1)
                assert answer - memory.VALUES - 2 in records.modules[same].tolist()
    assert {(1, memory.VALUES), (1, memory.VALUES + 1)} <= seen


def test_training_and_held_out_histories_share_no_text_and_no_code(imported) -> None:
    memory: ModuleType = imported("memory_task")
    train, held_out = (memory.Records.read(part, torch.device("cpu")) for part in (False, True))
    for index in range(len(memory.MODULES)):
        seen, new = (set(map(tuple, part.snippets[part.modules == index].tolist())) for part in (train, held_out))
        assert seen and new and not seen & new
    assert not set(map(tuple, train.hashes.tolist())) & set(map(tuple, held_out.hashes.tolist()))
