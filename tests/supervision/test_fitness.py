"""The short look at a machine before it joins a run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from zili.chips import find_backend
from zili.errors import ChipError, ConfigError
from zili.supervision import fitness
from zili.supervision.fitness import listening_here, refuse_unfit

CPU = find_backend("cpu")


def test_a_sound_machine_joins_and_nothing_is_left(tmp_path: Path) -> None:
    refuse_unfit(tmp_path, CPU, 2)
    assert not list(tmp_path.iterdir())


def test_too_few_devices(tmp_path: Path) -> None:
    chip = replace(CPU, device_type="acme", name="acme")
    there = SimpleNamespace(here=True, count=3, reason="", fix="")
    with mock.patch.object(fitness, "presence", lambda _: there), pytest.raises(ChipError, match="3 acmes for 4"):
        refuse_unfit(tmp_path, chip, 4)


def test_no_device(tmp_path: Path) -> None:
    there = SimpleNamespace(here=False, count=0, reason="no driver", fix="install it")
    with (
        mock.patch.object(fitness, "presence", lambda _: there),
        pytest.raises(ChipError, match="no driver; install it"),
    ):
        refuse_unfit(tmp_path, CPU, 1)


def test_too_little_memory(tmp_path: Path) -> None:
    with mock.patch.object(fitness, "available_bytes", lambda: 1 << 29), pytest.raises(ConfigError, match="512 MiB"):
        refuse_unfit(tmp_path, CPU, 2)


def test_a_disk_that_is_full_absent_or_wrong(tmp_path: Path) -> None:
    usage = SimpleNamespace(free=1 << 20)
    with mock.patch.object(shutil, "disk_usage", lambda _: usage), pytest.raises(ConfigError, match="1 MiB free"):
        refuse_unfit(tmp_path, CPU, 1)
    with pytest.raises(ConfigError, match="cannot be written"):
        refuse_unfit(tmp_path / "absent", CPU, 1)
    with mock.patch.object(Path, "read_bytes", lambda _: b"other"), pytest.raises(ConfigError, match="other bytes"):
        refuse_unfit(tmp_path, CPU, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", ["192.0.2.7", "no such host"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen there"):
        listening_here(host)
    listening_here("127.0.0.1").close()
