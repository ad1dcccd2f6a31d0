"""The generated list of keys, and what loads without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_origin

import pytest

from zili.config import RunConfig
from zili.config.key_list import key_list
from zili.config.section import Section

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def leaves(section: type[Section]) -> list[tuple[str, str | None]]:
    """(key, documentation) of every setting, found by walking the types another way than the list does."""
    found: list[tuple[str, str | None]] = []
    for key, field in section.model_fields.items():
        # A table that may be left out is annotated `Table | None`.
        tables = [part for part in (field.annotation, *get_args(field.annotation)) if _is_table(part)]
        if tables and get_origin(field.annotation) is not tuple:
            found += leaves(tables[0])
        else:
            found.append((key, field.description))
    return found


def _is_table(part: object) -> bool:
    return isinstance(part, type) and issubclass(part, Section)


def test_the_page_in_docs_is_what_the_command_prints() -> None:
    assert PAGE.read_text(encoding="utf-8") == key_list(), "stale: run `make docs`"


@pytest.mark.parametrize(("key", "meaning"), leaves(RunConfig))
def test_the_reference_holds_every_key_and_its_meaning(key: str, meaning: str | None) -> None:
    rows = [line for line in key_list().splitlines() if line.startswith(f"| `{key}` |")]
    assert rows
    assert meaning is None or any(" ".join(meaning.split()) in row for row in rows)


@pytest.mark.parametrize(
    "code", ["import zili.config", "import zili.cli.app", "import sys; sys.argv[1:] = ['--help']; import zili.__main__"]
)
def test_torch_is_not_imported_to_read_a_recipe_or_show_help(code: str) -> None:
    script = f"import sys, atexit\natexit.register(lambda: print('torch' in sys.modules))\n{code}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "False"
