"""Opening any model folder: names, shapes and a way to read, and from there a decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from zili.checksums import SUMS_FILE
from zili.config.model import ModelConfig
from zili.data.tokenizer import has_tokenizer
from zili.errors import CheckpointError
from zili.models.arithmetic import is_adapter, parameter_shapes
from zili.models.decoder import Decoder
from zili.release.checkpoint import open_checkpoint
from zili.release.folder import read_json
from zili.release.gguf.file import find_gguf, open_gguf
from zili.release.layouts.deepseek import DeepSeek
from zili.release.layouts.gguf import GGUF
from zili.release.layouts.layout import PublishedConfig, PublishedLayout, recognise
from zili.release.layouts.llama import Llama, TeleChat3, TeleFLM
from zili.release.layouts.mapping import ImportedTensors, check_tensors
from zili.release.layouts.telechat2 import TeleChat2
from zili.release.layouts.telechat52 import TeleChat52
from zili.release.native import MODEL_FILE, Origin, is_native, read_model_file, read_native
from zili.release.tensors import Index, Tensors, open_tensors
from zili.training.parts import box_of

LAYOUTS: tuple[PublishedLayout, ...] = (TeleChat2(), Llama(), TeleChat3(), TeleFLM(), TeleChat52(), DeepSeek())
"""In the order `export_model` tries them for a model that was never published."""
GGUF_LAYOUT = GGUF()
"""Apart, as it is no folder with a config.json."""
_WEIGHTS = (".safetensors", ".gguf", ".bin")


@dataclass(frozen=True)
class OpenModel:
    """A model whose weights are still on disk."""

    config: ModelConfig
    tensors: Tensors
    """Under Zili's names."""
    origin: Origin | None
    companions: Path
    """Folder of the tokenizer and its like."""
    checkpoint: Path | None = None
    """The training checkpoint that the weights are in; None: a model folder."""

    @property
    def dtypes(self) -> set[torch.dtype]:
        """In which the weights are stored."""
        return {tensor.dtype for tensor in self.tensors.describe().values()}


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


@torch.no_grad()
def fill_from(parts: Iterable[Decoder], model: OpenModel) -> None:
    """Fill the weights of `parts`, decoders or parts of one as a training process has them, from any model.

    Of a weight that is cut over processes each reads the part it has, in whatever form the folder is; nothing crosses
    processes. Weights keep their dtype.

    Raises:
        CheckpointError: as `load`, or `parts` are of another model.
    """
    # No dict: two parts of a pipeline in one process may have an embedding each.
    wanted = [named for part in parts for named in part.named_tensors()]
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted}
    described = model.tensors.describe()
    # Adapters begin as they were drawn: what they adapt has none.
    wanted = [(name, tensor) for name, tensor in wanted if name in described or not is_adapter(name)]
    shapes = {name: shapes[name] for name, _ in wanted}
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
    return tuple(slice(start, start + size) for start, size in zip(*box_of(tensor), strict=True))


def identity(folder: Path) -> str:
    """Tells copies of a folder that `load` takes apart by names and sizes of weight files, and by listed hashes."""
    digest = hashlib.sha256()
    for file in sorted([folder, *folder.rglob("*")]):
        name = file.relative_to(folder)
        if not file.is_file():
            continue
        if file.suffix in _WEIGHTS and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name} {file.stat().st_size}\n".encode())
        elif file.name in (SUMS_FILE, MODEL_FILE):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def weights_fingerprint(model: OpenModel) -> str:
    """Tells models apart by their weights, wherever a folder lies and in whatever form: of each matrix the row in the
    middle, each vector whole, as fp32. Training changes every row of what it trains, but rows of an embedding."""
    digest, tensors = hashlib.sha256(), model.tensors.stored
    wanted = parameter_shapes(model.config)
    for name, shape in sorted((name, tensor.shape) for name, tensor in tensors.describe().items()):
        if name in wanted or is_adapter(name):
            index = *(slice(size // 2, size // 2 + 1) for size in shape[:-1]), slice(0, shape[-1])
            row = tensors.read(name, index).float().contiguous()
            digest.update(f"{name} {list(shape)} ".encode() + row.numpy().tobytes())
    return digest.hexdigest()


def open_model(folder: Path, *, hashed: bool = False, decoder: type[Decoder] = Decoder) -> OpenModel:
    """Any folder `load` takes, as names, shapes and a way to read them. `hashed` and `decoder` as `open_checkpoint`
    has them."""
    if is_native(folder):
        config, origin, tensors = read_native(folder)
        return OpenModel(config, tensors, origin, folder)
    if is_published(folder):
        return open_published(folder)
    file = find_gguf(folder)
    if file is not None:
        return open_gguf_model(file)
    config, tensors, found = open_checkpoint(folder, hashed=hashed, decoder=decoder)
    around = [place for place in run_places(folder) if (place / MODEL_FILE).is_file()]
    origin = read_model_file(around[0])[1] if around else None
    return OpenModel(config, tensors, origin, _tokenizer_folder(folder), found)


def open_gguf_model(file: Path) -> OpenModel:
    """A GGUF file of the Llama architecture, its tensors' names and shapes checked."""
    values, published, _ = open_gguf(file)
    return _recognised((GGUF_LAYOUT,), PublishedConfig(file, values), published, file)


def open_published(folder: Path) -> OpenModel:
    """A Hugging Face folder, its layout recognised and its tensors' names and shapes checked."""
    config = PublishedConfig(folder / "config.json", read_json(folder / "config.json"))
    return _recognised(LAYOUTS, config, open_tensors(folder), folder)


def _recognised(
    layouts: tuple[PublishedLayout, ...], config: PublishedConfig, published: Tensors, place: Path
) -> OpenModel:
    described = published.describe()
    layout = recognise(layouts, config, set(described))
    names = {name for name in described if not layout.ignored.search(name)}
    model = layout.read_config(config, names)
    _check_experts(model, described, config.path)
    variant = layout.find_variant(model, names)
    check_tensors({name: described[name] for name in names}, layout.published_shapes(model, variant), place)
    for name, other in layout.repeats(model, variant, set(described)).items():
        _check_repeat(published, name, other, config.path)
    tensors = ImportedTensors(published, layout.rules(model, variant))
    return OpenModel(model, tensors, Origin(layout.name, variant, config.values), place)


def _check_experts(model: ModelConfig, described: dict[str, Tensor], config: Path) -> None:
    """Names are made for each expert that a file counts: no more than some tensor has rows for, as a router has."""
    rows = max((size for tensor in described.values() for size in tensor.shape), default=0)
    if model.mixture is not None and model.mixture.experts > rows:
        raise CheckpointError(
            f"{config}: counts {model.mixture.experts:,} experts; no tensor has more than {rows:,} rows"
        )


def _check_repeat(published: Tensors, name: str, other: str, config: Path) -> None:
    if torch.equal(published.read(name), published.read(other)):
        return
    if name != "lm_head.weight":
        raise CheckpointError(f"{config.parent}: {name} should repeat {other} and does not; fetch the weights again")
    raise CheckpointError(
        f"{config} ties the head to the embedding, yet lm_head.weight is not {other}; if the head is its own, set "
        "tie_word_embeddings to false"
    )


def is_published(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def run_places(folder: Path) -> list[Path]:
    """A run folder, or for one of its checkpoints (`RUN/checkpoints/step-...`) the folders above it too."""
    whole = folder.resolve()
    inside = whole.parent.name == "checkpoints"
    return [whole, whole.parent.parent] if inside else [whole]


def _tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer's files are: a run keeps them in a folder of their own."""
    places = [place / inner for place in run_places(folder) for inner in ("tokenizer", ".")]
    return next((place for place in places if has_tokenizer(place)), folder)
