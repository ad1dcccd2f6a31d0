"""Held-out figures while a run trains, as a callback of the trainer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from zili.data.packing import DialogueLoader
from zili.data.store import TokenStore
from zili.data.tokenizer import Tokenizer
from zili.evaluation.bits_per_byte import expected_seconds, score_token_ids, stored_documents
from zili.objectives.next_token import NextToken
from zili.parallel.control.crumbs import own_crumbs
from zili.training.callbacks import Callback
from zili.training.trainer import Trainer

_TOKENS_A_BATCH = 8192
"""Bounds the memory of an evaluation batch, whatever the sequence length."""
T = TypeVar("T")
Measure = Callable[[Trainer], dict[str, float]]
"""Figures of the model as it is now."""


class HeldOutEvaluation(Callback):
    """Scores the same documents every `evaluation.every` steps and at the end, and tells all callbacks."""

    everywhere = True

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self._scored_at: int | None = None

    def after_step(self, trainer: Trainer) -> None:
        every = trainer.config.evaluation.every
        if every and trainer.step % every == 0:
            self._score(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if not trainer.interrupted and self._scored_at != trainer.step:
            self._score(trainer)

    def _score(self, trainer: Trainer) -> None:
        started = time.perf_counter()
        with trainer.uncompiled(), own_crumbs().within("evaluate"):
            values = self._measure(trainer)
        self._scored_at = trainer.step
        values |= {"tokens": trainer.tokens, "seconds": time.perf_counter() - started}
        for callback in trainer.callbacks:
            callback.on_evaluation(trainer.step, values)


def measure_of(held_out: TokenStore | DialogueLoader, tokenizer: Tokenizer) -> Measure:
    """What is measured on plain text, or on conversations."""
    if isinstance(held_out, DialogueLoader):
        return _of_dialogues(held_out, tokenizer)
    return _of_text(held_out, tokenizer)


def seconds_of(store: TokenStore, tokenizer: Tokenizer) -> Callable[[Trainer], float]:
    """What one measurement of plain text takes on the machine as it is now; training does not notice."""

    def expect(trainer: Trainer) -> float:
        with trainer.uncompiled():
            return _on_text(expected_seconds, trainer, store, tokenizer)

    return expect


def _on_text(figure: Callable[..., T], trainer: Trainer, store: TokenStore, tokenizer: Tokenizer) -> T:
    length = trainer.config.training.sequence_length
    return figure(
        trainer.parallel,
        stored_documents(store, tokenizer, trainer.config.evaluation.max_bytes),
        start_token=tokenizer.start_id,
        sequence_length=length,
        batch_size=_rows_at_once(trainer, length),
    )


def _of_text(store: TokenStore, tokenizer: Tokenizer) -> Measure:
    """Bits per byte of plain text."""

    def measure(trainer: Trainer) -> dict[str, float]:
        score = _on_text(score_token_ids, trainer, store, tokenizer)
        return {
            "bits_per_byte": score.bits_per_byte,
            "loss": score.loss_per_token,
            "documents": score.documents,
            "bytes": score.bytes,
        }

    return measure


def _of_dialogues(loader: DialogueLoader, tokenizer: Tokenizer) -> Measure:
    """Loss of what the assistant says, nats a token; of pairs, loss and rewards as training has them."""
    ((store, _),) = loader.sources

    def measure(trainer: Trainer) -> dict[str, float]:
        parallel, left = trainer.parallel, trainer.config.evaluation.max_bytes
        objective = parallel.objective if loader.pairs else NextToken()
        sums, count, scored, size = Counter[str](), 0.0, 0, 0
        parallel.eval()
        for batch, rows in loader.every_row(0, _rows_at_once(trainer, loader.sequence_length)):
            documents = [document for row in rows for document in row]
            size += sum(len(tokenizer.decode(store.document(document)).encode()) for document in documents)
            scored += len(documents)
            terms = parallel.evaluate(batch, objective)
            sums.update({name: float(total) for name, total in {"loss": terms.loss, **terms.figures}.items()})
            count += float(terms.count)
            if size >= left:
                break
        parallel.train()
        means = {name: total / max(count, 1) for name, total in sums.items()}
        return {**means, "documents": scored, "bytes": size}

    return measure


def _rows_at_once(trainer: Trainer, length: int) -> int:
    together = trainer.parallel.rows_together
    return max(1, _TOKENS_A_BATCH // length // together) * together
