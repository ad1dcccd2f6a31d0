"""Checkpoints: what they hold, whether they are sound, and how a run takes them up again. `saving` writes them.

A checkpoint is a folder `step-00000120/`:

- `shard-*.safetensors`, one a process: weights (`model.*`), optimizer state (`optimizer.*`) and generator states
  (`rng.*`), written by torch.distributed.checkpoint's safetensors storage, whose plans let any layout read them.
- `run.json`: step, data position, configuration, versions, chosen operations.
- `SHA256SUMS`: one line a file, as `sha256sum -c` reads it.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.optim import Optimizer

from zili.checksums import read_sums, share_of, verify_sums
from zili.config import ModelConfig
from zili.errors import CheckpointError
from zili.models.arithmetic import parameter_shapes
from zili.models.decoder import Decoder
from zili.plugins import place_of

if TYPE_CHECKING:
    from zili.parallel.world import World

RUN_FILE = "run.json"
FORMAT = 1
Named = list[tuple[str, nn.Parameter]]
"""Parameters under their names in the whole model."""
_LOG = logging.getLogger(__name__)
_STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class RunState:
    """What `run.json` holds: where the run stands and what it is."""

    step: int
    """Optimizer steps done."""
    samples: int
    """Global count of samples consumed: the whole data position."""
    config: dict[str, Any]
    data_fingerprint: str
    teacher_fingerprint: str = ""
    """Fingerprint of the teacher's weights (`zili.release.weights_fingerprint`); empty: there is none."""
    classes: dict[str, str] = field(default_factory=dict)
    """`objective` and `model`, as `zili.train` takes them: `zili.plugins.place_of` their classes."""
    operations: dict[str, str] = field(default_factory=dict)
    """Version of each operation by name; a resumed run keeps them, so that its numbers stay the same bits."""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def set_aside_after(path: Path) -> None:
    """Rename the checkpoints newer than `path`, which a run passed over as damaged: they no longer count as kept."""
    for later in list_checkpoints(path.parent):
        if later.name > path.name:
            aside = later.with_name(f"damaged-{later.name}")
            shutil.rmtree(aside, ignore_errors=True)
            if aside.exists():  # one from before that cannot be deleted
                aside = aside.with_name(f"{aside.name}-{secrets.token_hex(4)}")
            later.rename(aside)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in `folder`, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry for entry in found if _STEP_FOLDER.fullmatch(entry.name))


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    return int(path.name.removeprefix("step-"))


def newest_sound(folder: Path, report: Callable[[str], None], world: World | None = None) -> Path | None:
    """The newest checkpoint whose hashes hold; each damaged one is named through `report` and passed over.

    With a `world` all its processes call it and share the work.

    Raises:
        CheckpointError: there are checkpoints and none of them is sound.
    """
    checkpoints = list_checkpoints(folder) if world is None else world.from_first(lambda: list_checkpoints(folder))
    for path in reversed(checkpoints):
        try:
            _LOG.debug("hashing %s", path)
            verify(path, world)
        except CheckpointError as error:
            report(f"passing over a damaged checkpoint: {error}")
        else:
            return path
    if checkpoints:
        raise CheckpointError(
            f"all {len(checkpoints)} checkpoints in {folder} are damaged; start the run in a new folder"
        )
    return None


def verify(path: Path, world: World | None = None) -> None:
    """Hash every file again; with a `world`, every process its share, and all raise what one finds.

    Raises:
        CheckpointError: a file is missing, truncated or changed; the message names it.
    """
    if world is None:
        verify_sums(path, read_sums(path, [RUN_FILE]))
        return
    # Dealt out by what the first sees, since all have to deal alike.
    sums, sizes = world.from_first(lambda: _sums_and_sizes(path))
    own = {name: sums[name] for name in share_of(sizes, world.rank, world.size)}
    world.agree(lambda: verify_sums(path, own), patience=None)


def _sums_and_sizes(path: Path) -> tuple[dict[str, str], dict[str, int]]:
    sums = read_sums(path, [RUN_FILE])
    # What is missing weighs nothing: whose share it is in will say so.
    return sums, {name: (path / name).stat().st_size if (path / name).exists() else 0 for name in sums}


def read_state(path: Path) -> RunState:
    """`run.json` of one checkpoint.

    Raises:
        CheckpointError: missing, broken, or of a format this version does not know.
    """
    try:
        raw = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        if raw.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {raw.get('format')!r}; this version reads {FORMAT}")
        state = RunState(**raw)
        if not isinstance(state.config["model"], dict) or not isinstance(state.classes, dict):
            raise TypeError("its model configuration, or its classes, are not a table")
        return state
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{path / RUN_FILE} cannot be read: {error!r}") from error


def restore(
    path: Path, config: ModelConfig, tensors: dict[str, Tensor], named: Named, optimizers: list[Optimizer], rank: int
) -> dict[str, Tensor]:
    """Fill weights and optimizer state in place; returns the generator states of process `rank` by name.

    `tensors` (from `model_tensors`) and the parameters `named` are what this process has a part of. It reads only those
    parts, whatever the layout was that wrote them. A process that was not there has no generator states: the result is
    empty then.

    Raises:
        CheckpointError: the checkpoint is of another model or optimizer.
    """
    metadata = _metadata(path)
    wanted = {f"model.{name}" for name in parameter_shapes(config)}
    _check_same_keys(path, {key for key in metadata if key.startswith("model.")}, wanted)
    states = _empty_optimizer_state(path, config, named, optimizers, metadata)
    tensors = {**tensors, **{key: tensor for key, (_, _, tensor) in states.items()}}
    rng = {
        key: torch.empty(entry.size, dtype=torch.uint8)
        for key, entry in metadata.items()
        if key.startswith("rng.") and generator_key(key.split(".")[1], rank) == key
    }
    _read(path, {**tensors, **rng}, metadata)
    for key, (optimizer, parameter, tensor) in states.items():
        name = key.rpartition(".")[2]
        optimizer.state[parameter][name] = tensor.reshape(()) if name == "step" else tensor
    return {key.split(".")[1]: value for key, value in rng.items()}


def generator_key(name: str, rank: int) -> str:
    """Under what name a checkpoint has the state of process `rank`'s generator `name`."""
    return f"rng.{name}" if rank == 0 else f"rng.{name}.{rank}"


def load_model(path: Path, decoder: type[Decoder] = Decoder) -> Decoder:
    """The decoder of a checkpoint, in eval mode on the CPU. `path`: a checkpoint, or a run folder holding some;
    `decoder`: the kind that it was trained as.

    Raises:
        CheckpointError: no sound checkpoint there, or it is of another kind.
    """
    found = find_checkpoint(path)
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint; give a run folder or a step-... folder")
    state = read_state(found)
    check_decoder(found, state, decoder)
    config = ModelConfig.model_validate(state.config["model"])
    with torch.device("meta"):
        model = decoder(config)
    model.to_empty(device="cpu")
    tensors, metadata = model_tensors(model.named_tensors()), _metadata(found)
    # What an objective learned beside the decoder stays where it is.
    _check_same_keys(found, metadata.keys() & tensors.keys(), set(tensors))
    _read(found, tensors, metadata)
    return model.eval()


def check_decoder(path: Path, state: RunState, decoder: type[Decoder]) -> None:
    """Refuse what was trained as a decoder of one's own, and would be opened as another: blocks of equal names may
    compute other things."""
    trained = str(state.classes.get("model", place_of(Decoder)))
    if trained not in (place_of(Decoder), place_of(decoder)):
        name = trained.rpartition(":")[2]
        raise CheckpointError(
            f"{path} was trained with model={trained}, which was given to zili.train, and {place_of(decoder)} cannot "
            f"stand for it; open it in Python: zili.training.checkpoints.load_model(run, {name})"
        )


def find_checkpoint(
    path: Path, report: Callable[[str], None] = _LOG.warning, world: World | None = None
) -> Path | None:
    """`path` itself when it is a checkpoint, else the newest sound one below it; hashed as `newest_sound` does."""
    if (path / RUN_FILE).is_file():
        verify(path, world)
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return newest_sound(folder, report, world)


def newest_state(folder: Path) -> RunState | None:
    """What the newest checkpoint in `folder` that can be read says of itself; its hashes are not checked."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return read_state(path)
        except CheckpointError:
            continue  # `newest_sound` names the damage when the run resumes
    return None


@contextmanager
def one_process() -> Iterator[None]:
    """Without torch's warning that there is one process: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def model_tensors(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Weights under the names that a checkpoint has them by."""
    return {f"model.{name}": tensor.detach() for name, tensor in named}


def optimizer_tensors(named: Named, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Optimizer state by parameter name. Step counts become `[1]`: a safetensors slice needs a dimension."""
    return {
        f"optimizer.{name}.{key}": value.reshape(1) if value.ndim == 0 else value
        for name, parameter, optimizer in _owners(named, optimizers)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _empty_optimizer_state(
    path: Path, config: ModelConfig, named: Named, optimizers: list[Optimizer], metadata: dict[str, Any]
) -> dict[str, tuple[Optimizer, nn.Parameter, Tensor]]:
    """Room for the `optimizer.*` tensors of the checkpoint, shaped and placed like the parameters they belong to."""
    owners = {name: (optimizer, parameter) for name, parameter, optimizer in _owners(named, optimizers)}
    known = parameter_shapes(config)
    states = {}
    for key, entry in metadata.items():
        if not key.startswith("optimizer."):
            continue
        name, _, state_name = key.removeprefix("optimizer.").rpartition(".")
        if name not in known:
            raise CheckpointError(f"{path} holds optimizer state of {name}, which this run does not train")
        if name not in owners:
            continue  # another process of the pipeline has it
        optimizer, parameter = owners[name]
        whole = entry.size == parameter.shape and state_name != "step"
        # A fused optimizer counts its steps on the device, the others on the host.
        device = parameter.device if optimizer.defaults.get("fused") else None
        room = torch.empty_like(parameter) if whole else torch.empty(entry.size, device=device)
        states[key] = (optimizer, parameter, room.detach())
    _check_state_kinds(path, states, optimizers)
    return states


def _check_state_kinds(path: Path, states: dict[str, Any], optimizers: list[Optimizer]) -> None:
    """Refuse Muon's state for AdamW and the reverse: momentum under another name would be silently lost."""
    wanted = {type(optimizer).__name__: optimizer for optimizer in optimizers}
    for key, (optimizer, _, _) in states.items():
        muon_state = key.endswith(".momentum_buffer")
        if muon_state != (type(optimizer).__name__ == "Muon"):
            raise CheckpointError(
                f"{path} was saved with another optimizer ({key}) than this run's {' + '.join(wanted)}; "
                "resume with the same optimizer.name or start in a new folder"
            )


def _owners(named: Named, optimizers: list[Optimizer]) -> Iterator[tuple[str, nn.Parameter, Optimizer]]:
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in named:
        if id(parameter) in owner:
            yield name, parameter, owner[id(parameter)]


def _metadata(path: Path) -> dict[str, Any]:
    try:
        return HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    for key, tensor in tensors.items():
        if metadata[key].size != tensor.shape:
            raise CheckpointError(
                f"{path}: {key} has shape {list(metadata[key].size)}, this model expects {list(tensor.shape)}"
            )
    with one_process():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


def _check_same_keys(path: Path, found: set[str], wanted: set[str]) -> None:
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        parts = [
            f"{len(names)} {what} (first: {names[0]})"
            for what, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
        raise CheckpointError(f"{path} is of another model: {', '.join(parts)} tensors")
