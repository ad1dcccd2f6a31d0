"""Runs the commands of docs/claims.md: `python tools/claims.py [WORDS IN A HEADING ...]`.

The page is the only list of claims. A claim is a heading of the second level and the block below it that begins with
`$ `: the command, then what it prints. A claim holds if its command ends with exit code 0 and the last line that it
prints is the last line of the block, where any number may stand for a number. So a command whose tests were all skipped
does not count as passed.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "claims.md"
SECONDS = 300
"""How long a command may take; on a machine that is busy with other work, set ZILI_CLAIMS_SECONDS."""
_NUMBER = re.compile(r"\d[\d.,]*(e[+-]?\d+)?")
_LONG_TIME = re.compile(r" in NUMBERs( \(.*\))?$")
"""pytest adds minutes to the seconds of a slow run."""


@dataclass(frozen=True)
class Claim:
    name: str
    command: list[str]
    """Its words; no shell reads them."""
    last_line: str


def claims_in(page: str) -> list[Claim]:
    """The claims of a page, in its order. Raises ValueError where a heading has no command or no output."""
    found = []
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        name = section.splitlines()[0].strip()
        blocks = re.findall(r"^```\w*\n\$ (.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
        if len(blocks) != 1:
            raise ValueError(f"'{name}' has {len(blocks)} commands in place of one")
        command, _, output = re.sub(r"\\\n\s*", " ", blocks[0]).partition("\n")
        lines = [line for line in output.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"'{name}' does not say what its command prints")
        found.append(Claim(name, shlex.split(command), lines[-1]))
    return found


def without_numbers(line: str) -> str:
    return _LONG_TIME.sub("", _NUMBER.sub("NUMBER", line.strip()))


def runnable(words: list[str]) -> list[str]:
    """The command under this Python: `zili`, `pytest` and `python` need not be on the path."""
    here = {"python": [], "zili": ["-m", "zili"], "pytest": ["-m", "pytest"]}
    return [sys.executable, *here[words[0]], *words[1:]]


def run(claim: Claim, seconds: float) -> str:
    """Why the claim does not hold, or an empty text. Prints what the command prints."""
    command = runnable(claim.command)
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=seconds)
        except BaseException as error:  # Ctrl-C too: the command has a session of its own
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return f"took more than {seconds:.0f} s"
            raise
    print(printed, flush=True)
    lines = [line for line in printed.splitlines() if line.strip()] or [""]
    if process.returncode:
        return f"exit code {process.returncode}"
    if without_numbers(lines[-1]) != without_numbers(claim.last_line):
        return f"it ended with '{lines[-1]}', and the page says '{claim.last_line}'"
    return ""


def main(words: list[str]) -> int:
    limit = float(os.environ.get("ZILI_CLAIMS_SECONDS", SECONDS))
    claims = claims_in(PAGE.read_text(encoding="utf-8"))
    rows = []
    for claim in (claim for claim in claims if all(word.lower() in claim.name.lower() for word in words)):
        print(f"## {claim.name}\n$ {shlex.join(claim.command)}", flush=True)
        begun = time.monotonic()
        why = run(claim, limit)
        rows.append((claim.name, why, time.monotonic() - begun))
    width = max((len(name) for name, _, _ in rows), default=0)
    print(f"{'claim':<{width}}  passed  seconds")
    for name, why, seconds in rows:
        print(f"{name:<{width}}  {'no' if why else 'yes':<6}  {seconds:7.1f}  {why}".rstrip())
    return int(any(why for _, why, _ in rows) or not rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
