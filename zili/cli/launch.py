"""From a recipe to a running trainer: what `zili train` and `zili quickstart` share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from zili.cli.options import program, starter
from zili.config import Choice, RunConfig, dump_recipe
from zili.durable import locked, write_whole
from zili.errors import ConfigError
from zili.parallel.layout import processes

if TYPE_CHECKING:
    from zili.data.loader import Batches
    from zili.data.packing import DialogueLoader
    from zili.data.store import TokenStore
    from zili.data.tokenizer import Tokenizer
    from zili.models.decoder import Decoder
    from zili.parallel.world import World
    from zili.training.pacing import Pacer
    from zili.training.setup import Setup
    from zili.training.trainer import Trainer

RECIPE_FILE = "recipe.toml"
_TOKENIZER_FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    "generation_config.json",  # it names the tokens that end an answer
)


@dataclass(frozen=True)
class Launch:
    """A run ready to start."""

    recipe: RunConfig
    """As written; `setup.config` is the same with every automatic choice made."""
    setup: Setup
    tokenizer: Tokenizer
    loader: Batches
    started: float
    """When, as `time.monotonic` tells it: `training.hours` count from here."""

    @property
    def choices(self) -> tuple[Choice, ...]:
        return self.setup.choices


def prepare_launch(recipe: RunConfig) -> Launch:
    """Activate the chip, make the automatic choices, open tokenizer and stores, check that they fit one another.

    Raises:
        ZiliError: whatever makes the run impossible, before anything is written.
    """
    started = time.monotonic()
    from zili.training.setup import set_up

    setup = set_up(recipe)
    # Late: a process that has imported `parallel.world` is taken for one that has joined (`cli.app`).
    from zili.parallel.machines import check_same

    world, config = setup.world, setup.config  # the first process's: the recipe may be a copy too
    tokenizer, loader, stores = world.agree(lambda: _open_data(config))
    check_same(world, "token stores", " ".join(store.identity() for store in stores))
    if config.data.verify:
        _verify(stores, world)
    return Launch(recipe, setup, tokenizer, loader, started)


def _verify(stores: list[TokenStore], world: World) -> None:
    """Read the stores through, once a machine, as each may have copies of its own: its processes share the work."""
    from zili.data.store import verify_stores

    _, _, here = processes()
    world.agree_patiently(lambda: verify_stores(stores, here, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _open_data(recipe: RunConfig) -> tuple[Tokenizer, Batches, list[TokenStore]]:
    """Tokenizer, loader, and all stores that the run reads, those held out among them."""
    from zili.data.packing import DialogueLoader, open_loader
    from zili.data.store import TokenStore
    from zili.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(recipe.data.tokenizer)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise ConfigError(
            f"{recipe.data.tokenizer} has {tokenizer.vocab_size} tokens, model.vocab_size is "
            f"{recipe.model.vocab_size}; raise it to at least as many"
        )
    stores = [(TokenStore.open(source.store), source.weight) for source in recipe.data.sources]
    held_out = [TokenStore.open(recipe.data.held_out)] if recipe.data.held_out else []
    read = [*(store for store, _ in stores), *held_out]
    for store in read:
        store.check_tokenizer(tokenizer)
    loader = open_loader(
        stores,
        sequence_length=recipe.training.sequence_length,
        global_batch=recipe.training.global_batch,
        seed=recipe.seed,
    )
    if (recipe.preference is not None) != (isinstance(loader, DialogueLoader) and loader.pairs):
        raise ConfigError(
            "preference is given, and data.sources are no pairs of answers (`zili dialogues`)"
            if recipe.preference is not None
            else "data.sources are pairs of answers: say how they are learned from, preference.beta"
        )
    return tokenizer, loader, read


def run(launch: Launch, console: Console, pacer: Pacer | None = None) -> Trainer:
    """Train to the end, or until interrupted, going on from the newest checkpoint; returns the trainer.

    `pacer` finds where the end is.
    """
    from zili.data.store import TokenStore
    from zili.evaluation.during_training import EvaluationSink, HeldOutEvaluation, measure_of, seconds_of
    from zili.training.callbacks import Callback, MetricsLog, ProgressDisplay, TensorBoardLog
    from zili.training.trainer import Trainer

    _refuse_adapters_of_nothing(launch.setup.config)
    config, world = launch.setup.config, launch.setup.world
    progress = ProgressDisplay(console)
    metrics = MetricsLog(config.folder, progress.on_note)
    callbacks: list[Callback] = [metrics, progress]
    sinks: list[EvaluationSink] = [metrics, progress]
    if config.logging.tensorboard:
        board = TensorBoardLog(config.folder, progress.on_note)
        callbacks.append(board)
        sinks.append(board)
    if not world.is_first:  # one process speaks; all of them compute
        callbacks, sinks = [], []
    if pacer is not None:
        callbacks.append(pacer)
        sinks.append(pacer)
    held_out = world.agree(lambda: _open_held_out(launch))
    if held_out is not None:
        callbacks.insert(0, HeldOutEvaluation(measure_of(held_out, launch.tokenizer), sinks))
    if pacer is not None and isinstance(held_out, TokenStore):
        pacer.expect(seconds_of(held_out, launch.tokenizer))
    with _run_folder(config.folder, world, progress.on_note):
        given = (config, launch.loader, launch.setup.device, callbacks, world)
        trainer = world.agree(lambda: Trainer(*given, started=launch.started))
        if world.is_first:
            for line in launch.loader.report:
                console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        begin(trainer, held_out)
        world.from_first(lambda: _leave_a_whole_run_folder(launch))
        try:
            trainer.fit()
        finally:
            progress.close()
    return trainer


def _refuse_adapters_of_nothing(config: RunConfig) -> None:
    from zili.training.checkpoints import list_checkpoints

    begins = config.training.start_from is None and not list_checkpoints(config.folder / "checkpoints")
    if begins and config.model.lora is not None:
        error = ConfigError(
            "model.lora trains adapters beside a model, and none is named, so it would be one at random: name it with "
            "model.folder, or its weights with training.start_from"
        )
        error.agreed = True  # every process has read the same recipe
        raise error


@contextmanager
def _run_folder(folder: Path, world: World, note: Callable[[str], None]) -> Iterator[None]:
    """Keep the run's folder from other runs, and see that it is the same one for all processes of this."""
    from zili.parallel.machines import check_shared_folder

    checkpoints = folder / "checkpoints"  # it may be a mount or a link of its own
    with ExitStack() as held:
        no_locks = world.agree(lambda: held.enter_context(locked(folder)) if world.is_first else None)
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
    from zili.training.reference import set_reference

    start, resumed = trainer.config.training.start_from, trainer.resume()
    if not resumed and start is not None:
        _start_from(trainer, start)
    elif not resumed and isinstance(trainer.loader, DialogueLoader):
        seed = trainer.config.seed
        trainer.note(f"weights drawn from seed {seed}: no model is named to go on from (training.start_from)")
    distill = trainer.config.objective.distill
    if distill is not None and trainer.parallel.teacher is not None:
        _fill(trainer, trainer.parallel.teacher.parts, distill.teacher)
        trainer.note(f"teacher from {distill.teacher}")
    loaders = (trainer.loader, held_out)
    of_pairs = [loader for loader in loaders if isinstance(loader, DialogueLoader) and loader.pairs]
    if of_pairs:
        set_reference(trainer, of_pairs, resumed=resumed)


def _start_from(trainer: Trainer, folder: Path) -> None:
    _fill(trainer, trainer.parallel.parts, folder)
    trainer.note(f"weights from {folder}")


def _fill(trainer: Trainer, parts: Sequence[Decoder], folder: Path) -> None:
    """Read the weights of a model from a folder, the same for all processes."""
    from zili.parallel.machines import check_same
    from zili.release import identity, load_into
    from zili.training.checkpoints import find_checkpoint

    world = trainer.world
    check_same(world, f"files in {folder}", world.agree(lambda: identity(folder)))
    found = world.agree(lambda: find_checkpoint(folder, trainer.note, world))
    world.agree(lambda: load_into(parts, found or folder, hashed=found is not None))


def _open_held_out(launch: Launch) -> TokenStore | DialogueLoader | None:
    """Plain text, or conversations in rows.

    Raises:
        ZiliError: it is of another tokenizer, or holds pairs where none are learned from.
    """
    from zili.data.packing import DialogueLoader
    from zili.data.store import TokenStore

    config = launch.setup.config
    if config.data.held_out is None:
        return None
    store = TokenStore.open(config.data.held_out)
    store.check_tokenizer(launch.tokenizer)
    if store.learned is None:
        return store
    if store.manifest.pairs and config.preference is None:
        raise ConfigError(f"data.held_out: {store.prefix} holds pairs of answers, and no preference is learned")
    length = config.training.sequence_length
    return DialogueLoader([(store, 1.0)], sequence_length=length, global_batch=1, seed=config.seed)


def keep_length(recipe: RunConfig, config: RunConfig) -> None:
    """Write `recipe` into its run folder with the length that the run `config` has found for itself."""
    found = recipe.changed(training={"steps": config.training.steps}, schedule=config.schedule)
    write_whole(recipe.folder / RECIPE_FILE, dump_recipe(found))


def print_next(folder: Path, console: Console) -> None:
    """The commands one can go on with, as this shell takes them."""
    from zili.evaluation.report import next_commands

    for command in next_commands(folder):
        trains = command.line.startswith("zili train")
        line = command.line.replace("zili", starter() if trains else program(), 1)
        console.print(f"  {line:<46} # {command.purpose}", highlight=False, markup=False, soft_wrap=True)


def print_choices(choices: tuple[Choice, ...], console: Console) -> None:
    """Every automatic choice with its reason."""
    for choice in choices:
        console.print(f"  {choice}", highlight=False, markup=False, soft_wrap=True)


def _leave_a_whole_run_folder(launch: Launch) -> None:
    """Put recipe and tokenizer beside the checkpoints: sampling, chat and export need nothing else. Training on does:
    the recipe names its stores, and its folder, relative to where it was started."""
    folder, source = launch.recipe.folder, launch.recipe.data.tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECIPE_FILE, dump_recipe(launch.recipe))
    target = folder / "tokenizer"
    if source.resolve() == target.resolve():
        return
    target.mkdir(exist_ok=True)
    # The tokenizer's own files only: it may lie in a model folder, among terabytes of weights.
    for file in sorted({file for pattern in _TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()}):
        write_whole(target / file.name, file.read_text(encoding="utf-8"))
