"""Which files hold the text: files and folders in a fixed order, the standard library, and their identity."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from zili.errors import DataError

_SUFFIX_LIST = """
    .txt .text .md .markdown .rst .tex .org .adoc .srt .po
    .py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .java .kt .scala .groovy .js .mjs .jsx .ts .tsx .vue
    .go .rs .swift .mm .rb .php .pl .pm .lua .r .jl .sh .bash .zsh .fish .ps1 .bat .sql .hs .ml .mli .ex .exs
    .erl .clj .lisp .el .scm .f .f90 .pas .vb .cs .fs .dart .zig .nim .v .sv .vhd .asm .s .tcl
    .yaml .yml .toml .ini .cfg .cmake .proto
"""
TEXT_SUFFIXES = frozenset(_SUFFIX_LIST.split())
"""Read whole, one document a file. Markup (.html, .xml) is left out: its tags are not text."""
_PACKED = ("", ".gz", ".zst")
LINE_SUFFIXES = tuple(f"{suffix}{packed}" for suffix in (".jsonl", ".ndjson") for packed in _PACKED)
JSON_SUFFIXES = tuple(f".json{packed}" for packed in _PACKED)
"""An array of objects, or one object a line. Read where they are named; in a folder `.json` is mostly no text."""
TABLE_SUFFIXES = (".parquet",)
READABLE = ".txt .md .rst .py and other source, .jsonl .ndjson .json [.gz|.zst], .parquet"

_AT_ONCE = 1 << 20
"""Bytes read at a time."""

# `test` and its like: half the library, repetitive, in places deliberately ill-encoded, and absent from some
# distributions' Python. Left out, so that two machines with one Python release train on the same text.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class Content:
    """Size and sha256 of a file, noted while it is read, so that nothing has to read it once more."""

    def __init__(self) -> None:
        self._digest, self._size, self._whole = hashlib.sha256(), 0, False

    def add(self, piece: bytes | memoryview) -> None:
        """What was read next; nothing: that was all."""
        self._digest.update(piece)
        self._size += len(piece)
        self._whole = self._whole or not piece

    def measured(self, path: Path) -> tuple[int, str]:
        """Bytes and sha256 of the file, which is read again only where a reader stopped before its end."""
        return (self._size, self._digest.hexdigest()) if self._whole else measure(path)


class _Noted(io.RawIOBase):
    """A file whose content is noted as it goes by."""

    def __init__(self, stream: io.FileIO, content: Content) -> None:
        self._stream, self._content = stream, content

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        count = self._stream.readinto(view)
        self._content.add(view[:count])
        return count

    def readall(self) -> bytes:
        found = self._stream.readall()
        self._content.add(found)
        self._content.add(b"")
        return found

    def close(self) -> None:
        self._stream.close()
        super().close()


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read. `name` is relative to what the user gave, so that records hold no machine's paths."""

    path: Path
    name: str
    explicit: bool = False
    """Given by its own path, not found in a folder: it is read whatever its suffix says."""
    content: Content | None = field(default=None, compare=False)
    """Takes size and hash of what is read; None: nobody wants them."""

    def open(self) -> BinaryIO:
        """To be read from beginning to end."""
        stream = self._opened()
        return io.BufferedReader(stream if self.content is None else _Noted(stream, self.content), _AT_ONCE)

    def open_anywhere(self) -> BinaryIO:
        """To be read in any order, and so hashed before."""
        stream = io.BufferedReader(self._opened(), _AT_ONCE)
        if self.content is not None:
            while piece := stream.read(_AT_ONCE):
                self.content.add(piece)
            self.content.add(b"")
            stream.seek(0)
        return stream

    def _opened(self) -> io.FileIO:
        try:
            return self.path.open("rb", 0)
        except OSError as error:
            if self.content is not None:  # a file that cannot be hashed cannot be left out either
                _refuse(error)
            raise

    @property
    def shown(self) -> str:
        """Its path for messages and records, in characters that can be written."""
        return printable(str(self.path))


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What was read of one file, as the manifest keeps it."""

    name: str
    bytes: int
    sha256: str
    documents: int


@dataclass
class Census:
    """What a reading met: documents, UTF-8 bytes of text, files, and everything it left out by reason."""

    hashes: bool = True
    """Hash the files as they are read; False where nobody asks."""
    documents: int = 0
    text_bytes: int = 0
    files: list[FileRecord] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    """Keys of records, and of their turns, that say something and were not used."""

    @property
    def left_out(self) -> str:
        """`3 hidden, 1 binary`, or `nothing`."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items())) or "nothing"

    def fingerprint(self) -> str:
        """The value `fingerprint` gives for the files read."""
        return _identity((file.name, file.bytes, file.sha256) for file in self.files)


Source = str | os.PathLike[str] | SourceFile


def list_files(paths: Iterable[Source], census: Census | None = None) -> list[SourceFile]:
    """The files under `paths`: paths in the order given, a folder's files before its folders, each sorted.

    Hidden names, suffixes that are not text, files given twice and what is no regular file are left out and
    counted in `census`. Links to folders are not followed. Raises `DataError` for a path that is not there, or for one
    string in place of a list.
    """
    if isinstance(paths, str):  # its letters would be taken for paths
        raise DataError(f"{paths!r} is a string, where a list of paths is meant: give [{paths!r}]")
    skipped = Counter[str]() if census is None else census.skipped
    seen: set[Path] = set()
    files = []
    for file in (file for path in paths for file in _expand(path, skipped)):
        real = file.path.resolve()
        if real in seen:
            skipped["given twice"] += 1
        else:
            files.append(file)
            seen.add(real)
    return files


def _expand(source: Source, skipped: Counter[str]) -> Iterator[SourceFile]:
    if isinstance(source, SourceFile):
        yield source
        return
    path = Path(source)
    if path.is_dir():
        yield from _walk(path, skipped)
    elif path.is_file():
        yield SourceFile(path, printable(path.name), explicit=True)
    else:
        raise DataError(f"{printable(str(path))}: no such file or folder. Check the path given as text.")


def _walk(folder: Path, skipped: Counter[str]) -> Iterator[SourceFile]:
    for at, folders, names in os.walk(folder, onerror=_refuse):
        skipped["hidden"] += sum(name.startswith(".") for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(at, name)
            reason = _unfit(path)
            if reason:
                skipped[reason] += 1
            else:
                yield SourceFile(path, printable((folder.resolve().name / path.relative_to(folder)).as_posix()))
    skipped += Counter()  # drops the zeros


def size_of(path: Path) -> int:
    """Bytes of a file. Raises `DataError` when it cannot be read."""
    try:
        return path.stat().st_size
    except OSError as error:
        _refuse(error)
        raise


def _refuse(error: OSError) -> None:
    # os.walk's default leaves out a folder it may not open, without a word.
    name = printable(os.fsdecode(error.filename or "a file"))
    raise DataError(f"{name}: cannot be read ({error.strerror}). Check its permissions.") from error


def _unfit(path: Path) -> str | None:
    name = path.name.lower()
    if name.startswith("."):
        return "hidden"
    if path.suffix.lower() not in TEXT_SUFFIXES and not name.endswith(LINE_SUFFIXES + TABLE_SUFFIXES):
        return "of another kind"
    return None if path.is_file() else "not a regular file"


def standard_library_files() -> list[SourceFile]:
    """The running Python's own library as text: 12 MB on every machine, no download (PSF licence).

    Sorted; without installed packages, tests, and the generated file that records the build machine's paths.
    Raises `DataError` where Python came without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    label = f"python{sys.version_info.major}.{sys.version_info.minor}"
    files = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not _NOT_LIBRARY.intersection(inside.parts) and not path.name.startswith("_sysconfigdata"):
            files.append(SourceFile(path, f"{label}/{inside.as_posix()}"))
    if not files:
        raise DataError(f"{root}: this Python came without its source. Give your own text with --text PATH.")
    return files


def fingerprint(paths: Iterable[Source]) -> str:
    """Identity of the text in `paths`: sha256 over names, sizes and content hashes. Reads every file once."""
    return _identity((file.name, *measure(file.path)) for file in list_files(paths))


def printable(name: str) -> str:
    r"""A file's name with bytes that are no UTF-8 written `\xcb`: archives made on Windows may have names in GBK."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def measure(path: Path) -> tuple[int, str]:
    """Bytes and sha256 of a file's content. Raises `DataError` when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        _refuse(error)
        raise


def _identity(records: Iterable[tuple[str, int, str]]) -> str:
    digest = hashlib.sha256()
    for name, size, content in records:
        digest.update(f"{name}\0{size}\0{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
