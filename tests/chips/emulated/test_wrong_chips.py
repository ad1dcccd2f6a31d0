"""What is wrong with a chip or its software is one line with the cause and the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import emulated
import pytest
from forks import zili
from plugins import ASCEND, CAMBRICON, Environment

from zili.config import RunConfig, dump_recipe

OLD = replace(ASCEND, chip="Ascend910A")


@pytest.fixture
def train(recipe: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`zili train` of a tiny recipe with overrides, under variables."""
    file = tmp_path / "tiny.toml"
    file.write_text(dump_recipe(recipe("training.steps=2")), encoding="utf-8")

    def run(variables: dict[str, str], *overrides: str) -> subprocess.CompletedProcess[str]:
        words = [word for override in overrides for word in ("--set", override)]
        return zili("train", file, *words, environment=variables)

    return run


def one_line(finished: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert finished.returncode == 6, finished.stderr
    (line,) = finished.stderr.strip().splitlines()
    assert line.startswith("zili: ") and [part for part in parts if part not in line] == [], line


def test_a_precision_the_chip_lacks(train, with_plugins: Environment) -> None:
    wrong = train(with_plugins(OLD), "chip.name=ascend", "chip.precision=bf16")
    one_line(wrong, "Ascend910A has no bf16", 'set chip.precision = "fp32"')


def test_left_to_choose_it_takes_one_the_chip_has(train, with_plugins: Environment) -> None:
    finished = train(with_plugins(OLD), "chip.name=ascend", "chip.precision=auto")
    assert finished.returncode == 0, finished.stderr
    assert "chip.precision = fp32: the 910A has fp16 and fp32 only" in " ".join(finished.stdout.split())


def test_a_plugin_for_another_torch(train, with_plugins: Environment) -> None:
    variables = with_plugins(ASCEND)
    site = Path(variables["PYTHONPATH"].split(os.pathsep)[0])
    (info,) = site.glob("torch_npu-*.dist-info")
    metadata = info / "METADATA"
    metadata.write_text(
        metadata.read_text(encoding="utf-8").replace("Version: 2.13", "Version: 2.11"), encoding="utf-8"
    )
    one_line(train(variables, "chip.name=ascend"), "torch_npu 2.11 does not pair with torch 2.13", "torch_npu==2.13")


def test_a_plugin_whose_runtime_is_missing(train, with_plugins: Environment) -> None:
    variables = with_plugins(ASCEND)
    site = Path(variables["PYTHONPATH"].split(os.pathsep)[0])
    (site / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    one_line(train(variables, "chip.name=ascend"), "torch_npu cannot be imported (libhccl.so", "likely no device")


def test_two_plugins_for_one_place(train, with_plugins: Environment, tmp_path: Path) -> None:
    variables = with_plugins(ASCEND, CAMBRICON)
    site = Path(variables["PYTHONPATH"].split(os.pathsep)[1])
    (site / "torch_mlu.py").write_text("import torch_npu\n", encoding="utf-8")  # the other one was there first
    one_line(train(variables, "chip.name=cambricon"), "torch is bound to npu here", "without the other plugin")


def test_a_device_that_is_not_there(train, with_plugins: Environment) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "9", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    one_line(train(with_plugins(ASCEND, **place), "chip.name=ascend"), "device 9 asked for, 8 in sight (0..7)")


def test_no_compiler_for_the_emulated_device(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler"}
    command = [sys.executable, emulated.__file__, str(tmp_path)]
    built = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert built.returncode != 0
    assert "the emulated device cannot be built" in built.stderr and "apt install g++" in built.stderr
