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
from zili.planning.machine import machine, with_measurements


def findings(chip: str, parts: Sequence[str], faults: Sequence[Fault] = ()) -> list[Finding]:
    """What parts of the check find, one after the other in this process."""
    from zili import chips
    from zili.diagnosis import device_parts

    chips.activate(chips.find_backend(chip))
    import emulated

    emulated.plant(*faults)
    found: list[Finding] = []
    for part in parts:
        getattr(device_parts, part)(chip, found.append)
    return found


def test_a_sound_chip(with_plugins: Environment) -> None:
    parts = ("goldens", "memory", "moved")
    (found,) = on_processes(1, findings, "ascend", parts, environment=with_plugins(ASCEND))
    by_name = {(finding.area, finding.name): finding for finding in found}
    goldens = [("goldens", name) for name in ("deepseek", "llama", "telechat2")]
    memory = [("peak memory", name) for name in ("dense", "mixture")]
    assert list(by_name) == [*goldens, *memory, ("resume", "dense")]
    for place in (*goldens, ("resume", "dense")):
        assert by_name[place].severity is Severity.GOOD, by_name[place]
    assert all(by_name[place].figures["logits"] < 1e-5 for place in goldens)
    assert by_name["resume", "dense"].figures["relative difference"] < 1e-5
    for place in memory:
        given, said = (by_name[place].figures[f"{what} bytes"] for what in ("given", "rehearsed"))
        assert said == pytest.approx(given, rel=0.1), by_name[place]


@pytest.mark.parametrize("part", ["align_mixture", pytest.param("align_dense", marks=pytest.mark.slow)])
def test_a_sound_chip_is_aligned_in_bf16(part: str, with_plugins: Environment) -> None:
    ((found,),) = on_processes(1, findings, "cambricon", (part,), environment=with_plugins(CAMBRICON))
    assert found.severity is Severity.GOOD, found
    assert "in bf16" in found.seen and found.figures["operations"] > 500


def test_a_wrong_chip_is_found_by_goldens_and_named_by_align(with_plugins: Environment) -> None:
    faults = [Fault("aten::silu", "scale", 0.01)]
    (found,) = on_processes(
        *(1, findings, "cambricon", ("goldens", "align_dense"), faults), environment=with_plugins(CAMBRICON)
    )
    assert all(finding.severity is Severity.BROKEN for finding in found)
    assert {finding.name for finding in found if finding.area == "goldens"} == {"deepseek", "llama", "telechat2"}
    first = next(finding for finding in found if finding.name == "dense: 1")
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
    assert [part for part in report["parts"] if part["state"] == "failed"] == []
    wrong = [finding for finding in report["findings"] if finding["severity"] in ("broken", "degraded")]
    assert wrong == [] and code == 0
    assert report["seconds"] < 600
    assert report["backend"] == (vendor.backend if vendor else "cpu")
    areas = {finding["area"] for finding in report["findings"]}
    assert areas >= {"goldens", "numbers", "speed", "align", "peak memory", "resume", "throughput", "collectives"}
    rates = {f["name"]: f["figures"] for f in report["findings"] if f["area"] == "throughput"}
    assert rates["zili, eager"]["tokens/s"] > 0
    # transformers asks a plugin called torch_npu for operations that the emulated one has not.
    assert vendor is ASCEND or rates["transformers, eager"]["zili over it"] > 0
    if vendor is ASCEND:
        # An emulated chip has a host's speed: a plan for the real one would rightly refuse that.
        slow = replace(machine(find_chip("910b2")), peak=1e12, memory=1e11, link=1e10)
        assert with_measurements(slow, report)[0].measured >= {"measured_products", "memory", "link"}
