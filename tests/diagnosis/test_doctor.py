"""`zili doctor` on the CPU, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zili.ops.yardstick import distance


def doctor(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zili", "doctor", "--chip", "cpu", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180, env=dict(os.environ))


def test_this_machine(tmp_path: Path) -> None:
    finished = doctor("--json", "--folder", str(tmp_path))
    report = json.loads(finished.stdout)
    assert finished.returncode == 0, [
        found for found in report["findings"] if found["severity"] in ("broken", "degraded")
    ]
    assert report["severity"] == "fallback" and report["versions"]["torch"] == torch.__version__
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_not_there_is_said(tmp_path: Path) -> None:
    finished = doctor("--folder", str(tmp_path / "nowhere"), "--processes", "1")
    assert finished.returncode == 10
    assert "cannot be written" in finished.stdout and "verdict: broken" in finished.stdout


def test_a_chip_that_is_not_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("the chip is here")
    finished = doctor("--chip", "nvidia")
    assert finished.returncode == 10 and "built without cuda" in finished.stdout and "Traceback" not in finished.stderr


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2.0**bits).trunc() / 2.0**bits, exponent).float()


def test_distances_are_in_units_of_the_precision() -> None:
    exact = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double()
    same = exact.float()
    assert distance(same, same, exact).ulps <= 1 and distance(same, same, exact).fits
    off = same.clone()
    off[3, 4] += 100 * torch.finfo(torch.float32).eps * same.abs().max()
    assert distance(off, same, exact).ulps == pytest.approx(100, rel=0.02) and not distance(off, same, exact).fits
    cut = distance(rounded(exact, 23), same, exact)
    assert cut.ulps < cut.expected and not cut.fits, "too small to stand out, but all to one side"
    assert 0.3 < cut.bias < 0.7
    nan = same.clone()
    nan[0, 0] = torch.nan
    assert not distance(nan, same, exact).fits
    assert not distance(torch.tensor([1, 2]), torch.tensor([1, 3]), None).fits
    inf = torch.tensor([torch.inf, 1.0])
    assert distance(inf, inf, None).fits and not distance(-inf * -1, torch.tensor([-torch.inf, 1.0]), None).fits
    assert not distance(torch.tensor([torch.nan, 1.0]), torch.tensor([-torch.inf, 1.0]), None).fits
