"""How long a run under `zili launch` takes from the death of a process to its next finished step, by phase.

    python benchmarks/recovery.py kills --rounds 2 --kills 2 [--compile]
    python benchmarks/recovery.py grow --processes 8 32 128

`kills`: two agents of two processes here train a small model; a process is killed by signal 9 in a step. Rounds
alternate between cold (`zili launch --cold`) and warm (the default). Printed are medians by phase, from the run's own
ledger, and the ratios; and what a fresh `zili launch --cold` takes to its first step, with caches filled.

`grow`: the same for a worker that is only a stand-in: it joins, agrees with the others and agrees again for each step.
It shows what the nursery, the nodes and the root take as processes grow; the model has no part in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NoReturn

from start import prepared

from zili.parallel.control.crumbs import own_crumbs

SMALL = (
    *("model.hidden_size=64", "model.layers=2", "model.heads=2", "model.kv_heads=2", "model.ffn_hidden_size=128"),
    *("training.sequence_length=64", "training.steps=100000", "checkpoint.every=10", "logging.every=1"),
    "chip.name=cpu",
)
"""What differs from the recipe of `start.py`: steps that take little."""
BETWEEN = 15
"""Steps that a life does before a process of it is killed."""
LONGEST = 240.0
"""Seconds for which one step is waited for."""
PHASES = ("detection", "stopping", "replacement", "init", "join", "reload", "warm_up")
Times = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    does = parser.add_subparsers(dest="do", required=True)
    kills = does.add_parser("kills")
    kills.add_argument("--rounds", type=int, default=2)
    kills.add_argument("--kills", type=int, default=2, help="in each launch")
    kills.add_argument("--compile", action="store_true", help="train compiled; what was compiled is kept between lives")
    grow = does.add_parser("grow")
    grow.add_argument("--processes", type=int, nargs="+", default=[8, 32, 128])
    grow.add_argument("--kills", type=int, default=2)
    agent = does.add_parser("agent")
    agent.add_argument("folder", type=Path)
    agent.add_argument("name")
    agent.add_argument("processes", type=int)
    arguments = parser.parse_args()
    if arguments.do == "agent":
        sys.exit(_agent(arguments.folder, arguments.name, arguments.processes))
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.do == "kills":
            _kills(Path(scratch), arguments.rounds, arguments.kills, arguments.compile)
        else:
            _grow(Path(scratch), arguments.processes, arguments.kills)


# ---- a small model


def _kills(folder: Path, rounds: int, kills: int, compiled: bool) -> None:
    recipe = str(prepared(folder))
    os.environ["ZILI_CACHE"] = str(folder / "cache")
    settings = [word for key in (*SMALL, f"chip.compile={str(compiled).lower()}") for word in ("--set", key)]
    launch = [sys.executable, "-m", "zili", "launch", recipe, *settings, "--processes", "2", "--machines", "2"]
    _fill_caches(launch, folder / "filled")
    rows: dict[str, list[Times]] = defaultdict(list)
    fresh: list[float] = []
    for number in range(rounds):
        for how, options in (("cold", ["--cold"]), ("warm", [])):
            run = folder / f"{how}-{number}"
            began = time.time()
            agents = [_begin([*launch, "--set", f"folder={run}", *options, "--machine", name]) for name in "ab"]
            try:
                found = _recoveries(run, kills, agents)
            finally:
                _end(agents)
            if how == "cold":
                fresh.append(_steps(run)[0] - began)
            rows[how] += found
            print(how, number, [f"{one['all']:.2f} s" for one in found], flush=True)
    _tell(rows, fresh)


def _fill_caches(launch: list[str], run: Path) -> None:
    """Let later launches find what this one measures and compiles."""
    filled = [*launch, "--set", f"folder={run}", "--set", "training.steps=2"]
    agents = [_begin([*filled, "--machine", name]) for name in "ab"]
    try:
        if any(agent.wait(LONGEST) for agent in agents):
            raise RuntimeError(f"{run}: {_events(run)[-3:]}")
    finally:
        _end(agents)


def _recoveries(run: Path, kills: int, agents: list[subprocess.Popen[bytes]]) -> list[Times]:
    """Kill a process after every `BETWEEN` steps, and follow what the run does."""
    killed: list[float] = []
    for number in range(kills + 1):
        _wait_for(partial(_has_done, run, number + 1), run)
        if number < kills:
            killed.append(time.time())
            _kill_a_worker(agents[number % len(agents)].pid)
    agents[0].send_signal(signal.SIGINT)
    for agent in agents:
        agent.wait(LONGEST)
    return [_phases(run, number + 2, at) for number, at in enumerate(killed)]


def _kill_a_worker(agent: int) -> None:
    """The last process that the nursery of an agent has begun."""
    nursery = next(
        pid for pid in _children(agent) if b"zili.supervision.nursery" in _words(pid) or b"nursery" in _words(pid)
    )
    os.kill(_children(nursery)[-1], signal.SIGKILL)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def _words(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _events(run: Path) -> list[dict[str, Any]]:
    with suppress(OSError):
        lines = (run / "supervision" / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    return []


def _records(run: Path) -> list[dict[str, Any]]:
    with suppress(OSError):
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]
    return []


def _lives(run: Path) -> list[list[float]]:
    """When each step ended, by lives."""
    lives: list[list[float]] = []
    for record in _records(run):
        if record.get("kind") == "start":
            lives.append([])
        elif record.get("kind") == "train" and lives:
            lives[-1].append(_seconds(record["time"]))
    return [life for life in lives if life]


def _seconds(told: Any) -> float:
    from datetime import datetime

    return datetime.fromisoformat(told).timestamp() if isinstance(told, str) else float(told)


def _steps(run: Path) -> list[float]:
    return [end for life in _lives(run) for end in life]


def _has_done(run: Path, life: int) -> bool:
    """Whether a life has done `BETWEEN` steps."""
    lives = _lives(run)
    return len(lives) >= life and len(lives[life - 1]) >= BETWEEN


def _wait_for(so: Callable[[], bool], run: Path) -> None:
    until = time.monotonic() + LONGEST
    while not so():
        if time.monotonic() > until:
            raise TimeoutError(f"{run}: {_events(run)[-3:]}")
        time.sleep(0.1)


def _phases(run: Path, number: int, killed: float) -> Times:
    """From a kill to the first step of life `number`, by the ledger's phases."""
    from zili.supervision.account import account

    events = _events(run)
    stop = next(one["time"] for one in events if one["event"] == "stopping" and one["life"] == number - 1)
    lives = {life.number: life for life in account(events).lives}
    before, after = lives[number - 1].seconds, lives[number].seconds
    found = {name: after.get(name, 0.0) for name in ("replacement", "init", "join", "reload", "warm_up")}
    found |= {"detection": stop - killed, "stopping": before.get("stopping", 0.0)}
    found["all"] = _lives(run)[number - 1][0] - killed if _lives(run) else sum(found.values())
    found["step"] = lives[number].step_seconds or 0.0
    return found


def _begin(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _end(agents: list[subprocess.Popen[bytes]]) -> None:
    for agent in agents:
        if agent.poll() is None:
            agent.kill()
        agent.wait()


def _tell(rows: dict[str, list[Times]], fresh: list[float]) -> None:
    print(f"\nseconds, medians of {len(rows['cold'])} kills each; load {os.getloadavg()[0]:.0f}")
    print(f"{'':<14}{'cold':>8}{'warm':>8}{'ratio':>8}")
    for name in (*PHASES, "all", "step"):
        cold, warm = (median(one[name] for one in rows[how]) for how in ("cold", "warm"))
        print(f"{name:<14}{cold:>8.2f}{warm:>8.2f}{warm / cold if cold else 0:>8.2f}")
    warm = median(one["all"] for one in rows["warm"])
    print(
        f"fresh `zili launch --cold` to its first step: {median(fresh):.2f} s; warm is {warm / median(fresh):.2f} of it"
    )


# ---- a stand-in, many times


def _grow(folder: Path, counts: list[int], kills: int) -> None:
    rows: dict[int, list[Times]] = {}
    for count in counts:
        run = folder / str(count)
        run.mkdir()
        words = [sys.executable, __file__, "agent", str(run)]
        agents = [_begin([*words, name, str(count // 2)]) for name in "ab"]
        try:
            killed = []
            for number in range(kills + 1):
                _wait_for((run / f"life-{number + 1}").exists, run)
                time.sleep(1.0)
                if number < kills:
                    killed.append(time.time())
                    _kill_a_worker(agents[number % 2].pid)
            agents[0].send_signal(signal.SIGINT)
            for agent in agents:
                agent.wait(LONGEST)
        finally:
            _end(agents)
        rows[count] = [_phases(run, number + 2, at) for number, at in enumerate(killed)]
        ends = [float((run / f"life-{number + 2}").read_text()) for number in range(kills)]
        for row, end, at in zip(rows[count], ends, killed, strict=True):
            row["all"] = end - at
        print(count, [f"{one['all']:.2f} s" for one in rows[count]], flush=True)
    print(f"\nseconds, medians of {kills} kills; load {os.getloadavg()[0]:.0f}")
    print(f"{'processes':<14}" + "".join(f"{count:>8}" for count in rows))
    for name in (*PHASES, "all"):
        print(f"{name:<14}" + "".join(f"{median(one[name] for one in found):>8.2f}" for found in rows.values()))


def _agent(run: Path, name: str, processes: int) -> int:
    """A machine's agent, whose nursery runs stand-ins."""
    import zili.supervision.processes as begun
    from zili.supervision.agent import Agent, ThisMachine
    from zili.supervision.folder import SupervisionFolder
    from zili.supervision.state import Launch

    def begin(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
        # In place of `-m zili.supervision.nursery`: the same, and its children are stand-ins.
        return subprocess.Popen([sys.executable, __file__, "nursery", *words[3:]], **options)

    begun.subprocess = SimpleNamespace(Popen=begin, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore[assignment]
    folder = SupervisionFolder(run)
    launch = Launch([str(run)], processes, 2, {"2": []})

    async def supervise(own: Path) -> int:
        return await Agent(folder, own, launch, ThisMachine(name, "127.0.0.1", "cpu", False, {}), print).run()

    with folder.machine(name) as own:
        return asyncio.run(supervise(own))


def _stand_in() -> None:
    """A worker: it meets the others at its machine's node, and agrees with them again and again."""
    from zili.parallel.control.member import AGENT, AGENT_SECRET, Control

    rank, crumbs, asked = int(os.environ["RANK"]), own_crumbs(), []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    crumbs.enter("join")
    control = Control(os.environ[AGENT], bytes.fromhex(os.environ[AGENT_SECRET]), rank)
    control.turn()
    crumbs.enter("load")
    control.turn()
    crumbs.enter("warm_up")
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1
    first = 1000 * life  # a failure at the same step again would stop the run
    crumbs.resumed(first - 1)
    for step in range(first, first + 1_000_000):
        heard = control.turn(b"stop" if asked else None)
        if step == first:
            if rank == 0:
                Path(sys.argv[1], f"life-{life}").write_text(str(time.time()), encoding="ascii")
            crumbs.enter("step")
        crumbs.done(step)
        if heard.word:
            sys.exit(130)
        time.sleep(0.2)


def _run_stand_in(words: list[str]) -> NoReturn:
    sys.argv, code = ["zili", *words], 1
    try:
        _stand_in()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:2] == ["nursery"]:
        from zili.supervision import nursery

        run = nursery._run
        nursery._run = lambda words: (run if words[:2] == ["launch", "try-out"] else _run_stand_in)(words)
        del sys.argv[1]
        nursery.main()
    else:
        main()
