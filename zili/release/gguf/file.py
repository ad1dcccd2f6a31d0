"""GGUF files, read and written with the `gguf` package: one file with metadata, tokenizer and tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zili.data.pointers import what_it_is
from zili.errors import CheckpointError, ConfigError
from zili.release.gguf.counts import check_counts
from zili.release.tensors import Index, Tensors, cut

GGUF_FILE = "model.gguf"
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_MOST_FILES = 1000
_NEEDS = "GGUF files need the gguf package: pip install 'zili[release]'"


def gguf_package() -> Any:
    """The `gguf` package. Raises ConfigError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(_NEEDS) from error
    return gguf


def find_gguf(path: Path) -> Path | None:
    """`path` if it is a GGUF file, or the one in a folder; of a model in several files the first.

    Raises:
        CheckpointError: a folder with several, or a part without the first.
    """
    if path.is_file():
        return parts_of(path)[0] if path.suffix == ".gguf" else None
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if found and set(found) <= set(parts_of(found[0])):
        return found[0]
    if len(found) > 1:
        raise CheckpointError(f"{path} has {len(found)} GGUF files ({found[0].name}, ...); give one of them")
    return found[0] if found else None


def parts_of(path: Path) -> list[Path]:
    """The files of a model that llama.cpp has split (`NAME-00001-of-00003.gguf`), one of which is `path`; or it alone.

    Raises:
        CheckpointError: one of them is missing.
    """
    named = _PART.fullmatch(path.name)
    if named is None:
        return [path]
    count = int(named[2])
    if not 0 < count <= _MOST_FILES:
        raise CheckpointError(f"{path} calls itself one of {count} files; up to {_MOST_FILES:,} are read")
    parts = [path.with_name(f"{named[1]}-{number:05d}-of-{named[2]}.gguf") for number in range(1, count + 1)]
    missing = next((part for part in parts if not part.is_file()), None)
    if missing is not None:
        raise CheckpointError(f"{missing} is missing, one of {count} files of the model; fetch it too")
    return parts


class GGUFTensors(Tensors):
    """A model's tensors, mapped; what is quantised is computed back to fp32 as it is read."""

    def __init__(self, readers: Sequence[Any]) -> None:
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        self._plain = {
            name: plain[tensor.tensor_type.name]
            for name, tensor in self._tensors.items()
            if tensor.tensor_type.name in plain
        }

    def describe(self) -> dict[str, Tensor]:
        return {
            # Dimensions are written from the innermost.
            name: torch.empty(
                [int(size) for size in reversed(tensor.shape)],
                dtype=self._plain.get(name, torch.float32),
                device="meta",
            )
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, index: Index | None = None) -> Tensor:
        tensor, dtype = self._tensors[name], self._plain.get(name)
        shape = [int(size) for size in reversed(tensor.shape)]
        if dtype is None:
            values = gguf_package().quants.dequantize(tensor.data, tensor.tensor_type)
            return cut(torch.from_numpy(np.ascontiguousarray(values)).view(shape), index)
        raw = torch.from_numpy(np.array(tensor.data).view(np.uint8).reshape(-1))
        return cut(raw.view(dtype).view(shape), index).clone()


def open_gguf(path: Path) -> tuple[dict[str, Any], GGUFTensors, Any]:
    """A GGUF model's metadata without its long lists, its tensors, and the package's reader of its (first) file.

    Raises:
        CheckpointError: it is no GGUF file, or damaged, or a part of it is missing or another's.
        ConfigError: the package is not installed.
    """
    package = gguf_package()
    read = [_read(package, part) for part in parts_of(path)]
    values, reader = read[0]
    tensors = GGUFTensors([one for _, one in read])
    told = values.get("split.tensors.count")
    if told is not None and told != len(tensors.describe()):
        count = len(tensors.describe())
        raise CheckpointError(
            f"{path}: {len(read)} files have {count} tensors, {told} belong to the model; fetch them again"
        )
    tokens = reader.get_field("tokenizer.ggml.tokens")
    architecture = values.get("general.architecture")
    if tokens is not None:
        values.setdefault(f"{architecture}.vocab_size", len(tokens.data))
    return values, tensors, reader


def _read(package: Any, path: Path) -> tuple[dict[str, Any], Any]:
    """One file's metadata, and its reader."""
    try:
        check_counts(path)
        reader = package.GGUFReader(path)
        values = {key: _plain_value(field) for key, field in reader.fields.items() if not _is_long(field)}
        for tensor in reader.tensors:
            if tensor.data_offset + tensor.n_bytes > path.stat().st_size:
                raise ValueError(f"it ends inside {tensor.name}")
    except Exception as error:  # a file cut short raises whatever the package was doing
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        detail = f"{path} ({path.stat().st_size} bytes) is no whole GGUF file: {said}"
        raise CheckpointError(what_it_is(path, detail)) from error
    return values, reader


def _is_long(field: Any) -> bool:
    return len(field.data) > 64


def _plain_value(field: Any) -> Any:
    """The value that was meant: a 32-bit 1e-5 is 1e-5."""
    value = field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: Tensors,
    write_tokenizer: Callable[[Any], None],
) -> None:
    """Write `tensors`, under GGUF's names, a tensor at a time. Vectors are fp32, as llama.cpp wants them."""
    package = gguf_package()
    writer = package.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    write_tokenizer(writer)
    described = tensors.describe()
    for name, tensor in described.items():
        dtype = _stored(tensor)
        kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
        size = tensor.numel() * dtype.itemsize
        numpy_dtype = np.dtype(np.float32 if dtype == torch.float32 else np.float16)
        writer.add_tensor_info(name, tensor.shape, numpy_dtype, size, package.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in described.items():
        whole = tensors.read(name).to(_stored(tensor)).contiguous()
        raw = whole.view(torch.int16) if whole.dtype == torch.bfloat16 else whole
        writer.write_tensor_data(raw.numpy())
    writer.close()


def _stored(tensor: Tensor) -> torch.dtype:
    kept = tensor.ndim > 1 and tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.dtype if kept else torch.float32


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, str(value))
