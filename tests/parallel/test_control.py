"""Control messages: a tree of machines through which processes agree, and torch's store on top of it."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from zili.errors import PeerError
from zili.parallel.control.links import LARGEST, PlainLink, Unproven
from zili.parallel.control.member import Control, Heard, Hosted
from zili.parallel.control.messages import NOBODY, About, Message, entries, entry, together, unpacked
from zili.parallel.control.node import FAN, Node, above, below
from zili.parallel.control.store import NodeStore

SECRET = b"of this run"
EACH = 2
"""Processes of a machine."""


@contextmanager
def tree(machines: int) -> Iterator[list[Control]]:
    """The control messages of a run on so many machines, of `EACH` processes each, all of them threads here."""
    hosted = []
    for number in range(machines):
        ranks = range(EACH * number, EACH * number + EACH)
        hosted.append(Hosted(Node(number, ranks, below(number, machines), SECRET)))
    addresses = [f"127.0.0.1:{one.listen('127.0.0.1')}" for one in hosted]
    for number, one in enumerate(hosted):
        parent = above(number)
        if parent is not None:
            one.join(addresses[parent])
    controls = [Control(addresses[rank // EACH], SECRET, rank) for rank in range(EACH * machines)]
    try:
        yield controls
    finally:
        for control in controls:
            control.close(0)
        for one in reversed(hosted):
            one.close(1)


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """What each makes, or raises, in threads beside one another."""
    made: list[Any] = [None] * len(works)

    def one(number: int) -> None:
        try:
            made[number] = works[number]()
        except Exception as error:
            made[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return made


def test_the_tree_has_everybody_once() -> None:
    for count in (1, 2, FAN, FAN + 1, FAN + 2, 100, 1280):
        assert sorted(child for number in range(count) for child in below(number, count)) == list(range(1, count))
        assert all(number in below(above(number) or 0, count) for number in range(1, count))


@pytest.mark.parametrize("machines", [1, 2, FAN + 3])
def test_all_hear_the_first_that_spoke_and_the_first_gets_every_value(machines: int) -> None:
    with tree(machines) as controls:
        size = len(controls)
        speakers = {size - 1: b"full", size // 2: b"missing"}
        works = [
            lambda c=control, r=rank: [c.turn(), c.turn(speakers.get(r), f"value {r}".encode()), c.turn()]
            for rank, control in enumerate(controls)
        ]
        heard = at_once(works)
        first = min(speakers)
        for rank, (before, told, after) in enumerate(heard):
            assert before == after == Heard(0, NOBODY, b"", [])
            assert (told.spoke, told.rank, told.word) == (len(speakers), first, speakers[first])
            assert told.values == ([f"value {r}".encode() for r in range(size)] if rank == 0 else [])


def test_channels_do_not_meet() -> None:
    with tree(2) as controls:
        works = [
            lambda c=control, word=word, channel=channel: c.turn(word, channel=channel).word
            for channel in (0, 1)
            for control, word in zip(controls, [None, None, None, str(channel).encode()], strict=True)
        ]
        assert at_once(works) == [b"0"] * 4 + [b"1"] * 4


@pytest.mark.parametrize("gone", [0, 3])
def test_who_is_gone_is_named_in_the_same_turn(gone: int) -> None:
    with tree(2) as controls:
        at_once([control.turn for control in controls])
        rest = [control for rank, control in enumerate(controls) if rank != gone]

        def leave() -> None:
            time.sleep(0.2)
            controls[gone].close(0)

        heard = at_once([leave, *(control.turn for control in rest)])[1:]
        assert all(isinstance(one, PeerError) and f"process {gone} is gone" in str(one) for one in heard)
        again = at_once([control.turn for control in rest])
        assert all(isinstance(one, PeerError) for one in again), "and in every turn that follows"


def test_a_machine_that_is_gone_takes_its_processes_along() -> None:
    nodes = [Hosted(Node(number, [number], below(number, 2), SECRET)) for number in (0, 1)]
    addresses = [f"127.0.0.1:{node.listen('127.0.0.1')}" for node in nodes]
    nodes[1].join(addresses[0])
    controls = [Control(address, SECRET, rank) for rank, address in enumerate(addresses)]
    assert [turn.spoke for turn in at_once([control.turn for control in controls])] == [0, 0]
    nodes[1].close(0)
    first, last = at_once([control.turn for control in controls])
    assert isinstance(first, PeerError) and "the machine of process 1 is gone" in str(first)
    assert isinstance(last, PeerError)
    nodes[0].close(0)


def test_who_does_not_come_is_not_awaited_for_ever() -> None:
    with tree(1) as controls, pytest.raises(PeerError, match="within 0 s"):
        controls[0].turn(patience=0.2)


def test_strangers_and_garbage_disturb_nobody() -> None:
    with tree(1) as controls:
        address = controls[0]._address
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(500), b"\xff" * 8):
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as link:
                link.sendall(garbage)
        for hello in (Message(About.PROCESS, rank=7), Message(About.TURN), Message(About.NODE, rank=1)):
            stranger = PlainLink(address, SECRET)
            stranger.send(hello.packed())
            with pytest.raises(ConnectionError):
                stranger.receive()
        assert [turn.spoke for turn in at_once([control.turn for control in controls])] == [0, 0]
        twice = PlainLink(address, SECRET)
        twice.send(Message(About.PROCESS, rank=0).packed())
        with pytest.raises(ConnectionError):
            twice.receive()
        assert [turn.spoke for turn in at_once([control.turn for control in controls])] == [0, 0]


def test_who_does_not_know_the_secret_is_refused() -> None:
    node = Hosted(Node(0, [0], [1], SECRET))
    port = node.listen("127.0.0.1")
    with pytest.raises((Unproven, ConnectionError)):
        PlainLink(f"127.0.0.1:{port}", b"another")
    PlainLink(f"127.0.0.1:{port}", SECRET).close()
    node.close(0)


def test_a_message_that_is_too_large_ends_its_link() -> None:
    with tree(1) as controls:
        link = PlainLink(controls[0]._address, SECRET)
        link._socket.sendall((LARGEST + 1).to_bytes(4, "big"))
        with pytest.raises(ConnectionError):
            link.receive()
        host, _, port = controls[0]._address.rpartition(":")
        with socket.create_connection(
            (host, int(port)), 5
        ) as stranger:  # its bytes would be kept until they are all there
            stranger.sendall((1 << 20).to_bytes(4, "big"))
            while stranger.recv(1 << 16):
                pass


def test_messages_travel_unchanged() -> None:
    message = Message(About.TURN, 1, 2**31, 3, -1, b"word\n", entry(5, b"") + entry(2, b"two"))
    assert unpacked(message.packed()) == message
    assert entries(message.list) == [b"two", b""]
    for broken in (b"", b"\x02", b"\x09" + bytes(17)):
        with pytest.raises(ValueError):
            unpacked(broken)


def test_of_several_words_the_lowest_ranks_counts() -> None:
    said = [
        Message(About.TURN, spoke=1, rank=4, word=b"b"),
        Message(About.TURN),
        Message(About.TURN, spoke=2, rank=1, word=b"a"),
    ]
    assert together(said) == Message(About.TURN, spoke=3, rank=1, word=b"a")


# ------------------------------------------------------------------ the store


def contents(store: dist.Store) -> list[Any]:
    """What torch's own store answers to the same calls."""
    found: list[Any] = []
    store.set("a", "1")
    found += [store.get("a"), store.add("n", 2), store.add("n", -1), store.get("n")]
    found += [
        store.compare_set("c", "", "new"),
        store.compare_set("c", "other", "x"),
        store.compare_set("c", "new", "y"),
    ]
    found += [store.compare_set("absent", "expected", "x")]
    store.append("l", "one")
    store.append("l", "two")
    found += [
        store.get("l"),
        store.check(["a", "l"]),
        store.check(["a", "z"]),
        store.delete_key("a"),
        store.delete_key("a"),
    ]
    store.wait(["l", "n"])
    found += [store.check(["a"]), store.get("l")]
    return found


def test_the_store_answers_as_torchs(tmp_path: Path) -> None:
    with tree(1) as controls:
        assert contents(NodeStore(controls[0]._address, SECRET)) == contents(dist.HashStore())


def test_a_key_is_awaited_from_every_machine_and_asked_for_once_each() -> None:
    with tree(3) as controls:
        stores = [NodeStore(control._address, SECRET) for control in controls]

        def late() -> bytes:
            time.sleep(0.3)
            stores[-1].set("late", b"\x00came")
            return stores[-1].get("late")

        works = [late, *(lambda s=store: s.get("late") for store in stores[:-1])]
        assert at_once(works) == [b"\x00came"] * len(stores)
        stores[0].set_timeout(timedelta(seconds=0.2))
        with pytest.raises(dist.DistStoreError):
            stores[0].get("never")
        stores[0].set("there", "1")
        assert stores[4].get("there") == b"1", "a wait that was given up leaves the store in order"


def test_questions_to_the_store_that_make_no_sense_end_their_link_only() -> None:
    with tree(1) as controls:
        link = PlainLink(controls[0]._address, SECRET)
        link.send(Message(About.STORE, word=b'["no such operation"]').packed())
        with pytest.raises(ConnectionError):
            link.receive()
        store = NodeStore(controls[0]._address, SECRET)
        store.set("a", "1")
        assert store.num_keys() == 1


def test_a_node_waits_for_those_below_until_its_patience_is_over() -> None:
    node = Hosted(Node(0, [0], (), SECRET))
    control = Control(f"127.0.0.1:{node.listen('127.0.0.1')}", SECRET, 0)
    control.turn()
    begun = time.monotonic()
    node.close(0.3)
    assert time.monotonic() - begun >= 0.3


def test_what_is_said_before_the_node_above_is_there_is_not_lost() -> None:
    async def one() -> list[int]:
        upper, lower = Node(0, [0], [1], SECRET), Node(1, [1], (), SECRET)
        port = await upper.listen("127.0.0.1")
        heard: list[Message] = []
        lower._hear((About.PROCESS, 1), None, Message(About.TURN, rank=1, spoke=1, word=b"early"))  # type: ignore[arg-type]
        upper._answer = heard.append  # type: ignore[method-assign]
        await lower.join(f"127.0.0.1:{port}", 1)
        upper._hear((About.PROCESS, 0), None, Message(About.TURN))  # type: ignore[arg-type]
        for _ in range(100):
            if heard:
                break
            await asyncio.sleep(0.02)
        await lower.close(0)
        await upper.close(0)
        return [said.spoke for said in heard]

    assert asyncio.run(one()) == [1]
