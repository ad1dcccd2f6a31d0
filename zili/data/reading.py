"""From files to documents: plain text, JSON lines and parquet, all UTF-8, with the place of every flaw."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import TYPE_CHECKING, Any, Literal

from zili.data.sources import (
    LINE_SUFFIXES,
    READABLE,
    TABLE_SUFFIXES,
    Census,
    FileRecord,
    Source,
    SourceFile,
    list_files,
    measure,
)
from zili.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

OnError = Literal["raise", "skip"]
_WAY_OUT = "Repair it, or leave such input out, counted, with --on-error skip."


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text and where it came from: `folder/file.md`, or `corpus.jsonl:17` for line or row 17."""

    text: str
    source: str

    def to_json(self) -> str:
        """As a JSON line that `read_documents` reads, without its line end."""
        return json.dumps({"text": self.text, "source": self.source}, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Flaw:
    """A document that cannot be read. Readers yield it, since a generator that raises cannot go on."""

    reason: str
    message: str


def read_documents(
    paths: Iterable[Source],
    *,
    text_field: str = "text",
    on_error: OnError = "raise",
    census: Census | None = None,
) -> Iterator[Document]:
    """Every document under `paths`, in a fixed order, with memory bounded by the largest one.

    Args:
        paths: files and folders (`sources.list_files` says in what order and what is left out).
        text_field: key of a JSON line, or column of a parquet file, that holds the text.
        on_error: `raise` stops at the first flaw; `skip` counts it in `census.skipped` and goes on.
        census: filled while reading, complete at the end.

    A text file is one document; a JSON line or parquet row is one; those without text are counted as empty.
    Raises `DataError` with file, line or byte, and the way out; also when nothing readable was found at all.
    """
    paths = list(paths)
    census = Census(hashes=False) if census is None else census
    for file in list_files(paths, census):
        size, sha256 = measure(file.path) if census.hashes else (file.path.stat().st_size, "")
        before = census.documents
        for item in _reader(file)(file, text_field):
            if isinstance(item, Flaw):
                refuse_or_count(item, file, on_error, census)
            else:
                census.documents += 1
                census.text_bytes += len(item.text.encode())
                yield item
        census.files.append(FileRecord(file.name, size, sha256, census.documents - before))
    if not census.documents:
        given = ", ".join(str(path.path if isinstance(path, SourceFile) else path) for path in paths[:3])
        raise DataError(
            f"no readable text in {given or 'an empty list of paths'}: left out {census.left_out}. "
            f"Give files or folders with {READABLE}."
        )


def refuse_or_count(flaw: Flaw, file: SourceFile, on_error: OnError, census: Census) -> None:
    """Raise `DataError` for a flaw, or count it as left out."""
    harmless = flaw.reason == "empty" or (flaw.reason == "binary" and not file.explicit)
    if on_error == "raise" and not harmless:
        raise DataError(f"{flaw.message} {_WAY_OUT}")
    census.skipped[flaw.reason] += 1


Reader = Callable[[SourceFile, str], Iterator[Document | Flaw]]


def _reader(file: SourceFile) -> Reader:
    name = file.path.name.lower()
    if name.endswith(LINE_SUFFIXES):
        return _read_lines
    if name.endswith(TABLE_SUFFIXES):
        return _read_table
    if name.endswith(".json"):
        raise DataError(f"{file.path}: .json is not read. Write one object a line into a .jsonl file.")
    return _read_text


def _read_text(file: SourceFile, text_field: str) -> Iterator[Document | Flaw]:
    raw = file.path.read_bytes()
    if b"\0" in raw[:8192]:
        yield Flaw("binary", f"{file.path}: holds zero bytes, so it is binary or UTF-16; UTF-8 is read.")
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Flaw("broken UTF-8", f"{file.path}: line {line}, byte {error.start}: broken UTF-8.")
        return
    yield Document(text, file.name) if text.strip() else Flaw("empty", "")


def _read_lines(file: SourceFile, text_field: str) -> Iterator[Document | Flaw]:
    for number, record in line_records(file):
        if isinstance(record, Flaw):
            yield record
        elif text_field not in record:
            yield Flaw("without the field", f"{file.path}: line {number}: {_no_field(text_field, list(record))}")
        else:
            yield _document(record[text_field], text_field, f"{file.path}: line {number}", f"{file.name}:{number}")


def line_records(file: SourceFile) -> Iterator[tuple[int, dict[str, Any] | Flaw]]:
    """Number of each line of a file of JSON lines, compressed or not, and the object on it; blank lines are passed."""
    import pyarrow as pa  # where text is read, and not where a model is trained without any

    number = 0
    try:
        # Arrow's decompressor: python-zstandard and a bare zlib object take a cut-off stream for a whole one.
        with pa.input_stream(str(file.path), compression="detect") as stream:
            for number, line in enumerate(BufferedReader(stream, 1 << 20), start=1):
                if line.strip():
                    yield number, _parse_line(f"{file.path}: line {number}", number, line)
    except (OSError, pa.ArrowException) as error:
        place = f"{file.path}: after line {number}"
        yield number, Flaw("damaged file", f"{place}: cannot be read further ({error}).")


def _parse_line(place: str, number: int, line: bytes) -> dict[str, Any] | Flaw:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Flaw("broken UTF-8", f"{place}, byte {error.start} of the line: broken UTF-8.")
    except json.JSONDecodeError as error:
        return Flaw("broken JSON", f"{place}, column {error.colno}: broken JSON ({error.msg}).")
    except RecursionError:
        return Flaw("broken JSON", f"{place}: JSON nested too deep.")
    if not isinstance(record, dict):
        return Flaw("broken JSON", f"{place}: {type(record).__name__} where an object was expected.")
    return record


def _read_table(file: SourceFile, text_field: str) -> Iterator[Document | Flaw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(file.path) as table:
            if text_field not in table.schema_arrow.names:
                message = f"{file.path}: {_no_field(text_field, table.schema_arrow.names)}"
                yield Flaw("without the field", message)
                return
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for row, value in enumerate(batch.column(0), start=row + 1):  # noqa: B020
                    yield _parse_value(file, row, value, text_field)
    except (OSError, pa.ArrowException) as error:
        yield Flaw("damaged file", f"{file.path}: after row {row}: cannot be read further ({error}).")


def _parse_value(file: SourceFile, row: int, value: pa.Scalar, text_field: str) -> Document | Flaw:
    place = f"{file.path}: row {row}"
    try:
        text = value.as_py()
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        return Flaw("broken UTF-8", f"{place}, byte {error.start} of the text: broken UTF-8.")
    return _document(text, text_field, place, f"{file.name}:{row}")


def _document(text: object, text_field: str, place: str, source: str) -> Document | Flaw:
    if not isinstance(text, str):
        return Flaw("not a string", f"{place}: field {text_field!r} is {type(text).__name__}, not a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair: "\ud800"
        code = f"U+{ord(text[error.start]):04X}"
        return Flaw("broken UTF-8", f"{place}, character {error.start}: lone surrogate {code}.")
    return Document(text, source) if text.strip() else Flaw("empty", "")


def _no_field(wanted: str, present: list[str]) -> str:
    fields = ", ".join(repr(name) for name in present[:12]) or "none at all"
    near = difflib.get_close_matches(wanted, present, n=1, cutoff=0.5)
    hint = f"; nearest {near[0]!r}" if near else ""
    return f"no field {wanted!r}; fields there: {fields}{hint}. Name yours with --text-field."
