"""What the files of a checkpoint hold, in one of them: who restores a part opens the files that have it and no other.

The largest part of what ten thousand files say of themselves is the same, so it is there once. Files that have parts of
the same tensors share a table of their names; of each file only the places differ, and tensors alike have one place
together. `index.json` is

    {"format": 1, "tables": [{NAME: NUMBER, ...}, ...],
     "files": {FILE: {"table": NUMBER, "whole": {NAME: NUMBER, ...}, "places": [[DTYPE, SIZE, OFFSET, SHAPE], ...]}}}

where `table` counts in `tables`, the other numbers count in the file's `places`, and `whole` are tensors that no other
file has anything of.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from zili.errors import CheckpointError

INDEX_FILE = "index.json"
FORMAT = 1
SHARDING = "DCP_SHARDING_INFO"
"""Under what torch.distributed.checkpoint keeps in a file's header where its tensors lie in the whole ones."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names that safetensors has for them."""


class Box(NamedTuple):
    """A part of a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def meets(self, other: Box) -> bool:
        """Whether the two have an element in common."""
        return all(
            max(here, there) < min(here + own, there + theirs)
            for here, own, there, theirs in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )


class Place(NamedTuple):
    """What a file has of a tensor."""

    dtype: str
    size: tuple[int, ...]
    """Shape of the whole tensor."""
    box: Box

    @property
    def whole(self) -> bool:
        return self.box.shape == self.size


class StoredPart(NamedTuple):
    """A part of a tensor and the file that has it."""

    file: str
    box: Box


Names = dict[str, int]
"""Tensors, each with the number of its place."""


class Shard(NamedTuple):
    """One file."""

    cut: Names
    """Tensors that other files have the rest of."""
    whole: Names
    places: list[Place]


def shard_of(header: Mapping[str, Place]) -> Shard:
    """What a file holds, from the places of its tensors."""
    numbers: dict[Place, int] = {}
    found = {name: numbers.setdefault(place, len(numbers)) for name, place in sorted(header.items())}
    places = list(numbers)
    cut = {name: number for name, number in found.items() if not places[number].whole}
    return Shard(cut, {name: number for name, number in found.items() if name not in cut}, places)


def read_header(file: Path) -> dict[str, Place]:
    """The places of a file's tensors. One that does not say how large the whole ones are counts as their end.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            offsets = json.loads((opened.metadata() or {}).get(SHARDING, "{}"))
            pieces = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return {name: _place(piece, offsets.get(name, {})) for name, piece in pieces.items()}
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def header_places(raw: bytes) -> dict[str, Place]:
    """`read_header` of a header in JSON, as a store gives it without the rest of its file.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: it is none.
    """
    header = json.loads(raw)
    offsets = json.loads(header.pop("__metadata__", {}).get(SHARDING, "{}"))
    return {
        name: _place_of(str(one["dtype"]), _integers(one["shape"]), offsets.get(name, {}))
        for name, one in header.items()
    }


def _place(piece: Any, said: dict[str, Any]) -> Place:
    return _place_of(piece.get_dtype(), tuple(piece.get_shape()), said)


def _place_of(dtype: str, shape: tuple[int, ...], said: dict[str, Any]) -> Place:
    offset = tuple(said.get("saved_offsets", [0] * len(shape)))
    size = tuple(said.get("size", [start + count for start, count in zip(offset, shape, strict=True)]))
    return Place(dtype, size, Box(offset, shape))


def table_digest(names: Names) -> str:
    """The same for files that share a table, and for no others."""
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()[:32]


class TensorIndex:
    """Which file has which part of which tensor."""

    def __init__(self, tables: list[Names], files: dict[str, tuple[int, Names, list[Place]]]) -> None:
        """`files`: each with the number of its table, the tensors that are whole in it, and its places."""
        self._tables, self._files = tables, files
        self._homes = {name: (file, number) for file, (_, whole, _) in files.items() for name, number in whole.items()}
        self._sharing: list[list[str]] = [[] for _ in tables]
        for file, (table, _, _) in files.items():
            self._sharing[table].append(file)
        self._of_name: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for table, names in enumerate(tables):
            for name, number in names.items():
                self._of_name[name].append((table, number))
        self._found: dict[tuple[int, int, Box], list[StoredPart]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # As short as its file; what is looked up in it is made anew.
        return _parsed, (self.text(),)

    def names(self) -> list[str]:
        """All tensors."""
        return [*self._homes, *self._of_name]

    def __contains__(self, name: str) -> bool:
        return name in self._homes or name in self._of_name

    def size(self, name: str) -> torch.Size:
        """Shape of the whole tensor."""
        return torch.Size(self._one_place(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor.

        Raises:
            CheckpointError: torch has none of that name.
        """
        said = self._one_place(name).dtype
        if said not in DTYPES:
            raise CheckpointError(f"{name} has dtype {said}; this version reads {', '.join(DTYPES)}")
        return DTYPES[said]

    def parts(self, name: str, box: Box | None = None) -> list[StoredPart]:
        """The parts in files, of a tensor or of what `box` has of it."""
        if name in self._homes:
            file, number = self._homes[name]
            return [StoredPart(file, self._files[file][2][number].box)]
        box = box or Box((0,) * len(self.size(name)), tuple(self.size(name)))
        return [part for table, number in self._of_name[name] for part in self._parts(table, number, box)]

    def _parts(self, table: int, number: int, box: Box) -> list[StoredPart]:
        """Asked for every tensor of a model, of which many are alike: each question is answered once."""
        key = (table, number, box)
        if key not in self._found:
            parts = (StoredPart(file, self._files[file][2][number].box) for file in self._sharing[table])
            self._found[key] = [part for part in parts if part.box.meets(box)]
        return self._found[key]

    def _one_place(self, name: str) -> Place:
        if name in self._homes:
            file, number = self._homes[name]
        else:
            table, number = self._of_name[name][0]
            file = self._sharing[table][0]
        return self._files[file][2][number]

    def check_whole(self) -> None:
        """Every element of every tensor is in one file.

        Raises:
            CheckpointError: there are fewer or more of a tensor than it has.
        """
        sums = {
            (table, number): sum(prod(self._files[file][2][number].box.shape) for file in files)
            for table, files in enumerate(self._sharing)
            for number in set(self._tables[table].values())
        }
        for name, places in self._of_name.items():
            there, wanted = sum(sums[place] for place in places), self.size(name).numel()
            if there != wanted or name in self._homes:
                raise CheckpointError(f"{there} of {wanted} elements of {name} were written")
        listed = sum(len(whole) for _, whole, _ in self._files.values())
        if listed != len(self._homes):
            raise CheckpointError(f"{listed} whole tensors were written where there are {len(self._homes)}")

    def text(self) -> str:
        """As `index.json` has it."""
        files = {
            file: {"table": table, "whole": whole, "places": flat_places(places)}
            for file, (table, whole, places) in self._files.items()
        }
        raw = {"format": FORMAT, "tables": self._tables, "files": files}
        return json.dumps(raw, separators=(",", ":")) + "\n"


def flat_places(places: Iterable[Place]) -> list[list[Any]]:
    """For JSON."""
    return [[place.dtype, place.size, *place.box] for place in places]


def places_of(raw: Iterable[Any]) -> list[Place]:
    """The reverse of `flat_places`."""
    return [
        Place(str(dtype), _integers(size), Box(_integers(offset), _integers(shape)))
        for dtype, size, offset, shape in raw
    ]


def _integers(raw: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(one) for one in raw)


def index_of_one(file: Path) -> TensorIndex:
    """Of one file alone, as if there were no other.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    shard = shard_of(read_header(file))
    return TensorIndex([shard.cut], {file.name: (0, shard.whole, shard.places)})


def index_of_told(told: list[dict[str, Any]], header: Callable[[str], Mapping[str, Place]]) -> TensorIndex:
    """Of the files that all processes told of; of those that share a table, the `header` of one is asked for it.

    `told`: of each file `name`, `table` (its digest), `whole` and `places` (flat).
    """
    numbers: dict[str, int] = {}
    tables: list[Names] = []
    files = {}
    for one in told:
        if one["table"] not in numbers:
            numbers[one["table"]] = len(tables)
            tables.append(shard_of(header(one["name"])).cut)
        files[one["name"]] = (numbers[one["table"]], one["whole"], places_of(one["places"]))
    return TensorIndex(tables, files)


def told_of(header: Mapping[str, Place]) -> dict[str, Any]:
    """What a process tells of its file for `index_of_told`: the names are many and the same for many processes."""
    shard = shard_of(header)
    return {"table": table_digest(shard.cut), "whole": shard.whole, "places": flat_places(shard.places)}


def read_index(folder: Path) -> TensorIndex:
    """The index of a checkpoint; of one from before there was any, by the headers of all its files.

    Raises:
        CheckpointError: it cannot be read, or is broken, or of a format that this version does not know.
    """
    file = folder / INDEX_FILE
    if not file.is_file():
        return _index_by_headers(folder)
    try:
        return _parsed(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error


def _parsed(text: str) -> TensorIndex:
    raw = json.loads(text)
    if raw.get("format") != FORMAT:
        raise ValueError(f"its format is {raw.get('format')!r}; this version reads {FORMAT}")
    files = {name: (one["table"], one["whole"], places_of(one["places"])) for name, one in raw["files"].items()}
    index = TensorIndex(raw["tables"], files)
    for name in index.names():
        index.size(name)
    return index


def _index_by_headers(folder: Path) -> TensorIndex:
    headers = {file.name: read_header(file) for file in sorted(folder.glob("*.safetensors"))}
    sizes: dict[str, tuple[int, ...]] = {}
    for header in headers.values():
        for name, place in header.items():
            sizes[name] = tuple(map(max, sizes.get(name, place.size), place.size))
    tables: list[Names] = []
    files = {}
    for file, header in headers.items():
        shard = shard_of({name: place._replace(size=sizes[name]) for name, place in header.items()})
        files[file] = (len(tables), shard.whole, shard.places)
        tables.append(shard.cut)
    return TensorIndex(tables, files)
