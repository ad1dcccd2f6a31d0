"""States in memory: a life goes on from where the one before was, though the disk has only what is older."""

from __future__ import annotations

import asyncio
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from launching import Launch, Launched, weights
from many import on_processes, train
from safetensors.torch import load_file

from zili.parallel.control.links import Link
from zili.parallel.control.messages import About, Message, unpacked
from zili.parallel.control.node import Node
from zili.supervision import held
from zili.supervision.held import HeldStates, Owner, StateMark
from zili.training.held import StateMemory, _common, _laid_out
from zili.training.index import read_header
from zili.training.parts import held_parts

STATES = ("checkpoint.every=0", "checkpoint.memory_share=1")


def resumed(run: Launched) -> list[int]:
    """Steps after which lives went on from memory."""
    notes = (run.run / "metrics.jsonl").read_text(encoding="utf-8")
    return [int(step) for step in re.findall(r"resumed from memory at step (\d+)", notes)]


@pytest.mark.slow
def test_a_run_without_a_checkpoint_loses_a_step_at_most(launch: Launch) -> None:
    """Two machines, each with half of the state: a worker is killed in the optimizer's step, then a machine vanishes
    whose state another one has."""
    run = launch(*STATES, "training.steps=60", words=("--machines", "2", "--wait", "30"))
    run.begin("a", "b")
    run.await_life(1, 10)
    run.fault(1, "die in the optimizer")
    run.await_life(2, 0)
    killed = run.steps()
    run.await_life(2, killed + 4)
    run.vanish("b")
    gone = run.steps()
    run.begin("b")
    run.await_life(3, gone + 4)
    assert run.codes() == {0}, run.everything()
    first, *_, second = resumed(run)  # a machine beside other work may cost a life
    assert first >= killed - 1 and second >= gone - 1, (first, killed, second, gone)
    calm = run.config.changed(folder=run.run.parent / "calm")
    on_processes(4, train, calm)
    assert weights(run.run) == weights(calm.folder)


@pytest.mark.slow
def test_who_is_left_has_the_state_of_the_replica_that_is_gone(launch: Launch) -> None:
    """Two machines that each have all of the state: with one less the run goes on from the other's memory."""
    words = ("--machines", "1:2", "--wait", "1")
    run = launch(*STATES, "training.steps=80", "parallel.replicas=2", "parallel.shards=2", words=words)
    run.begin("a", "b")
    run.until(lambda: any("on 2 machines" in line for line in run.said()) and run.steps() > 10)
    gone = run.steps()
    run.vanish("b")
    run.until(lambda: any("2 processes on 1 machine" in line for line in run.said()))
    assert run.codes() == {0}, run.everything()
    assert resumed(run)[-1] >= gone - 1


# ---- an agent's memories


class Wire:
    """A link to an agent, by which a process or another agent asks."""

    def __init__(self, states: HeldStates) -> None:
        self._states = states
        self.answers: list[Message] = []

    def send(self, raw: bytes) -> None:
        self.answers.append(unpacked(raw))

    async def ask(self, **question: Any) -> dict[str, Any]:
        await self._states.take(cast(Link, self), Message(About.HELD, word=json.dumps(question).encode()))
        return dict(json.loads(self.answers.pop(0).word))

    async def keep(self, step: int, kind: str = "k", local: int = 0, *, life: int = 1, whole: bool = True) -> str:
        """As a process of a life does after a step; `whole`: it lives long enough to say so."""
        room = await self.ask(do="room", kind=kind, local=local, size=8)
        Path(room["path"]).write_bytes(step.to_bytes(8, "big"))
        if whole:
            about = {"kind": kind, "local": local, "number": room["number"]}
            await self.ask(do="whole", mark=((life, 0), step), said=f"after {step}", alone=True, **about)
        return str(room["path"])

    async def found(self, step: int, kind: str = "k", local: int = 0) -> int | None:
        told = await self.ask(do="find", kind=kind, mark=((1, 0), step), local=local)
        return int.from_bytes(Path(told["path"]).read_bytes(), "big") if told else None

    async def forget(self, step: int, kind: str = "k", local: int = 0) -> None:
        await self.ask(do="forget", step=step, kind=kind, local=local)


async def nowhere(kind: str) -> dict[StateMark, list[str]]:
    return {}


def steps(states: HeldStates, kind: str = "k") -> list[int]:
    return [mark.step for known, mark in states.inventory() if known == kind]


def test_a_copy_that_is_cut_off_costs_no_whole_one() -> None:
    """Whatever steps were skipped: which memory is free does not follow from a step's number."""

    async def copies() -> None:
        states = HeldStates("a", b"secret", nowhere)
        wire = Wire(states)
        for step in (2, 4, 7, 8, 20, 22):
            await wire.keep(step)
        await wire.keep(24, whole=False)
        assert steps(states) == [20, 22]
        for _ in range(3):  # of a process that dies each time
            await wire.keep(24, whole=False)
        assert [await wire.found(step) for step in (20, 22, 24, 8)] == [20, 22, None, None]
        await wire.keep(25)
        await wire.keep(26, whole=False)
        assert steps(states) == [22, 25], "the newest whole one is never written into"
        states.close()

    asyncio.run(copies())


def test_states_of_a_way_that_was_not_taken_are_forgotten_and_no_others() -> None:
    """Two processes of a machine hold different halves. It still has states of processes of an earlier layout."""

    async def forget() -> None:
        states = HeldStates("a", b"secret", nowhere)
        wire = Wire(states)
        for step in (5, 6, 7):
            await wire.keep(step, kind="of another layout")
            for local in (0, 1):
                await wire.keep(step, kind=f"half {local}", local=local)
        for local in (0, 1):
            await wire.forget(6, kind=f"half {local}", local=local)
        assert [steps(states, kind) for kind in ("half 0", "half 1", "of another layout")] == [[5, 6], [5, 6], []]
        states.close()

    asyncio.run(forget())


def test_states_of_two_histories_are_never_joined() -> None:
    """b stood by while the run went on from step 10 without it: its step 11 is another one than that of a."""

    async def histories() -> None:
        a, b = (HeldStates(name, b"secret", nowhere, newest=2) for name in "ab")
        for step in (9, 10):
            await Wire(a).keep(step)
        for step in (9, 10, 11):
            await Wire(b).keep(step)
        await Wire(a).forget(10)
        for step in (11, 12):
            await Wire(a).keep(step, life=2)
        offers = [await Wire(one).ask(do="offer", kind="k") for one in (a, b)]
        assert _common([("k", name, one["marks"]) for name, one in zip("ab", offers, strict=True)])[1] == ((1, 0), 10)
        a.close()
        b.close()

    asyncio.run(histories())


def test_old_states_of_its_own_do_not_hide_what_others_have() -> None:
    """A machine that stood by since step 10 takes the place of one whose states another one keeps."""

    async def offered() -> None:
        asked = []

        async def elsewhere(kind: str) -> dict[StateMark, list[str]]:
            asked.append(kind)
            return {StateMark((2, 0), 1012): ["x:1"]}

        states = HeldStates("b", b"secret", elsewhere)
        await Wire(states).keep(10)
        for newest, marks in ((2, [[[1, 0], 10], [[2, 0], 1012]]), (1, [[[1, 0], 10]]), (0, [])):
            states.begin("", newest)
            for _ in range(2):
                assert (await Wire(states).ask(do="offer", kind="k"))["marks"] == marks
        assert asked == ["k"], "the root is asked once a kind, and only by who lacks the newest"
        states.close()

    asyncio.run(offered())


def test_what_other_machines_had_is_let_go() -> None:
    """Ten machines have failed one after another; of each this one keeps a state, and has fetched it once."""

    async def lives() -> None:
        source, states = HeldStates("s", b"secret", nowhere), HeldStates("a", b"secret", nowhere)
        for life in range(1, 11):
            await Wire(source).keep(life, life=1)
            node = Node(0, [0], [], b"secret", source.take)  # each life has another port
            address = f"127.0.0.1:{await node.listen('127.0.0.1')}"

            async def there(kind: str, address: str = address, life: int = life) -> dict[StateMark, list[str]]:
                return {StateMark((1, 0), life): [address]}

            states.elsewhere = there
            states.begin("", 99)
            await Wire(states).ask(do="offer", kind="k")
            assert await Wire(states).found(life) == life
            await Wire(states).forget(life)
            await node.close(0)
            about = {
                "do": "keep",
                "kind": "k",
                "of": f"machine {life} 0",
                "size": 8,
                "mark": ((1, 0), life),
                "said": "",
            }
            piece = life.to_bytes(8, "big")
            sent = Sent(Message(About.HELD, number=zlib.crc32(piece), list=piece))
            await states.take(cast(Link, sent), Message(About.HELD, word=json.dumps(about).encode()))
        assert sum(1 for _ in states._all()) <= 2
        source.close()
        states.close()

    asyncio.run(lives())


class Sent:
    """A link on which another agent has sent something."""

    def __init__(self, *messages: Message) -> None:
        self._messages = list(messages)

    async def receive(self) -> bytes | None:
        return self._messages.pop(0).packed() if self._messages else None

    def send(self, raw: bytes) -> None:
        pass


def test_a_process_gets_its_own_state_before_a_replicas() -> None:
    """Only its own has its generators."""

    async def find() -> None:
        states = HeldStates("a", b"secret", nowhere)
        paths = [await Wire(states).keep(5, local=local) for local in (0, 1)]
        for local in (0, 1):
            told = await Wire(states).ask(do="find", kind="k", mark=((1, 0), 5), local=local)
            assert told["path"] == paths[local]
        states.close()

    asyncio.run(find())


def test_a_system_that_has_no_such_memory_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS; a Python that was built against an old glibc; no handles left."""
    monkeypatch.delattr(os, "memfd_create")

    async def room() -> dict[str, Any]:
        return await Wire(HeldStates("a", b"secret", nowhere)).ask(do="room", kind="k", local=0, size=8)

    assert "memfd_create" in asyncio.run(room())["refused"]


@pytest.mark.parametrize("question", [{"do": "x"}, {}, [1], {"do": "whole", "kind": "k", "local": 0, "number": 5}])
def test_garbage_ends_the_link(question: Any) -> None:
    with pytest.raises(ValueError, match="no question about states"):
        asyncio.run(
            HeldStates("a", b"secret", nowhere).take(
                cast(Link, Sent()), Message(About.HELD, word=json.dumps(question).encode())
            )
        )


def test_a_memory_that_is_read_is_not_written_into() -> None:
    async def free() -> None:
        states = HeldStates("a", b"secret", nowhere)
        memories = states._memories.setdefault(Owner("k", None, "b 0"), [])
        first, second = (states._free(memories, 8, 2) for _ in range(2))
        first.mark, second.mark, first.busy, second.busy = StateMark((1, 0), 9), StateMark((1, 0), 10), 1, 1
        assert states._free(memories, 8, 2) not in (first, second)
        states.close()

    asyncio.run(free())


def test_a_state_that_is_long_on_its_way_is_known_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process does not wait so long that it would pass for hanging; how often states are kept follows from it."""
    monkeypatch.setattr(held, "_WAIT", 0.1)
    monkeypatch.setattr(held, "_STILL", 0.3)

    async def slow() -> None:
        async def nothing(link: Link, message: Message) -> None:
            await asyncio.sleep(0.05)

        node = Node(0, [0], [], b"secret", nothing)
        states = HeldStates("a", b"secret", nowhere)
        states.begin(f"127.0.0.1:{await node.listen('127.0.0.1')}", 0)
        await Wire(states).keep(1)
        assert (await Wire(states).ask(do="settle", kind="k", local=0))["late"]
        await asyncio.sleep(0.5)
        assert (await Wire(states).ask(do="room", kind="k", local=0, size=8))["took"] >= 0.3
        await node.close(0)
        states.close()

    asyncio.run(slow())


def test_the_partner_has_a_state_before_the_next_step_is_done(tmp_path: Path) -> None:
    """And gives it to whoever takes the machine's place; damaged pieces are not taken."""

    async def two() -> None:
        secret, here = b"secret", HeldStates("a", b"secret", nowhere)
        there, third = HeldStates("b", secret, nowhere), HeldStates("c", secret, nowhere)
        nodes = [Node(0, [0], [], secret, states.take) for states in (there, third)]
        address = f"127.0.0.1:{await nodes[0].listen('127.0.0.1')}"
        here.begin(address, 0)
        wire = Wire(here)
        for step in (1, 2, 3, 4):
            await wire.keep(step)
            await wire.ask(do="settle", kind="k", local=0)
        assert steps(there) == [3, 4]
        here.close()

        async def known(kind: str) -> dict[StateMark, list[str]]:
            return {mark: ["127.0.0.1:1", address] for known, mark in there.inventory() if known == kind}

        third.elsewhere = known
        third.begin("", 1)
        other = Wire(third)
        assert await other.ask(do="offer", kind="k") == {"marks": [[[1, 0], 3], [[1, 0], 4]], "machine": "c"}
        assert await other.found(3) == 3, "by the second address, as nobody is at the first"
        assert await other.found(1) is None and await other.found(3, kind="x") is None
        for node in nodes:
            await node.close(0)
        there.close()
        third.close()

    asyncio.run(asyncio.wait_for(two(), 30))


def test_a_piece_that_is_damaged_on_its_way_is_no_state() -> None:
    async def receive() -> None:
        states = HeldStates("a", b"secret", nowhere)
        about = {"do": "keep", "kind": "k", "of": "b 0", "size": 8, "mark": ((1, 0), 3), "said": ""}
        damaged = Sent(Message(About.HELD, number=1, list=b"damaged!"))
        with pytest.raises(ValueError, match="damaged"):
            await states.take(cast(Link, damaged), Message(About.HELD, word=json.dumps(about).encode()))
        assert states.inventory() == []
        states.close()

    asyncio.run(receive())


def test_a_file_in_memory_is_one_of_safetensors(tmp_path: Path) -> None:
    held = {
        "a.half": torch.arange(3, dtype=torch.bfloat16),
        "b.bytes": torch.arange(5, dtype=torch.uint8),
        "c.step": torch.tensor([7.0]),
        "d.whole": torch.arange(6, dtype=torch.float64).view(2, 3),
    }
    layout = _laid_out(held_parts(held))
    sizes = [part.tensor.element_size() for part in layout.parts.values()]
    assert all(start % size == 0 for start, size in zip(layout.starts, sizes, strict=True))
    file = tmp_path / "file"
    file.write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    memory = StateMemory.__new__(StateMemory)
    memory._rooms = {}
    for name, view in memory._views(str(file), 0, layout.parts).items():
        view.copy_(held[name])
    read = load_file(file)
    assert read.keys() == held.keys() and all(torch.equal(read[name], held[name]) for name in held)
    assert read_header(file)["d.whole"].whole


def test_all_go_on_after_the_newest_step_that_each_can_have() -> None:
    def told(kind: str, machine: str, *steps: int) -> tuple[str, str, list[Any]]:
        return kind, machine, [[[1, 0], step] for step in steps]

    three = [told("x", "a", 8, 9, 10), told("y", "a", 8, 9), told("x", "b", 7, 8, 9)]
    assert _common(three) == (["y"], ((1, 0), 9))
    assert _common([*three, told("z", "c")]) == (["y", "z"], None)
