"""Machines that do not share what they have to, and work that they share."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st
from many import files_of, on_processes, open_trainer, world_here

from zili import checksums
from zili.config import RunConfig
from zili.data import store as store_module
from zili.data.store import TokenStore
from zili.errors import CheckpointError, ConfigError, DataError, ZiliError
from zili.parallel import machines
from zili.parallel import world as world_module
from zili.parallel.machines import check_same, check_shared_folder
from zili.runs import opening
from zili.training import checkpoints
from zili.training.tiers import run_folder

Recipe = Callable[..., RunConfig]


def raised_by(work: Callable[[], object]) -> tuple[type, str, bool] | None:
    try:
        work()
    except ZiliError as error:
        return type(error), str(error), error.agreed
    return None


@contextmanager
def impatient() -> Iterator[None]:
    """Without the seconds that a network file system may take to show a file."""
    with mock.patch("zili.durable.soon.__defaults__", (0.3,)):
        yield


def probes(shared: Path, own: Path) -> dict[str, Any]:
    """What two processes find of folders that they share, do not share, and share in one direction."""
    world = world_here(2)
    apart = own / str(world.rank)
    kept = mock.patch.object(machines.Path, "touch") if world.rank else mock.patch.object(machines, "_CURE", "")
    with impatient():
        found = {
            "shared": raised_by(lambda: check_shared_folder(world, shared)),
            "apart": raised_by(lambda: check_shared_folder(world, apart)),
            "none": raised_by(lambda: check_shared_folder(world, apart / "absent")),
        }
        with kept:
            found["what the other writes stays with it"] = raised_by(lambda: check_shared_folder(world, shared))
    found["same"] = raised_by(lambda: check_same(world, "stores", "a"))
    found["other"] = raised_by(lambda: check_same(world, "stores", str(world.rank)))
    return found


def test_a_folder_that_is_not_one_for_all_is_refused_by_all(tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    for folder in (shared, own / "0", own / "1"):
        folder.mkdir(parents=True)
    first, last = on_processes(2, probes, shared, own)
    assert first == last, "all processes raise the same"
    assert first["shared"] is None and first["same"] is None
    for case, parts in {
        "apart": ["process 1 on ", "does not see in", "process 0 on ", "all machines share"],
        "what the other writes stays with it": ["process 0 on ", "1 of 2 processes", "process 1"],
    }.items():
        kind, text, agreed = first[case]
        assert kind is ConfigError and agreed
        assert [part for part in parts if part not in text] == [], text
    assert first["none"][0] is ConfigError and "cannot be written" in first["none"][1]
    assert first["other"][0] is DataError and "process 1 on" in first["other"][1]
    assert not list(tmp_path.rglob("*shared-*")), "the probes are swept away"


def save_at(config: RunConfig, place: Path) -> tuple[type, str, bool] | None:
    """Train on from a copy of a run that this process alone sees."""
    os.chdir(place / os.environ["RANK"])
    trainer = open_trainer(config)
    assert trainer.resume() and trainer.step == 4
    with impatient():
        return raised_by(trainer.fit)


def test_no_checkpoint_appears_or_goes_while_files_are_on_another_machine(recipe: Recipe, tmp_path: Path) -> None:
    """A sound run, copied to two machines that share nothing: both copies stay as they were."""
    config = recipe("folder=run", "training.steps=4", "training.micro_batch=1")
    for rank in "01":
        (tmp_path / "places" / rank).mkdir(parents=True)
    with chdir(tmp_path / "places" / "0"):
        open_trainer(config).fit()
    shutil.copytree(tmp_path / "places" / "0", tmp_path / "places" / "1", dirs_exist_ok=True)
    sound = {rank: files_of(tmp_path / "places" / rank / "run" / "checkpoints") for rank in "01"}
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 8})})
    found = on_processes(2, save_at, longer, tmp_path / "places")
    for kind, text, _ in found:
        assert kind is CheckpointError and "shard-00002." in text and "not shared by all machines" in text
    for rank in "01":
        here = tmp_path / "places" / rank / "run" / "checkpoints"
        assert [file for file in files_of(here) if not file.startswith(".")] == sound[rank]
        for path in checkpoints.list_checkpoints(here):
            checkpoints.verify(path)


def ends_at(config: RunConfig) -> tuple[Any, int]:
    """How and where a run ends whose last process finds its disk full at every save but the first."""
    trainer = open_trainer(config)
    real = run_folder._written

    def written(file: Path) -> Any:
        if trainer.world.rank == 1 and file.parent.name != ".step-00000002":
            raise OSError(28, "No space left on device")
        return real(file)

    with mock.patch.object(run_folder, "_written", written):
        return raised_by(trainer.fit), trainer.step


def test_a_disk_that_is_full_for_one_process_ends_the_run_for_all_at_one_step(recipe: Recipe) -> None:
    config = recipe("training.steps=60", "training.micro_batch=1", "checkpoint.patience=3")
    first, last = on_processes(2, ends_at, config)
    assert first == last
    (kind, text, _), step = first
    assert kind is CheckpointError and "3 saves in a row failed" in text and "No space left on device" in text
    assert 8 <= step <= 12, "saves at 4, 6 and 8 failed; it is told at the next step or save, and done two steps later"
    kept = checkpoints.list_checkpoints(config.folder / "checkpoints")
    assert [path.name for path in kept] == ["step-00000002"]


HASH_SECONDS = 5
"""Of the first process; longer than a collective may wait in these tests."""


@contextmanager
def hashing(module: Any, function: str, seconds: float) -> Iterator[list[str]]:
    """The files that this process hashes, each after `seconds`."""
    files: list[str] = []
    real = getattr(module, function)

    def slow(path: Path) -> Any:
        time.sleep(seconds)
        files.append(path.name)
        return real(path)

    with mock.patch.object(module, function, slow):
        yield files


def hashed_together(checkpoint: Path, store: Path) -> dict[str, Any]:
    """Who hashes what of a checkpoint and of a token store, the first process slowly, and how damage is met."""
    with mock.patch.object(world_module, "SECONDS", HASH_SECONDS - 2):
        world = world_here(2)
    found: dict[str, Any] = {}
    with hashing(checksums, "sha256", 0 if world.rank else HASH_SECONDS) as found["checkpoint"]:
        checkpoints.verify(checkpoint, world)
    stores = [TokenStore.open(store)]
    with hashing(store_module, "measure", 0 if world.rank else HASH_SECONDS) as found["store"]:
        opening._verify(stores, world)
    for name, path in {"damaged checkpoint": checkpoint / "shard-3", "damaged store": Path(f"{store}.bin")}.items():
        world.from_first(lambda path=path: flip(path))  # type: ignore[misc]
        check = (
            (lambda: opening._verify(stores, world))
            if "store" in name
            else lambda: checkpoints.verify(checkpoint, world)
        )
        found[name] = raised_by(check)
    notes: list[str] = []
    newest = world.agree(lambda: checkpoints.newest_sound(checkpoint.parent, notes.append, world))
    found["newest"] = newest.path.name if newest else None
    found["notes"] = notes
    return found


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_processes_share_the_hashing_and_none_waits_in_vain_for_a_slow_one(tmp_path: Path, tiny_data: Path) -> None:
    """A collective may wait three seconds here, and the first process hashes for more than five."""
    for step, sizes in {1: [10], 2: [900, 30, 400, 500, 20]}.items():
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for number, size in enumerate(sizes):
            (folder / f"shard-{number}").write_bytes(bytes([number]) * size)
        (folder / "run.json").write_text("{}")
        listing = subprocess.run(
            ["sha256sum", *sorted(file.name for file in folder.iterdir())], cwd=folder, capture_output=True, check=True
        )
        (folder / "SHA256SUMS").write_bytes(listing.stdout)
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(tiny_data / f"train{suffix}", tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    first, last = on_processes(2, hashed_together, checkpoint, tmp_path / "train")
    # 900 against 500 + 400; then 30 to the one, 20 and 2 to the other.
    assert sorted(first["checkpoint"]) == ["shard-0", "shard-1"]
    assert sorted(last["checkpoint"]) == ["run.json", "shard-2", "shard-3", "shard-4"]
    assert sorted(first["store"] + last["store"]) == ["train.bin", "train.idx"] and first["store"] and last["store"]
    assert first["damaged checkpoint"] == last["damaged checkpoint"]
    kind, text, agreed = first["damaged checkpoint"]
    assert kind is CheckpointError and "shard-3 is damaged" in text and agreed
    kind, text, agreed = first["damaged store"]
    assert kind is DataError and "train.bin: content changed" in text and agreed
    for own in (first, last):
        assert own["newest"] == "step-00000001"
        assert len(own["notes"]) == 1 and "shard-3 is damaged" in own["notes"][0]


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(0, 1000), max_size=30),
    st.integers(1, 9),
)
def test_shares_are_all_the_files_and_even(sizes: dict[str, int], parts: int) -> None:
    """A file goes to one process, and no two processes differ by more than the largest file."""
    shares = [checksums.share_of(sizes, part, parts) for part in range(parts)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
