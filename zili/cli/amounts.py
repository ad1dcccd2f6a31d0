"""What a recipe amounts to, told before anything is opened: parameters, tokens, and how often its data is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from zili.config import RunConfig
from zili.errors import DataError
from zili.models.arithmetic import count_parameters
from zili.plurals import counted

_MANY_EPOCHS = 4
"""Muennighoff et al. 2023 (Scaling data-constrained language models, section 5): up to four epochs of a text are nearly
as good as new text, and beyond them ever less is learned."""


class Amount(NamedTuple):
    """One line."""

    text: str
    warns: bool = False


def amounts(config: RunConfig) -> Iterator[Amount]:
    """The size of the model and of the run, then a line for each source; it says so if a store is not here."""
    training, model = config.training, count_parameters(config.model)
    a_step = training.global_batch * training.sequence_length
    active = f" ({model.active:,} a token)" if model.active != model.total else ""
    yield Amount(
        f"{config.name}: {model.total:,} parameters{active}, {counted(training.steps, 'step')} of "
        f"{counted(a_step, 'token')}, {counted(training.steps * a_step, 'token')} in all, in {config.folder}"
    )
    weights = sum(source.weight for source in config.data.sources)
    for source in config.data.sources:
        yield _read(source.store, source.weight / weights, training.steps * a_step)


def _read(store: Path, share: float, tokens: int) -> Amount:
    from zili.data.store import Manifest, store_files

    try:
        there = Manifest.read(store_files(store)[".json"]).tokens
    except DataError:
        return Amount(f"{store}: not here, so its tokens and epochs are not known")
    # Of conversations a hundredth more: rows that are not quite full.
    epochs = share * tokens / max(1, there)
    text = f"{store}: {counted(there, 'token')}, {share:.0%} of what is read, {epochs:.3g} epochs"
    if epochs <= _MANY_EPOCHS:
        return Amount(text)
    return Amount(
        f"{text}. Above {_MANY_EPOCHS} epochs a text teaches ever less when it comes again: take more text, a smaller "
        "weight, or fewer training.steps",
        warns=True,
    )
