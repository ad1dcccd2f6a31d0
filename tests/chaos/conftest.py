"""Seeds of chaos, and the counts of faults at the end: `pytest tests/chaos -m chaos --seed 17` runs one case alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

CASES = 24
"""`make test-chaos` runs these; each has `FAULTS` faults."""
FAULTS = 14
FOUND = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="One seed of chaos.")
    parser.addoption("--seeds", default=f"0:{CASES}", help="Seeds of chaos, FIRST:END.")
    parser.addoption("--faults", type=int, default=FAULTS, help="Faults of each seed.")
    parser.addoption("--kinds", help="Kinds of faults, as of zili drill.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        # Where all tests are collected, these options are not there, and no case of chaos is run.
        alone = metafunc.config.getoption("--seed", None)
        first, _, end = metafunc.config.getoption("--seeds", f"0:{CASES}").partition(":")
        metafunc.parametrize("seed", range(int(first), int(end)) if alone is None else [alone])


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = []


@pytest.fixture
def found_faults(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What followed each fault of this run of pytest."""
    return request.config.stash[FOUND]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash[FOUND]
    if not found:
        return
    terminalreporter.section("faults by kind and phase: made in their phase, of those that were due")
    due = Counter((one["fault"]["kind"], one["fault"]["phase"]) for one in found)
    made = Counter((one["fault"]["kind"], one["fault"]["phase"]) for one in found if one["counts"])
    for key in sorted(due):
        terminalreporter.write_line(f"{key[0]:10} {key[1]:8} {made[key]:4} of {due[key]}")
    terminalreporter.write_line(f"{'all':19} {sum(made.values()):4} of {len(found)}")
    Path("build").mkdir(exist_ok=True)
    Path("build/chaos.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
