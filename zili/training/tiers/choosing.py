"""Where a run goes on: the newest sound checkpoint of all its tiers, from the nearest that has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from zili.chips.device import Device
from zili.config import RunConfig
from zili.errors import CheckpointError
from zili.parallel.layout import Layout
from zili.parallel.world import World
from zili.training.checkpoints import RunState, SoundCheckpoint, has_read
from zili.training.fence import generation_fence
from zili.training.left_out import LeftOut
from zili.training.restoring import Needs
from zili.training.tiers.local_disk import LocalDisk
from zili.training.tiers.object_store import ObjectStore
from zili.training.tiers.run_folder import RunFolder
from zili.training.tiers.tier import Offered, Tier


class Chosen(NamedTuple):
    """The checkpoint that a run goes on from."""

    found: SoundCheckpoint
    step: int
    holders: list[Tier]
    """Those that have that step, as far as is known."""
    passed: list[tuple[Tier, int]]
    """What was passed over as damaged or incomplete."""
    unfit: list[tuple[Tier, int]]
    """What has read a batch that is left out."""


def tiers_of(config: RunConfig, world: World) -> Callable[[RunFolder], list[Tier]]:
    """The tiers beside the run's folder, as the recipe lists them. Nothing is asked of them yet."""

    def made(folder: RunFolder) -> list[Tier]:
        found: list[Tier] = []
        for tier in config.checkpoint.tiers:
            fence, run = generation_fence(config.folder), config.folder
            if tier.is_store:
                store = ObjectStore(
                    tier.place, world, every=tier.every, keep=tier.keep, fence=fence, run=run, folder=folder
                )
                found.append(store)
            else:
                found.append(LocalDisk(tier.place, world, every=tier.every, keep=tier.keep, fence=fence, run=run))
        return found

    return made


def newest_of(
    tiers: Sequence[Tier],
    needs: Needs,
    report: Callable[[str], None],
    world: World,
    decisions: Sequence[LeftOut] = (),
) -> Chosen | None:
    """The newest sound checkpoint; each one that is passed over is named through `report`. All processes call it.

    `tiers`: the run's folder is the first. `decisions`: what the run leaves out; a checkpoint that has read of it is
    none to go on from.

    Raises:
        CheckpointError: there are checkpoints and none of them is sound, or nothing was found and a tier, which may
            have some, cannot be read or written.
    """
    offered, silent = _offered(tiers, report)
    passed: list[tuple[Tier, int]] = []
    unfit = _unfit(offered, world, decisions)
    offered = [one for number, one in enumerate(offered) if number not in unfit]
    for tier, offer in offered:
        try:
            if offer.flaw:
                raise CheckpointError(f"{tier.where(offer.step)}: {offer.flaw}")
            found = tier.opened(offer.step, needs)
        except CheckpointError as error:
            report(_passed_over(tier, offer, error, alone=len(tiers) == 1))
            passed.append((tier, offer.step))
            continue
        brought = [one for one in tiers if one is not tier and one.where(offer.step) == str(found.path)]
        if brought:
            report(f"step {offer.step} was brought from {tier.title}")
        holders = [one for one, other in offered if other.step == offer.step and (one, other.step) not in passed]
        return Chosen(found, offer.step, [*holders, *brought], passed, list(unfit.values()))
    if silent:
        raise CheckpointError(
            f"{silent[0]}; no other place has a sound checkpoint, and the run would begin anew: bring it back, or take "
            "it out of checkpoint.tiers"
        )
    if passed:
        raise _none_sound(tiers, len(passed))
    for tier in tiers:
        tier.probe()
    return None


def _unfit(
    offered: Sequence[tuple[Tier, Offered]], world: World, decisions: Sequence[LeftOut]
) -> dict[int, tuple[Tier, int]]:
    """Those of the offered that have read what is left out, by their number in the list. The first process reads."""

    def numbers() -> list[int]:
        found = []
        for number, (tier, offer) in enumerate(offered):
            with suppress(CheckpointError):  # who verifies it will say so
                if has_read(tier.state_of(offer.step), decisions):
                    found.append(number)
        return found

    found = world.from_first(numbers) if decisions and offered else []
    return {number: (offered[number][0], offered[number][1].step) for number in found}


def steps_offered(tiers: Sequence[Tier]) -> list[int]:
    """All steps that any of them has, as far as they can be asked. All processes call it."""
    offered, _ = _offered(tiers, lambda text: None)
    return sorted({offer.step for _, offer in offered if not offer.flaw})


def newest_offered(tiers: Sequence[Tier]) -> int:
    """The newest step that any of them has, as far as they can be asked; 0: there is none. All processes call it."""
    return max(steps_offered(tiers), default=0)


def set_aside(chosen: Chosen, report: Callable[[str], None]) -> None:
    """What was passed over no longer counts; what brought a checkpoint has set aside itself what was in its place."""
    for why, passed in (("damaged", chosen.passed), ("rolled-back", chosen.unfit)):
        for tier in {tier: None for tier, _ in passed}:
            mine = (step for one, step in passed if one is tier)
            steps = [step for step in mine if step > chosen.step or tier not in chosen.holders]
            try:
                tier.set_aside(steps, why)
            except CheckpointError as error:
                report(f"{tier.title} keeps what was passed over: {error}")


def _offered(
    tiers: Sequence[Tier], report: Callable[[str], None]
) -> tuple[list[tuple[Tier, Offered]], list[CheckpointError]]:
    """What all tiers have, the best place first, and why some do not say."""
    found: list[tuple[Tier, Offered]] = []
    silent = []
    for tier in tiers:
        try:
            found += [(tier, offer) for offer in tier.offers()]
        except CheckpointError as error:
            report(f"{tier.title} cannot be asked for checkpoints: {error}")
            if tier.durable:
                silent.append(error)
    return sorted(found, key=lambda one: (-one[1].step, one[0].distance)), silent


def _passed_over(tier: Tier, offer: Offered, error: CheckpointError, *, alone: bool) -> str:
    return (
        f"passing over a damaged checkpoint: {error}"
        if alone
        else (f"passing over step {offer.step} in {tier.title}: {error}")
    )


def _none_sound(tiers: Sequence[Tier], passed: int) -> CheckpointError:
    where = tiers[0].where(0).rpartition("/")[0] if len(tiers) == 1 else ", ".join(tier.title for tier in tiers)
    return CheckpointError(f"all {passed} checkpoints in {where} are damaged; start the run in a new folder")


def newest_state_of(config: RunConfig, device: Device) -> RunState | None:
    """What the newest checkpoint of a run says of itself, in any tier that this process alone can read; no hash is
    checked. A tier that cannot be asked says so when the run goes on from it."""
    alone = World(Layout(), device)
    folder = RunFolder(config.folder / "checkpoints", alone, every=0, keep=2, keep_every=0, fence=lambda: True)
    states = []
    for tier in (folder, *tiers_of(config, alone)(folder)):
        try:
            states.append(tier.newest_state())
        except (CheckpointError, OSError):
            continue
    return max(filter(None, states), key=lambda state: state.step, default=None)
