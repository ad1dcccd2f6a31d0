"""Whether the processes of a machine can use its chip, begun as its workers will be: by a try-out of each.

It is also the proof of forking. Nobody knows of a vendor's plugin whether it works in a process whose parent imported
torch, and so each machine tries. Where forked try-outs fail and cold ones pass, its workers begin cold.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path

from zili.errors import ChipError, ConfigError
from zili.plurals import counted
from zili.supervision.nursery import STACKS
from zili.supervision.processes import ERROR_FILE, LocalProcesses
from zili.supervision.reports import stacks_of
from zili.supervision.stacks import place_in

FORKED = 60.0
"""Seconds for try-outs that are forked: a device takes up to 20 s to open."""
COLD = 180.0
"""Seconds for cold ones, which import everything from what may be a shared disk, all at once."""
_AGAIN = 5.0
"""Seconds after which a device that refused is asked once more: who had it before may be about to end."""
_DYING = 10.0
"""Seconds in which one ends that was killed."""
_WHILE = 300.0
"""Seconds for which it is believed of a chip that it works, after a process has used it."""
_TAIL = 4096
"""Bytes of a log's end that are read."""
_LONGEST = 500
"""Characters of a reason."""


class Proving:
    """One machine's proof, made once, and again where no process has used the chip for a while."""

    def __init__(
        self,
        chip: str,
        host: str,
        count: int,
        folder: Path,
        show: Callable[[str], None],
        *,
        cold: bool,
        look: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`count`: processes, each with a device. `folder`: of this machine and this user alone. `look` raises what
        else keeps this machine from a run."""
        self.cold = cold
        """Whether each process of the machine has to be a Python of its own."""
        self.reason = ""
        """Why forked ones cannot be used here, where it was tried."""
        self._tryouts = [TryOut(chip, host, local, count, folder) for local in range(count)]
        self._chip = chip
        self._show = show
        self._look = look
        self._used: float | None = None
        self._one_at_a_time = asyncio.Lock()

    def used(self) -> None:
        """Tell that a process has used the chip until now."""
        self._used = time.monotonic()

    async def prove(self, processes: LocalProcesses, renewed: Callable[[], LocalProcesses]) -> None:
        """Try the chip. `renewed` gives other processes for `processes`, cold ones from now on.

        Raises:
            ChipError: it cannot be used, in any way that processes can be begun here.
            ConfigError: this machine cannot be reached. And what `look` raises.
        """
        async with self._one_at_a_time:
            await self._prove(processes, renewed)

    async def prove_again(self, processes: LocalProcesses, renewed: Callable[[], LocalProcesses]) -> None:
        """`prove`, where the last proof is old: of a machine that stood by, not of one that worked."""
        async with self._one_at_a_time:
            if self._used is not None and time.monotonic() - self._used > _WHILE:
                await self._prove(processes, renewed)

    async def _prove(self, processes: LocalProcesses, renewed: Callable[[], LocalProcesses]) -> None:
        if self._look is not None:
            await self._look()
        await processes.ready
        failed = await self._failures(processes, COLD if self.cold else FORKED)
        if failed and failed[0].code not in (None, ConfigError.exit_code):
            await asyncio.sleep(_AGAIN)
            failed = await self._failures(processes, COLD if self.cold else FORKED)
        if failed and not self.cold and failed[0].code != ConfigError.exit_code:
            self.cold, why = True, self._why(failed)
            processes = renewed()
            await processes.ready
            failed = await self._failures(processes, COLD)
            if not failed:
                self.reason = why
                self._show(
                    f"forked processes cannot use {self._chip} here ({why}): each worker begins as a Python of its "
                    "own, restarts take longer"
                )
        if failed:
            kind = ConfigError if failed[0].code == ConfigError.exit_code else ChipError
            raise kind(f"this machine cannot take part: {self._why(failed)}")
        self.used()

    async def _failures(self, processes: LocalProcesses, seconds: float) -> list[TryOut]:
        """Try all devices at once; those that did not pass."""
        await asyncio.gather(*(one.run(processes, seconds) for one in self._tryouts))
        return [one for one in self._tryouts if one.code != 0]

    def _why(self, failed: list[TryOut]) -> str:
        first = failed[0].why[:_LONGEST]
        if len(self._tryouts) == 1:
            return first
        others = f"; {len(failed)} of {counted(len(self._tryouts), 'process')}" if len(failed) > 1 else ""
        return f"process {failed[0].local}: {first}{others}"


class TryOut:
    """That of one process."""

    def __init__(self, chip: str, host: str, local: int, count: int, folder: Path) -> None:
        self.local = local
        self.code: int | None = None
        """Exit code of the last one; None: it did not end in time."""
        self.why = ""
        """What it said where it failed."""
        self._key = -1 - local  # ranks of the run's processes are no less than 0
        self._words = ["launch", "try-out", chip, "--host", host]
        self._files = {kind: folder / f"try-out-{local}.{kind}" for kind in ("log", "error", "stacks")}
        self._environment = {
            **{"RANK": str(local), "LOCAL_RANK": str(local), "GROUP_RANK": "0"},
            **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_WORLD_SIZE": "1"},
            **{ERROR_FILE: str(self._files["error"]), STACKS: str(self._files["stacks"])},
        }

    async def run(self, processes: LocalProcesses, seconds: float) -> None:
        """Begin it and await its end, which comes within `seconds` and those that a kill takes."""
        self._clear()
        self.code, self.why = None, ""
        ended = processes.begin_apart(self._key, self._words, self._environment, self._files["log"])
        await asyncio.wait([ended], timeout=seconds)
        if ended.done():
            self.code = ended.result()
            self.why = _why(self.code, self._files) if self.code else ""
        else:
            self.why = f"it did not end in {seconds:.0f} s{await self._where(processes)}"
            processes.signal(signal.SIGKILL, self._key)
            await asyncio.wait([ended], timeout=_DYING)
        self._clear()

    async def _where(self, processes: LocalProcesses) -> str:
        """Where it hangs, as far as it says."""
        send = lambda number: processes.signal(number, self._key, alone=True)  # noqa: E731
        place = place_in(await stacks_of(self._files["stacks"], send))
        return f", at {place.frame}" if place else ""

    def _clear(self) -> None:
        for file in self._files.values():
            file.unlink(missing_ok=True)


def _why(code: int, files: Mapping[str, Path]) -> str:
    """What a process that ended with `code` said of it, in a line."""
    end = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    with suppress(OSError, ValueError, KeyError, TypeError):
        said = str(json.loads(files["error"].read_text(encoding="utf-8"))["message"]["message"])
        ours = re.match(r"zili: (?:process \d+: )?", said)
        return " ".join(said[ours.end() :].split()) if ours else _last_line(said)
    with suppress(OSError):
        last = _last_line(files["log"].read_bytes()[-_TAIL:].decode("utf-8", "replace"))
        return f"{end}: {last}" if last else end
    return end


def _last_line(text: str) -> str:
    """The line that says what was wrong, of a traceback too."""
    return (text.strip().splitlines() or [""])[-1]
