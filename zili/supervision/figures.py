"""What an agent's endpoint serves: its machine's processes, and of the first machine the run.

Each machine tells of its own processes, as their crumbs say; none of them needs a port.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from zili.exposition import ServedFigure, of_evaluation, of_process, of_record
from zili.supervision.account import Account
from zili.supervision.ledger import mean_of
from zili.supervision.pace import Pace
from zili.supervision.standing import Standing, age
from zili.supervision.state import State


class MachineFigures:
    """The figures of one machine; called by the endpoint's thread, for each question."""

    def __init__(self, run: Path, chip: str, pace: Pace, state: Callable[[], State]) -> None:
        """`state`: what the root last told of the run."""
        self._name, self._machine, self._pace, self._state = run.resolve().name, pace.machine, pace, state
        self._labels = {"run": self._name, "node": self._machine, "chip": chip}
        self._standing = Standing(run)

    def __call__(self) -> Iterator[ServedFigure]:
        state, processes = self._state(), self._pace.processes
        works = self._machine in state.machines
        yield ServedFigure("zili_node_processes", len(processes), self._labels)
        yield ServedFigure("zili_node_working", works, self._labels)
        for rank, at in sorted(processes.items()):
            seconds = {**at["seconds"], at["phase"]: at["seconds"].get(at["phase"], 0.0) + at["stood"]}
            labels = {**self._labels, "rank": str(rank)}
            yield from of_process(at["phase"], at["step"], at["stood"], seconds, at.get("step_seconds"), **labels)
        if state.machines[:1] == [self._machine] or not state.machines:
            self._standing.look(mean_of(list(processes.values())))
            yield from figures_of_run(self._standing, state, run=self._name)


def figures_of_run(standing: Standing, state: State, **run: str) -> Iterator[ServedFigure]:
    """What its files say."""
    last, batch = standing.last, standing.batch
    yield from of_record(last, **run)
    yield from of_evaluation(standing.evaluation, **run)
    yield from standing.stragglers.figures(**run)
    if standing.planned is not None:
        yield ServedFigure("zili_planned_steps", standing.planned, run)
    if batch is not None:
        yield ServedFigure("zili_data_position_samples", last.get("samples", last.get("step", 0) * batch), run)
    newest = standing.checkpoint()
    if newest is not None:
        yield ServedFigure("zili_checkpoint_step", newest[0], run)
        yield ServedFigure("zili_checkpoint_age_seconds", age(newest[1]), run)
    if isinstance(standing.saved.get("seconds"), int | float):
        yield ServedFigure("zili_checkpoint_save_seconds", standing.saved["seconds"], run)
    yield ServedFigure("zili_machines", len(state.machines), run)
    for name in state.left_out:
        yield ServedFigure("zili_machine_left_out", 1, {**run, "node": name})
    if standing.account is not None:
        yield from _of_account(standing.account, run)


def _of_account(account: Account, run: dict[str, str]) -> Iterator[ServedFigure]:
    yield ServedFigure("zili_lives", len(account.lives), run)
    yield ServedFigure("zili_restarts_total", sum(life.failed for life in account.lives), run)
    yield ServedFigure("zili_goodput_ratio", account.share, run)
    for name, size in account.seconds.items():
        yield ServedFigure("zili_phase_seconds", size, {**run, "phase": name})
