"""Writes the map of the package into docs/architecture.md: `python tools/module_map.py`. tests/test_docs.py fails where
the page is behind the tree."""

from __future__ import annotations

import ast
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- the map: python tools/module_map.py -->\n", "<!-- the map ends -->\n"


def module_map() -> str:
    """A list of every module, room by room: its name, and the first sentence of its docstring."""
    files = [path for path in sorted((ROOT / "zili").rglob("*.py")) if path.name != "__init__.py"]
    lines = []
    for room, inside in groupby(sorted(files, key=lambda path: (path.parent, path.name)), key=lambda path: path.parent):
        lines += [f"\n`{room.relative_to(ROOT)}/`\n\n"]
        lines += [f"- `{path.name}`: {_first_sentence(path)}\n" for path in inside]
    return "".join(lines) + "\n"


def _first_sentence(path: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    sentence, dot, _ = text.partition(". ")
    return sentence + "." * bool(dot)


def with_map(page: str) -> str:
    """The page, with the map as the tree is now."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + module_map() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_map(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
