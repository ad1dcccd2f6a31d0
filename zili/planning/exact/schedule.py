"""The order in which a pipeline's processes work, as torch's schedules have it, and how long that takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from zili.config.parallel import Schedule

Kind = Literal["forward", "backward", "inputs", "weights"]
"""backward: both gradients at once; inputs, weights: one of them."""


class Action(NamedTuple):
    """What a process does with a micro-batch in one of its stages."""

    kind: Kind
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class PipelinePlan:
    """A schedule on so many processes, with so many stages each."""

    schedule: Schedule
    processes: int
    virtual: int
    micro_batches: int

    @property
    def stages(self) -> int:
        """In all."""
        return self.processes * self.virtual


@lru_cache(maxsize=64)
def actions(plan: PipelinePlan) -> tuple[tuple[Action, ...], ...]:
    """The actions of each process, in order."""
    if plan.schedule == "1f1b":
        queues = (_one_forward_one_backward(plan, process) for process in range(plan.processes))
    elif plan.schedule == "zbv":
        queues = (_shape_of_a_v(plan, process) for process in range(plan.processes))
    else:
        zero_bubble = plan.schedule == "zero_bubble"
        queues = (_interleaved(plan, process, zero_bubble) for process in range(plan.processes))
    return tuple(map(tuple, queues))


def _one_forward_one_backward(plan: PipelinePlan, process: int) -> Iterator[Action]:
    """Narayanan et al. 2021, figure 4, above."""
    ahead = min(plan.micro_batches, plan.processes - process)
    yield from (Action("forward", process, number) for number in range(ahead))
    for number in range(plan.micro_batches):
        yield Action("backward", process, number)
        if ahead + number < plan.micro_batches:
            yield Action("forward", process, ahead + number)


def _interleaved(plan: PipelinePlan, process: int, zero_bubble: bool) -> Iterator[Action]:
    """Narayanan et al. 2021, figure 4, below; zero bubble: Qi et al. 2023, ZB-H1, with several stages."""
    rounds = max(1, plan.micro_batches // plan.processes)
    each = plan.micro_batches // rounds
    total = plan.micro_batches * plan.virtual
    hops = (1 if zero_bubble else 2) * (plan.processes - 1 - process)
    ahead = min((plan.virtual - 1) * each + hops, total)
    counts: dict[tuple[Kind, int], int] = defaultdict(int)

    def act(kind: Kind, place: int) -> Action:
        stage = place * plan.processes + process
        counts[kind, stage] += 1
        return Action(kind, stage, counts[kind, stage] - 1)

    def back(index: int) -> int:
        return plan.virtual - 1 - index // each % plan.virtual

    weights = 0
    for index in range(ahead + total):
        if index < total:
            yield act("forward", index // each % plan.virtual)
        if index < ahead:
            continue
        yield act("inputs" if zero_bubble else "backward", back(index - ahead))
        # Gradients of weights come later by as many as the process has before it.
        if zero_bubble and index - ahead >= process:
            yield act("weights", back(weights))
            weights += 1
    if zero_bubble:
        yield from (act("weights", back(index)) for index in range(weights, total))


def _shape_of_a_v(plan: PipelinePlan, process: int) -> Iterator[Action]:
    """Qi et al. 2024 (2405.15362), ZB-V, in the form that torch gives it."""
    stages = (process, plan.stages - 1 - process)
    counts: dict[tuple[Kind, int], int] = defaultdict(int)

    def act(*what: tuple[Kind, int]) -> Iterator[Action]:
        for kind, end in what:
            number = counts[kind, end]
            counts[kind, end] += 1
            if number < plan.micro_batches:
                yield Action(kind, stages[end], number)

    both: tuple[Kind, Kind] = ("inputs", "weights")
    after = plan.processes - process
    for _ in range(2 * after - 1):
        yield from act(("forward", 0))
    for _ in range(process):
        yield from act(("forward", 1), ("forward", 0))
    for _ in range(after):
        yield from act(("forward", 1), *((kind, 1) for kind in both))
    enough = max(2 * plan.processes - 1, plan.micro_batches)
    while counts["forward", 1] < counts["forward", 0] or counts["forward", 0] < enough:
        if counts["forward", 0] < enough:
            yield from act(("forward", 0))
        yield from act(*((kind, 0) for kind in both), ("forward", 1), *((kind, 1) for kind in both))
    for _ in range(process):
        yield from act(("inputs", 0), ("inputs", 1))
    for _ in range(after):
        yield from act(*((kind, 0) for kind in both))
    for end in (1, 0):
        while counts["weights", end] < counts["inputs", end]:
            yield from act(("weights", end))


@lru_cache(maxsize=256)
def asked_for(plan: PipelinePlan) -> tuple[tuple[int, ...], ...]:
    """For each process, as each of its actions begins: messages that were asked for and are not used yet, its own not
    counted.

    1F1B asks for one when it needs it; of several stages a process asks, as torch lowers their schedules, right where
    the other sends (`_add_send_recv` of torch.distributed.pipelining.schedules).
    """
    queues = actions(plan)
    if plan.schedule == "1f1b":
        return tuple((0,) * len(queue) for queue in queues)
    home = {action.stage: process for process, queue in enumerate(queues) for action in queue}
    done: set[tuple[bool, int, int]] = set()
    unused = [0] * len(queues)
    found: list[list[int]] = [[] for _ in queues]
    while any(len(counts) < len(queue) for counts, queue in zip(found, queues, strict=True)):
        for process, queue in enumerate(queues):
            if len(found[process]) == len(queue):
                continue
            kind, stage, micro_batch = queue[len(found[process])]
            forward = kind == "forward"
            before, after = (stage - 1, stage + 1) if forward else (stage + 1, stage - 1)
            travels = kind != "weights"
            if travels and before in home and (forward, before, micro_batch) not in done:
                continue
            unused[process] -= travels and home.get(before, process) != process
            found[process].append(unused[process])
            if travels:
                done.add((forward, stage, micro_batch))
                unused[home.get(after, process)] += home.get(after, process) != process
    return tuple(map(tuple, found))


class Span(NamedTuple):
    """An action and when it runs, in seconds."""

    action: Action
    start: float
    end: float


def simulate(plan: PipelinePlan, seconds: Callable[[Action], float], between: float = 0.0) -> list[list[Span]]:
    """When each process does what, if an action takes `seconds` and a message between processes `between`.

    An action starts when its process is free and what it needs is there: the stage before has gone forward, the stage
    after backward.
    """
    queues = actions(plan)
    home = {action.stage: process for process, queue in enumerate(queues) for action in queue}
    done: dict[tuple[str, int, int], float] = {}
    spans: list[list[Span]] = [[] for _ in queues]
    places, last = [0] * len(queues), plan.stages - 1
    moved = True
    while moved:
        moved = False
        for process, queue in enumerate(queues):
            while places[process] < len(queue):
                action = queue[places[process]]
                ready = _ready(action, last, done, home, between)
                if ready is None:
                    break
                free = spans[process][-1].end if spans[process] else 0.0
                start = max(free, ready)
                end = start + seconds(action)
                spans[process].append(Span(action, start, end))
                direction = "forward" if action.kind == "forward" else "backward"
                if action.kind != "weights":
                    done[direction, action.stage, action.micro_batch] = end
                places[process] += 1
                moved = True
    assert all(place == len(queue) for place, queue in zip(places, queues, strict=True)), "everybody waits"
    return spans


def _ready(
    action: Action, last: int, done: dict[tuple[str, int, int], float], home: dict[int, int], between: float
) -> float | None:
    """When what an action needs is there; None: not known yet."""
    if action.kind == "weights" or (action.kind == "forward" and action.stage == 0):
        return 0.0
    if action.kind == "forward":
        direction, other = "forward", action.stage - 1
    elif action.stage == last:
        direction, other = "forward", last
    else:
        direction, other = "backward", action.stage + 1
    when = done.get((direction, other, action.micro_batch))
    if when is None:
        return None
    return when + (between if home[other] != home[action.stage] else 0.0)


def makespan(spans: Sequence[Sequence[Span]]) -> float:
    """Seconds from the first action to the last."""
    return max(queue[-1].end for queue in spans if queue)
