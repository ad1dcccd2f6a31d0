"""A corpus as tokens on disk: Megatron's `.bin` and `.idx`, and a manifest that says what they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zili.checksums import several_at_once, share_of
from zili.data.indexed import REBUILD, Index, read_index
from zili.data.sources import FileRecord, measure
from zili.data.tokenizer import Tokenizer
from zili.errors import DataError

FORMAT = "zili token store 1"
MASK = ".mask"
"""Ending of the file, of dialogues, that says a byte a token which are learned."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """`prefix.json`: where the tokens come from, and what the two files must hash to."""

    tokenizer_sha256: str
    vocab_size: int
    end_id: int
    documents: int
    tokens: int
    text_bytes: int
    """UTF-8 bytes of the text behind the tokens, for bits per byte."""
    split: str
    files: dict[str, dict[str, Any]]
    """`.bin` and `.idx`, of dialogues `.mask` too: bytes and sha256."""
    sources: tuple[FileRecord, ...]
    left_out: dict[str, int]
    zili_version: str
    format: str = FORMAT
    pairs: bool = False
    """Whether documents 2k and 2k + 1 are a chosen and a rejected answer to one question."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises `DataError` for a manifest that is missing, broken or of another format."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["sources"] = tuple(FileRecord(**record) for record in fields["sources"])
            manifest = cls(**fields)
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such manifest: the store is absent or half-built. {REBUILD}") from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: not a manifest this version reads ({error}). {REBUILD}") from error
        if manifest.format != FORMAT:
            raise DataError(f"{path}: format {manifest.format!r}, this version reads {FORMAT!r}. {REBUILD}")
        return manifest


def store_files(prefix: str | Path) -> dict[str, Path]:
    """The three files of a store by suffix: `.bin`, `.idx`, `.json`."""
    return {suffix: Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".json")}


class TokenStore:
    """A token store, memory-mapped. Each document ends with the tokenizer's end token."""

    def __init__(
        self, prefix: Path, manifest: Manifest, index: Index, tokens: NDArray[Any], learned: NDArray[Any] | None = None
    ) -> None:
        self.prefix = prefix
        self.manifest = manifest
        self.tokens = tokens
        """All ids `[T]`, document after document."""
        self.learned = learned
        """Which tokens the assistant says in dialogues, `[T]` uint8; None: every token is learned."""
        self.lengths = index.lengths
        """Tokens of each document `[N]`."""
        self.offsets = index.offsets
        """First token of each document `[N]`, as a position in `tokens`."""

    @classmethod
    def open(cls, prefix: str | Path) -> TokenStore:
        """Map `prefix.bin` and check it against index and manifest, by size (`verify` checks content).

        Raises `DataError` naming the file that is missing or cut off, with expected and found numbers.
        """
        files = store_files(prefix)
        manifest = Manifest.read(files[".json"])
        for suffix in (".bin", ".idx"):
            if not files[suffix].is_file():
                raise DataError(f"{files[suffix]}: missing from the store. {REBUILD}")
        index = read_index(files[".idx"])
        found, expected = files[".bin"].stat().st_size, index.tokens * index.dtype.itemsize
        if found != expected:
            raise DataError(f"{files['.bin']}: {index.tokens} tokens take {expected} bytes, found {found}. {REBUILD}")
        if (len(index.lengths), index.tokens) != (manifest.documents, manifest.tokens):
            raise DataError(
                f"{files['.json']}: speaks of {manifest.documents} documents and {manifest.tokens} tokens, "
                f"the index of {len(index.lengths)} and {index.tokens}: files of two stores. {REBUILD}"
            )
        tokens = np.memmap(files[".bin"], dtype=index.dtype, mode="r")
        return cls(Path(prefix), manifest, index, tokens, _open_mask(Path(f"{prefix}{MASK}"), manifest))

    def verify(self) -> None:
        """Hash the files again. Raises `DataError` naming one whose content is not what was written."""
        verify_stores([self])

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises `DataError` when the store was built with another tokenizer: its ids mean other text."""
        built = self.manifest.tokenizer_sha256
        if built != tokenizer.sha256:
            raise DataError(
                f"{self.prefix}: built with tokenizer {built[:12]} ({self.manifest.vocab_size} tokens), the "
                f"run has {tokenizer.sha256[:12]} ({tokenizer.vocab_size}). Use that tokenizer, or build the "
                "store again with this one."
            )

    def __len__(self) -> int:
        """Documents."""
        return self.manifest.documents

    def document(self, index: int) -> NDArray[Any]:
        """Ids `[n]` of one document, its end token last; a view of the file."""
        start = int(self.offsets[index])
        return self.tokens[start : start + int(self.lengths[index])]

    def iter_documents(self) -> Iterator[NDArray[Any]]:
        """The documents in stored order."""
        return (self.document(index) for index in range(len(self)))

    def identity(self) -> str:
        """sha256 of what the store holds; it does not depend on the store's path."""
        suffixes = [".bin", ".idx", *((MASK,) if MASK in self.manifest.files else ())]
        return ":".join(self.manifest.files[suffix]["sha256"] for suffix in suffixes)


def verify_stores(stores: Iterable[TokenStore], part: int = 0, parts: int = 1) -> None:
    """Hash the files of `stores` again; of `parts` processes that share the work, process `part` its own.

    Raises `DataError` naming a file whose content is not what was written.
    """
    written = {
        Path(f"{store.prefix}{suffix}"): record for store in stores for suffix, record in store.manifest.files.items()
    }
    own = share_of({path: record["bytes"] for path, record in written.items()}, part, parts)
    for path, (_, found) in zip(own, several_at_once(measure, own), strict=True):
        expected = written[path]["sha256"]
        if found != expected:
            raise DataError(
                f"{path}: content changed since it was built (sha256 {found[:12]}, written {expected[:12]}). {REBUILD}"
            )


def _open_mask(path: Path, manifest: Manifest) -> NDArray[Any] | None:
    if MASK not in manifest.files:
        return None
    found = path.stat().st_size if path.is_file() else 0
    if found != manifest.tokens:
        raise DataError(f"{path}: {manifest.tokens} tokens take as many bytes, found {found}. {REBUILD}")
    return np.memmap(path, dtype=np.uint8, mode="r")
