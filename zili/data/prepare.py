"""From text to everything a run reads: tokenizer, token stores, and the held-out text, in one folder."""

from __future__ import annotations

import heapq
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from zili.data.building import BuildReport, build_store
from zili.data.encoding import Engine
from zili.data.reading import Document, OnError, read_documents
from zili.data.sources import Census, Source, fingerprint, standard_library_files
from zili.data.split import Split, content_key, cut
from zili.data.spool import Spool
from zili.data.store import TokenStore
from zili.data.tokenizer import Tokenizer
from zili.durable import sync, sync_tree
from zili.errors import DataError
from zili.plurals import counted

_MARK = "prepared.json"  # written last: a folder without it is not whole
_SPOOL = "spool"  # the documents as they were read, until they are encoded
_SCHEME = 1  # raise when the same settings come to give other files
_FEW = 20  # documents below which text is cut into pieces, so that some can be held out
_PIECE = (500, 20_000)  # characters: bounds of a piece
_EXCERPT = 1_000_000  # characters of one document the tokenizer may learn from

Progress = Callable[[str, int, int | None], None]
"""Called with the stage (`read`, `tokenizer`, `encode`), bytes of text done, and bytes in all when known."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a prepared folder depends on; equal settings need no second preparation."""

    sources: str
    """`sources.fingerprint` of the text."""
    tokenizer: str
    """sha256 of a tokenizer given, or the size and sample asked of one to be trained."""
    held_out_fraction: float
    text_field: str
    on_error: str
    scheme: int = _SCHEME


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared folder, opened."""

    folder: Path
    tokenizer: Tokenizer
    train: TokenStore
    held_out: TokenStore
    held_out_text: Path
    """JSON lines with `text`: the held-out documents raw, for bits per byte and reference compressors."""
    reused: bool
    lines: list[str]
    """What was done and why, one line each, for the user."""

    @property
    def table(self) -> dict[str, Any]:
        """The `[data]` table of a recipe that reads it."""
        return data_table(self.folder)


def data_table(folder: Path) -> dict[str, Any]:
    """The `[data]` table of a recipe that reads what `prepare` leaves in `folder`."""
    return {
        "sources": [{"store": str(folder / "train")}],
        "tokenizer": str(folder / "tokenizer"),
        "held_out": str(folder / "held_out"),
    }


@dataclass
class _Plan:
    """What the first reading learned: how to cut and split, and text for the tokenizer."""

    census: Census = field(default_factory=Census)
    documents: int = 0
    piece: int | None = None
    """Characters of a piece when documents are few."""
    split: Split | None = None
    sample: list[str] = field(default_factory=list)


def prepare(
    paths: Sequence[Source] | None,
    folder: str | Path,
    *,
    vocab_size: int = 8192,
    held_out_fraction: float = 0.05,
    tokenizer: Tokenizer | None = None,
    tokenizer_bytes: int = 10_000_000,
    text_field: str = "text",
    on_error: OnError = "raise",
    engine: Engine = "auto",
    rebuild: bool = True,
    progress: Progress | None = None,
) -> Prepared:
    """Read text, hold documents out, train a tokenizer on the rest, encode both sides into `folder`.

    Left there: `tokenizer/`, `train.*` and `held_out.*` (token stores), `held_out.jsonl`, `prepared.json`.
    The folder appears whole: it is built beside itself as `<folder>.partial` and renamed. A folder already
    made of the same text with the same settings is opened again; otherwise it is rebuilt, and a line says
    why.

    Args:
        paths: files and folders; None takes the running Python's standard library.
        vocab_size: tokens of the tokenizer trained here; unused when `tokenizer` is given.
        held_out_fraction: share of the documents, chosen by content (`split.Split`).
        tokenizer_bytes: text the tokenizer learns from, spread over all training documents.
        text_field: see `read_documents`.
        on_error: see `read_documents`.
        engine: see `choose_encoder`.
        rebuild: False refuses to replace a folder made of other text or with other settings; a damaged one is
            rebuilt all the same, to what it was.
    Raises:
        DataError: text that cannot be read, too little of it, or a `folder` that holds something else.
    """
    folder = Path(folder)
    if paths is None:
        paths, on_error = standard_library_files(), "skip"
    asked = tokenizer.sha256 if tokenizer else f"{vocab_size} tokens from {tokenizer_bytes} bytes"
    # Of a folder that is there the text is compared first; else the one reading below tells what it was.
    sources = fingerprint(paths) if _is_there(folder) else ""
    settings = Settings(sources, asked, held_out_fraction, text_field, on_error)
    why = _stale(folder, settings)
    if why is None:
        return _open(folder, reused=True, lines=[f"data: {folder} holds this text already; reused"])
    if not rebuild:
        _keep_what_was_learned(folder, settings)
    job = _Preparation(paths, settings, engine, progress or (lambda stage, done, total: None))
    lines = _made(folder, lambda aside: job.run(aside, tokenizer, vocab_size, tokenizer_bytes))
    return _open(folder, reused=False, lines=[why, *lines])


def _keep_what_was_learned(folder: Path, settings: Settings) -> None:
    """Raises: DataError, the folder is whole and of other text or settings, and so must not be replaced."""
    if (folder / _MARK).is_file() and (changed := _changed(folder, settings)):
        raise DataError(
            f"{folder} holds other data ({', '.join(changed)} changed), and a run has learned from it. Give the same "
            "text and settings to go on with that run, another folder for another run, or --restart to drop it."
        )


def _made(folder: Path, fill: Callable[[Path], list[str]]) -> list[str]:
    """Build `folder` beside itself by `fill`, whose lines are returned, and put it in its place."""
    aside = folder.with_name(folder.name + ".partial")
    new = [parent for parent in aside.parents if not parent.exists()]
    shutil.rmtree(aside, ignore_errors=True)  # of a preparation that was killed
    try:
        aside.mkdir(parents=True)
        lines = fill(aside)
        sync_tree(aside)
        _swap(aside, folder)
    except OSError as error:
        raise DataError(f"{error.filename or aside}: {error.strerror}. Nothing was kept; run again.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # the folder is in them
            for parent in new:
                parent.rmdir()
    return lines


def _is_there(folder: Path) -> bool:
    """Whether there is more than an empty folder."""
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _stale(folder: Path, settings: Settings) -> str | None:
    """Why `folder` must be built, or None when it can be used as it is."""
    if not _is_there(folder):
        return f"data: building {folder}"
    mark = folder / _MARK
    if not mark.is_file():
        raise DataError(f"{folder}: exists and was not made by zili. Give another folder, or remove it.")
    try:
        changed = _changed(folder, settings)
        if not changed:
            _open(folder, reused=True, lines=[])
            return None
    except (ValueError, AttributeError):
        return f"data: building {folder} again: {mark} is damaged"
    except DataError as error:
        return f"data: building {folder} again: {error}"
    return f"data: building {folder} again: changed since the last time: {', '.join(changed)}"


def _changed(folder: Path, settings: Settings) -> list[str]:
    """Names of the settings that differ from those in the folder's mark; ValueError where that is not JSON."""
    before = json.loads((folder / _MARK).read_text(encoding="utf-8"))
    return [name for name, value in asdict(settings).items() if before.get(name) != value]


def _open(folder: Path, *, reused: bool, lines: list[str]) -> Prepared:
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    train, held_out = TokenStore.open(folder / "train"), TokenStore.open(folder / "held_out")
    train.check_tokenizer(tokenizer)
    held_out.check_tokenizer(tokenizer)
    text = folder / "held_out.jsonl"
    if not text.is_file():
        raise DataError(f"{text}: missing. Remove {folder} and prepare again.")
    return Prepared(folder, tokenizer, train, held_out, text, reused, lines)


def _swap(aside: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


class _Preparation:
    """One reading of a text, to learn what it is, and another look at what was read, to encode it."""

    def __init__(self, paths: Sequence[Source], settings: Settings, engine: Engine, progress: Progress) -> None:
        self._paths = paths
        self._settings = settings
        self._engine: Engine = engine
        self._progress = progress

    def run(self, folder: Path, tokenizer: Tokenizer | None, vocab_size: int, sample_bytes: int) -> list[str]:
        """Fill `folder`; returns the report's lines."""
        spool = Spool(folder / _SPOOL)
        plan = self._scan(spool, sample_bytes)
        lines = _describe(plan)
        if tokenizer is None:
            tokenizer, line = self._train_tokenizer(plan, vocab_size)
            lines.append(line)
        tokenizer.save(folder / "tokenizer")
        train, held_out = self._build(folder, spool, plan, tokenizer)
        spool.remove()
        settings = replace(self._settings, sources=plan.census.fingerprint())
        (folder / _MARK).write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")
        return [*lines, train.encoder, f"train: {train}", f"held out: {held_out}"]

    def _scan(self, spool: Spool, sample_bytes: int) -> _Plan:
        plan = _Plan()
        documents = read_documents(
            self._paths,
            text_field=self._settings.text_field,
            on_error=self._settings.on_error,  # type: ignore[arg-type]
            census=plan.census,
        )
        plan = self._learn(plan, spool.keeping(documents), sample_bytes)
        if plan.documents < _FEW:
            low, high = _PIECE
            plan = _Plan(plan.census, piece=min(high, max(low, plan.census.text_bytes // 200)))
            plan = self._learn(plan, _pieces(spool, plan), sample_bytes)
        if not plan.sample:
            raise DataError(
                f"{plan.census.text_bytes} bytes of text in {plan.documents} documents leave none to train "
                f"on once {self._settings.held_out_fraction:.0%} is held out. Give more text."
            )
        return plan

    def _learn(self, plan: _Plan, documents: Iterable[Document], sample_bytes: int) -> _Plan:
        fraction = self._settings.held_out_fraction
        threshold, smallest = Split.of(fraction).threshold, None
        kept = _Sample(sample_bytes)
        for document in documents:
            key = content_key(document.text)
            smallest = key if smallest is None else min(smallest, key)
            plan.documents += 1
            if key >= threshold:
                kept.offer(key, document.text[:_EXCERPT])
            self._progress("read", plan.census.text_bytes, None)
        assert smallest is not None  # read_documents refuses to find nothing
        plan.split = Split.of(fraction, smallest)
        plan.sample = kept.texts(plan.split.threshold)
        return plan

    def _train_tokenizer(self, plan: _Plan, vocab_size: int) -> tuple[Tokenizer, str]:
        size = sum(len(text.encode()) for text in plan.sample)
        self._progress("tokenizer", 0, size)
        started = time.perf_counter()
        tokenizer = Tokenizer.train(plan.sample, vocab_size)
        seconds = time.perf_counter() - started
        self._progress("tokenizer", size, size)
        got = f"{tokenizer.vocab_size:,} tokens"
        if tokenizer.vocab_size < vocab_size:
            got += f" ({vocab_size:,} asked, the text has no more)"
        return tokenizer, f"tokenizer: {got}, learned from {size / 1e6:.3g} MB in {seconds:.1f} s"

    def _build(self, folder: Path, spool: Spool, plan: _Plan, tokenizer: Tokenizer) -> tuple[BuildReport, BuildReport]:
        split, total, text = plan.split, plan.census.text_bytes, folder / "held_out.jsonl"
        assert split is not None
        with text.open("w", encoding="utf-8", newline="\n") as stream:
            train = build_store(
                _divert(_pieces(spool, plan), split, stream),
                tokenizer,
                folder / "train",
                census=plan.census,
                split=f"not those {split.rule}",
                engine=self._engine,
                progress=lambda done: self._progress("encode", done, total),
            )
        held_out = build_store(
            read_documents([text]),
            tokenizer,
            folder / "held_out",
            census=plan.census,
            split=split.rule,
            engine=self._engine,
        )
        self._progress("encode", total, total)
        return train, held_out


def _pieces(documents: Iterable[Document], plan: _Plan) -> Iterator[Document]:
    """The documents, cut where the plan cuts them."""
    for document in documents:
        for piece in (document.text,) if plan.piece is None else cut(document.text, plan.piece):
            if piece.strip():
                yield Document(piece, document.source)


def _divert(documents: Iterator[Document], split: Split, stream: TextIO) -> Iterator[Document]:
    """The documents to train on; those held out go to `stream` as JSON lines."""
    for document in documents:
        if split.holds_out(document.text):
            stream.write(document.to_json() + "\n")
        else:
            yield document


def _describe(plan: _Plan) -> list[str]:
    census = plan.census
    lines = [
        f"text: {counted(census.documents, 'document')}, {census.text_bytes / 1e6:.3g} MB "
        f"in {counted(len(census.files), 'file')}; left out: {census.left_out}"
    ]
    if plan.piece is not None:
        lines.append(
            f"text: fewer than {_FEW} documents, so cut into {counted(plan.documents, 'piece')} at blank lines "
            f"(about {plan.piece:,} characters each), to hold some out"
        )
    return lines


class _Sample:
    """The documents with the smallest keys, up to a number of bytes: a sample that no order changes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._heap: list[tuple[int, str]] = []  # of negated keys: the largest key goes first

    def offer(self, key: int, text: str) -> None:
        heapq.heappush(self._heap, (-key, text))
        self._bytes += len(text.encode())
        while len(self._heap) > 2 and self._bytes > self._limit:
            self._bytes -= len(heapq.heappop(self._heap)[1].encode())

    def texts(self, threshold: int) -> list[str]:
        """Those with keys of at least `threshold`, in the order of their keys."""
        return [text for key, text in sorted(self._heap, reverse=True) if -key >= threshold]
