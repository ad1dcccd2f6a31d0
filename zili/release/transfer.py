"""Opening any model folder, and carrying models between Hugging Face's form and Zili's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from zili.config.model import ModelConfig
from zili.errors import CheckpointError, ConfigError
from zili.models.decoder import Decoder
from zili.release.checkpoint import open_checkpoint
from zili.release.deepseek import DeepSeek
from zili.release.folder import copy_companions, read_json, whole_folder, write_json
from zili.release.layout import Layout, PublishedConfig, Variant, recognise
from zili.release.llama import Llama
from zili.release.mapping import ImportedTensors, PublishedTensors, check_tensors
from zili.release.native import MODEL_FILE, Origin, is_native, read_model_file, read_native, write_native
from zili.release.telechat2 import TeleChat2
from zili.release.telechat52 import TeleChat52
from zili.release.tensors import (
    DEFAULT_SHARD_BYTES,
    CastTensors,
    Index,
    Tensors,
    open_tensors,
    write_tensors,
)

LAYOUTS: tuple[Layout, ...] = (TeleChat2(), Llama(), TeleChat52(), DeepSeek())
"""In the order `export_model` tries them for a model that was never published."""


@dataclass(frozen=True)
class OpenModel:
    """A model whose weights are still on disk."""

    config: ModelConfig
    tensors: Tensors
    """Under Zili's names."""
    origin: Origin | None
    companions: Path
    """Folder of the tokenizer and its like."""


def load(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """The decoder in a Hugging Face folder, a Zili model folder, or a Zili checkpoint or run; in eval mode.

    Weights are read one at a time and converted to `dtype` whatever they are stored in.

    Raises:
        CheckpointError: nothing there, damaged, incomplete, or an architecture not supported.
    """
    model = open_model(Path(path))
    with torch.device("meta"):
        decoder = Decoder(model.config)
    for parameter in decoder.parameters():  # not the buffers: a router's bias, rounded, would choose other experts
        parameter.data = parameter.data.to(dtype)
    decoder.to_empty(device=device)
    for buffer in decoder.buffers():
        buffer.zero_()
    fill_from([decoder], model)
    return decoder.eval()


def load_into(parts: Iterable[Decoder], folder: str | Path) -> None:
    """Fill the weights of `parts`, decoders or parts of one as a training process has them, from any folder `load`
    takes.

    Of a weight that is cut over processes each reads the part it has, in whatever form the folder is; nothing crosses
    processes. Weights keep their dtype.

    Raises:
        CheckpointError: as `load`, or `parts` are of another model.
    """
    fill_from(parts, open_model(Path(folder)))


@torch.no_grad()
def fill_from(parts: Iterable[Decoder], model: OpenModel) -> None:
    """`load_into`, of a model that is open."""
    # No dict: two parts of a pipeline in one process may have an embedding each.
    wanted = [named for part in parts for named in part.named_tensors()]
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted}
    described = model.tensors.describe()
    check_tensors({name: described[name] for name in shapes if name in described}, shapes, model.companions)
    for name, tensor in wanted:
        index = own_part(tensor)
        if index is None:
            tensor.copy_(model.tensors.read(name))
        elif all(part.start < part.stop for part in index):
            local = tensor.to_local()  # type: ignore[attr-defined]
            local.copy_(model.tensors.read(name, index))


def own_part(tensor: Tensor) -> Index | None:
    """Which part of `tensor` this process has; None: all of it."""
    if not isinstance(tensor, DTensor):
        return None
    sizes, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def import_model(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> OpenModel:
    """Write a Hugging Face folder's model as a Zili model folder; `dtype` None keeps each tensor's own.

    Raises:
        CheckpointError: as `load`, or `target` exists. Nothing half-written is left.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise CheckpointError(f"{source} does not exist; give a Hugging Face model folder")
    if not _is_published(source):
        raise CheckpointError(f"{source} is not a Hugging Face model folder: it has no config.json")
    model = open_published(source)
    tensors = model.tensors if dtype is None else CastTensors(model.tensors, dtype)
    with whole_folder(target) as aside:
        write_native(aside, model.config, model.origin, tensors, max_shard_bytes)
        copy_companions(model.companions, aside)
    return model


def export_model(
    source: str | Path,
    target: str | Path,
    *,
    layout: str = "auto",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> str:
    """Write any model `load` takes as a Hugging Face folder of safetensors; returns the layout's name.

    "auto" takes the layout the weights came in, else the first that can hold the model. A model exported in
    its own layout gets its original config.json back, with what has changed since put in.

    Raises:
        CheckpointError: as `load`, `target` exists, or the layout cannot hold the model.
        ConfigError: no layout of that name.
    """
    model = open_model(Path(source))
    chosen = _choose_layout(layout, model)
    own = model.origin is not None and model.origin.layout == chosen.name
    variant = model.origin.variant if own and model.origin else Variant(chosen.prefix)
    tensors = model.tensors if dtype is None else CastTensors(model.tensors, dtype)
    published = PublishedTensors(tensors, chosen.rules(model.config, variant))
    config = _published_config(model, chosen, variant)
    stored = str(published.describe()[variant.prefix + chosen.embedding].dtype).removeprefix("torch.")
    key = "dtype" if "dtype" in config else "torch_dtype"
    with whole_folder(Path(target)) as aside:
        write_json(aside / "config.json", {**config, key: stored})
        write_tensors(published, aside, max_shard_bytes)
        copy_companions(model.companions, aside)
    return chosen.name


def open_model(folder: Path) -> OpenModel:
    """Any folder `load` takes, as names, shapes and a way to read them."""
    if is_native(folder):
        config, origin, tensors = read_native(folder)
        return OpenModel(config, tensors, origin, folder)
    if _is_published(folder):
        return open_published(folder)
    config, tensors = open_checkpoint(folder)
    around = [place for place in _run_places(folder) if (place / MODEL_FILE).is_file()]
    origin = read_model_file(around[0])[1] if around else None
    return OpenModel(config, tensors, origin, _tokenizer_folder(folder))


def open_published(folder: Path) -> OpenModel:
    """A Hugging Face folder, its layout recognised and its tensors' names and shapes checked."""
    config = PublishedConfig(folder / "config.json", read_json(folder / "config.json"))
    published = open_tensors(folder)
    described = published.describe()
    layout = recognise(LAYOUTS, config, set(described))
    names = {name for name in described if not layout.ignored.search(name)}
    model = layout.read_config(config, names)
    variant = layout.find_variant(model, names)
    check_tensors({name: described[name] for name in names}, layout.published_shapes(model, variant), folder)
    for name, other in layout.repeats(model, variant, set(described)).items():
        _check_repeat(published, name, other, config.path)
    tensors = ImportedTensors(published, layout.rules(model, variant))
    return OpenModel(model, tensors, Origin(layout.name, variant, config.values), folder)


def _check_repeat(published: Tensors, name: str, other: str, config: Path) -> None:
    if torch.equal(published.read(name), published.read(other)):
        return
    if name != "lm_head.weight":
        raise CheckpointError(f"{config.parent}: {name} should repeat {other} and does not; fetch the weights again")
    raise CheckpointError(
        f"{config} ties the head to the embedding, yet lm_head.weight is not {other}; if the head is its own, set "
        "tie_word_embeddings to false"
    )


def _choose_layout(name: str, model: OpenModel) -> Layout:
    by_name = {layout.name: layout for layout in LAYOUTS}
    if name != "auto":
        if name not in by_name:
            raise ConfigError(f"there is no layout {name!r}; choose auto, {', '.join(by_name)}")
        losses = by_name[name].losses(model.config)
        if losses:
            raise CheckpointError(f"the {name} layout cannot hold this model: {'; '.join(losses)}; try --as auto")
        return by_name[name]
    first = by_name[model.origin.layout] if model.origin else LAYOUTS[0]
    for layout in (first, *LAYOUTS):
        if not layout.losses(model.config):
            return layout
    reasons = "; ".join(f"{layout.name}: {layout.losses(model.config)[0]}" for layout in LAYOUTS)
    raise CheckpointError(f"no published layout can hold this model ({reasons})")


def _published_config(model: OpenModel, layout: Layout, variant: Variant) -> dict[str, Any]:
    """The original config.json where there is one, with the keys of what has changed since."""
    if model.origin is None or model.origin.layout != layout.name:
        return layout.write_config(model.config)
    original = model.origin.config
    names = set(layout.published_shapes(model.config, variant))
    if layout.read_config(PublishedConfig(Path("config.json"), original), names) == model.config:
        return original
    return {**original, **layout.write_config(model.config)}


def _is_published(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _run_places(folder: Path) -> list[Path]:
    """A run folder, or for one of its checkpoints (`RUN/checkpoints/step-...`) the folders above it too."""
    whole = folder.resolve()
    inside = whole.parent.name == "checkpoints"
    return [whole, whole.parent.parent] if inside else [whole]


def _tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer's files are: a run keeps them in a folder of their own."""
    places = [place / inner for place in _run_places(folder) for inner in ("tokenizer", ".")]
    return next((place for place in places if (place / "tokenizer.json").is_file()), folder)
