"""The emulated device's library, built once, and its plugins."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
from plugins import Environment, Vendor, environment, install
from tiny_models import Runs


@pytest.fixture(scope="session")
def library(pytestconfig: pytest.Config) -> Path:
    """Kept between sessions; a minute to build."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler to build the emulated device with (Debian: apt install g++)")
    folder = Path(pytestconfig.cache.mkdir("emulated-device"))
    command = [sys.executable, emulated.__file__, str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert built.returncode == 0, built.stderr
    return Path(built.stdout.split()[-1])


@pytest.fixture(scope="session")
def with_plugins(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """`with_plugins(ASCEND)`: variables of a process in which that plugin is installed."""

    def variables(*vendors: Vendor, **more: str) -> dict[str, str]:
        folders = [install(vendor, tmp_path_factory.mktemp(vendor.plugin)) for vendor in vendors]
        return {**environment(library, *folders), **more}

    return variables


@pytest.fixture(scope="session")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs on the CPU, and recipes for those on devices."""
    return Runs(tiny_data, tmp_path_factory.mktemp("emulated-runs"))
