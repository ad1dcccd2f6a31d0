"""From a recipe to a run that can start: its chip, the automatic choices, tokenizer and data, checked against each
other."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zili.config import Choice, RunConfig
from zili.errors import ConfigError, DataError
from zili.parallel.layout import processes
from zili.plurals import counted

if TYPE_CHECKING:
    from zili.data.loader import Batches
    from zili.data.packing import DialogueLoader
    from zili.data.store import TokenStore
    from zili.data.tokenizer import Tokenizer
    from zili.models.decoder import Decoder
    from zili.objectives.objective import Objective
    from zili.parallel.world import World
    from zili.training.callbacks import Callback
    from zili.training.setup import Setup
    from zili.training.trainer import Trainer


_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedRun:
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
        """Every automatic choice with its reason."""
        return self.setup.choices

    def trainer(
        self,
        callbacks: Sequence[Callback] = (),
        objective: Objective | None = None,
        model: type[Decoder] | None = None,
    ) -> Trainer:
        """The trainer before its first step, its weights drawn from the seed.

        Args:
            callbacks: of this process.
            objective: what is learned, in place of what the recipe says.
            model: the kind of decoder, in place of `zili.models.decoder.Decoder`.
        """
        from zili.models.decoder import Decoder
        from zili.training.trainer import Trainer

        setup, kind = self.setup, model or Decoder
        given = (setup.config, self.loader, setup.device, callbacks, setup.world)
        return Trainer(*given, started=self.started, objective=objective, decoder=kind)


def open_run(recipe: RunConfig) -> OpenedRun:
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
    world.agree(lambda: _check_brought(config))
    tokenizer, loader, stores = world.agree(lambda: _open_data(config))
    for store in stores:
        _LOG.debug("opened %s: %d documents", store.prefix, len(store))
    check_same(world, "token stores", " ".join(store.identity() for store in stores))
    if config.data.verify:
        _verify(stores, world)
    return OpenedRun(recipe, setup, tokenizer, loader, started)


def _check_brought(config: RunConfig) -> None:
    """What packages bring, which may be imported now."""
    from zili.objectives import objective_of
    from zili.training.callbacks.named import check_callbacks

    check_callbacks(config, imports=True)
    objective_of(config)


def open_trainer(recipe: RunConfig, loader: Batches | None = None) -> Trainer:
    """The trainer of `recipe` before its first step; it reads `loader` in place of the recipe's data, if given."""
    if loader is None:
        return open_run(recipe).trainer()
    from zili.training.setup import set_up

    setup = set_up(recipe)
    from zili.training.trainer import Trainer

    return Trainer(setup.config, loader, setup.device, world=setup.world)


def _verify(stores: list[TokenStore], world: World) -> None:
    """Read the stores through, once a machine, as each may have copies of its own: its processes share the work."""
    from zili.data.store import verify_stores

    _, _, here = processes()
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world.agree(lambda: verify_stores(stores, here, beside), patience=None)


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
    _refuse_other_words(recipe, tokenizer)
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


def _refuse_other_words(recipe: RunConfig, tokenizer: Tokenizer) -> None:
    """A teacher whose ids mean other text would teach nonsense. Of one without a tokenizer nothing is known."""
    distill = recipe.objective.distill
    if distill is None:
        return
    from zili.serving.model_folder import find_tokenizer

    try:
        found, place = find_tokenizer(distill.teacher)
    except DataError:
        return
    theirs, added = found.tokens(), tokenizer.added_tokens
    others = sum(theirs.get(text) != number for text, number in tokenizer.tokens().items() if text not in added)
    if others:
        raise ConfigError(
            f"objective.distill.teacher: {place} is another tokenizer than {recipe.data.tokenizer} (data.tokenizer): "
            f"{counted(others, 'token')} of {tokenizer.vocab_size:,} have another id there or none; "
            "name a teacher with the tokenizer of the data, or prepare the data with the teacher's"
        )


def open_held_out(opened: OpenedRun) -> TokenStore | DialogueLoader | None:
    """Plain text, or conversations in rows; None: the recipe names none.

    Raises:
        ZiliError: it is of another tokenizer, or holds pairs where none are learned from.
    """
    from zili.data.packing import DialogueLoader
    from zili.data.store import TokenStore

    config = opened.setup.config
    if config.data.held_out is None:
        return None
    store = TokenStore.open(config.data.held_out)
    store.check_tokenizer(opened.tokenizer)
    if store.learned is None:
        return store
    if store.manifest.pairs and config.preference is None:
        raise ConfigError(f"data.held_out: {store.prefix} holds pairs of answers, and no preference is learned")
    length = config.training.sequence_length
    return DialogueLoader([(store, 1.0)], sequence_length=length, global_batch=1, seed=config.seed)
