"""Counts in messages."""

from __future__ import annotations

import re
from pathlib import Path

from zili.plurals import counted


def test_counts() -> None:
    said = [counted(number, thing) for thing in ("chip", "process", "micro-batch") for number in (0, 1, 1024)]
    assert said == [
        *("0 chips", "1 chip", "1,024 chips"),
        *("0 processes", "1 process", "1,024 processes"),
        *("0 micro-batches", "1 micro-batch", "1,024 micro-batches"),
    ]


def test_nobody_makes_plurals_by_hand() -> None:
    package = Path(__file__).parents[1] / "zili"
    others = [path for path in package.rglob("*.py") if path.name != "plurals.py"]
    by_hand = re.compile(r"""["']e?s["'] (?:\*|if )""")
    assert not [path for path in others if by_hand.search(path.read_text(encoding="utf-8"))]
