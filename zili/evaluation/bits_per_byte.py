"""Bits per byte: how many bits a model needs for each UTF-8 byte of text it has not seen.

The measure does not depend on the tokenizer, so models with different vocabularies, and compressors, can be
laid side by side. The convention here:

- a document's first token is predicted from the end-of-text token, which stands between documents in training
  too: the model is told that a document begins;
- the end-of-text token itself is not scored. The bytes are those of the text alone, and the compressors of
  `zili.evaluation.compressors` get the documents joined, with no mark between them either;
- every other token is scored exactly once, with at least half a window of context after the first window.

Like every figure of this kind it is an upper bound. The tokenizer's one way of cutting a text is charged for, while the
model also gives probability to other ways of spelling the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from zili.data.store import TokenStore
from zili.data.tokenizer import Tokenizer
from zili.errors import ConfigError, DataError
from zili.evaluation.windows import Window, WindowBatch, batches, pack, windows_of

if TYPE_CHECKING:
    from zili.evaluation.compressors import CompressorFigure

Progress = Callable[[int], None]
"""Called after each batch with the tokens scored so far."""

BATCHES_HELD = 16
"""Windows for this many full batches are gathered before packing: rows fill well and memory stays bounded."""
_TIMED = 2
"""Times a batch is scored to learn what one takes."""
TEXTS_ENCODED = 256
CHARACTERS_ENCODED = 1 << 20


class LossModel(Protocol):
    """What evaluation asks of a model; `zili.models` decoders and `zili.load` give it."""

    @property
    def training(self) -> bool: ...
    def eval(self) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def parameters(self) -> Iterator[Tensor]: ...
    def loss_sum(self, input_ids: Tensor, labels: Tensor, *, document_ids: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Score:
    """The outcome of an evaluation. `loss_per_token` is in nats, `seconds` includes encoding."""

    bits_per_byte: float
    loss_per_token: float
    tokens: int
    bytes: int
    documents: int
    seconds: float
    compressors: tuple[CompressorFigure, ...] = ()
    """What others need for the same text, where it was asked for."""

    def as_json(self) -> dict[str, Any]:
        """The fields, a value that is not finite as None (JSON has no NaN)."""
        figures = {key: value for key, value in asdict(self).items() if key != "compressors"}
        finite = {key: value if math.isfinite(value) else None for key, value in figures.items()}
        return {**finite, "compressors": [reference.as_json() for reference in self.compressors]}


def limit_bytes(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """The texts up to `max_bytes` UTF-8 bytes in total, the last one cut at a character's border."""
    left = math.inf if max_bytes is None else max_bytes
    for text in texts:
        if left <= 0:
            return
        raw = text.encode("utf-8")
        if len(raw) <= left:
            yield text
        else:
            yield raw[: int(left)].decode("utf-8", errors="ignore")
        left -= len(raw)


def bits_per_byte(
    model: LossModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    sequence_length: int,
    batch_size: int,
    progress: Progress | None = None,
) -> Score:
    """Score `texts`, one document each, with `model`; they are read and encoded as they are needed.

    Args:
        sequence_length: tokens in a window; the model's training length is the natural choice.
        batch_size: windows' rows in a batch.
        progress: called after each batch with the tokens scored so far.
    Raises:
        ConfigError: a length or batch size that cannot be used.
        DataError: no text at all.
    """
    return score_token_ids(
        model,
        _encoded(tokenizer, texts),
        start_token=tokenizer.start_id,
        sequence_length=sequence_length,
        batch_size=batch_size,
        progress=progress,
    )


def score_token_ids(
    model: LossModel,
    documents: Iterable[tuple[np.ndarray, int]],
    *,
    start_token: int,
    sequence_length: int,
    batch_size: int,
    progress: Progress | None = None,
) -> Score:
    """The same from documents already encoded, `(token ids [n], UTF-8 bytes)` each: for use while training.

    A trailing end-of-text token must not be among the ids. The model's training mode is restored afterwards.
    """
    if sequence_length < 2 or batch_size < 1:
        raise ConfigError(
            f"evaluation with sequence_length {sequence_length} and batch_size {batch_size}: "
            "at least 2 and 1 are needed"
        )
    began = time.perf_counter()
    tally, nats = _Tally(), 0.0
    with _evaluating(model):
        for batch in _batches(documents, start_token, sequence_length, batch_size, tally):
            nats += _loss(model, *batch)
            tally.scored += int((batch.labels >= 0).sum())
            if progress is not None:
                progress(tally.scored)
    if not tally.bytes:
        raise DataError("there is no text to evaluate: every document is empty; give files with some text")
    return Score(
        bits_per_byte=nats / math.log(2) / tally.bytes,
        loss_per_token=nats / max(tally.scored, 1),
        tokens=tally.scored,
        bytes=tally.bytes,
        documents=tally.documents,
        seconds=time.perf_counter() - began,
    )


def expected_seconds(
    model: LossModel,
    documents: Iterable[tuple[np.ndarray, int]],
    *,
    start_token: int,
    sequence_length: int,
    batch_size: int,
) -> float:
    """What `score_token_ids` of the same will take: its batches are made and counted, and the first one is scored.

    The first time takes memory and wakes threads, and does not count.
    """
    began = time.perf_counter()
    made = _batches(documents, start_token, sequence_length, batch_size, _Tally())
    first = next(made, None)
    if first is None:
        return 0.0
    count = 1 + sum(1 for _ in made)
    making = time.perf_counter() - began
    with _evaluating(model):
        _loss(model, *first)
        began = time.perf_counter()
        for _ in range(_TIMED):
            _loss(model, *first)
    return making + count * (time.perf_counter() - began) / _TIMED


def stored_documents(
    store: TokenStore, tokenizer: Tokenizer, max_bytes: int | None = None
) -> Iterator[tuple[np.ndarray, int]]:
    """Whole documents of a token store for `score_token_ids`, until they hold `max_bytes` bytes.

    The end token every stored document has is left off. A document's bytes are those its ids decode to, which
    for a tokenizer trained by Zili are exactly the text's.
    """
    total = 0
    for ids in store.iter_documents():
        if max_bytes is not None and total >= max_bytes:
            return
        size = len(tokenizer.decode(ids[:-1]).encode("utf-8"))
        total += size
        yield ids[:-1], size


@dataclass
class _Tally:
    scored: int = 0
    bytes: int = 0
    documents: int = 0


@contextmanager
def _evaluating(model: LossModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batches(
    documents: Iterable[tuple[np.ndarray, int]], start: int, length: int, batch_size: int, tally: _Tally
) -> Iterator[WindowBatch]:
    for held in _held(documents, start, length, batch_size, tally):
        yield from batches(pack(held, length), length, batch_size, start)


def _held(
    documents: Iterable[tuple[np.ndarray, int]], start: int, length: int, batch_size: int, tally: _Tally
) -> Iterator[list[Window]]:
    """Lists of windows, each about `BATCHES_HELD` batches large; counts documents and bytes as they pass."""
    held: list[Window] = []
    tokens = 0
    for ids, size in documents:
        if not size:
            continue
        tally.documents += 1
        tally.bytes += size
        for window in windows_of(ids, start, length):
            held.append(window)
            tokens += len(window.inputs)
            if tokens >= BATCHES_HELD * batch_size * length:
                yield held
                held, tokens = [], 0
    if held:
        yield held


# no_grad rather than inference_mode: tensors made under the latter cannot enter sharded or compiled
# training code.
@torch.no_grad()
def _loss(model: LossModel, input_ids: Tensor, labels: Tensor, document_ids: Tensor) -> float:
    device = next(model.parameters()).device
    loss = model.loss_sum(input_ids.to(device), labels.to(device), document_ids=document_ids.to(device))
    return float(loss)


def _encoded(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[np.ndarray, int]]:
    """`(ids, UTF-8 bytes)` of each text, encoded some hundred at a time."""
    waiting: list[str] = []
    characters = 0
    for text in texts:
        waiting.append(text)
        characters += len(text)
        if len(waiting) >= TEXTS_ENCODED or characters >= CHARACTERS_ENCODED:
            yield from _encode(tokenizer, waiting)
            waiting, characters = [], 0
    yield from _encode(tokenizer, waiting)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[tuple[np.ndarray, int]]:
    if texts:
        for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
            yield np.asarray(ids), len(text.encode("utf-8"))
