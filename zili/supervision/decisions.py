"""What the root does after a failure: the verdict, as far as the machines that are here allow it."""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple

from zili.errors import NoProgressError
from zili.supervision.state import State
from zili.supervision.verdicts import ACTIONS, Failure, Verdict, judge


class Decision(NamedTuple):
    """What follows a failure."""

    verdict: Verdict
    action: str
    """What is done, in words."""
    stops: bool
    """Whether the run ends."""
    left_out: str = ""
    """A machine that is not to be used any more; "": none."""

    def exit_code(self, said_why: int | None) -> int:
        """Of a run that ends; `said_why`: the failed process's own, where that says what it was."""
        return self.verdict.exit_code or said_why or NoProgressError.exit_code


def decide(failure: Failure, state: State, *, can_do_without: bool) -> Decision:
    """Judge a failure, and keep in `state` what comes of it.

    A machine that failed once is the last to be taken again, one that fails again and again is left out for good.
    `can_do_without`: whether a life could begin without the machine of the failure.
    """
    verdict = judge(failure, [Failure(**earlier) for earlier in state.failures])
    state.remember(asdict(failure))
    action, stops, name = ACTIONS[verdict.action], verdict.action in ("stop", "roll_back"), failure.machine
    if verdict.action != "replace":
        return Decision(verdict, action, stops)
    if failure.kind == "preemption":  # a machine that is taken away goes by itself
        return Decision(verdict, ACTIONS["restart"], stops)
    if not can_do_without:
        return Decision(verdict, f"{ACTIONS['restart']}, as no other machine is here", stops)
    if verdict.rule != "machine-again":
        state.doubtful = [*(one for one in state.doubtful if one != name), name]
        return Decision(verdict, action, stops)
    state.left_out[name] = verdict.reason
    return Decision(verdict, action, stops, left_out=name)
