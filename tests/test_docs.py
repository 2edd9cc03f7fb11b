"""The README and the pages of docs/ do what they say: their code runs, their commands too."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import perceiver_kernels
from perceiver_kernels import dispatch
from perceiver_kernels.cli import build_parser, main
from perceiver_kernels.integrations.replacement import LIBRARIES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")))
FENCED = re.compile(
    r"(?:^<!-- (?P<mark>not run|needs): (?P<said>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
PROGRAM = "perceiver-kernels"
NOT_RUN = 7
"""Blocks that say why they cannot be run. One more is a decision, not an oversight."""
TINY: dict[str, dict[str, list[str]]] = {
    "run": {"--preset": ["tiny"], "--max-inputs": ["256"]},
    "bench": {"--max-inputs": ["32"], "--seconds": ["0.01"], "--no-compile": [], "--case": ["flow"], "--peers": ["none"]},
    "bench models": {"--seconds": ["0.01"], "--no-compile": [], "--case": ["shape-decoder-129"], "--peers": ["none"]},
    "bench replaced": {"--seconds": ["0.01"], "--no-compile": [], "--case": ["torch-512x50k-c512-h8"], "--peers": ["none"]},
    "memory": {"--sizes": ["512,1K"], "--peers": ["none"]},
}
"""Options that make a command small; the later of two options counts."""
CHOICES = ("--case", "--peers")
"""Of those, the ones that a command keeps where it names them itself."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document.

    Args:
        line: of the fence.
        mark: "not run" or "needs", what the comment before it says; empty where there is none.
        said: the reason, or the modules.
    """

    document: str
    line: int
    language: str
    code: str
    mark: str
    said: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def needs(self) -> list[str]:
        return self.said.split(", ") if self.mark == "needs" else []


def blocks_of(document: str) -> list[Block]:
    text = (ROOT / document).read_text()
    return [
        Block(
            document, text.count("\n", 0, m.start("language")) + 1, m["language"], m["code"], m["mark"] or "", m["said"] or ""
        )
        for m in FENCED.finditer(text)
    ]


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


def open_flamingo() -> ModuleType:
    """Its helpers alone, as a block imports them: the package itself imports a language model's dependencies."""
    spec = importlib.util.find_spec("open_flamingo")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("open_flamingo is not installed")
    path = Path(spec.submodule_search_locations[0]) / "src" / "helpers.py"
    loader = importlib.util.spec_from_file_location("open_flamingo.src.helpers", path)
    assert loader is not None and loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    sys.modules[loader.name] = module
    return module


def perceiver_io() -> Any:
    """krasserm's modules of torch alone, without what their packages import."""
    from tests.convert import krasserm

    if krasserm.theirs is None:
        raise ImportError("perceiver-io is not installed")
    return krasserm.theirs


def timm() -> ModuleType:
    """Its file of one layer; its packages import torchvision, which fits one torch alone, and stay unread."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise ImportError("timm is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name in ("timm", "timm.layers"):
                package = ModuleType(name)
                package.__path__ = [str(Path(spec.origin).parents[1].joinpath(*name.split(".")))]
                patch.setitem(sys.modules, name, package)
        return importlib.import_module("timm.layers.attention_pool")


@pytest.fixture(autouse=True)
def forgotten_modules() -> Iterator[None]:
    """What `open_flamingo` made visible is gone afterwards."""
    yield
    sys.modules.pop("open_flamingo.src.helpers", None)


BY_PATH: dict[str, Callable[[], Any]] = {"open_flamingo": open_flamingo, "perceiver": perceiver_io, "timm": timm}


def missing(block: Block) -> str | None:
    """The first module that a block needs and that cannot be imported, with the reason."""
    for name in block.needs:
        try:
            BY_PATH.get(name, lambda name=name: imported(name))()
        except ImportError as error:
            return f"a block of {block.document} needs {name}: {error}"
    return None


def imported(name: str) -> None:
    """Import a module; one of this package must be in this tree, not in another that is installed."""
    spec = importlib.util.find_spec(name)
    ours = Path(perceiver_kernels.__file__).parent
    if name.startswith("perceiver_kernels.") and (spec is None or ours not in Path(spec.origin or "").parents):
        raise ImportError(f"{name} is not built or not there")
    importlib.import_module(name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(b.language == "python" for b in blocks_of(name))])
def test_python_blocks_run(document: str, device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that name a GPU run where there is one; a block may go on from the one before."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    for block in (block for block in blocks_of(document) if block.language == "python" and block.mark != "not run"):
        if (device == "cpu" and "cuda" in block.code) or missing(block):
            continue
        # Line numbers of a traceback are those of the document.
        code = compile("\n" * block.line + block.code, document, "exec")
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(code, names)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.needs], ids=str)
def test_what_blocks_need_is_here(block: Block) -> None:
    """One skip for each block that this machine leaves out."""
    reason = missing(block)
    if reason:
        pytest.skip(reason)


def commands() -> dict[str, Block]:
    """Every command of the documents once, and a block that has it."""
    found: dict[str, Block] = {}
    for block in BLOCKS:
        if block.language == "sh" and block.mark != "not run":
            found |= {shlex.join(shlex.split(line, comments=True)): block for line in block.code.splitlines() if line.strip()}
    return found


def split_command(command: str) -> tuple[dict[str, str], list[str]]:
    """Variables before the program, and its arguments."""
    words = shlex.split(command)
    variables = dict(word.split("=", 1) for word in words[: words.index(PROGRAM)])
    return variables, words[words.index(PROGRAM) + 1 :]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("command", commands())
def test_commands_run(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each as it is written is a right request, and done at tiny sizes."""
    block = commands()[command]
    if reason := missing(block):
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    variables, arguments = split_command(command)
    build_parser().parse_args(arguments)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if dispatch.ENVIRONMENT_VARIABLE in variables:
        # It is read once, when the package is imported.
        monkeypatch.setattr(dispatch, "_environment", tuple(variables[dispatch.ENVIRONMENT_VARIABLE].split(",")))
    if "--image" in arguments:
        image = pytest.importorskip("PIL.Image")
        image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 20).save(arguments[arguments.index("--image") + 1])
    if arguments[0] == "plot":
        # It draws what is committed.
        (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    small = TINY.get(" ".join(arguments[:2]), TINY.get(arguments[0], {}))
    small = {option: values for option, values in small.items() if option not in CHOICES or option not in arguments}
    added = [word for option, values in small.items() for word in (option, *values)]
    assert main([*arguments, *added]) == 0, capsys.readouterr().err
    for option in ("--json", "--plot", "--output"):
        if option in arguments and (path := arguments[arguments.index(option) + 1]) != "-":
            assert Path(path).stat().st_size


def test_blocks_are_of_languages_that_are_run() -> None:
    """Shell blocks that are run hold commands of this package alone, and every block that is not run says why."""
    for block in BLOCKS:
        assert block.language in ("python", "sh", "toml"), f"{block}: a block of {block.language or 'no language'}"
        assert block.mark != "not run" or len(block.said.split()) > 3, f"{block}: {block.said!r} is no reason"
    for command, block in commands().items():
        assert PROGRAM in shlex.split(command), f"{block}: {command}"
    left_out = [str(block) for block in BLOCKS if block.mark == "not run"]
    assert len(left_out) == NOT_RUN, left_out


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_fenced(document: str) -> None:
    """Indented text is shown, not run: no command, and no Python, may stand there."""
    text = FENCED.sub("", (ROOT / document).read_text())
    assert text.count("```") == 0
    loose = re.findall(rf"^ {{4}}(?:{PROGRAM}|make|pip|python|from|import) .*$", text, re.MULTILINE)
    assert loose == []


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(b.language == "toml" for b in blocks_of(name))])
def test_toml_blocks_are_toml(document: str) -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    for block in (block for block in blocks_of(document) if block.language == "toml"):
        assert tomllib.loads(block.code), str(block)


def test_every_class_that_is_replaced_is_named() -> None:
    page = (ROOT / "docs" / "integrations" / "index.md").read_text()
    adapted: set[str] = set()
    for library, file in LIBRARIES.items():
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
            adapters = importlib.import_module(f"perceiver_kernels.integrations.{file}").ADAPTERS
            adapted |= {adapter.original.__name__ for adapter in adapters}
    assert adapted and adapted <= set(re.findall(r"`(\w+)`", page))


def test_gpu_blocks_are_few_and_named() -> None:
    """What only a GPU machine runs is known: a block that says "cuda" by accident would go untested elsewhere."""
    assert {block.document for block in BLOCKS if block.language == "python" and "cuda" in block.code} == {
        "docs/models.md", "docs/memory.md", "docs/integrations/transformers.md"
    }  # fmt: skip
