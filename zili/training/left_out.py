"""Which batches a run leaves out, and why: written down, so that who goes on with it or repeats it does the same. No
torch.

Batches have positions, from 0: that of position p is a pure function of the seed and p. Step k takes position k plus
what is left out before it. `RUN/decisions.json` has every decision at once, a checkpoint those that it came about by.
"""

from __future__ import annotations

import json
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from zili.config.watch import WatchConfig
from zili.durable import write_whole
from zili.errors import CheckpointError, ConfigError, TrainingError
from zili.plurals import counted

DECISIONS_FILE = "decisions.json"
Window = tuple[int, int]
"""First and last position of batches."""


@dataclass(frozen=True, order=True)
class LeftOut:
    """Batches that are left out: read without an update (skip), or not read at all (roll_back)."""

    first: int
    """Position of the first batch."""
    last: int
    action: Literal["skip", "roll_back"]
    step: int
    """Steps done before the one that met the bad batch."""
    why: str
    """What was seen, with its figures."""

    def __str__(self) -> str:
        batches = f"batch {self.first}" if self.first == self.last else f"batches {self.first} to {self.last}"
        done = "is read without an update" if self.action == "skip" else "left out, from a checkpoint before"
        return f"step {self.step + 1}: {self.why}; {batches} {done}"


def windows(decisions: Iterable[LeftOut]) -> list[Window]:
    """What is not read at all, in order; windows that meet are one."""
    found: list[Window] = []
    for first, last in sorted((one.first, one.last) for one in decisions if one.action == "roll_back"):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return found


def position_of(step: int, left_out: Sequence[Window]) -> int:
    """Position of the batch of step `step` (from 0), where the `windows` are left out."""
    position = step
    for first, last in left_out:
        if position < first:
            break
        position += last - first + 1
    return position


def together(*some: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
    """All decisions once each, by position. Two on the same batches are one: the first that is given."""
    found: list[LeftOut] = []
    for decision in (decision for every in some for decision in every):
        if all((decision.action, decision.first, decision.last) != (a.action, a.first, a.last) for a in found):
            insort(found, decision)
    return tuple(found)


def consumed(decisions: Iterable[LeftOut], step: int, known: Iterable[LeftOut]) -> bool:
    """Whether a checkpoint after `step` steps, which came about by the decisions `known`, has read a batch that
    `decisions` leave out."""
    own = windows(known)
    position = position_of(step, own)
    read = (p for first, last in windows(decisions) for p in range(first, min(last + 1, position)))
    return any(all(not first <= p <= last for first, last in own) for p in read)


def leave_out(step: int, why: str, decisions: Sequence[LeftOut], watch: WatchConfig, saved: Iterable[int]) -> LeftOut:
    """The decision to leave out the batch of step `step` (from 0) and `watch.margin` on each side, as far as
    checkpoints of the steps `saved` allow."""
    left_out = windows(decisions)
    bad = position_of(step, left_out)
    wanted = max(0, bad - watch.margin)
    begins = [position_of(one, left_out) for one in saved if one <= step]
    # Without a checkpoint so far back, what the oldest has read stays read.
    first = wanted if not begins or min(begins) <= wanted else min(begins)
    return LeftOut(first, bad + watch.margin, "roll_back", step, why)


def refuse_too_many(decision: LeftOut, decisions: Iterable[LeftOut], watch: WatchConfig) -> None:
    """Raise TrainingError where batches were left out `watch.most` times shortly before."""
    lately = [one for one in decisions if 0 <= decision.last - one.last < watch.within and one != decision]
    if len(lately) >= watch.most:
        error = TrainingError(
            f"step {decision.step + 1}: {decision.why}. Batches were left out {counted(len(lately), 'time')} among the "
            f"last {watch.within:,} (watch.most = {watch.most}), so it is not the data. Lower "
            "optimizer.learning_rate, lengthen schedule.warmup_steps, or raise watch.threshold"
        )
        error.agreed = True
        raise error


def read_decisions(file: Path) -> tuple[LeftOut, ...]:
    """What `write_decisions` wrote; nothing where there is no file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return decisions_in(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}; it says which batches are left out") from error


def decisions_in(table: Any) -> tuple[LeftOut, ...]:
    """Of a list as `as_table` makes it. Raises TypeError or ValueError where it is none."""
    found = together(LeftOut(**one) for one in table)
    for one in found:
        if not (isinstance(one.first, int) and isinstance(one.last, int) and 0 <= one.first <= one.last):
            raise ValueError(f"no batches: {one}")
    return found


def as_table(decisions: Iterable[LeftOut]) -> list[dict[str, Any]]:
    return [asdict(one) for one in decisions]


def write_decisions(run: Path, decisions: Iterable[LeftOut]) -> None:
    """Put them into the run's folder, whole."""
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / DECISIONS_FILE, json.dumps(as_table(decisions), indent=1) + "\n")


def repeated(watch: WatchConfig) -> tuple[LeftOut, ...]:
    """What the recipe has repeated of another run.

    Raises:
        ConfigError: `watch.decisions` names none.
    """
    if watch.decisions is None:
        return ()
    file = watch.decisions / DECISIONS_FILE if watch.decisions.is_dir() else watch.decisions
    if not file.is_file():
        raise ConfigError(f"watch.decisions: there is no {file}; a run that left out nothing has none")
    return read_decisions(file)


def order_roll_back(run: Path, step: int, why: str, watch: WatchConfig, saved: Iterable[int]) -> LeftOut:
    """Have the next life of `run` go back to before step `step` (from 0), and leave out its batch. For a supervisor.
    What was ordered for the same reason already is not ordered again.

    Raises:
        TrainingError: batches were left out too often.
        CheckpointError: what was left out so far cannot be read.
        OSError: it cannot be written.
    """
    known = read_decisions(run / DECISIONS_FILE)
    if (before := next((one for one in known if (one.step, one.why) == (step, why)), None)) is not None:
        return before
    decision = leave_out(step, why, known, watch, saved)
    refuse_too_many(decision, known, watch)
    write_decisions(run, together(known, [decision]))
    return decision
