"""For whoever holds a chip: `python -m zili.diagnosis.device_check`, from a clone, without installing anything.

    python -m zili.diagnosis.device_check [--chip NAME] [--folder DIR] [--only PART ...]

Each part runs in a process of its own, for so long and no longer. What hangs, crashes or is not there is a line of the
report, and the next part follows. This process imports Python's own library alone, so it reports whatever else is
missing. It ends in one page to read and one JSON to send back, which `zili plan --doctor` takes. Ten minutes at most,
nothing is fetched, and what is written is readable by its owner alone, without names of machines, people or folders.

Exit codes, as `zili doctor`: 0 sound, 9 something is slow or does not repeat, 10 something is wrong.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from zili.diagnosis.device_page import page, without_names
from zili.diagnosis.findings import EXIT_CODES, Finding, Severity, worst
from zili.durable import write_whole

SECONDS = 600.0
"""For everything together."""
_LEAST = 5.0
"""Seconds with less than which a part is not begun."""
_GRACE = 5.0
"""Seconds for a process to say where it hangs, and again to end; a driver may keep one that was killed."""
_MADE_FOR = (2, 13)
"""The version of torch. What an older one lacks is skipped, and does not count against the chip."""
_TOLD = 60
"""Last lines of a failed process that are kept."""


class Part(NamedTuple):
    """What is examined by itself."""

    seconds: float
    """After which it is ended. Together more than `SECONDS`: on a chip most take a tenth of it."""
    what: str
    function: str
    """In a module beside this one, imported by the process that runs it alone."""


PARTS: Mapping[str, Part] = {
    "goldens": Part(90, "published models' logits, loss, gradients", "device_parts.goldens"),
    "speed": Part(90, "products, memory, copies, disk; whether sums repeat", "device_doctor.speed"),
    "numbers": Part(120, "every operation, forward and backward", "device_doctor.numbers"),
    "align dense": Part(120, "every operation of training steps, in bf16", "device_parts.align_dense"),
    "align mixture": Part(120, "the same with experts and latent attention", "device_parts.align_mixture"),
    "memory": Part(120, "the allocator's peak beside a rehearsal's", "device_parts.memory"),
    "resume": Part(120, "a run from the chip to the CPU and back", "device_parts.moved"),
    "throughput": Part(120, "tokens/s and MFU, beside transformers", "device_speed.eager"),
    "capabilities": Part(150, "what the chip's record promises", "device_doctor.capabilities"),
    "collectives": Part(120, "two processes, where there are two devices", "device_doctor.collectives"),
    "workers": Part(120, "whether forked workers can use the chip", "device_doctor.workers"),
    "compiled": Part(150, "tokens/s with compiled blocks", "device_speed.compiled"),
}
"""In this order: what a report is most wanted for comes first, should time run out."""


@dataclass
class Outcome:
    """What came of a part."""

    name: str
    state: str
    """done, skipped, or failed."""
    seconds: float = 0.0
    why: str = ""
    findings: list[Finding] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    """What `zili doctor` says of the chip, where the part is one of its areas."""
    log: list[str] = field(default_factory=list)
    """Last lines of a process that failed."""

    def as_json(self) -> dict[str, Any]:
        """Without findings and report, which are joined with the other parts'."""
        own = {key: value for key, value in vars(self).items() if key not in ("findings", "report")}
        return {**own, "seconds": round(self.seconds, 1), "what": PARTS[self.name].what}


def check(chip: str, folder: Path, only: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Run the parts named `only`, or all, on backend `chip`; write page and JSON into `folder`; return the JSON."""
    begun, outcomes = time.monotonic(), []
    for name in only or PARTS:
        left = SECONDS - (time.monotonic() - begun)
        outcomes.append(run_part(name, command(name, chip), min(PARTS[name].seconds, left)))
        say(_line(outcomes[-1]))
    report = without_names(joined(outcomes, time.monotonic() - begun))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "device-check.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / "device-check.md", page(report))
    return report


def command(name: str, chip: str) -> list[str]:
    """The process of part `name`; where its findings go comes last."""
    return [sys.executable, "-m", "zili.diagnosis.device_check", "--chip", chip, "--part", name]


def run_part(name: str, begin: Sequence[str], seconds: float) -> Outcome:
    """Run the process `begin FILE` for `seconds` at most, and read what it wrote into the file."""
    if seconds < _LEAST:
        return Outcome(name, "skipped", why=f"the {SECONDS / 60:.0f} minutes are over")
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        found, started = Path(own) / "findings", time.monotonic()
        found.touch()
        process = subprocess.Popen(
            [*begin, str(found)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # what it starts ends with it
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_search_path())},
        )
        try:
            process.wait(seconds)
            end = _how_it_ended(process.returncode)
        except subprocess.TimeoutExpired:
            end = f"did not end in {seconds:.0f} s"
        finally:
            _end(process)
        return _outcome(name, found, end, time.monotonic() - started, log)


def _search_path() -> Iterator[str]:
    """The clone first: what is not installed is found, and nothing that is installed is taken for it."""
    yield str(Path(__file__).resolve().parents[2])
    yield from filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and all it started; one that runs first says on which lines it is."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGUSR1)
            time.sleep(_GRACE / 5)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)


def _outcome(name: str, found: Path, end: str, seconds: float, log: TextIO) -> Outcome:
    outcome = Outcome(name, "failed", seconds, end)
    for line in found.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # the last one, of a process that was ended while writing it
            _heard(outcome, json.loads(line))
    if outcome.state == "failed":
        log.seek(0)
        outcome.log = log.read().splitlines()[-_TOLD:]
        last = f" after {outcome.findings[-1].name}" if outcome.findings else ""
        where = "its last lines are in the JSON, under parts"
        outcome.findings.append(Finding(name, "part", Severity.BROKEN, f"{outcome.why}{last}", where))
    elif outcome.state == "skipped":
        outcome.findings.append(Finding(name, "part", Severity.FALLBACK, outcome.why))
    elif end != _how_it_ended(0):  # as plugins do that take their device down too late
        outcome.why = f"and then {end}"
    return outcome


def _heard(outcome: Outcome, line: dict[str, Any]) -> None:
    if "finding" in line:
        outcome.findings.append(Finding(**{**line["finding"], "severity": Severity(line["finding"]["severity"])}))
    else:
        outcome.state, outcome.why = line["state"], line.get("why", "")
        outcome.report = line.get("report") or {}


def _line(outcome: Outcome) -> str:
    what = f"{worst(outcome.findings).name.lower()}, {len(outcome.findings)} findings"
    if outcome.state != "done":
        what = f"{outcome.state}: {outcome.why}"
    return f"{outcome.name:<14} {outcome.seconds:5.0f} s  {what}"


def joined(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """One report as of `zili doctor --json`, of all areas and parts, and beside it `parts` and `seconds`."""
    report: dict[str, Any] = {}
    capabilities: dict[str, Any] = {}
    for outcome in outcomes:
        own = outcome.report
        capabilities |= {
            name: found
            for name, found in own.get("capabilities", {}).items()
            if found["works"] is not None or name not in capabilities
        }
        report = {**{key: value for key, value in own.items() if key not in ("severity", "findings")}, **report}
    findings = list(_once(outcomes))
    return {
        **report,
        "capabilities": capabilities,
        "severity": worst(findings).name.lower(),
        "seconds": round(seconds, 1),
        "parts": [outcome.as_json() for outcome in outcomes],
        "findings": [_as_json(finding) for finding in findings],
    }


def _as_json(finding: Finding) -> dict[str, Any]:
    # JSON has no inf and no nan, and not every reader takes Python's; the words beside say it.
    figures = {name: value for name, value in finding.figures.items() if math.isfinite(value)}
    return {**asdict(finding), "severity": finding.severity.name.lower(), "figures": figures}


def _once(outcomes: Sequence[Outcome]) -> Iterator[Finding]:
    """All findings; each of doctor's areas also says what is here."""
    seen = set()
    for outcome in outcomes:
        for finding in outcome.findings:
            if finding.area != "here" or finding.name not in seen:
                yield finding
            if finding.area == "here":
                seen.add(finding.name)


# ---- in the process of a part


def _run_here(name: str, chip: str, into: Path) -> None:
    """Part `name`, a line of JSON for each finding and one for the end."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    with into.open("a", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        try:
            from zili import chips

            chips.apply_environment(chips.choose(chip).backend)  # parts import torch, which reads it
            module, _, function = PARTS[name].function.partition(".")
            part = getattr(importlib.import_module(f"zili.diagnosis.{module}"), function)
            report = part(chip, lambda finding: write({"finding": asdict(finding)}))
            if report is None:
                report = importlib.import_module("zili.diagnosis.doctor").identity(chip)
            write({"state": "done", "report": report})
        except Exception as error:  # whatever a chip raises
            traceback.print_exc()
            lacking = what_is_lacking(error, _torch_version())
            write({"state": "skipped", "why": lacking} if lacking else {"state": "failed", "why": _said(error)})


def what_is_lacking(error: BaseException, torch_version: str) -> str | None:
    """What is not installed, or in an older torch not there, if that is what `error` is about."""
    for one in (error, error.__cause__):
        if isinstance(one, ModuleNotFoundError) and one.name and not one.name.startswith(("zili", "torch.")):
            package = one.name.partition(".")[0]
            return f"{package} is not installed (pip install {package})"
    older = tuple(int(part) for part in torch_version.split(".")[:2] if part.isdigit()) < _MADE_FOR
    if older and isinstance(error, ImportError | AttributeError) and "torch" in str(error):
        return f"torch {torch_version} is older than {'.'.join(map(str, _MADE_FOR))}: {error}"
    return None


def _torch_version() -> str:
    return str(getattr(sys.modules.get("torch"), "__version__", "0"))


def _said(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first} ({Path(place.filename).name}:{place.lineno})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zili.diagnosis.device_check", description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="auto", help="backend; auto takes the one that a run would")
    parser.add_argument("--folder", type=Path, default=Path("device-check"), help="where page and JSON go")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone; may be given again")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("into", nargs="?", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.part:
        _run_here(given.part, given.chip, given.into)
        return 0
    before = os.umask(0o077)
    try:
        report = check(given.chip, given.folder, given.only or (), lambda line: print(line, flush=True))
    finally:
        os.umask(before)
    print("\n" + page(report))
    print(f"to read: {given.folder / 'device-check.md'}; to send back: {given.folder / 'device-check.json'}")
    return EXIT_CODES[Severity[report["severity"].upper()]]


if __name__ == "__main__":
    sys.exit(main())
