"""What a rehearsal found."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from zili.planning.exact.messages import Message
from zili.rehearsal.recorder import PARTS, Recorder

_POINTS = 400


def ranges_text(numbers: Sequence[int]) -> str:
    """`0-11`, or `0-3, 12-15`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


@dataclass(frozen=True)
class Peak:
    """The moment at which most memory is taken."""

    bytes: int
    when: int
    """Number of the operation."""
    parts: dict[str, int]
    """Bytes by what they are for, all of `PARTS`."""
    largest: list[tuple[int, str, int]]
    """The largest blocks then: bytes of one, what it is, and how many are alike."""


@dataclass(frozen=True)
class Rehearsal:
    """One process's step."""

    rank: int
    world: int
    layout: str
    stages: list[int]
    """Numbers of the pipeline's stages that it has."""
    layers: list[int]
    micro_batches: int
    """In the rehearsed step; a run's has at least as many."""
    peak: Peak
    timeline: list[tuple[int, dict[str, int]]]
    """Bytes by part, thinned out: of each stretch of operations the moment with most."""
    messages: dict[Message, int]
    flops: dict[str, int]
    """FLOPs of matrix products and attention by phase; recomputation counts as backward."""
    operations: dict[str, int]
    seconds: float = 0.0
    resident_bytes: int = 0
    """This machine's, for the rehearsal itself."""
    choices: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        messages = [
            {"kind": m.kind, "mesh": m.mesh, "processes": m.processes, "bytes": m.bytes, "count": count}
            for m, count in self.messages.items()
        ]
        own = {key: value for key, value in vars(self).items() if key not in ("peak", "messages")}
        return {**own, "peak": vars(self.peak), "messages": messages}


def memory(recorder: Recorder) -> tuple[Peak, list[tuple[int, dict[str, int]]]]:
    """The peak of what `recorder` saw, and memory over time."""
    live: dict[int, int] = defaultdict(int)
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    step = max(1, recorder.now // _POINTS)
    total, top, at_top = 0, -1, {}
    timeline: list[tuple[int, dict[str, int]]] = []
    when, largest = 0, {}
    for stretch, changes in groupby(recorder.changes, key=lambda change: change[0] // step):
        highest, then = -1, {}
        for time, number, difference in changes:
            live[number] += difference
            parts[recorder.allocations[number].part] += difference
            total += difference
            if total > highest:
                highest, then = total, dict(parts)
            if total > top:
                top, at_top, when = total, dict(parts), time
                largest = dict(live) if stretch else {}
        timeline.append((stretch * step, then))
    peak = Peak(top, when, at_top, _largest(recorder, largest or dict(live)))
    return peak, timeline


def _largest(recorder: Recorder, live: dict[int, int], count: int = 12) -> list[tuple[int, str, int]]:
    alike = Counter((size, _said(recorder, number)) for number, size in live.items() if size)
    return [(size, what, times) for (size, what), times in sorted(alike.items(), key=_in_all)[:count]]


def _in_all(alike: tuple[tuple[int, str], int]) -> int:
    (size, _), times = alike
    return -size * times


def _said(recorder: Recorder, number: int) -> str:
    allocation = recorder.allocations[number]
    return f"{allocation.part}: {list(allocation.shape)} {allocation.dtype} of {allocation.made_by}"
