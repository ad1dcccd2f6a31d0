"""A plugin made by `zili chips new` for a device that Zili has never heard of passes its own tests and trains."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import plugins
import pytest
from forks import zili
from many import on_processes, train
from plugins import ACME
from tiny_models import BOUND, Layout, Row, Runs

LAYOUT = Layout("shards=2")
SHORT = ("training.steps=3", "training.global_batch=8")


def its_own_tests(folder: Path) -> tuple[int, str]:
    """pytest's exit code and words."""
    with redirect_stdout(StringIO()) as said:
        code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(folder / "tests")])
    return int(code), said.getvalue()


def exported(folder: Path) -> dict[str, str]:
    """What the page tells a shell without a chip to export."""
    command = [sys.executable, plugins.__file__, str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(shlex.split(line)[1].split("=", 1) for line in said.splitlines())


@pytest.mark.slow
def test_an_afternoon(runs: Runs, library: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "zili-acme"
    named = ("--device-type", ACME.device_type, "--collectives", ACME.collectives, "--plugin", ACME.plugin)
    made = zili("chips", "new", "acme", *named, "--folder", folder)
    assert "zili_acme.py" in made.stdout and "docs/extending/chip.md" in made.stdout
    # What `pip install --editable` would do, without asking the package index for setuptools.
    info = folder / "zili_acme-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zili-acme\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[zili.chips]\nacme = zili_acme:BACKEND\n")
    variables = exported(library.parent)
    variables["PYTHONPATH"] = os.pathsep.join((str(folder), variables["PYTHONPATH"]))
    ((code, said),) = on_processes(1, its_own_tests, folder, environment=variables)
    assert code == 0 and "3 passed" in said, said
    config = runs.recipe("dense", *LAYOUT.overrides, "chip.name=acme", *SHORT, "chip.precision=fp32")
    curve = on_processes(2, train, config, environment=variables)[0]
    Row.of("shards=2 on acme", 2, "dense", runs.alone("dense", *SHORT), curve, BOUND).check(request)
