"""Looks for wrong sums: the same micro-batch computed twice, and weights that replicas hold alike."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zili.errors import CorruptionError, PeerError
from zili.parallel.machines import own_place
from zili.parallel.model import plain
from zili.parallel.witness import BitMark, Witness, bits_of
from zili.training.callbacks.base import Callback
from zili.training.parts import box_of

if TYPE_CHECKING:
    from zili.data.loader import Batch
    from zili.training.trainer import Trainer

_MODULUS = 1 << 64
UNDECIDED = "which of them is wrong cannot be told"


class CorruptionWatch(Callback):
    """Every `every` steps, before the step, and for weights before each checkpoint too.

    A process is to blame where something that it made differs in the second pass although all that it had received
    until then was the same; or where most of those that hold the same weights have others. The run ends then: with
    `CorruptionError` on who is to blame, with `PeerError` on the others.
    """

    everywhere = True

    def __init__(self, every: int) -> None:
        self._every = every
        self._repeats = True

    def on_start(self, trainer: Trainer) -> None:
        device = trainer.device
        self._repeats = device.type == "cpu" or trainer.config.chip.deterministic
        if not self._repeats:
            trainer.note(
                f"watch.corruption: {device.name()} need not repeat bit by bit, so nothing is computed twice and only "
                "weights are compared; chip.deterministic = true lets it"
            )

    def before_step(self, trainer: Trainer, batch: Batch) -> None:
        if trainer.step % self._every == 0:
            self._look(trainer, self._repeats and differs(trainer, batch))

    def after_step(self, trainer: Trainer) -> None:
        if trainer.saves_here:
            self._look(trainer, own_fault=False)

    def _look(self, trainer: Trainer, own_fault: bool) -> None:
        world = trainer.world
        said = json.dumps({"place": own_place(world), "fault": own_fault, "weights": held_weights(trainer)})
        every = world.gathered(said)
        blamed, text = world.from_first(lambda: verdict([json.loads(one) for one in every]))
        if not blamed:
            return
        text = f"after step {trainer.step}: {text}"
        for callback in trainer.callbacks:
            callback.on_event("corruption", {"step": trainer.step, "processes": blamed, "text": text})
        error = CorruptionError(text) if world.rank in blamed else PeerError(text)
        error.agreed = True
        raise error


def differs(trainer: Trainer, batch: Batch) -> bool:
    """Whether this process makes other bits of the same micro-batch when it computes it again. Nothing stays of it."""
    generators = trainer.device.rng_state()
    first, second = (_marks(trainer, batch, generators) for _ in range(2))
    if len(first) != len(second):  # what is met for the first time may ask others for more
        first, second = second, _marks(trainer, batch, generators)
    trainer.device.set_rng_state(generators)
    both = zip(first, second, strict=False)
    sums = torch.stack([torch.stack((one.sum, other.sum)) for one, other in both]).tolist()
    for mark, (one, other) in zip(first, sums, strict=False):
        if one != other:
            return not mark.received
    return False


def _marks(trainer: Trainer, batch: Batch, generators: dict[str, Tensor]) -> list[BitMark]:
    parallel, witness = trainer.parallel, Witness()
    trainer.device.set_rng_state(generators)
    with trainer.uncompiled(), witness:
        terms = parallel.accumulate(parallel.some_rows(batch))
    gradients = (plain(one.grad) for one in parallel.parameters() if one.grad is not None)
    witness.made(iter((terms.loss, *gradients)))
    parallel.forget()
    return witness.marks


def held_weights(trainer: Trainer) -> list[tuple[str, int]]:
    """What this process holds, in kinds of which all processes that hold the same ones should have the same bits."""
    parallel = trainer.parallel
    kinds: dict[float, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in parallel.named_tensors():
        copies = parallel.copies(tensor)
        if copies > 1 and not parallel.is_second(name):
            kinds[copies].append((f"{name} {box_of(tensor)}", plain(tensor)))
    return [(_names(held), _sum(held)) for held in kinds.values()]


def _names(held: list[tuple[str, Tensor]]) -> str:
    return hashlib.sha256("\n".join(name for name, _ in held).encode()).hexdigest()[:16]


def _sum(held: list[tuple[str, Tensor]]) -> int:
    sums = torch.stack([bits_of(tensor) for _, tensor in held]).tolist()
    # Odd factors: two that change one another's bits do not make up for it.
    return sum((2 * number + 1) * one for number, one in enumerate(sums)) % _MODULUS


def verdict(said: list[dict[str, Any]]) -> tuple[list[int], str]:
    """Ranks that are to blame, and what is wrong; none where all is well."""
    places = [one["place"] for one in said]
    if faulty := [rank for rank, one in enumerate(said) if one["fault"]]:
        return faulty, f"{_listed(places, faulty)} computed other bits of the same micro-batch the second time"
    for names in dict.fromkeys(name for one in said for name, _ in one["weights"]):
        found = list(_holding(said, names))
        sums = Counter(held for _, held in found).most_common()
        if len(sums) > 1:
            others = [rank for rank, held in found if held != sums[0][0]]
            if sums[0][1] > sums[1][1]:
                most = f"the {sums[0][1]} that hold the same ones"
                return others, f"{_listed(places, others)} has other weights than {most}"
            ranks = [rank for rank, _ in found]
            return ranks, f"{_listed(places, ranks)} hold the same weights with unlike bits; {UNDECIDED}"
    return [], ""


def _holding(said: list[dict[str, Any]], names: str) -> Iterator[tuple[int, int]]:
    for rank, one in enumerate(said):
        yield from ((rank, held) for name, held in one["weights"] if name == names)


def _listed(places: list[str], ranks: list[int]) -> str:
    return " and ".join(places[rank] for rank in ranks)
