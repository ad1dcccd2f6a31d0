"""What the root does after a failure: the verdict, as far as the machines that are here allow it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from zili.config.watch import WatchConfig
from zili.errors import NoProgressError
from zili.supervision.state import State
from zili.supervision.verdicts import ACTIONS, Failure, Verdict, judge
from zili.training.left_out import order_roll_back


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


def decide(failure: Failure, state: State, *, can_do_without: bool, may_skip_data: bool = False) -> Decision:
    """Judge a failure, and keep in `state` what comes of it.

    A machine that failed once is the last to be taken again, one that fails again and again is left out for good.
    `can_do_without`: whether a life could begin without the machine of the failure. `may_skip_data`: whether the recipe
    allows to leave out batches (`watch.failure`).
    """
    verdict = judge(failure, [Failure(**earlier) for earlier in state.failures], may_skip_data)
    state.remember(asdict(failure))
    action, stops, name = ACTIONS[verdict.action], verdict.action == "stop", failure.machine
    if verdict.action == "roll_back":
        state.bad_batch = {"step": failure.step or 0, "why": f"life {state.life}: {failure.sentence}"}
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


def leave_out_batch(run: Path, bad: Mapping[str, Any], watch: Mapping[str, Any]) -> str:
    """Have the next life leave out the batch on which one failed; what that means, for a person. Asked again, it
    changes nothing.

    Raises:
        ZiliError: batches were left out too often, or what was left out so far cannot be read.
        OSError: it cannot be written.
    """
    saved = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    return str(order_roll_back(run, bad["step"], bad["why"], WatchConfig.model_validate(watch), saved))
