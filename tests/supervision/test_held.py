"""States in memory: a life goes on from where the one before was, though the disk has only what is older."""

from __future__ import annotations

import asyncio
import json
import re
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
from zili.supervision.held import HeldStates
from zili.training.held import StateMemory, _common, _laid_out
from zili.training.index import read_header
from zili.training.parts import held_parts

STATES = ("checkpoint.every=0", "checkpoint.memory_share=1")


def resumed(run: Launched) -> list[int]:
    """Steps after which lives went on from memory."""
    notes = (run.run / "metrics.jsonl").read_text(encoding="utf-8")
    return [int(step) for step in re.findall(r"resumed from memory at step (\d+)", notes)]


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
    first, second = resumed(run)
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

    async def keep(self, step: int, kind: str = "k", local: int = 0, *, whole: bool = True) -> str:
        """As a process does after a step; `whole`: it lives long enough to say so."""
        room = await self.ask(do="room", kind=kind, local=local, size=8)
        Path(room["path"]).write_bytes(step.to_bytes(8, "big"))
        if whole:
            about = {"kind": kind, "local": local, "number": room["number"]}
            await self.ask(do="whole", step=step, said=f"after {step}", alone=True, **about)
        return str(room["path"])

    async def found(self, step: int, kind: str = "k") -> int | None:
        told = await self.ask(do="find", kind=kind, step=step)
        return int.from_bytes(Path(told["path"]).read_bytes(), "big") if told else None


async def nowhere(kind: str) -> dict[int, list[str]]:
    return {}


def test_a_copy_that_is_cut_off_costs_no_whole_one() -> None:
    """Whatever steps were skipped: which memory is free does not follow from a step's number."""

    async def copies() -> None:
        states = HeldStates("a", b"secret", nowhere)
        wire = Wire(states)
        for step in (2, 4, 7, 8, 20, 22):
            await wire.keep(step)
        await wire.keep(24, whole=False)
        assert states.inventory() == [("k", 20), ("k", 22)]
        for _ in range(3):  # of a process that dies each time
            await wire.keep(24, whole=False)
        assert [await wire.found(step) for step in (20, 22, 24, 8)] == [20, 22, None, None]
        await wire.keep(25)
        await wire.keep(26, whole=False)
        assert states.inventory() == [("k", 22), ("k", 25)], "the newest whole one is never written into"
        states.close()

    asyncio.run(copies())


def test_a_state_of_a_way_that_was_not_taken_is_forgotten() -> None:
    async def forget() -> None:
        states = HeldStates("a", b"secret", nowhere)
        wire = Wire(states)
        for step in (5, 6, 7):
            await wire.keep(step)
            await wire.keep(step, kind="of another layout")
        await wire.ask(do="forget", step=6, kinds=["k"])
        assert states.inventory() == [("k", 5), ("k", 6)]
        states.close()

    asyncio.run(forget())


def test_the_partner_has_a_state_before_the_next_step_is_done(tmp_path: Path) -> None:
    """And gives it to whoever takes the machine's place; damaged pieces are not taken."""

    async def two() -> None:
        secret, here = b"secret", HeldStates("a", b"secret", nowhere)
        there, third = HeldStates("b", secret, nowhere), HeldStates("c", secret, nowhere)
        nodes = [Node(0, [0], [], secret, states.take) for states in (there, third)]
        address = f"127.0.0.1:{await nodes[0].listen('127.0.0.1')}"
        here.begin(address)
        wire = Wire(here)
        for step in (1, 2, 3, 4):
            await wire.keep(step)
            await wire.ask(do="settle", kind="k", local=0)
        assert there.inventory() == [("k", 3), ("k", 4)]
        here.close()

        async def known(kind: str) -> dict[int, list[str]]:
            return {step: ["127.0.0.1:1", address] for known, step in there.inventory() if known == kind}

        third.elsewhere = known
        other = Wire(third)
        assert await other.ask(do="offer", kind="k") == {"steps": [3, 4], "machine": "c"}
        assert await other.found(3) == 3, "by the second address, as nobody is at the first"
        assert await other.found(1) is None and await other.found(3, kind="x") is None
        for node in nodes:
            await node.close(0)
        there.close()
        third.close()

    asyncio.run(asyncio.wait_for(two(), 30))


def test_a_piece_that_is_damaged_on_its_way_is_no_state() -> None:
    class Damaged:
        async def receive(self) -> bytes:
            return Message(About.HELD, number=1, list=b"damaged!").packed()

    async def receive() -> None:
        states = HeldStates("a", b"secret", nowhere)
        with pytest.raises(ValueError, match="damaged"):
            await states.take(
                cast(Link, Damaged()),
                Message(About.HELD, word=json.dumps({"do": "keep", "kind": "k", "of": "b own 0", "size": 8}).encode()),
            )
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
    for name, view in memory._views(str(file), layout.parts).items():
        view.copy_(held[name])
    read = load_file(file)
    assert read.keys() == held.keys() and all(torch.equal(read[name], held[name]) for name in held)
    assert read_header(file)["d.whole"].whole


def test_all_go_on_after_the_newest_step_that_each_can_have() -> None:
    told = [("x", "a", [8, 9, 10]), ("y", "a", [8, 9]), ("x", "b", [7, 8, 9])]
    assert _common(told) == (["y"], 9)
    assert _common([*told, ("z", "c", [])]) == (["y", "z"], None)
