"""A hang is put down to one process, by what processes asked of groups and by the lines they are at."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import zili
from zili.supervision.hangs import ASKING, Hang, Inquiry, culprit
from zili.supervision.reports import Asked, At, GroupRecord, Report, Subject, ask, groups_in, report_of
from zili.supervision.stacks import place_in

TORCH = "/venv/lib/python3.11/site-packages/torch"
STEP = Report(0, "a", "S", "step", 12, 2, changes=40, quiet=61.0, frame=("model.py", 7, "forward"), waits=True)


def reports(count: int = 4, **changed: object) -> list[Report]:
    """Processes that all wait; `r2={...}` changes one."""
    found = [replace(STEP, rank=rank, machine="ab"[rank // 2]) for rank in range(count)]
    for rank, fields in changed.items():
        number = int(rank[1:])
        found[number] = replace(found[number], **fields)  # type: ignore[arg-type]
    return found


def asked(*operations: str, description: str = "mesh_tensor") -> GroupRecord:
    sizes = [Asked(number, operation, "[[4]]") for number, operation in enumerate(operations, 1)]
    return GroupRecord(description, len(sizes), sizes)


def test_a_stopped_process_is_named_before_all() -> None:
    found = culprit(reports(r1={"waits": False}, r3={"state": "T"}))
    assert (found.rank, found.machine, found.held) == (3, "b", False)
    assert "SIGSTOP" in str(found)


def test_a_process_that_a_debugger_holds_is_a_persons() -> None:
    found = culprit(reports(r1={"state": "t", "frame": None}, r3={"state": "T"}))
    assert (found.rank, found.held) == (1, True)


def test_a_process_that_no_signal_reaches_is_named() -> None:
    found = culprit(reports(r0={"waits": False}, r2={"state": "D", "frame": None}))
    assert found.rank == 2 and "kernel" in found.why and "no stacks" in str(found)


def test_the_one_that_asked_its_group_for_less_is_named_with_the_mesh_dimension() -> None:
    all_of_it, less = asked("gloo:broadcast", "gloo:all_reduce"), asked("gloo:broadcast")
    found = culprit([replace(one, groups={"7": less if one.rank == 2 else all_of_it}) for one in reports()])
    assert found.rank == 2
    assert str(found) == (
        "process 2 on b hangs in step after step 12, micro-batch 2, at model.py:7 in forward: mesh dimension tensor "
        "has been asked 1 times by it, 2 by others; last collective: gloo:broadcast number 1 of mesh dimension tensor"
    )


def test_of_a_chain_of_those_who_wait_for_one_another_the_end_is_named() -> None:
    """0 waits for 1 in one group, 1 for 3 in another one."""
    more, less = asked("a", "b"), asked("a")
    groups = {0: {"rows": more}, 1: {"rows": less, "columns": more}, 2: {"others": more}, 3: {"columns": less}}
    assert culprit([replace(one, groups=groups[one.rank]) for one in reports()]).rank == 3


def test_of_those_behind_the_one_that_does_not_wait_is_named() -> None:
    more, less = asked("a", "b"), asked("a")
    behind = [replace(one, groups={"7": less if one.rank in (1, 2) else more}) for one in reports(r2={"waits": False})]
    assert culprit(behind).rank == 2


def test_one_that_skipped_a_collective_is_named_by_the_one_that_it_asked_for_instead() -> None:
    """All wait, and all asked as often."""
    usual, other = asked("x", "gloo:all_reduce", "gloo:all_gather"), asked("x", "gloo:all_gather", "gloo:all_reduce")
    found = culprit([replace(one, groups={"7": other if one.rank == 1 else usual}) for one in reports()])
    assert (
        found.rank == 1 and "its collective 2 of mesh dimension tensor is gloo:all_gather, that of others" in found.why
    )


def test_one_that_does_not_wait_is_named() -> None:
    assert culprit(reports(r3={"waits": False})).rank == 3


def test_else_the_one_that_got_least_far_is_named() -> None:
    assert culprit(reports(r1={"changes": 39}, r2={"changes": 38})).rank == 2
    assert culprit(reports(r1={"waits": False}, r2={"waits": False, "changes": 38})).rank == 2
    assert culprit(reports()).rank == 0, "nothing tells"


def test_a_report_is_the_same_behind_the_network() -> None:
    one = replace(STEP, groups={"7": asked("a")})
    assert report_of(one.as_table()) == one


def test_machines_are_asked_once_and_not_forever() -> None:
    found: list[Hang] = []
    suspect = Hang.of_late("b", {"rank": 3, "phase": "step", "step": 7, "quiet": 9.0, "limit": 8.0})
    inquiry = Inquiry(["a", "b"], 100.0, found.append, suspect)
    first, second = reports(2, r1={"waits": False}), reports(4)[2:]
    inquiry.hear("a", [one.as_table() for one in first], 100.1)
    assert not found and not inquiry.over
    inquiry.look(100 + ASKING)
    assert not found
    inquiry.look(100.1 + ASKING)
    assert [hang.rank for hang in found] == [1], "by those who answered"
    inquiry.hear("b", [one.as_table() for one in second], 105)
    assert len(found) == 1
    Inquiry(["a", "b"], 100.0, found.append, suspect).look(100.1 + ASKING)
    assert found[1] == suspect, "nobody reported anything"
    assert str(suspect).startswith("process 3 on b hangs in step after step 7") and suspect.ending.rank == 3


# ---- stacks


def thread(*frames: str, current: bool = False) -> str:
    """A thread as faulthandler writes it; `file:line function`, the innermost first."""
    lines = [
        f'  File "{one.split()[0].rpartition(":")[0]}", line {one.split()[0].rpartition(":")[2]} in {one.split()[1]}'
        for one in frames
    ]
    return "\n".join([f"{'Current thread' if current else 'Thread'} 0x00007f1 (most recent call first):", *lines, ""])


OURS = Path(zili.__file__).parent
PYTHON = Path(threading.__file__).parent
ALL_REDUCE = f"{TORCH}/distributed/distributed_c10d.py:3252 all_reduce"
WAIT_TENSOR = f"{TORCH}/distributed/_functional_collectives.py:2 wait_tensor"
IDLE = (f"{PYTHON}/threading.py:5 wait", f"{PYTHON}/queue.py:5 get", f"{PYTHON}/concurrent/futures/thread.py:81 work")
STEP_OF_OURS = f"{OURS}/training/trainer.py:331 _one_step"


@pytest.mark.parametrize(
    ("text", "line", "waits"),
    [
        pytest.param(thread(ALL_REDUCE, STEP_OF_OURS), f"{OURS}/training/trainer.py:331", True, id="collective"),
        pytest.param(
            thread(f"{TORCH}/_ops.py:1 __call__", WAIT_TENSOR, STEP_OF_OURS),
            f"{OURS}/training/trainer.py:331",
            True,
            id="functional",
        ),
        pytest.param(
            thread(f"{OURS}/parallel/control/links.py:9 receive", f"{OURS}/parallel/world.py:8 _turn", STEP_OF_OURS),
            f"{OURS}/training/trainer.py:331",
            True,
            id="control",
        ),
        pytest.param(thread("/home/u/own.py:3 wait_for_godot", STEP_OF_OURS), "/home/u/own.py:3", False, id="user"),
        pytest.param(
            thread(f"{PYTHON}/threading.py:5 wait", "/home/u/own.py:3 lock", STEP_OF_OURS),
            "/home/u/own.py:3",
            False,
            id="lock",
        ),
        pytest.param(
            thread(f"{TORCH}/nn/functional.py:5 linear", f"{OURS}/models/a.py:8 forward"),
            f"{OURS}/models/a.py:8",
            False,
            id="operation",
        ),
        pytest.param(
            thread(f"{TORCH}/distributed/checkpoint/filesystem.py:5 write", f"{OURS}/training/saving.py:8 save"),
            f"{OURS}/training/saving.py:8",
            False,
            id="writing",
        ),
        pytest.param(
            thread("/home/u/own.py:3 batch", f"{OURS}/data/prefetch.py:50 _work", f"{PYTHON}/threading.py:9 run")
            + thread(f"{PYTHON}/queue.py:5 get", f"{OURS}/data/prefetch.py:70 __next__", STEP_OF_OURS, current=True),
            "/home/u/own.py:3",
            False,
            id="data",
        ),
        pytest.param(
            thread(*IDLE)
            + thread(ALL_REDUCE, f"{OURS}/training/saving.py:8 _attempt", f"{PYTHON}/threading.py:9 run")
            + thread(f"{PYTHON}/threading.py:5 join", f"{OURS}/training/saving.py:9 wait", STEP_OF_OURS),
            f"{OURS}/training/saving.py:8",
            True,
            id="saving-elsewhere",
        ),
        pytest.param(
            thread(ALL_REDUCE, f"{TORCH}/distributed/fsdp/_fully_shard/_fsdp_param_group.py:9 unshard")
            + thread(f"{TORCH}/autograd/graph.py:9 _engine_run_backward", STEP_OF_OURS),
            f"{TORCH}/distributed/distributed_c10d.py:3252",
            True,
            id="backward",
        ),
        pytest.param(
            thread(*IDLE) + thread(f"{PYTHON}/threading.py:5 wait", "/home/u/own.py:3 event", STEP_OF_OURS),
            "/home/u/own.py:3",
            False,
            id="event",
        ),
    ],
)
def test_the_line_of_a_process_and_whether_it_waits(text: str, line: str, waits: bool) -> None:
    found = place_in(text)
    assert found is not None
    assert (f"{found.frame.file}:{found.frame.line}", found.waits) == (line, waits)


@pytest.mark.parametrize(
    "text", ["", "Segmentation fault", "Thread 0x1 (most recent call first):\n  <no Python frame>\n", 'File "' * 99]
)
def test_what_is_no_stack_says_nothing(text: str) -> None:
    assert place_in(text) is None


@pytest.fixture
def stacks(tmp_path: Path) -> Iterator[Path]:
    """This process answers SIGUSR1 into a file, as a worker does."""
    with (tmp_path / "stacks").open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        yield tmp_path / "stacks"
        faulthandler.unregister(signal.SIGUSR1)


def subject(stacks: Path) -> Subject:
    return Subject(
        *(5, "a", os.getpid(), At("step", 3, 1, 9, 61.0), stacks, stacks.with_name("none")),
        keep=stacks.with_name("kept").write_text,
        send=lambda number: os.kill(os.getpid(), number),
    )


def test_a_process_is_asked_where_it_is_and_its_stacks_are_kept(stacks: Path) -> None:
    for _ in range(2):  # what was written before is not read again
        found = asyncio.run(ask(subject(stacks)))
    assert found.frame is not None and found.frame[0].endswith(".py") and found.step == 3
    kept = stacks.with_name("kept").read_text(encoding="utf-8")
    assert "test_a_process_is_asked" in kept and kept.count("Current thread") == 1
    assert "process 5 on a, step after step 3, micro-batch 1, 9 crumbs, none for 61.0 s" in kept


def test_a_process_that_writes_nothing_is_given_up(stacks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zili.supervision.reports._STACKS", 0.1)
    found = asyncio.run(ask(replace(subject(stacks), send=lambda number: None)))
    assert found.frame is None and found.groups == {}


def test_a_recorder_that_answers_garbage_is_none(stacks: Path) -> None:
    with tempfile.TemporaryDirectory() as short:  # a socket's path has 107 bytes at most
        recorder = Path(short, "recorder")
        assert asyncio.run(_asked_beside(recorder, replace(subject(stacks), recorder=recorder))).groups == {}


async def _asked_beside(recorder: Path, one: Subject) -> Report:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.1 200 OK\r\n\r\n{"entries": [{"is_p2p": 7}]}')
        writer.close()

    async with await asyncio.start_unix_server(answer, recorder):
        return await ask(one)


def test_of_torchs_recorder_the_newest_collectives_of_each_group_count() -> None:
    def entry(name: str, number: int) -> dict[str, object]:
        group = [name, f"mesh_{name}"]
        return {
            "is_p2p": False,
            "process_group": group,
            "collective_seq_id": number,
            "profiling_name": "gloo:x",
            "input_sizes": [[4]],
        }

    entries = [
        *(entry("tensor", number) for number in range(1, 40)),
        entry("shards", 1),
        {"is_p2p": True},
        entry("tensor", 40),
    ]
    found = groups_in({"entries": entries})
    assert list(found) == ["shards", "tensor"], "the one that was asked last comes last"
    assert found["tensor"].asked == 40 and [one.number for one in found["tensor"].last] == [*range(25, 41)]
    assert found["shards"] == GroupRecord("mesh_shards", 1, [Asked(1, "gloo:x", "[[4]]")])
