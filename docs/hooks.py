"""What the site's pages take from elsewhere when they are built: generated tables, and sections of other documents.

`<!-- insert table: NAME -->` becomes a table of benchmarks/tables.py, made from the results that are published;
`<!-- insert section: PATH, HEADING -->` what stands under a heading of a document of this repository.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"^<!-- insert table: (?P<name>[\w-]+) -->$", re.MULTILINE)
SECTION = re.compile(r"^<!-- insert section: (?P<path>[\w./-]+), (?P<heading>.+?) -->$", re.MULTILINE)


@cache
def tables() -> ModuleType:
    """benchmarks/tables.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("site_tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def table(name: str) -> str:
    """The table of that name; without results, the line that says so."""
    source = tables()
    if name not in source.TABLES:
        raise PluginError(f"no table is called {name}, but {', '.join(source.TABLES)}")
    return "\n".join(source.TABLES[name](source.published()) or [source.NOT_MEASURED])


def section(path: str, heading: str) -> str:
    """The lines under `## heading` up to the next heading of its level."""
    document = ROOT / path
    parts = re.split(r"^## (.+)\n", document.read_text(), flags=re.MULTILINE) if document.is_file() else []
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    if heading not in found:
        raise PluginError(f"{path} has no section {heading!r}")
    return found[heading].strip()


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the text of every page."""
    markdown = TABLE.sub(lambda match: table(match["name"]), markdown)
    return SECTION.sub(lambda match: section(match["path"], match["heading"]), markdown)
