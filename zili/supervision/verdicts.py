"""What to do after a failure: who met the cause, what it was, and whether to restart, replace, roll back or stop."""

from __future__ import annotations

import signal as signals
from collections.abc import Sequence
from dataclasses import dataclass

from zili.errors import NoProgressError
from zili.supervision.rules import ACTIONS, Action, Ending, FaultRule, Kind, rule_for, rule_named

__all__ = ["ACTIONS", "Ending", "Failure", "Verdict", "cause_of", "failure_of", "judge"]

RESTARTS_WITHOUT_A_STEP = 3
"""A fault that passes is gone after one restart, mostly; who fails three times without a step will fail a fourth time.
NVRx stops after as many."""
DEVICE_FAULTS_OF_A_MACHINE = 2
"""By chance a machine of a thousand meets two of a month's 150 failures once in a hundred months, so two of its devices
or of its own are a reason. In one published run 3 of 63 machines made half of all exclusions."""
FAULTS_OF_A_MACHINE = 3
"""Of faults that need not be the machine's, such as a crash in native code, one more."""
_OF_A_DEVICE = {"device", "host"}
_OF_A_MACHINE = _OF_A_DEVICE | {"memory", "network", "storage", "code", "unknown"}
_OF_THE_RUN = {"data", "numerics", "code", "memory", "unknown"}
"""What may come of the batch or of the program, and then comes again at the same step."""
_WRITTEN = {"code", "configuration"}
"""What a person wrote; it does not change from life to life."""
_BEFORE_A_STEP = {"start", "load"}
_ASKED = {signals.SIGTERM, signals.SIGINT, signals.SIGHUP}
"""Signals by which somebody asks a process to end."""
_STOPS = _ASKED | {signals.SIGKILL}
"""Those that a supervisor sends."""


@dataclass(frozen=True)
class Failure:
    """What a rule made of an ending."""

    rule: str
    kind: Kind
    machine: str
    rank: int
    step: int | None
    """Last finished step of the run; None before the first."""
    phase: str | None
    sentence: str
    """What happened, to whom and when, for a person."""
    hint: str
    """What a person can do."""


@dataclass(frozen=True)
class Verdict:
    """What is to be done, and why."""

    action: Action
    reason: str
    rule: str
    machine: str | None = None
    """The machine that is left out, where the action is `replace`."""
    exit_code: int | None = None
    """What the supervisor ends with, where history and not one failure says stop; schedulers do not requeue it."""


def cause_of(endings: Sequence[Ending]) -> Ending:
    """Of all processes that ended, the one that met the cause; the others are its victims.

    A process that a signal killed comes before one that raised, that before one that only lost a peer, and that before
    one that was asked to end. Time stamps say nothing: they are of a second, and of different clocks. Among equals the
    one of which a rule knows more comes first, then the lowest rank.

    The cause of causes is the cause of all, so each machine may name its own. One ending takes some milliseconds.

    Raises:
        ValueError: nobody ended.
    """
    return min(endings, key=_standing)


def failure_of(ending: Ending, seen: str | None = None) -> Failure:
    """What the table makes of an ending; `seen` names the rule where the supervisor itself saw what happened.

    Raises:
        LookupError: there is no rule `seen`.
    """
    rule = rule_named(seen) if seen else rule_for(ending)
    when = "before the first step" if ending.step is None else f"after step {ending.step}"
    doing = f", in {ending.phase}" if ending.phase else ""
    where = f"process {ending.rank} on {ending.machine}, {when}{doing}"
    return Failure(
        rule=rule.name,
        kind=rule.kind,
        machine=ending.machine,
        rank=ending.rank,
        step=ending.step,
        phase=ending.phase,
        sentence=f"{where}: {rule.says}",
        hint=rule.hint,
    )


def judge(failure: Failure, history: Sequence[Failure], may_skip_data: bool = False) -> Verdict:
    """What to do after `failure`, given the run's earlier ones, oldest first.

    Args:
        failure: what `failure_of` made of the ending of `cause_of`.
        history: the failures of the run before this one.
        may_skip_data: whether the recipe allows to go back and leave out data.
    """
    rule = rule_named(failure.rule)
    counted = [earlier for earlier in history if earlier.kind != "preemption"]
    action = rule.at_start if rule.at_start and _as_at_start(rule, failure, history) else rule.action
    if failure.kind == "preemption" or action == "stop":
        return _as_the_rule_says(action, failure, rule)
    return (
        _without_progress(failure, counted)
        or _machine_again(failure, counted)
        or _same_step_again(failure, counted, may_skip_data)
        or _as_the_rule_says(action, failure, rule, may_skip_data)
    )


def _standing(ending: Ending) -> tuple[int, int, int]:
    """Smaller is nearer to the cause."""
    rule = rule_for(ending)
    return _distance(ending, rule), -rule.weight, ending.rank


def _distance(ending: Ending, rule: FaultRule) -> int:
    killed_by = ending.killed_by
    if ending.code == 0 and killed_by is None:
        return 4
    if ending.stopped and killed_by in _STOPS:
        return 3
    # Who had left an error when it was asked to end had met something before.
    if rule.kind == "preemption" or (killed_by in _ASKED and not ending.error):
        return 3
    if rule.consequence:
        return 2
    return 1 if killed_by is None or killed_by in _ASKED else 0


def _as_the_rule_says(action: Action, failure: Failure, rule: FaultRule, may_skip_data: bool = False) -> Verdict:
    reason = failure.sentence
    if action == "roll_back" and not may_skip_data:
        action, reason = "stop", f"{reason}; the recipe does not allow to skip data"
    return Verdict(action, reason, rule.name, failure.machine if action == "replace" else None)


def _as_at_start(rule: FaultRule, failure: Failure, history: Sequence[Failure]) -> bool:
    """Whether it failed where it would fail again: before the run's first step, in a phase that the rule names, or in
    the first life of a launch that goes on from a checkpoint, where nothing of what a person set has worked yet."""
    if max(map(_steps, (failure, *history))) == 0 or failure.phase in rule.also_in:
        return True
    return rule.kind in _WRITTEN and failure.phase in _BEFORE_A_STEP and not history


def _steps(failure: Failure) -> int:
    return failure.step or 0


def _without_progress(failure: Failure, history: Sequence[Failure]) -> Verdict | None:
    """Stop where the last restarts all failed before a step that the run had not finished before."""
    lives = [*history, failure]
    restarts = 0
    for earlier, later in zip(range(1, len(lives)), lives[1:], strict=True):
        further = _steps(later) > max(map(_steps, lives[:earlier]))
        restarts = 0 if further else restarts + 1
    if restarts < RESTARTS_WITHOUT_A_STEP:
        return None
    reason = f"{restarts} restarts without a new step; the last: {failure.sentence}"
    return Verdict("stop", reason, "no-progress", exit_code=NoProgressError.exit_code)


def _machine_again(failure: Failure, history: Sequence[Failure]) -> Verdict | None:
    """Leave out a machine that fails again and again. Who only lost a peer is not to blame, nor who computed what
    any machine would have."""
    if not _is_the_machines(failure):
        return None
    own = [one for one in (*history, failure) if one.machine == failure.machine and _is_the_machines(one)]
    device = sum(one.kind in _OF_A_DEVICE for one in own)
    if device < DEVICE_FAULTS_OF_A_MACHINE and len(own) < FAULTS_OF_A_MACHINE:
        return None
    reason = f"{failure.machine} failed {len(own)} times, {device} of them by a device or by itself; the last: "
    return Verdict("replace", reason + failure.sentence, "machine-again", failure.machine)


def _is_the_machines(failure: Failure) -> bool:
    return failure.kind in _OF_A_MACHINE and not rule_named(failure.rule).consequence


def _same_step_again(failure: Failure, history: Sequence[Failure], may_skip_data: bool) -> Verdict | None:
    """The same failure at the same step comes of the data or the code. Chips do not wait for a step, but for one
    machine's."""
    if rule_named(failure.rule).from_outside:
        return None
    same = [one for one in history if (one.rule, one.step) == (failure.rule, failure.step)]
    elsewhere = any(one.machine != failure.machine for one in same)
    if (
        not same
        or failure.step is None
        or not (failure.kind in _OF_THE_RUN or (failure.kind == "device" and elsewhere))
    ):
        return None
    reason = f"the same failure after step {failure.step} again, so data or code is to blame: {failure.sentence}"
    if may_skip_data:
        return Verdict("roll_back", reason, "same-step-again")
    reason += "; the recipe does not allow to skip data"
    return Verdict("stop", reason, "same-step-again", exit_code=NoProgressError.exit_code)
