"""Prints how far every layout strays from one process, as a Markdown table: `python tests/parallel/table.py`.

It runs the tests themselves, the slow ones too, and prints what they compared. Arguments go to pytest: `-k mixture`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

FILES = ("test_curves.py", "test_settings.py", "test_other_layouts.py", "test_trillion.py")


class Rows:
    """A pytest plugin that keeps the rows that tests note."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call":
            return
        from tiny_models import Row  # pytest knows the way

        for name, noted in report.user_properties:
            if name == "row":
                row = Row(**noted)
                bounds = ", ".join(f"{bound:.0e}" for bound in dict.fromkeys((row.bound, row.norms_bound)))
                within = "" if report.passed else " **failed**"
                self.lines.append(
                    f"| {row.layout} | {row.processes} | {row.kind} | {row.losses:.1e} | {row.norms:.1e} "
                    f"| {bounds}{within} |"
                )


def main() -> int:
    rows = Rows()
    here = Path(__file__).parent
    code = pytest.main([*(str(here / name) for name in FILES), *sys.argv[1:]], plugins=[rows])
    print("| layout | processes | model | losses | gradient norms | bound |\n|---|---|---|---|---|---|")
    print("\n".join(rows.lines))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
