"""From documents to a token store that appears whole or not at all."""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

import zili
from zili.data.encoding import Encoded, Encoder, Engine, audit, choose_encoder
from zili.data.indexed import LONGEST, token_type, write_index
from zili.data.reading import Document
from zili.data.sources import Census, measure
from zili.data.store import MASK, Manifest, store_files
from zili.data.tokenizer import Tokenizer
from zili.durable import sync
from zili.errors import DataError
from zili.plurals import counted

_BATCH_BYTES = 8 << 20  # of text encoded at once: enough to keep all cores busy, little to hold


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did, end to end: reading, encoding, hashing and writing."""

    documents: int
    text_bytes: int
    tokens: int
    seconds: float
    encoder: str

    @property
    def mb_per_second(self) -> float:
        """Megabytes (10^6 bytes) of text a second."""
        return self.text_bytes / 1e6 / self.seconds

    def __str__(self) -> str:
        return (
            f"{counted(self.documents, 'document')}, {self.text_bytes / 1e6:.3g} MB of text, "
            f"{counted(self.tokens, 'token')} "
            f"({self.text_bytes / self.tokens:.2f} bytes each) in {self.seconds:.1f} s, "
            f"{self.mb_per_second:.1f} MB/s"
        )


def build_store(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    prefix: str | Path,
    *,
    census: Census | None = None,
    split: str = "all documents",
    engine: Engine = "auto",
    progress: Callable[[int], None] | None = None,
) -> BuildReport:
    """Encode `documents`, each ended by the tokenizer's end id, into `prefix.bin`, `.idx` and `.json`.

    Streams: held in memory are 8 MB of text, its ids, and four bytes a document. The order is kept; the
    loader shuffles. An existing store at `prefix` is replaced at the end; a failure leaves nothing behind.

    Args:
        census: the reading that feeds `documents`; its files go into the manifest as sources.
        split: the rule that chose these documents, for the manifest.
        engine: see `choose_encoder`.
        progress: called with the bytes of text encoded so far.
    Raises:
        DataError: no documents, one longer than the format allows, or a disk that is full.
    """
    started = time.perf_counter()
    encoder: Encoder | None = None
    text_bytes = 0
    with StoreWriter(Path(prefix), tokenizer) as writer:
        for texts, size in _batches(documents):
            encoder = encoder or choose_encoder(tokenizer, texts, engine)
            writer.add(encoder.encode(texts))
            audit(encoder, tokenizer, texts)
            text_bytes += size
            if progress is not None:
                progress(text_bytes)
        if encoder is None:
            raise DataError(f"{prefix}: no documents to build a store of. Give text that can be read.")
        writer.finish(text_bytes, census or Census(), split)
    seconds = time.perf_counter() - started
    return BuildReport(len(writer.lengths), text_bytes, writer.tokens, seconds, str(encoder))


def _batches(documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text.encode())
        if size >= _BATCH_BYTES:
            yield texts, size
            texts, size = [], 0
    if texts:
        yield texts, size


class StoreWriter:
    """Writes a store's files aside, then renames them; leaving the block early removes what was written."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer, *, masked: bool = False) -> None:
        """`masked`: with a `.mask`, which tokens are learned."""
        self._tokenizer = tokenizer
        self._final = store_files(prefix) | ({MASK: Path(f"{prefix}{MASK}")} if masked else {})
        self._aside = {suffix: Path(f"{path}.partial") for suffix, path in self._final.items()}
        self._dtype = token_type(tokenizer.vocab_size)
        self._streams: dict[str, BinaryIO] = {}
        self._digests = {suffix: hashlib.sha256() for suffix in (".bin", *((MASK,) if masked else ()))}
        self.lengths = array("i")
        self.tokens = 0
        self._new = False

    def __enter__(self) -> StoreWriter:
        self._new = not self._final[".bin"].parent.exists()
        try:
            self._final[".bin"].parent.mkdir(parents=True, exist_ok=True)
            self._streams = {suffix: self._aside[suffix].open("wb") for suffix in self._digests}
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be written ({error.strerror}).") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for stream in self._streams.values():
            stream.close()
        for path in self._aside.values():
            path.unlink(missing_ok=True)
        if error is not None and self._new:
            with suppress(OSError):  # something else is in it by now
                self._final[".bin"].parent.rmdir()
        if isinstance(error, OSError):
            place = error.filename or self._final[".bin"]
            raise DataError(f"{place}: {error.strerror}. The store was not built.") from error

    def add(self, encoded: Encoded) -> None:
        """Append documents, an end id after each."""
        ids, lengths = encoded
        if lengths.max(initial=0) >= LONGEST:
            raise DataError(f"a document of {lengths.max()} tokens; the format ends at {LONGEST}. Cut it.")
        ended = np.insert(ids, np.cumsum(lengths), self._tokenizer.end_id)
        self._write(".bin", ended.astype(self._dtype).tobytes())
        self.lengths.frombytes((lengths + 1).astype(np.intc).tobytes())
        self.tokens += len(ended)

    def add_masked(self, ids: list[int], learned: list[bool]) -> None:
        """Append one document as it is, and which of its tokens are learned."""
        self._write(".bin", np.array(ids, dtype=self._dtype).tobytes())
        self._write(MASK, np.array(learned, dtype=np.uint8).tobytes())
        self.lengths.append(len(ids))
        self.tokens += len(ids)

    def _write(self, suffix: str, raw: bytes) -> None:
        self._digests[suffix].update(raw)
        self._streams[suffix].write(raw)

    def finish(self, text_bytes: int, census: Census, split: str, *, pairs: bool = False) -> None:
        """Make everything durable, then let it appear, the manifest last."""
        for stream in self._streams.values():
            stream.flush()
        with self._aside[".idx"].open("wb") as stream:
            write_index(stream, self._dtype, self.lengths)
        index_bytes, index_sha256 = measure(self._aside[".idx"])
        files = {
            suffix: {"bytes": self._aside[suffix].stat().st_size, "sha256": digest.hexdigest()}
            for suffix, digest in self._digests.items()
        }
        files[".idx"] = {"bytes": index_bytes, "sha256": index_sha256}
        manifest = Manifest(
            tokenizer_sha256=self._tokenizer.sha256,
            vocab_size=self._tokenizer.vocab_size,
            end_id=self._tokenizer.end_id,
            documents=len(self.lengths),
            tokens=self.tokens,
            text_bytes=text_bytes,
            split=split,
            files=files,
            sources=tuple(census.files),
            left_out=dict(census.skipped),
            zili_version=zili.__version__,
            pairs=pairs,
        )
        self._aside[".json"].write_text(manifest.to_json(), encoding="utf-8", newline="\n")
        self._appear()

    def _appear(self) -> None:
        # A store without manifest counts as absent. So the old manifest goes first and the new one comes
        # last: whenever the power fails, what can be opened is one whole store.
        for path in self._aside.values():
            sync(path)
        self._final[".json"].unlink(missing_ok=True)
        for suffix in (*self._digests, ".idx", ".json"):
            self._aside[suffix].replace(self._final[suffix])
        sync(self._final[".json"].parent)
