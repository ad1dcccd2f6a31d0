"""The check for whoever holds a chip, as the holders of emulated ones run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from emulated import FAULTS, Fault
from many import on_processes
from plugins import ASCEND, CAMBRICON, UNHEARD_OF, Environment, Vendor

from zili.chips.catalog import find_chip
from zili.diagnosis.device_check import PARTS
from zili.diagnosis.findings import Finding, Severity
from zili.planning.fitted.machine import machine, with_measurements

SILU = Fault("aten::silu", "scale", 0.01)


def findings(chip: str, *asked: tuple[str, Sequence[Fault]]) -> list[list[Finding]]:
    """What parts of the check find, one after the other in this process, with these faults in the chip."""
    from zili import chips
    from zili.diagnosis import device_parts

    chips.activate(chips.find_backend(chip))
    import emulated

    found: list[list[Finding]] = []
    for part, faults in asked:
        found.append([])
        emulated.plant(*faults)
        getattr(device_parts, part)(chip, found[-1].append)
    return found


def test_goldens_and_a_run_that_moves(with_plugins: Environment) -> None:
    asked = (("goldens", []), ("moved", []), ("goldens", [SILU]), ("moved", [SILU]))
    (found,) = on_processes(1, findings, "ascend", *asked, environment=with_plugins(ASCEND))
    goldens, (moved,), wrong, (wrong_moved,) = found
    assert [finding.name for finding in goldens] == ["deepseek", "llama", "telechat2"]
    assert all(finding.severity is Severity.GOOD for finding in (*goldens, moved)), found
    assert all(finding.figures["logits"] < 1e-5 for finding in goldens)
    assert moved.figures["relative difference"] < 1e-5
    assert all(finding.severity is Severity.BROKEN for finding in (*wrong, wrong_moved)), found


@pytest.mark.slow
def test_a_sound_chip_is_aligned_in_bf16_and_has_the_memory_of_a_rehearsal(with_plugins: Environment) -> None:
    asked = [(part, []) for part in ("align_dense", "align_mixture", "memory")]
    (parts,) = on_processes(1, findings, "cambricon", *asked, environment=with_plugins(CAMBRICON))
    found = [finding for part in parts for finding in part]
    assert [finding.severity for finding in found] == 4 * [Severity.GOOD], found
    aligned, peaks = found[:2], found[2:]
    assert all("in bf16" in one.seen and one.figures["operations"] > 500 for one in aligned)
    for peak in peaks:
        assert peak.figures["rehearsed bytes"] == pytest.approx(peak.figures["given bytes"], rel=0.1)


@pytest.mark.slow
def test_a_wrong_operation_is_named(with_plugins: Environment) -> None:
    asked = ("align_dense", [SILU])
    ((found,),) = on_processes(1, findings, "cambricon", asked, environment=with_plugins(CAMBRICON))
    whole, first, *_ = found
    assert whole.severity is Severity.BROKEN and whole.figures["outside"] == len(found) - 1
    assert "forward of layers.0.feed_forward: aten.silu.default" in first.seen


def device_check(
    vendor: Vendor | None, with_plugins: Environment, folder: Path, *only: str, **more: str
) -> tuple[dict[str, Any], int]:
    """The command in a folder of its own, as from a clone: its JSON, and its exit code."""
    plugins = with_plugins(vendor, **more) if vendor else {}
    chosen = [word for part in only for word in ("--only", part)]
    clone = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, (clone, plugins.get("PYTHONPATH"))))
    words = ["--chip", vendor.backend if vendor else "cpu", "--folder", str(folder), *chosen]
    done = subprocess.run(
        [sys.executable, "-m", "zili.diagnosis.device_check", *words],
        env={**os.environ, **plugins, "PYTHONPATH": path},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    report = json.loads((folder / "device-check.json").read_text(encoding="utf-8"))
    assert (folder / "device-check.md").read_text(encoding="utf-8") in done.stdout, done.stderr
    return report, done.returncode


def test_the_command_and_a_chip_without_a_kernel(with_plugins: Environment, tmp_path: Path) -> None:
    raises = {FAULTS: json.dumps([{"operation": "aten::silu", "kind": "raise"}])}
    report, code = device_check(UNHEARD_OF, with_plugins, tmp_path / "out", "goldens", **raises)
    (part,) = report["parts"]
    assert code == 10 and part["state"] == "failed" and "no kernel for aten::silu" in part["why"]
    assert any("Traceback" in line for line in part["log"])


@pytest.mark.slow
@pytest.mark.parametrize("vendor", [ASCEND, CAMBRICON, UNHEARD_OF, None], ids=str)
def test_the_whole(vendor: Vendor | None, with_plugins: Environment, tmp_path: Path) -> None:
    report, code = device_check(vendor, with_plugins, tmp_path / "out")
    assert [part["name"] for part in report["parts"]] == list(PARTS)
    failed = [part for part in report["parts"] if part["state"] == "failed"]
    assert failed == []
    # Slow, a process may be by what else this machine does.
    assert [finding for finding in report["findings"] if finding["severity"] == "broken"] == [] and code != 10
    assert report["seconds"] < 600
    assert report["backend"] == (vendor.backend if vendor else "cpu")
    areas = {finding["area"] for finding in report["findings"]}
    assert areas >= {
        "goldens",
        "numbers",
        "speed",
        "align",
        "peak memory",
        "resume",
        "throughput",
        "collectives",
        "workers",
    }
    rates = {f["name"]: f["figures"] for f in report["findings"] if f["area"] == "throughput"}
    assert rates["zili, eager"]["tokens/s"] > 0
    # transformers asks a plugin called torch_npu for operations that the emulated one has not.
    assert vendor is ASCEND or rates["transformers, eager"]["zili over it"] > 0
    if vendor is ASCEND:
        # An emulated chip has a host's speed: a plan for the real one would rightly refuse that.
        slow = replace(machine(find_chip("910b2")), peak=1e12, memory=1e11, link=1e10)
        assert with_measurements(slow, report)[0].measured >= {"measured_products", "memory", "link"}
