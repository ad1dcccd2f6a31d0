"""From files to documents: plain text, JSON lines and parquet, all UTF-8, with the place of every flaw."""

from __future__ import annotations

import codecs
import difflib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from zili.data.sources import (
    JSON_SUFFIXES,
    LINE_SUFFIXES,
    READABLE,
    TABLE_SUFFIXES,
    Census,
    Content,
    FileRecord,
    Source,
    SourceFile,
    list_files,
    printable,
    size_of,
)
from zili.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

OnError = Literal["raise", "skip"]
T = TypeVar("T")
_WAY_OUT = "Repair it, or leave such input out, counted, with --on-error skip."


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text and where it came from: `folder/file.md`, or `corpus.jsonl:17` for line or row 17."""

    text: str
    source: str

    def to_json(self) -> str:
        """A JSON line that `read_documents` reads, without its line end."""
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
    census = Census(hashes=False) if census is None else census
    wanted = Wanted("readable text", f"files or folders with {READABLE}")
    for document in read_files(paths, lambda file: _reader(file)(file, text_field), wanted, on_error, census):
        census.text_bytes += len(document.text.encode())
        yield document


@dataclass(frozen=True, slots=True)
class Wanted:
    """What files are read for, and what to give where there is none of it."""

    what: str
    give: str


def read_files(
    paths: Iterable[Source],
    read: Callable[[SourceFile], Iterator[T | Flaw]],
    wanted: Wanted,
    on_error: OnError,
    census: Census,
) -> Iterator[T]:
    """What `read` gives of every file under `paths`, counted in `census`; flaws are refused, or counted too.

    Raises: DataError, a flaw, or nothing was found.
    """
    paths = list(paths)
    for file in list_files(paths, census):
        content, before = Content(), census.documents
        for item in read(replace(file, content=content) if census.hashes else file):
            if isinstance(item, Flaw):
                _refuse_or_count(item, file, on_error, census)
            else:
                census.documents += 1
                yield item
        size, sha256 = content.measured(file.path) if census.hashes else (size_of(file.path), "")
        census.files.append(FileRecord(file.name, size, sha256, census.documents - before))
    if not census.documents:
        given = ", ".join(printable(str(path.path if isinstance(path, SourceFile) else path)) for path in paths[:3])
        raise DataError(
            f"no {wanted.what} in {given or 'an empty list of paths'}: left out {census.left_out}. Give {wanted.give}."
        )


def _refuse_or_count(flaw: Flaw, file: SourceFile, on_error: OnError, census: Census) -> None:
    """Raise `DataError` for a flaw, or count it as left out."""
    harmless = flaw.reason == "empty" or (flaw.reason in ("binary", "of another kind") and not file.explicit)
    if on_error == "raise" and not harmless:
        raise DataError(f"{flaw.message} {_WAY_OUT}")
    census.skipped[flaw.reason] += 1


Reader = Callable[[SourceFile, str], Iterator[Document | Flaw]]


def _reader(file: SourceFile) -> Reader:
    name = file.path.name.lower()
    if name.endswith(LINE_SUFFIXES + JSON_SUFFIXES):
        return _read_records
    return _read_table if name.endswith(TABLE_SUFFIXES) else _read_text


def _read_text(file: SourceFile, text_field: str) -> Iterator[Document | Flaw]:
    try:
        with file.open() as stream:
            raw = stream.read()
    except OSError as error:
        yield Flaw("damaged file", f"{file.shown}: cannot be read ({error.strerror}).")
        return
    if b"\0" in raw[:8192]:
        yield Flaw("binary", f"{file.shown}: holds zero bytes, so it is binary or UTF-16; UTF-8 is read.")
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Flaw("broken UTF-8", f"{file.shown}: line {line}, byte {error.start}: broken UTF-8.")
        return
    yield Document(text, file.name) if text.strip() else Flaw("empty", "")


def _read_records(file: SourceFile, text_field: str) -> Iterator[Document | Flaw]:
    for place, record in records(file):
        if isinstance(record, Flaw):
            yield record
        elif text_field not in record:
            yield Flaw("without the field", f"{place}: {_no_field(text_field, list(record))}")
        else:
            number = place.rsplit(" ", 1)[1]
            yield _document(record[text_field], text_field, str(place), f"{file.name}:{number}")


def records(file: SourceFile) -> Iterator[tuple[str, dict[str, Any] | Flaw]]:
    """Each object of a file of JSON lines, or of a JSON file, compressed or not, or each row of a parquet file, and its
    place, which ends with its number."""
    if file.path.name.lower().endswith(TABLE_SUFFIXES):
        yield from _rows(file)
    elif file.path.name.lower().endswith(JSON_SUFFIXES):
        yield from _json_records(file)
    else:
        for number, line in _lines(file):
            place = f"{file.shown}: line {number}"
            yield place, line if isinstance(line, Flaw) else _parse_line(place, number, line)


def _lines(file: SourceFile) -> Iterator[tuple[int, bytes | Flaw]]:
    """Number and bytes of each line of a file, compressed or not; blank lines are passed."""
    import pyarrow as pa  # where text is read, and not where a model is trained without any

    number = 0
    try:
        # Arrow's decompressor: python-zstandard and a bare zlib object take a cut-off stream for a whole one. From a
        # file that is open already, since Arrow takes no name that is not UTF-8.
        packed = {".gz": "gzip", ".zst": "zstd"}.get(file.path.suffix.lower())
        with file.open() as raw, pa.input_stream(raw, compression=packed) as stream:
            for number, line in enumerate(BufferedReader(stream, 1 << 20), start=1):
                if line.strip():
                    yield number, line
    except (OSError, pa.ArrowException) as error:
        place = f"{file.shown}: after line {number}"
        yield number, Flaw("damaged file", f"{place}: cannot be read further ({error}).")


def _json_records(file: SourceFile) -> Iterator[tuple[str, dict[str, Any] | Flaw]]:
    """Records of a file with an array of objects, one object, or, as many write it, one object a line."""
    lines = list(_lines(file))
    damage = next((line for _, line in lines if isinstance(line, Flaw)), None)
    if damage is not None:
        yield f"{file.shown}: record 0", damage
        return
    raw = [line for _, line in lines if isinstance(line, bytes)]
    whole = _parse(file.shown, _bare(b"".join(raw)))
    first = _parse(file.shown, _bare(raw[0])) if raw and isinstance(whole, Flaw) else None
    if isinstance(first, dict):
        for number, line in lines:
            place = f"{file.shown}: line {number}"
            yield place, _parse_line(place, number, line)
        return
    found = whole if isinstance(whole, list) else [whole]
    for number, record in enumerate(found, start=1):
        place = f"{file.shown}: record {number}"
        yield place, record if isinstance(record, Flaw) else _object(place, record)


def _parse_line(place: str, number: int, line: bytes | Flaw) -> dict[str, Any] | Flaw:
    if isinstance(line, Flaw):
        return line
    return _object(place, _parse(place, line if number > 1 else _bare(line), of_one_line=True))


def _bare(raw: bytes) -> bytes:
    """Without the mark of byte order that some editors put first."""
    return raw.removeprefix(codecs.BOM_UTF8)


def _parse(place: str, raw: bytes, *, of_one_line: bool = False) -> Any:
    try:
        return json.loads(raw.decode(), object_pairs_hook=_of_single_keys)
    except UnicodeDecodeError as error:
        wide = "; it begins as UTF-16 does" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
        return Flaw("broken UTF-8", f"{place}, byte {error.start} of the line: broken UTF-8{wide}.")
    except json.JSONDecodeError as error:
        # A decoder that meets the end of a line counts the next one.
        line = f"line {error.lineno}, " if error.lineno > 1 and not of_one_line else ""
        return Flaw("broken JSON", f"{place}, {line}column {error.colno}: broken JSON ({error.msg}).")
    except RecursionError:
        return Flaw("broken JSON", f"{place}: JSON nested too deep.")
    except ValueError as error:  # a number of thousands of digits, or a key that stands twice
        return Flaw("broken JSON", f"{place}: broken JSON ({error}).")


def _of_single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which nothing is lost: Python keeps the last of several values of a key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {twice[:40]!a} stands twice")
    return found


def _object(place: str, record: Any) -> dict[str, Any] | Flaw:
    if isinstance(record, dict | Flaw):
        return record
    return Flaw("broken JSON", f"{place}: {type(record).__name__} where an object was expected.")


def _read_table(file: SourceFile, text_field: str) -> Iterator[Document | Flaw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with file.open_anywhere() as stream, pq.ParquetFile(stream) as table:
            names = table.schema_arrow.names
            if names.count(text_field) != 1:
                said = f"it has {text_field!r} twice" if text_field in names else _no_field(text_field, names)
                yield Flaw("without the field", f"{file.shown}: {said}")
                return
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for row, value in enumerate(batch.column(0), start=row + 1):  # noqa: B020
                    yield _parse_value(file, row, value, text_field)
    except (OSError, ValueError, IndexError, pa.ArrowException) as error:
        yield Flaw("damaged file", f"{file.shown}: after row {row}: cannot be read further ({error}).")


def _rows(file: SourceFile) -> Iterator[tuple[str, dict[str, Any] | Flaw]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with file.open_anywhere() as stream, pq.ParquetFile(stream) as table:
            if len(set(table.schema_arrow.names)) < len(table.schema_arrow.names):
                raise ValueError("two of its columns have one name")
            for batch in table.iter_batches(batch_size=256):
                for row, record in enumerate(batch.to_pylist(), start=row + 1):  # noqa: B020
                    yield f"{file.shown}: row {row}", record
    except (OSError, ValueError, IndexError, OverflowError, pa.ArrowException) as error:
        yield (
            f"{file.shown}: row {row}",
            Flaw("damaged file", f"{file.shown}: after row {row}: cannot be read further ({error})."),
        )


def _parse_value(file: SourceFile, row: int, value: pa.Scalar, text_field: str) -> Document | Flaw:
    place = f"{file.shown}: row {row}"
    try:
        text = value.as_py()
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        return Flaw("broken UTF-8", f"{place}, byte {error.start} of the text: broken UTF-8.")
    except (ValueError, OverflowError) as error:  # what Python has no value for, such as a time of nanoseconds
        return Flaw("not a string", f"{place}: field {text_field!r} is no string ({error}).")
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
