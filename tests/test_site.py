"""The site of the documentation: built without a warning or a network, complete, and its reference tells every argument."""

from __future__ import annotations

import html
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from perceiver_kernels.cli import plot, reading

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PACKAGES = ("functional", "nn", "models", "integrations", "convert", "counting")
REFERENCE = (*PACKAGES, "inputs", "positions", "dispatch")
"""Modules of the API reference; the first ones say in `__all__` what is theirs."""


def is_installed(distribution: str) -> bool:
    return any(importlib.metadata.distributions(name=distribution))


IMAGES = sorted((ROOT / "docs" / "images").glob("*.png"))

needs_mkdocs = pytest.mark.skipif(
    not all(map(is_installed, ("mkdocs-material", "mkdocstrings-python"))),
    reason="mkdocs-material and mkdocstrings are not installed (pip install '.[docs]')",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it, in a process that reaches no network."""
    folder = tmp_path_factory.mktemp("site")
    code = """
import socket, sys
def refuse(*_, **__): raise OSError("the documentation must build without a network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", "--site-dir", sys.argv[1]])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def page_of(source: Path) -> str:
    """Where a page of docs/ is in the site."""
    return source.relative_to(ROOT / "docs").with_suffix(".html").as_posix()


@needs_mkdocs
class TestSite:
    def test_every_page_is_in_the_navigation(self, site: Path) -> None:
        home = (site / "index.html").read_text()
        for page in (page_of(source) for source in PAGES):
            assert (site / page).is_file()
            assert page == "index.html" or f'href="{page}"' in home, f"{page} is in no menu"

    def test_nothing_is_loaded_from_elsewhere(self, site: Path) -> None:
        """Links may leave; fonts, scripts, styles and images may not."""
        loading = re.compile(
            r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//|<link(?![^>]*rel=\"canonical\")[^>]*href=\"(?:https?:)?//"
        )
        for page in site.rglob("*.html"):
            assert not loading.search(page.read_text()), page.name
        for style in site.rglob("*.css"):
            assert not re.search(r"url\(['\"]?(?:https?:)?//", style.read_text()), style.name

    def test_every_public_name_has_a_place(self, site: Path) -> None:
        pages = (page.read_text() for page in site.rglob("*.html"))
        anchors = {anchor for page in pages for anchor in re.findall(r'id="(perceiver_kernels[\w.]+)"', page)}
        # A method of that name is not the function.
        told = {anchor.rpartition(".")[2] for anchor in anchors if anchor.rpartition(".")[0] not in anchors}
        names = ["perceiver_kernels", *(f"perceiver_kernels.{name}" for name in PACKAGES)]
        for module in map(importlib.import_module, names):
            assert set(module.__all__) <= told, module.__name__

    def test_tables_and_sections_are_inserted(self, site: Path) -> None:
        from benchmarks import tables

        for source in PAGES:
            page = (site / page_of(source)).read_text()
            assert "<!-- insert" not in page, source.name
            for name in re.findall(r"^<!-- insert table: ([\w-]+) -->$", source.read_text(), re.MULTILINE):
                rows = tables.TABLES[name](tables.published())
                cells = rows[-1].strip("|").split(" | ") if rows else ["Not measured yet"]
                assert all(html.escape(cell.strip(), quote=False) in page for cell in cells), f"{source.name}: {name}"
        assert "Correct first." in (site / "benchmarks.html").read_text()


@needs_mkdocs
class TestHooks:
    @pytest.fixture
    def hooks(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def test_what_is_not_there_ends_the_build(self, hooks: ModuleType) -> None:
        from mkdocs.exceptions import PluginError

        for text, message in (
            ("<!-- insert table: speeds -->", "no table is called speeds, but kernels"),
            ("<!-- insert section: benchmarks/README.md, Speeds -->", r"benchmarks/README.md has no section 'Speeds'"),
            ("<!-- insert section: benchmarks/NONE.md, Rules -->", r"benchmarks/NONE.md has no section 'Rules'"),
        ):
            with pytest.raises(PluginError, match=message):
                hooks.on_page_markdown(text)

    def test_a_section_ends_where_the_next_begins(
        self, hooks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "a.md").write_text("# A\n\n## One\n\nfirst\n\n### in it\n\n## Two\n\nsecond\n")
        monkeypatch.setattr(hooks, "ROOT", tmp_path)
        assert hooks.on_page_markdown("x\n<!-- insert section: a.md, One -->\ny") == "x\nfirst\n\n### in it\ny"


def arguments_told(item: Any) -> set[str]:
    """Names under Args of a griffe object's docstring, a class's with those of its bases in this package."""
    sections = item.docstring.parse("google", warnings=False) if item.docstring else []
    names = {field.name.lstrip("*") for section in sections if section.kind.value == "parameters" for field in section.value}
    return names.union(*map(arguments_told, item.mro())) if names and item.is_class else names


NOT_TOLD = {"self", "cls", "device", "dtype"}
"""Arguments that mean the same everywhere; device and dtype are told where they need words."""


def test_arguments_are_all_told() -> None:
    """A public docstring with Args, of a method too, has every argument under a name of its own."""
    griffe = pytest.importorskip("griffe", reason="griffe, of mkdocstrings, is not installed")
    package = griffe.load("perceiver_kernels", search_paths=[ROOT], docstring_parser="google", resolve_aliases=True)
    untold = []
    for module in REFERENCE:
        public = importlib.import_module(f"perceiver_kernels.{module}")
        own = [name for name, value in vars(public).items() if getattr(value, "__module__", "") == public.__name__]
        for name in getattr(public, "__all__", own):
            value = getattr(public, name)
            if not callable(value):
                continue
            item = package[f"{value.__module__}.{value.__qualname__}".removeprefix("perceiver_kernels.")]
            methods = [member for member in item.members.values() if member.is_function and member.is_public]
            for called in [item, *methods]:
                if told := arguments_told(called):
                    takes = {parameter.name for parameter in called.parameters if not parameter.name.startswith("_")}
                    untold += [f"{called.path}: {argument}" for argument in sorted(takes - told - NOT_TOLD)]
    assert untold == []


@pytest.mark.parametrize("picture", IMAGES, ids=lambda path: path.name)
def test_pictures_are_of_the_published_results(picture: Path) -> None:
    """A page shows each, and beside it the command that draws it from results that are committed; it was drawn from these."""
    image = pytest.importorskip("PIL.Image")
    name = picture.relative_to(ROOT)
    (page,) = (page for page in PAGES if f"(images/{picture.name})" in page.read_text())
    (command,) = re.findall(rf"^perceiver-kernels plot (.+) --output {name}$", page.read_text(), re.MULTILINE)
    reports = [reading.load(ROOT / path, "FILE.json") for path in command.split()]
    assert image.open(picture).text["Description"] == "; ".join(map(plot.origin, reports))
