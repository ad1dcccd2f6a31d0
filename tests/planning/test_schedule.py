"""The planner's orders of work are torch's, and take as long as closed forms say."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from zili.config.parallel import Schedule
from zili.parallel.layout import uneven_rounds
from zili.planning.exact.schedule import Action, PipelinePlan, actions, makespan, simulate

KINDS = {"F": "forward", "B": "backward", "I": "inputs", "W": "weights"}
CASES: list[tuple[Schedule, int, int, int]] = [
    (schedule, processes, virtual, micro_batches)
    for schedule, virtuals in (("1f1b", (1,)), ("interleaved", (2, 3)), ("zero_bubble", (2, 3)), ("zbv", (2,)))
    for virtual in virtuals
    for processes in (2, 4, 8)
    for micro_batches in (processes, 2 * processes, 3 * processes, 2 * processes + 2)
    if not uneven_rounds(schedule, processes, micro_batches)  # type: ignore[arg-type]
]


def of_torch(plan: PipelinePlan, process: int) -> list[Action]:
    """What torch's own schedule has a process do."""
    if plan.schedule == "1f1b":
        made: Any = SimpleNamespace(_num_stages=plan.processes, pp_group_size=plan.processes)
        made._n_microbatches, made.rank = plan.micro_batches, process
        order = schedules.Schedule1F1B._get_pipeline_order(made)[process]
    else:
        kind = {
            "interleaved": schedules.ScheduleInterleaved1F1B,
            "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
            "zbv": schedules.ScheduleZBVZeroBubble,
        }[plan.schedule]
        rounds = max(1, plan.micro_batches // plan.processes)
        made = SimpleNamespace(pp_group_size=plan.processes, n_local_stages=plan.virtual, num_stages=plan.stages)
        made._n_microbatches, made.microbatches_per_round = plan.micro_batches, plan.micro_batches // rounds
        order = kind._calculate_single_rank_operations(made, process)
    actions = [action for action in order if action is not None and action.computation_type.value in KINDS]
    # Numbered here: what torch prints of 1F1B begins with micro-batch 1 on the last process (it runs 0 first).
    counts: Counter[tuple[str, int]] = Counter()
    found = []
    for action in actions:
        kind, stage = KINDS[action.computation_type.value], action.stage_index
        found.append(Action(kind, stage, counts[kind, stage]))  # type: ignore[arg-type]
        counts[kind, stage] += 1
    return found


@pytest.mark.parametrize(("schedule", "processes", "virtual", "micro_batches"), CASES)
def test_the_order_is_torchs(schedule: Schedule, processes: int, virtual: int, micro_batches: int) -> None:
    plan = PipelinePlan(schedule, processes, virtual, micro_batches)
    for process in range(processes):
        assert list(actions(plan)[process]) == of_torch(plan, process)


@pytest.mark.parametrize(("virtual", "schedule"), [(1, "1f1b"), (2, "interleaved"), (4, "interleaved")])
def test_even_stages_wait_as_the_closed_form_says(virtual: int, schedule: Schedule) -> None:
    """(p - 1)(F + B) / v of idle time (Narayanan et al. 2021, section 2.2)."""
    processes, micro_batches, forward, backward = 8, 32, 1.0, 2.0
    plan = PipelinePlan(schedule, processes, virtual, micro_batches)
    spans = simulate(plan, lambda action: (forward if action.kind == "forward" else backward) / virtual)
    work = micro_batches * (forward + backward)
    assert makespan(spans) == pytest.approx(work + (processes - 1) * (forward + backward) / virtual)


@pytest.mark.parametrize("schedule", ["zero_bubble", "zbv"])
def test_weight_gradients_fill_bubbles(schedule: Schedule) -> None:
    """A third of 1F1B's bubble, with v stages a v-th of that: what the last process waits for at the beginning (Qi et
    al. 2023, table 1, whose last schedule hides that too, by an optimizer that does not wait for the others)."""
    processes, micro_batches, virtual = 8, 32, 2
    plan = PipelinePlan(schedule, processes, virtual, micro_batches)
    spans = simulate(plan, lambda _: 1 / virtual)
    assert makespan(spans) == pytest.approx(3 * micro_batches + (processes - 1) / virtual)


def test_every_action_comes_once() -> None:
    plan = PipelinePlan("zero_bubble", 4, 3, 8)
    found = [action for queue in actions(plan) for action in queue]
    assert len(found) == len(set(found)) == 3 * 12 * 8
