"""Seeded faults on real runs of real processes: the run ends with the weights of one that nothing happened to, bit by
bit, or it stops with the right exit code.

Each seed is one run of a few hundred steps, which meets many faults. The seed chooses how many machines and processes
there are, whether states are kept in memory, and the schedule.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from many import on_processes, train

from zili.config import RunConfig, dump_recipe
from zili.supervision.drill import Drill, Followed, Watched, drilled
from zili.supervision.faults import DAMAGES, KINDS, schedule
from zili.supervision.own_machines import OwnMachines, different_weights, environment

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
SHAPES = ((2, 1), (2, 2), (3, 1), (3, 2), (2, 3))
"""Machines, and processes on each."""
STEPS = 15
"""So long is a run, for each fault."""
PLAIN = tuple(f"chip.operations.{name}=reference" for name in ("linear", "attention"))
SETTINGS = (*PLAIN, "training.micro_batch=1", "training.global_batch=12", "checkpoint.every=10", "checkpoint.keep=3")
OVER = 900.0
"""Seconds for a run to end after its last fault."""


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunConfig, int], Path]:
    """`calm(config, processes)`: the folder of a run that nothing happened to; one for each number of them."""
    runs: dict[tuple[int, int], Path] = {}

    def make(config: RunConfig, processes: int) -> Path:
        key = processes, config.training.steps
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("calm") / "run"
            on_processes(processes, train, config.changed(folder=runs[key]))
        return runs[key]

    return make


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., OwnMachines]]:
    """`begin(config, machines, processes)`: a run that is under way."""
    begun: list[OwnMachines] = []

    def make(config: RunConfig, machines: int, processes: int) -> OwnMachines:
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(dump_recipe(config), encoding="utf-8")
        words = [str(recipe), "--processes", str(processes), "--patience", "2", "--wait", "60"]
        begun.append(OwnMachines(words, machines, tmp_path / "log", environment()))
        begun[-1].await_steps(lambda: Watched(config.folder).newest_step()[0], 2)
        return begun[-1]

    yield make
    for run in begun:
        run.close()


def test_a_run_survives_the_faults_of_a_seed(
    seed: int,
    begin: Callable[..., OwnMachines],
    calm: Callable[[RunConfig, int], Path],
    recipe: Callable[..., RunConfig],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    found_faults: list[dict[str, Any]],
) -> None:
    count, named = request.config.getoption("--faults"), request.config.getoption("--kinds")
    chosen = random.Random(f"chaos {seed}")
    machines, processes = chosen.choice(SHAPES)
    memory = () if chosen.random() < 0.5 else ("checkpoint.memory=0",)
    # Where states are in memory, nobody reads a checkpoint that was damaged.
    possible = [name for name in KINDS if (name != "nan" or seed % 6 == 5) and (memory or name not in DAMAGES)]
    kinds = named.split(",") if named else possible
    # Where no state is kept in memory no process is ever in that phase.
    phases = ("init", "join", "load", "warm_up", "data", "step", "save", *(() if memory else ("copy",)))
    config = recipe(*SETTINGS, *memory, f"training.steps={STEPS * count}")
    print(f"seed {seed}: {machines} machines of {processes}, {'disk' if memory else 'memory'}; kinds {kinds}")
    run = begin(config, machines, processes)
    folder, names, _ = drilled(config.folder)
    planned = schedule(seed, count, kinds, phases, names, processes)
    followed = list(Drill(folder, seed, run.tend).run(planned, every=0))
    found_faults += [{"seed": seed, "memory": not memory, **one.as_table()} for one in followed]
    log = tmp_path / "log"
    assert all(one.went_well for one in followed), _told(followed, log)
    for one in followed:
        damaged = Path(one.file).parent.name
        assert not one.file or not memory or (one.went_on and damaged not in one.went_on), _told(followed, log)
    codes = run.await_end(OVER)
    if any(one.fault.kind == "nan" and one.fired for one in followed):
        assert codes and codes <= set(KINDS["nan"].ends_run), _told(followed, log)
        return
    assert codes == {0}, _told(followed, log)
    tensors, differ = different_weights(config.folder, calm(config, machines * processes))
    assert tensors and not differ, (differ, _told(followed, log))


def _told(followed: list[Followed], log: Path) -> str:
    return "\n".join([*map(str, followed), log.read_text(encoding="utf-8", errors="replace")[-6000:]])
