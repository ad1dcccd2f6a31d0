"""Checkpoints: what they hold, and which are sound. `saving` writes them, `restoring` reads
them.

A checkpoint is a folder `step-00000120/`:

- `shard-*.safetensors`, one a process: weights (`model.*`), optimizer state (`optimizer.*`) and generator states
  (`rng.*`), in the form of torch.distributed.checkpoint's safetensors storage, whose plans let any layout read them.
- `index.json`: which file has which part of which tensor. Those from before it have none.
- `run.json`: step, data position, configuration, versions, chosen operations.
- `SHA256SUMS`: one line a file, as `sha256sum -c` reads it.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from zili.checksums import dealt, read_sums, verify_sums
from zili.errors import CheckpointError
from zili.models.decoder import Decoder
from zili.plugins import place_of
from zili.training.index import INDEX_FILE, TensorIndex, read_index
from zili.training.left_out import LeftOut, consumed, decisions_in

if TYPE_CHECKING:
    from zili.parallel.world import World

RUN_FILE = "run.json"
FORMAT = 1
Named = list[tuple[str, nn.Parameter]]
"""Parameters under their names in the whole model."""
Reads = Callable[[TensorIndex], set[str]]
"""Of a checkpoint, the files that this process is about to read."""
_TOLD = 64
"""Files that a process says it reads. It may read more; then others may hash them."""
_LOG = logging.getLogger(__name__)
_STEP_FOLDER = re.compile(r"step-(\d{8})")


class _Listing(NamedTuple):
    """A checkpoint as the first process finds it: nobody else lists its folder."""

    sums: dict[str, str]
    sizes: dict[str, int]
    contents: TensorIndex


class SoundCheckpoint(NamedTuple):
    """A checkpoint, and what its files hold."""

    path: Path
    contents: TensorIndex
    alone: bool = False
    """Whether `contents` is of this process's own file, which has all that it needs and nothing of others."""


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
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """Batches that were left out (`zili.training.left_out`)."""
    history: list[list[float]] = field(default_factory=list)
    """Number, loss and gradient norm of the last good steps, where every step is judged (`zili.training.spikes`)."""
    operations: dict[str, str] = field(default_factory=dict)
    """Version of each operation by name; a resumed run keeps them, so that its numbers stay the same bits."""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def set_aside(path: Path, why: str = "damaged") -> None:
    """Rename a checkpoint, so that it is none any more and can be looked at."""
    aside = path.with_name(f"{why}-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():  # one from before that cannot be deleted
        aside = aside.with_name(f"{aside.name}-{secrets.token_hex(4)}")
    path.rename(aside)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in `folder`, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry for entry in found if _STEP_FOLDER.fullmatch(entry.name))


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    return int(path.name.removeprefix("step-"))


def newest_sound(
    folder: Path, report: Callable[[str], None], world: World | None = None, reads: Reads = lambda index: set()
) -> SoundCheckpoint | None:
    """The newest checkpoint whose hashes hold; each damaged one is named through `report` and passed over.

    With a `world` all its processes call it and share the work, each by what it `reads`.

    Raises:
        CheckpointError: there are checkpoints and none of them is sound.
    """
    passed = 0
    for path in _candidates(folder, world):
        try:
            _LOG.debug("hashing %s", path)
            return SoundCheckpoint(path, verify(path, world, reads))
        except CheckpointError as error:
            report(f"passing over a damaged checkpoint: {error}")
            passed += 1
    if passed:
        raise CheckpointError(f"all {passed} checkpoints in {folder} are damaged; start the run in a new folder")
    return None


def _candidates(folder: Path, world: World | None) -> Iterator[Path]:
    """Where a run may go on, the best place first: what else holds its state comes in here."""
    yield from reversed(
        list_checkpoints(folder) if world is None else world.from_first(lambda: list_checkpoints(folder))
    )


def has_read(state: RunState, decisions: Sequence[LeftOut]) -> bool:
    """Whether the run of a checkpoint had read a batch that `decisions` leave out: then it is none to go on from."""
    try:
        return consumed(decisions, state.step, decisions_in(state.decisions))
    except (ValueError, TypeError, CheckpointError):
        return False


def verify(path: Path, world: World | None = None, reads: Reads = lambda index: set()) -> TensorIndex:
    """Hash every file; returns what they hold. With a `world` every process hashes its share, and all raise what one
    finds.

    Raises:
        CheckpointError: a file is missing, truncated or changed; the message names it.
    """
    if world is None:
        verify_sums(path, read_sums(path, [RUN_FILE]))
        return read_index(path)
    listing = world.from_first(lambda: _look_at(path))
    own = _share(listing, world, reads(listing.contents))
    world.agree(lambda: verify_sums(path, own), patience=None)
    return listing.contents


def _look_at(path: Path) -> _Listing:
    sums = read_sums(path, [RUN_FILE])
    if INDEX_FILE in sums:
        verify_sums(path, {INDEX_FILE: sums[INDEX_FILE]})
    return _Listing(sums, {name: _size(path / name) for name in sums}, read_index(path))


def _size(file: Path) -> int:
    """Bytes. What is missing weighs nothing: whose share it is in will say so."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _share(listing: _Listing, world: World, read: set[str]) -> dict[str, str]:
    """What this process hashes. Who reads what only each knows itself: the first hears it and deals the files out."""
    names = sorted(listing.sums)
    told = [number for number, name in enumerate(names) if name in read][:_TOLD]
    everyones = world.gathered(json.dumps(told))

    def deal() -> list[int]:
        near: dict[str, list[int]] = defaultdict(list, {INDEX_FILE: [0]})  # hashed before it was read
        for rank, numbers in enumerate(everyones):
            for number in json.loads(numbers):
                near[names[number]].append(rank)
        found = dealt(listing.sizes, world.size, near)
        return [found[name] for name in names]

    hashes = world.from_first(deal)
    own = (name for name, rank in zip(names, hashes, strict=True) if rank == world.rank)
    return {name: listing.sums[name] for name in own if name != INDEX_FILE}


def find_checkpoint(
    path: Path, report: Callable[[str], None] = _LOG.warning, world: World | None = None
) -> Path | None:
    """`path` itself when it is a checkpoint, else the newest sound one below it; hashed as `newest_sound` does."""
    if (path / RUN_FILE).is_file():
        verify(path, world)
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = newest_sound(folder, report, world)
    return None if found is None else found.path


def read_state(path: Path) -> RunState:
    """`run.json` of one checkpoint.

    Raises:
        CheckpointError: missing, broken, or of a format this version does not know.
    """
    try:
        return parsed_state((path / RUN_FILE).read_text(encoding="utf-8"), path)
    except OSError as error:
        raise CheckpointError(f"{path / RUN_FILE} cannot be read: {error!r}") from error


def parsed_state(text: str, path: object) -> RunState:
    """`read_state` of the text of a `run.json`; `path` is what an error names.

    Raises:
        CheckpointError: it is broken, or of a format this version does not know.
    """
    try:
        raw = json.loads(text)
        if raw.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {raw.get('format')!r}; this version reads {FORMAT}")
        state = RunState(**raw)
        if not isinstance(state.config["model"], dict) or not isinstance(state.classes, dict):
            raise TypeError("its model configuration, or its classes, are not a table")
        return state
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{path}/{RUN_FILE} cannot be read: {error!r}") from error


def state_text(state: RunState) -> str:
    """As `run.json` has it."""
    return json.dumps(asdict(state), indent=1) + "\n"


def generator_key(name: str, rank: int) -> str:
    """Under what name a checkpoint has the state of process `rank`'s generator `name`."""
    return f"rng.{name}" if rank == 0 else f"rng.{name}.{rank}"


def check_decoder(path: Path, state: RunState, decoder: type[Decoder]) -> None:
    """Refuse what was trained as a decoder of one's own, and would be opened as another: blocks of equal names may
    compute other things."""
    trained = str(state.classes.get("model", place_of(Decoder)))
    if trained not in (place_of(Decoder), place_of(decoder)):
        name = trained.rpartition(":")[2]
        raise CheckpointError(
            f"{path} was trained with model={trained}, which was given to zili.train, and {place_of(decoder)} cannot "
            f"stand for it; open it in Python: zili.training.restoring.load_model(run, {name})"
        )


def is_of_one_process(key: str) -> bool:
    """Whether a plain tensor is of the process that has it, and not the same on others."""
    return key.startswith("rng.")


def newest_state(folder: Path) -> RunState | None:
    """What the newest checkpoint in `folder` that can be read says of itself; its hashes are not checked."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return read_state(path)
        except CheckpointError:
            continue  # `newest_sound` names the damage when the run resumes
    return None


def model_tensors(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Weights under the names that a checkpoint has them by."""
    return {f"model.{name}": tensor.detach() for name, tensor in named}


def optimizer_tensors(named: Named, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Optimizer state by parameter name. Step counts become `[1]`: a safetensors slice needs a dimension."""
    return {
        f"optimizer.{name}.{key}": value.reshape(1) if value.ndim == 0 else value
        for name, parameter, optimizer in owners(named, optimizers)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def owners(named: Named, optimizers: list[Optimizer]) -> Iterator[tuple[str, nn.Parameter, Optimizer]]:
    """Each parameter with its name and the optimizer that has it."""
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in named:
        if id(parameter) in owner:
            yield name, parameter, owner[id(parameter)]
