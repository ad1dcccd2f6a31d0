"""Named tensors on disk: read one at a time from safetensors or `.bin`, written as safetensors shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zili.data.pointers import what_it_is
from zili.errors import CheckpointError, ConfigError
from zili.plurals import counted
from zili.release.folder import read_json, write_json
from zili.training.index import DTYPES

DEFAULT_SHARD_BYTES = 5_000_000_000
Index = tuple[slice, ...]
"""A part of a tensor: one slice with start and stop for each dimension."""
_OF_WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(name: str) -> torch.dtype:
    """What weights are asked for in; ConfigError where there is none of that name."""
    if name not in _OF_WEIGHTS:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(_OF_WEIGHTS)}")
    return _OF_WEIGHTS[name]


class Tensors(ABC):
    """Tensors by name, each described without being read."""

    @abstractmethod
    def describe(self) -> dict[str, Tensor]:
        """Every name with a `meta` tensor of its shape and dtype."""

    @abstractmethod
    def read(self, name: str, index: Index | None = None) -> Tensor:
        """The tensor itself, on the CPU, or the part of it that `index` names; only that part is read."""

    @property
    def stored(self) -> Tensors:
        """These, or what they are computed from, where another machine may round otherwise."""
        return self


def cut(tensor: Tensor, index: Index | None) -> Tensor:
    """The part of `tensor` that `index` names."""
    return tensor if index is None else tensor[index]


class HeldTensors(Tensors):
    """Tensors already in memory, such as a module's `state_dict`."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def describe(self) -> dict[str, Tensor]:
        return {name: tensor.detach().to("meta") for name, tensor in self._tensors.items()}

    def read(self, name: str, index: Index | None = None) -> Tensor:
        return cut(self._tensors[name].detach(), index).cpu()


class CastTensors(Tensors):
    """Other tensors, under Zili's names, converted to one dtype as they are read.

    All but the routers' biases: rounded to bfloat16 they would choose other experts.
    """

    def __init__(self, tensors: Tensors, dtype: torch.dtype) -> None:
        self._tensors, self._dtype = tensors, dtype

    def describe(self) -> dict[str, Tensor]:
        return {name: self._cast(name, tensor) for name, tensor in self._tensors.describe().items()}

    def read(self, name: str, index: Index | None = None) -> Tensor:
        return self._cast(name, self._tensors.read(name, index))

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if name.endswith(".expert_bias") else tensor.to(self._dtype)


class _Shards(Tensors):
    """Files of one folder, each holding some of the tensors."""

    def __init__(self, folder: Path, index: dict[str, str] | None, files: list[str]) -> None:
        self._folder = folder
        for file in files:
            if not (folder / file).is_file():
                raise CheckpointError(
                    f"{folder / file} is missing, one of {counted(len(files), 'shard')}; fetch it and try again"
                )
        self._described = {file: self._describe_file(folder / file) for file in files}
        self._home = index or {name: file for file, names in self._described.items() for name in names}
        for name, file in self._home.items():
            if name not in self._described[file]:
                raise CheckpointError(
                    f"{folder / file} lacks {name!r}, which the index says it holds; fetch both again"
                )

    def describe(self) -> dict[str, Tensor]:
        return {name: self._described[file][name] for name, file in self._home.items()}

    def read(self, name: str, index: Index | None = None) -> Tensor:
        return self._read_from(self._folder / self._home[name], name, index)

    @abstractmethod
    def _describe_file(self, path: Path) -> dict[str, Tensor]: ...

    @abstractmethod
    def _read_from(self, path: Path, name: str, index: Index | None) -> Tensor: ...


class _SafetensorsShards(_Shards):
    def _describe_file(self, path: Path) -> dict[str, Tensor]:
        described = {}
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                piece = file.get_slice(name)
                dtype = DTYPES.get(piece.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{path}: {name!r} has dtype {piece.get_dtype()}; convert to one of {list(DTYPES)}"
                    )
                described[name] = torch.empty(piece.get_shape(), dtype=dtype, device="meta")
        return described

    def _read_from(self, path: Path, name: str, index: Index | None) -> Tensor:
        with open_safetensors(path) as file:
            return file.get_tensor(name) if index is None else file.get_slice(name)[index]


def open_safetensors(path: Path) -> Any:
    """A safetensors file; CheckpointError where it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise _damaged(path, error) from error


class _PickleShards(_Shards):
    # One shard open at a time: tensors come in file order, and old formats are read rather than mapped.
    _open: tuple[Path, dict[str, Tensor]] | None = None

    def _describe_file(self, path: Path) -> dict[str, Tensor]:
        return {name: tensor.to("meta") for name, tensor in self._load(path).items()}

    def _read_from(self, path: Path, name: str, index: Index | None) -> Tensor:
        return cut(self._load(path)[name], index)

    def _load(self, path: Path) -> dict[str, Tensor]:
        if self._open is None or self._open[0] != path:
            self._open = (path, _load_pickle(path))
        return self._open[1]


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """A `.bin` file's tensors, mapped where its format allows. Runs no code of the file."""
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a pickle cut short raises whatever its parser happened to be doing
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), None)
        if reason:
            raise CheckpointError(
                f"{path} would run code if loaded, refused: {reason[:200]} Use its safetensors form, or "
                "convert it on a machine where you trust it"
            ) from error
        raise _damaged(path, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} is not a table of tensors; a model's weights were expected")
    return tensors


def _damaged(path: Path, error: Exception) -> CheckpointError:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(
        what_it_is(path, f"{path} ({path.stat().st_size} bytes) is damaged or cut short: {said}; fetch it again")
    )


def open_tensors(folder: Path) -> Tensors:
    """The weights of a Hugging Face or Zili model folder: safetensors before `.bin`, an index before a single
    file.

    Raises:
        CheckpointError: no weights, a shard missing, cut short or disagreeing with its index, a pickle with
        code.
    """
    kinds: tuple[tuple[str, type[_Shards]], ...] = (
        ("model.safetensors", _SafetensorsShards),
        ("pytorch_model.bin", _PickleShards),
    )
    for single, kind in kinds:
        index = folder / f"{single}.index.json"
        if index.is_file():
            homes = read_json(index).get("weight_map")
            if not isinstance(homes, dict):
                raise CheckpointError(f"{index} has no 'weight_map' table; fetch it again")
            for name, file in homes.items():
                if not isinstance(file, str) or not file or Path(file).name != file:
                    raise CheckpointError(f"{index}: {name!r} is in {file!r}, which is no file of this folder")
            return kind(folder, homes, sorted(set(homes.values())))
        if (folder / single).is_file():
            return kind(folder, None, [single])
    raise CheckpointError(
        f"{folder} has no weights: looked for {', '.join(name for name, _ in kinds)} and their indexes"
    )


def write_tensors(tensors: Tensors, folder: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[str]:
    """Write `model.safetensors`, or numbered shards of at most `max_shard_bytes` and an index; returns the
    names.

    At most one shard is in memory. A tensor larger than the limit gets a shard of its own.
    """
    described = tensors.describe()
    shards = _plan(described, max_shard_bytes)
    many = len(shards) > 1
    files: list[str] = []
    homes: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        save_file({name: tensors.read(name).contiguous() for name in names}, folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes for the owner alone; a release is for others
        homes.update(dict.fromkeys(names, file))
        files.append(file)
    if many:
        total = sum(tensor.nbytes for tensor in described.values())
        index = "model.safetensors.index.json"
        write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": homes})
        files.append(index)
    return files


def _plan(described: dict[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in described.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards
