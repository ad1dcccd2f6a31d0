"""Whether `zili launch` may fork its workers on a chip: the proof that a machine makes before it joins a run."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from zili.diagnosis.findings import Finding, Severity
from zili.errors import ChipError, ConfigError
from zili.plurals import counted
from zili.supervision.processes import LocalProcesses
from zili.supervision.proving import Proving

AREA = "workers"
_NAME = "forked workers"
_LOOPBACK = "127.0.0.1"


def examine(chip: str, count: int) -> Finding:
    """What is found of `count` workers, each with a device of backend `chip`, forked from a process that has imported
    what they need but the plugin."""
    try:
        seconds, reason = asyncio.run(_proved(chip, count))
    except (ChipError, ConfigError, RuntimeError) as error:
        fix = "`zili launch` refuses this machine so; what the line names has to be mended"
        return Finding(AREA, _NAME, Severity.BROKEN, f"not proven, because {error}", fix)
    if reason:
        seen = f"not proven, because {reason}; workers that are a Python of their own can use it"
        return Finding(AREA, _NAME, Severity.FALLBACK, seen, "`zili launch` begins those here; restarts take longer")
    seen = f"proven: {counted(count, 'process')} used the chip and ended {seconds:.2f} s after they were forked"
    return Finding(AREA, _NAME, Severity.GOOD, seen, figures={"seconds": seconds})


async def _proved(chip: str, count: int) -> tuple[float, str]:
    """Seconds that the proof took, and why it cannot be made by forks; "": it was."""

    def begun() -> LocalProcesses:
        made.append(LocalProcesses(chip, cold=proving.cold, ended=lambda *_: None))
        return made[-1]

    made: list[LocalProcesses] = []
    with tempfile.TemporaryDirectory() as folder:
        proving = Proving(chip, _LOOPBACK, count, Path(folder), lambda _: None, cold=False)
        try:
            await begun().ready
            started = time.monotonic()
            await proving.prove(made[0], begun)
            return time.monotonic() - started, proving.reason
        finally:
            for processes in made:
                processes.close()
