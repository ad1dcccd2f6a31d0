"""The check for whoever holds a chip: whatever a part does, the report comes, in time, and names nobody."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from zili.chips.catalog import find_chip
from zili.diagnosis import device_check
from zili.diagnosis.device_check import PARTS, Outcome, check, joined, run_part, what_is_lacking
from zili.diagnosis.device_page import page, without_names
from zili.diagnosis.findings import Finding, Severity
from zili.planning.fitted.machine import machine, with_measurements

CLONE = Path(device_check.__file__).resolve().parents[2]
FOUND = Finding("goldens", "llama", Severity.GOOD, "logits 1e-6 apart", figures={"logits": 1e-6})


def python(code: str) -> list[str]:
    """A process in a part's place: `file` is where its findings go."""
    begin = f"import json, os, sys, time\nfile = open(sys.argv[1], 'a')\nfound = {json.dumps(asdict(FOUND))!r}\n"
    begin += "file.write('{\"finding\": ' + found + '}\\n'); file.flush()\n"
    return [sys.executable, "-c", begin + textwrap.dedent(code)]


def test_what_a_crashed_process_found_before_is_kept() -> None:
    outcome = run_part("goldens", python("print('the driver said no'); sys.stdout.flush(); os.abort()"), 60)
    assert outcome.state == "failed" and outcome.why == "was ended by SIGABRT"
    kept, failed = outcome.findings
    assert kept == FOUND
    assert (failed.area, failed.severity) == ("goldens", Severity.BROKEN) and "after llama" in failed.seen
    assert "the driver said no" in outcome.log


def test_a_process_that_hangs_is_ended_in_time_with_all_it_started_and_says_where(tmp_path: Path) -> None:
    mark = tmp_path / "child"
    code = f"""
        import faulthandler, signal, subprocess
        faulthandler.register(signal.SIGUSR1)
        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])
        open({str(mark)!r}, 'w').write(str(child.pid))
        def waits_for_the_chip(): time.sleep(1000)
        waits_for_the_chip()
    """
    started = time.monotonic()
    outcome = run_part("goldens", python(code), 5)
    assert time.monotonic() - started < 60
    assert outcome.state == "failed" and outcome.why == "did not end in 5 s"
    assert any("waits_for_the_chip" in line for line in outcome.log)
    until(lambda: _ended(Path(f"/proc/{mark.read_text()}/stat")))  # killed, and the kernel takes its time


def _ended(status: Path) -> bool:
    try:
        return status.read_text().split()[2] == "Z"
    except OSError:
        return True


def test_a_process_that_crashes_when_all_is_done_loses_nothing() -> None:
    outcome = run_part("goldens", python('file.write(\'{"state": "done"}\\n\'); file.flush(); os.abort()'), 60)
    assert (outcome.state, outcome.why, outcome.findings) == ("done", "and then was ended by SIGABRT", [FOUND])


def test_half_a_line_of_a_process_that_was_ended_costs_nothing_else() -> None:
    outcome = run_part("goldens", python('file.write(\'{"finding": {"ar\'); file.flush(); os._exit(3)'), 60)
    assert outcome.why == "ended with code 3" and outcome.findings[0] == FOUND


def test_a_part_without_time_is_not_begun() -> None:
    outcome = run_part("goldens", ["/nothing/is/here"], 1)
    assert outcome.state == "skipped" and "minutes are over" in outcome.why


@pytest.mark.parametrize(
    ("raised", "torch", "said"),
    [
        ("import no_such_package_42.inner", "2.13.0", "no_such_package_42 is not installed (pip install"),
        ("import torch; torch.no_such_thing", "2.12.0+cu130", "torch 2.12.0+cu130 is older than 2.13"),
        ("import torch; torch.no_such_thing", "2.11.0", "has no attribute 'no_such_thing'"),
        ("import torch; torch.no_such_thing", "2.13.0", None),
        ("from torch.no_such_module import x", "2.12.0", "torch 2.12.0 is older"),
        ("from torch.no_such_module import x", "2.13.0", None),
        ("import zili.no_such_module", "2.12.0", None),
        ("{}.get('torch').x", "2.12.0", None),
        ("raise RuntimeError('torch: the chip is on fire')", "2.12.0", None),
    ],
)
def test_what_is_lacking_is_told_from_what_is_wrong(raised: str, torch: str, said: str | None) -> None:
    with pytest.raises(Exception) as caught:
        exec(raised)
    lacking = what_is_lacking(caught.value, torch)
    assert lacking is None if said is None else lacking is not None and said in lacking


def test_what_is_lacking_behind_an_error_of_ours_is_seen() -> None:
    with pytest.raises(RuntimeError) as caught:
        try:
            import no_such_package_42  # noqa: F401
        except ImportError as error:
            raise RuntimeError("the plugin cannot be imported") from error
    assert "no_such_package_42 is not installed" in str(what_is_lacking(caught.value, "2.13.0"))


def test_the_report_needs_nothing_that_is_not_pythons_own() -> None:
    code = (
        "import sys; before = set(sys.modules); import zili.diagnosis.device_check; print(*set(sys.modules) - before)"
    )
    loaded = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=CLONE)
    tops = {name.partition(".")[0] for name in loaded.stdout.split()}
    assert tops - set(sys.stdlib_module_names) == {"zili"}


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pydantic.py").write_text("raise ModuleNotFoundError(\"No module named 'pydantic'\", name='pydantic')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = run_part("goldens", device_check.command("goldens", "cpu"), 60)
    assert (outcome.state, outcome.why) == ("skipped", "pydantic is not installed (pip install pydantic)")
    (finding,) = outcome.findings
    assert finding.severity is Severity.FALLBACK, "nothing against the chip"


def doctors_report(*findings: Finding, **more: Any) -> dict[str, Any]:
    report = {"chip": "auto", "backend": "ascend", "device": "Ascend910B2", "model": "910b2", "devices": 8}
    return {**report, "versions": {"torch": "2.13.0"}, "capabilities": {}, **more}


SPEEDS = (
    Finding("here", "ascend", Severity.GOOD, "8 devices"),
    Finding("speed", "matmul bf16", Severity.GOOD, "TFLOP/s", figures={"4096 FLOP/s": 2.5e14}),
    Finding("speed", "memory", Severity.GOOD, "GB/s", figures={"bytes/s": 1.2e12}),
)
TOGETHER = Finding("collectives", "all_gather among 2", Severity.GOOD, "GB/s", figures={"bytes/s": 2e10})


def outcomes() -> list[Outcome]:
    tried = {"bf16": {"record": True, "works": True}, "fsdp2": {"record": True, "works": None}}
    together = {"bf16": {"record": True, "works": None}, "fsdp2": {"record": True, "works": False}}
    # The name is one that doctor has too: `zili plan` must not take it for the speed of memory.
    peak = Finding("peak memory", "dense", Severity.GOOD, "MiB", figures={"given bytes": 1e9})
    return [
        Outcome("goldens", "done", 3.0, findings=[FOUND]),
        Outcome("speed", "done", 9.0, findings=[*SPEEDS], report=doctors_report(capabilities=tried)),
        Outcome("memory", "done", 2.0, findings=[peak]),
        Outcome(
            "collectives", "done", 8.0, findings=[SPEEDS[0], TOGETHER], report=doctors_report(capabilities=together)
        ),
        Outcome("compiled", "skipped", 1.0, "triton is not installed"),
    ]


def test_parts_are_one_report_of_doctors_which_a_plan_takes() -> None:
    report = json.loads(json.dumps(without_names(joined(outcomes(), 23.0))))
    assert (report["backend"], report["device"], report["model"]) == ("ascend", "Ascend910B2", "910b2")
    assert report["severity"] == "good"
    assert [finding["name"] for finding in report["findings"]].count("ascend") == 1
    assert report["capabilities"]["bf16"]["works"] is True and report["capabilities"]["fsdp2"]["works"] is False
    measured, said = with_measurements(machine(find_chip("910b2")), report)
    assert measured.measured_products == 2.5e14 and measured.memory == 1.2e12 and measured.link == 2e10
    assert len(said) == 3


def test_the_page_says_each_part_and_what_was_skipped() -> None:
    text = page(without_names(joined(outcomes(), 23.0)))
    assert text.startswith("# Device check: Ascend910B2\n")
    assert "| compiled | tokens/s with compiled blocks | skipped: triton is not installed | 1 |" in text
    assert "- goldens: llama: logits 1e-6 apart" in text and "8 in sight; torch 2.13.0" in text
    assert len(text.splitlines()) < 60


def test_nobody_is_named() -> None:
    user, host, home = getpass.getuser(), platform.node(), str(Path.home())
    report = {
        "backend": host,  # as a chip may be called
        "environment": {"CACHE": f"{home}/cache", "OTHER": f"/data/{user}/x", "WHO": f"{user}@{host}"},
        "findings": [{"seen": f"{Path.cwd()}/a.py: no route to {host}.", "area": "here", "fix": ""}],
    }
    cleaned = without_names(report)
    assert cleaned["backend"] == host
    text = json.dumps({key: value for key, value in cleaned.items() if key != "backend"})
    for name in (home, str(Path.cwd()), f"/{user}/", f"{user}@", host):
        assert name not in text, text
    assert "no route to HOST." in text and "USER@HOST" in text
    # A user's name that is a word elsewhere stays a word.
    assert without_names({"seen": f"the {user} of it"}) == {"seen": f"the {user} of it"}


def test_files_are_the_owners_alone_and_a_report_comes_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dies = {"goldens": python("os.abort()"), "memory": python('file.write(\'{"state": "done"}\')')}
    monkeypatch.setattr(device_check, "command", lambda name, chip: dies[name])
    folder = tmp_path / "found"
    code = device_check.main(["--folder", str(folder), "--only", "goldens", "--only", "memory"])
    assert code == 10
    assert folder.stat().st_mode & 0o77 == 0
    report = json.loads((folder / "device-check.json").read_text(encoding="utf-8"))
    assert [part["state"] for part in report["parts"]] == ["failed", "done"]
    for file in folder.iterdir():
        assert file.stat().st_mode & 0o77 == 0
    shown = capsys.readouterr().out
    assert "failed: was ended by SIGABRT" in shown and (folder / "device-check.md").read_text() in shown


def test_all_parts_are_there_and_end_in_ten_minutes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock, bounds = [0.0], {}

    def takes_all_it_may(name: str, begin: Sequence[str], seconds: float) -> Outcome:
        bounds[name] = seconds
        clock[0] += max(seconds, 0)
        return Outcome(name, "done", seconds)

    monkeypatch.setattr(device_check, "run_part", takes_all_it_may)
    monkeypatch.setattr(device_check.time, "monotonic", lambda: clock[0])
    report = check("auto", tmp_path, (), lambda line: None)
    assert clock[0] <= 600 and list(bounds) == list(PARTS) == [part["name"] for part in report["parts"]]
    assert all(bounds[name] <= part.seconds for name, part in PARTS.items())


def test_a_report_with_a_failed_part_is_broken() -> None:
    failed = replace(outcomes()[0], findings=[FOUND, Finding("goldens", "part", Severity.BROKEN, "did not end")])
    assert joined([failed], 1.0)["severity"] == "broken"
