"""Puts the code that pages quote into them: `python tools/quote.py`. tests/test_docs.py fails where a page is behind.

A page names the file, and after `#` one class or function of it, in the line before the block:

    <!-- examples/own_callback.py#SlowSteps -->
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_QUOTE = re.compile(r"(<!-- (\S+\.py)(?:#(\w+))? -->\n```\w*\n)(.*?)(^```$)", re.DOTALL | re.MULTILINE)


def source_of(path: str, name: str | None) -> str:
    """The text of a file, or of one class or function of it. Raises LookupError where it has none of that name."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if name is None:
        return text.rstrip() + "\n"
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return (ast.get_source_segment(text, node) or "").rstrip() + "\n"
    raise LookupError(f"{path} has no {name}")


def with_quotes(page: str) -> str:
    """The page with every quoted block as its file has it now."""
    return _QUOTE.sub(lambda found: found[1] + source_of(found[2], found[3]) + found[5], page)


def pages() -> list[Path]:
    return [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := with_quotes(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: quotes renewed")


if __name__ == "__main__":
    main()
