"""Held-out bits per byte while a run trains, as a callback of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from zili.data.store import TokenStore
from zili.data.tokenizer import Tokenizer
from zili.evaluation.bits_per_byte import score_token_ids, stored_documents
from zili.training.callbacks import Callback
from zili.training.trainer import Trainer

_TOKENS_A_BATCH = 8192
"""Bounds the memory of an evaluation batch, whatever the sequence length."""


class EvaluationSink(Protocol):
    """What wants to know the figures."""

    def on_evaluation(self, step: int, values: dict[str, float]) -> None: ...


class HeldOutEvaluation(Callback):
    """Scores the same documents every `evaluation.every` steps and at the end, and tells the sinks."""

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, sinks: Sequence[EvaluationSink]) -> None:
        self._store = store
        self._tokenizer = tokenizer
        self._sinks = sinks
        self._scored_at: int | None = None

    def after_step(self, trainer: Trainer) -> None:
        every = trainer.config.evaluation.every
        if every and trainer.step % every == 0:
            self._score(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if not trainer.interrupted and self._scored_at != trainer.step:
            self._score(trainer)

    def _score(self, trainer: Trainer) -> None:
        length = trainer.config.training.sequence_length
        together = trainer.parallel.rows_together
        with trainer.uncompiled():
            score = score_token_ids(
                trainer.parallel,
                stored_documents(self._store, self._tokenizer, trainer.config.evaluation.max_bytes),
                start_token=self._tokenizer.end_id,
                sequence_length=length,
                batch_size=max(1, _TOKENS_A_BATCH // length // together) * together,
            )
        self._scored_at = trainer.step
        values = {
            "tokens": trainer.tokens,
            "bits_per_byte": score.bits_per_byte,
            "loss": score.loss_per_token,
            "documents": score.documents,
            "bytes": score.bytes,
            "seconds": score.seconds,
        }
        for sink in self._sinks:
            sink.on_evaluation(trainer.step, values)
