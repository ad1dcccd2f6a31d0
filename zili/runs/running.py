"""An opened run from where it goes on to its end, with its callbacks around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from zili.config import dump_recipe
from zili.durable import locked, write_whole
from zili.errors import ConfigError
from zili.runs.opening import OpenedRun, open_held_out
from zili.runs.recipes import RECIPE_FILE

if TYPE_CHECKING:
    from zili.data.packing import DialogueLoader
    from zili.data.store import TokenStore
    from zili.models.decoder import Decoder
    from zili.objectives.objective import Objective
    from zili.parallel.world import World
    from zili.release.opening import OpenModel
    from zili.training.callbacks import Callback
    from zili.training.setup import Setup
    from zili.training.trainer import Trainer

_TOKENIZER_FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    "generation_config.json",  # it names the tokens that end an answer
)


def run(
    opened: OpenedRun,
    callbacks: Sequence[Callback] = (),
    objective: Objective | None = None,
    model: type[Decoder] | None = None,
) -> Trainer:
    """Train to the end, or until interrupted, going on from the newest checkpoint; returns the trainer.

    `objective` and `model` are as of `OpenedRun.trainer`. `callbacks` come after those that every run has: held-out
    evaluation, `metrics.jsonl`, and what the recipe names.
    """
    _refuse_other_kinds(callbacks, objective, model)
    world = opened.setup.world
    if opened.setup.config.model.lora is not None:
        world.from_first(lambda: _refuse_adapters_of_nothing(opened.setup))
    held_out = world.agree(lambda: open_held_out(opened))
    given = [callback for callback in callbacks if world.is_first or callback.everywhere]

    def say(text: str) -> None:
        """To those who show notes: not to the record, which may be what the disk has refused."""
        for callback in given:
            callback.on_note(text)

    with _run_folder(opened.setup.config.folder, world, say):
        around = [*_of_every_run(opened, held_out, say), *given]
        trainer = world.agree(lambda: opened.trainer(around, objective, model))
        _tell_given(trainer, objective, model)
        begin(trainer, held_out)
        world.from_first(lambda: _leave_a_whole_run_folder(opened))
        try:
            trainer.fit()
        except BaseException as error:
            for callback in around:
                callback.on_error(trainer, error)
            raise
    return trainer


def _of_every_run(
    opened: OpenedRun, held_out: TokenStore | DialogueLoader | None, say: Callable[[str], None]
) -> list[Callback]:
    """Those of this process: one process speaks, all of them compute."""
    from zili.evaluation.during_training import HeldOutEvaluation, measure_of
    from zili.training.callbacks import MetricsLog
    from zili.training.callbacks.named import named_callbacks, watches

    config, world = opened.setup.config, opened.setup.world
    measured = [] if held_out is None else [HeldOutEvaluation(measure_of(held_out, opened.tokenizer))]
    named = world.agree(lambda: named_callbacks(config))
    found = [*measured, MetricsLog(config.folder, say), *watches(config.watch), *named]
    return [callback for callback in found if world.is_first or callback.everywhere]


def _refuse_other_kinds(
    callbacks: Sequence[Callback], objective: Objective | None, model: type[Decoder] | None
) -> None:
    """A class where an object is meant, or the reverse, would fail far from the call that gave it."""
    from zili.models.decoder import Decoder
    from zili.objectives import Objective
    from zili.training.callbacks import Callback

    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(f"callbacks: {callback!r:.60} is not an object of a zili.Callback class")
    if not isinstance(objective, Objective | None):
        raise TypeError(f"objective: {objective!r:.60} is not an object of a zili.Objective class")
    if model is not None and not (isinstance(model, type) and issubclass(model, Decoder)):
        raise TypeError(f"model: {model!r:.60} is not a class below zili.Decoder")


def _tell_given(trainer: Trainer, objective: Objective | None, model: type[Decoder] | None) -> None:
    """For the run's record and its report: what the recipe does not say."""
    given = {"objective": objective, "model": model}
    told = [f"{name}={kind}" for name, kind in trainer.classes.items() if given[name] is not None]
    if told:
        trainer.note(f"given in Python, so the recipe alone does not repeat this run: {', '.join(told)}")


def _refuse_adapters_of_nothing(setup: Setup) -> None:
    from zili.training.tiers.choosing import newest_state_of

    config = setup.config
    if config.training.start_from is None and newest_state_of(config, setup.device) is None:
        raise ConfigError(
            "model.lora trains adapters beside a model, and none is named, so it would be one at random: name it with "
            "model.folder, or its weights with training.start_from"
        )


@contextmanager
def _run_folder(folder: Path, world: World, note: Callable[[str], None]) -> Iterator[None]:
    """Keep the run's folder from other runs, and see that it is the same one for all processes of this."""
    from zili.parallel.control.member import GENERATION
    from zili.parallel.machines import check_shared_folder

    # Of lives that follow one another, one that was taken for dead may still be there, stopped. It must not keep the
    # next from the folder: supervisors see to it that there is one run, and a fence that only the newest life saves.
    shared = GENERATION in os.environ

    checkpoints = folder / "checkpoints"  # it may be a mount or a link of its own
    with ExitStack() as held:
        no_locks = world.agree(lambda: held.enter_context(locked(folder, shared=shared)) if world.is_first else None)
        if no_locks:
            note(f"{folder} cannot be locked ({no_locks}): see to it that no other run trains in it meanwhile")
        check_shared_folder(world, folder)
        if world.from_first(checkpoints.is_dir):
            check_shared_folder(world, checkpoints)
        yield


def begin(trainer: Trainer, held_out: TokenStore | DialogueLoader | None = None) -> None:
    """Bring a run to where it goes on: its newest checkpoint, or the model that it starts from. Pairs get their
    reference.

    Raises:
        ZiliError: neither can be read, or belongs to this run.
    """
    from zili.data.packing import DialogueLoader
    from zili.models.decoder import Decoder
    from zili.parallel.control.crumbs import own_crumbs
    from zili.release import weights_fingerprint
    from zili.training.reference_model import set_reference

    distill = trainer.config.objective.distill
    if distill is not None and trainer.parallel.teacher is not None:
        opened = _fill(trainer, trainer.parallel.teacher.parts, distill.teacher, Decoder)
        trainer.teacher_fingerprint = trainer.world.from_first(lambda: weights_fingerprint(opened()))
        trainer.note(f"teacher from {distill.teacher}")
    own_crumbs().enter("load")
    start, resumed = trainer.config.training.start_from, trainer.resume()
    if not resumed and start is not None:
        _start_from(trainer, start)
    elif not resumed and isinstance(trainer.loader, DialogueLoader):
        seed = trainer.config.seed
        trainer.note(f"weights drawn from seed {seed}: no model is named to go on from (training.start_from)")
    loaders = (trainer.loader, held_out)
    of_pairs = [loader for loader in loaders if isinstance(loader, DialogueLoader) and loader.pairs]
    if of_pairs:
        set_reference(trainer, of_pairs, resumed=resumed)


def _start_from(trainer: Trainer, folder: Path) -> None:
    _fill(trainer, trainer.parallel.parts, folder, trainer.decoder)
    trainer.note(f"weights from {folder}")


def _fill(trainer: Trainer, parts: Sequence[Decoder], folder: Path, decoder: type[Decoder]) -> Callable[[], OpenModel]:
    """Read the weights of a model from a folder, the same for all processes; returns what opens it."""
    from zili.parallel.machines import check_same
    from zili.release.opening import fill_from, identity, open_model
    from zili.training.checkpoints import find_checkpoint

    world = trainer.world
    check_same(world, f"files in {folder}", world.agree(lambda: identity(folder)))
    found = world.agree(lambda: find_checkpoint(folder, trainer.note, world))
    opened = partial(open_model, found or folder, hashed=found is not None, decoder=decoder)
    world.agree(lambda: fill_from(parts, opened()))
    return opened


def _leave_a_whole_run_folder(opened: OpenedRun) -> None:
    """Put recipe and tokenizer beside the checkpoints: sampling, chat and export need nothing else. Training on does:
    the recipe names its stores, and its folder, relative to where it was started."""
    folder, source = opened.recipe.folder, opened.recipe.data.tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECIPE_FILE, dump_recipe(opened.recipe))
    target = folder / "tokenizer"
    if source.resolve() == target.resolve():
        return
    target.mkdir(exist_ok=True)
    # The tokenizer's own files only: it may lie in a model folder, among terabytes of weights.
    for file in sorted({file for pattern in _TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()}):
        write_whole(target / file.name, file.read_text(encoding="utf-8"))
