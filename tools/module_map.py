"""Writes docs/modules.md, the map of the package: `python tools/module_map.py`. tests/test_docs.py fails where the page
is behind the tree."""

from __future__ import annotations

import ast
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "modules.md"
BEGINNING = """# Every module

This page has a line for each module of `zili/`, room by room: the first sentence of its docstring. It is made by
`python tools/module_map.py`. [architecture.md](architecture.md) says what the rooms are for.
"""


def page() -> str:
    """A heading for each room; under it its modules, each with the first sentence of its docstring."""
    files = [path for path in sorted((ROOT / "zili").rglob("*.py")) if path.name != "__init__.py"]
    lines = [BEGINNING]
    for room, inside in groupby(sorted(files, key=lambda path: (path.parent, path.name)), key=lambda path: path.parent):
        lines += [f"\n## `{room.relative_to(ROOT)}/`\n\n"]
        lines += [f"- `{path.name}`: {_first_sentence(path)}\n" for path in inside]
    return "".join(lines)


def _first_sentence(path: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    sentence, dot, _ = text.partition(". ")
    return sentence + "." * bool(dot)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
