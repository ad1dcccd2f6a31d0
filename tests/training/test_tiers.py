"""Checkpoint tiers beside the run's folder, on one process: what goes where, what a run goes on from, what fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tiny_run import (
    At,
    Recipe,
    Recorder,
    Saves,
    assert_same_bits,
    die,
    final_tensors,
    interrupt,
    open_trainer,
    run_apart,
    train,
)

from zili.config import RunConfig
from zili.errors import CheckpointError, ConfigError
from zili.training.callbacks import Callback
from zili.training.checkpoints import list_checkpoints, verify
from zili.training.parts import streamed
from zili.training.saving import Saver
from zili.training.tiers import local_disk, object_store, run_folder, store
from zili.training.tiers.object_store import ObjectStore
from zili.training.tiers.store import Store
from zili.training.trainer import Trainer

DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """The folder of a store that is a folder."""
    return tmp_path / "bucket"


def tiers(*entries: str) -> str:
    """The override that lists them."""
    return f"checkpoint.tiers=[{', '.join(entries)}]"


def tier(place: Path | str, every: int, keep: int = 2) -> str:
    url = f"file://{place}" if isinstance(place, Path) and place.name == "bucket" else place
    return f'{{place = "{url}", every = {every}, keep = {keep}}}'


def tables(disk: Path, bucket: Path, every: int) -> list[dict[str, Any]]:
    return [{"place": str(disk), "every": every}, {"place": f"file://{bucket}", "every": every}]


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(folder)]


def both(disk: Path, bucket: Path) -> str:
    return tiers(tier(disk, 1), tier(bucket, 3))


@pytest.fixture
def whole(recipe: Recipe) -> dict[str, Any]:
    """The end of a run of 6 steps that nothing befell."""
    config = recipe(*DROPOUT)
    train(config)
    found = final_tensors(config)
    shutil.rmtree(config.folder)
    return found


def test_each_tier_gets_what_is_due_there_and_keeps_its_own_number(
    recipe: Recipe, disk: Path, bucket: Path, whole: dict[str, Any]
) -> None:
    saves = Saves()
    config = recipe(*DROPOUT, both(disk, bucket))
    train(config, saves)
    assert steps(config.folder / "checkpoints") == [4, 6] and steps(disk) == [5, 6] and steps(bucket) == [3, 6]
    assert sorted(saves.saved) == sorted(
        [f"{config.folder}/checkpoints/step-0000000{step}" for step in (2, 4, 6)]
        + [f"{disk}/step-0000000{step}" for step in range(1, 7)]
        + [f"file://{bucket}/step-0000000{step}" for step in (3, 6)]
    )
    assert saves.notes == []
    assert_same_bits(final_tensors(config), whole)
    for path in (*list_checkpoints(bucket), *list_checkpoints(config.folder / "checkpoints")):
        verify(path)
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, check=True, capture_output=True)


def lose(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def flip(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("lost", "step", "place"), [((), 5, "disk"), (("disk",), 4, "run"), (("disk", "run"), 3, "bucket")]
)
def test_the_same_bits_whichever_tier_it_goes_on_from(
    recipe: Recipe,
    disk: Path,
    bucket: Path,
    whole: dict[str, Any],
    tmp_path: Path,
    lost: tuple[str, ...],
    step: int,
    place: str,
) -> None:
    config = recipe(*DROPOUT, both(disk, bucket))
    # Interrupted, it would save everywhere.
    with pytest.raises(RuntimeError, match="as if killed"):
        train(config, Saves(), At(6, _fail))
    for name in lost:
        lose(tmp_path / name)
    heard = Recorder()
    trainer = open_trainer(config, [heard])
    assert trainer.resume() and trainer.step == step
    assert f"/{place}/" in heard.notes[-1] or (place == "bucket" and f"{bucket}" in heard.notes[-2])
    trainer.fit()
    assert_same_bits(final_tensors(config), whole)


def _fail() -> None:
    raise RuntimeError("as if killed")


def test_damage_is_passed_over_tier_by_tier_and_step_by_step_and_each_is_named(
    recipe: Recipe, disk: Path, bucket: Path, whole: dict[str, Any]
) -> None:
    config = recipe(*DROPOUT, "checkpoint.every=3", tiers(tier(disk, 3), tier(bucket, 3)))
    train(config)
    for folder in (disk, config.folder / "checkpoints", bucket):
        flip(list_checkpoints(folder)[-1])
    flip(list_checkpoints(disk)[0])
    heard = Recorder()
    trainer = open_trainer(config, [heard])
    assert trainer.resume() and trainer.step == 3
    named = [(f"the local disk {disk}", 6), ("the run's folder", 6), (f"the store file://{bucket}", 6)]
    named.append((f"the local disk {disk}", 3))
    assert len(heard.notes) == 5, heard.notes
    for note, (title, step) in zip(heard.notes, named, strict=False):
        assert note.startswith(f"passing over step {step} in {title}: ") and "damaged" in note
    assert "resumed from" in heard.notes[4] and "/run/checkpoints/step-00000003" in heard.notes[4]
    assert steps(bucket) == [3, 6] and not (bucket / "step-00000006/SHA256SUMS").exists(), "set aside"
    trainer.fit()
    assert_same_bits(final_tensors(config), whole)
    assert (bucket / "step-00000006/SHA256SUMS").exists() and steps(disk) == [6], "set aside, neither counts"


def test_an_older_step_that_a_store_gives_stays_beside_damaged_newer_ones(recipe: Recipe, bucket: Path) -> None:
    config = recipe("checkpoint.every=1", tiers(tier(bucket, 2, keep=9)))
    train(config, Saves())
    for step in (5, 6):
        flip(config.folder / f"checkpoints/step-0000000{step}")
        (bucket / f"step-0000000{step}/SHA256SUMS").unlink(missing_ok=True)
    heard = Recorder()
    trainer = open_trainer(config, [heard])
    assert trainer.resume() and trainer.step == 4 and "was brought from the store" in heard.notes[-2]
    assert steps(config.folder / "checkpoints") == [4]


def test_a_local_disk_that_vanishes_at_the_end_of_a_save_leaves_no_process_alone(recipe: Recipe, disk: Path) -> None:
    """All say what they have to say in one turn, whatever befalls one of them."""
    gone = OSError(5, "Input/output error")
    saves = Saves()
    with refused(local_disk.LocalDisk, "_steps", lambda self: (disk / "step-00000006").exists(), gone):
        assert train(recipe("checkpoint.every=0", tiers(tier(disk, 3))), saves).done
    assert [text for _, text in saves.notes if "cannot be listed: [Errno 5]" in text] and steps(disk) == [3, 6]


def test_what_a_run_went_back_before_counts_until_something_newer_is_whole(recipe: Recipe, bucket: Path) -> None:
    """The store was not there when the run went on from an older step of its folder."""
    config = recipe("training.steps=4", "checkpoint.every=2", tiers(tier(bucket, 4)))
    train(config, Saves())
    shutil.rmtree(config.folder / "checkpoints/step-00000004")
    trainer = open_trainer(recipe("training.steps=3", "checkpoint.every=2", tiers(tier(bucket, 4))))
    with refused(ObjectStore, "_steps", lambda *_: True, CheckpointError("no answer")):
        assert trainer.resume() and trainer.step == 2
    with refused(Store, "put", lambda self, file, *_: "step-00000003/run.json" in file, NO_NET):
        trainer.fit()
    assert (bucket / "step-00000004/SHA256SUMS").exists()
    trainer = open_trainer(recipe("training.steps=3", tiers(tier(bucket, 4))))
    with refused(ObjectStore, "offers", lambda *_: True, CheckpointError("no answer")):
        assert trainer.resume() and trainer.step == 3
    trainer.fit()
    assert [path.parent.name for path in bucket.glob("*/SHA256SUMS")] == ["step-00000003"]


def test_with_an_empty_run_folder_the_store_alone_gives_the_run_back(
    recipe: Recipe, bucket: Path, whole: dict[str, Any]
) -> None:
    config = recipe(*DROPOUT, tiers(tier(bucket, 3)))
    train(config)
    lose(config.folder)
    heard = Recorder()
    trainer = open_trainer(config, [heard])
    assert trainer.resume() and trainer.done
    trainer.fit()
    (path,) = list_checkpoints(config.folder / "checkpoints")
    verify(path)
    assert_same_bits(final_tensors(config), whole)


def test_what_only_a_near_tier_has_is_in_all_at_the_end(recipe: Recipe, disk: Path, bucket: Path) -> None:
    config = recipe("checkpoint.every=0", tiers(tier(disk, 1), tier(bucket, 0)))
    trainer = train(config, Saves(), At(4, interrupt))
    assert trainer.interrupted
    for folder in (disk, bucket, config.folder / "checkpoints"):
        assert steps(folder)[-1] == 4
    lose(config.folder)
    lose(bucket)
    again = open_trainer(recipe("training.steps=4", "checkpoint.every=0", tiers(tier(disk, 1), tier(bucket, 0))))
    assert again.resume() and again.done
    again.fit()
    assert steps(bucket) == steps(config.folder / "checkpoints") == [4]


def refused(target: Any, name: str, when: Callable[..., bool], error: Exception) -> Any:
    real = getattr(target, name)

    def call(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise error
        return real(*arguments, **options)

    return mock.patch.object(target, name, call)


FULL = OSError(28, "No space left on device")
NO_NET = ConnectionError("the network is unreachable")


def test_a_tier_that_fails_is_a_line_at_the_next_step_with_cause_and_what_is_left(
    recipe: Recipe, disk: Path, bucket: Path
) -> None:
    saves = Saves()
    config = recipe("checkpoint.every=2", tiers(tier(disk, 2), tier(bucket, 2)))
    with (
        refused(Store, "_opened", lambda self, path: "step-00000004" in path, NO_NET),
        refused(local_disk, "write_parts", lambda file, parts: "step-00000002" in str(file), FULL),
    ):
        train(config, saves)
    (first, of_disk), (second, of_store) = saves.notes
    assert first in (2, 3) and f"the local disk {disk} has not taken step 2" in of_disk and "No space left" in of_disk
    assert second in (4, 5) and f"the store file://{bucket} has not taken step 4" in of_store
    assert "the network is unreachable" in of_store and "see whether it can be reached" in of_store
    assert "There is: " in of_store and "step 2 in the store" in of_store
    assert steps(disk) == [4, 6] and steps(bucket) == [2, 6] and steps(config.folder / "checkpoints") == [4, 6]


def test_a_run_goes_on_while_one_tier_that_all_machines_read_works(
    recipe: Recipe, disk: Path, bucket: Path, whole: dict[str, Any]
) -> None:
    saves = Saves()
    config = recipe(*DROPOUT, "checkpoint.every=1", "checkpoint.patience=2", tiers(tier(disk, 1), tier(bucket, 0)))
    with refused(run_folder, "_write_tensors", lambda *_: True, FULL):
        trainer = train(config, saves)
    assert trainer.done and steps(config.folder / "checkpoints") == []
    assert steps(bucket) == [5, 6], "it stands in for the folder, although it was due at the end alone"
    assert all("the run's folder has not taken" in text for _, text in saves.notes)
    train(config)
    assert_same_bits(final_tensors(config), whole)


@pytest.mark.parametrize("patience", [1, 2])
def test_it_ends_when_all_of_them_fail_although_the_local_disk_works(
    recipe: Recipe, disk: Path, bucket: Path, patience: int
) -> None:
    config = recipe("training.steps=40", "checkpoint.every=1", f"checkpoint.patience={patience}")
    config = config.changed(
        checkpoint={"tiers": [{"place": str(disk), "every": 1}, {"place": f"file://{bucket}", "every": 1}]}
    )
    trainer = open_trainer(config, [Saves()])
    with (
        refused(run_folder, "_write_tensors", lambda *_: True, FULL),
        refused(Store, "_opened", lambda *_: True, NO_NET),
        pytest.raises(CheckpointError, match=rf"{patience} saves in a row failed .*No space left on device"),
    ):
        trainer.fit()
    assert trainer.step <= patience + 2 and steps(disk)


def test_a_slow_store_delays_no_step_and_is_told_once(recipe: Recipe, bucket: Path) -> None:
    go_on, real, saves = threading.Event(), Store.put, Saves()
    config = recipe("training.steps=8", "checkpoint.every=1", tiers(tier(bucket, 1)))

    def slow(self: Store, name: str, *rest: Any) -> Any:
        if "step-00000002" in name:
            assert go_on.wait(60)
        return real(self, name, *rest)

    def in_time(trainer: Any) -> None:
        """Without waiting for any thread."""
        saves.step = trainer.step
        if trainer.step == 7:
            go_on.set()

    saves.after_step = in_time  # type: ignore[method-assign]
    with mock.patch.object(Store, "put", slow):
        train(config, saves)
    late = [text for _, text in saves.notes if "still writes step 2" in text]
    assert len(late) == 1 and "is left out there" in late[0] and saves.notes == [(saves.notes[0][0], late[0])]
    assert f"file://{bucket}/step-00000008" in saves.saved, "the last one is waited for"
    assert not any(f"file://{bucket}/step-0000000{step}" in saves.saved for step in (3, 4, 5))


class Asks(Callback):
    """Wants a checkpoint of every step in every place."""

    def after_step(self, trainer: Trainer) -> None:
        trainer.save()


@pytest.mark.parametrize("asked", [True, False])
def test_no_more_copies_are_alive_than_the_memory_estimate_counts(
    recipe: Recipe, disk: Path, bucket: Path, asked: bool
) -> None:
    """Also where checkpoints are asked for beside those that are due by their number, which go everywhere."""
    config = recipe("training.steps=12", "checkpoint.every=1", tiers(tier(disk, 1), tier(bucket, 1)))
    real, copied, alive, go_on = Saver._copied, [], [], threading.Event()

    def watched(self: Saver, *rest: Any) -> Any:
        copies = real(self, *rest)
        copied.append([weakref.ref(part.tensor) for part in {**copies.own, **copies.parts}.values()])
        alive.append(sum(any(one() is not None for one in save) for save in copied))
        return copies

    def wait(*about: Any) -> bool:
        assert ".zili-probe" in str(about) or go_on.wait(60)
        return False

    with (
        mock.patch.object(Saver, "_copied", watched),
        refused(Store, "_opened", wait, NO_NET),
        refused(local_disk, "write_parts", wait, FULL),
    ):
        train(config, At(10, go_on.set), *([Asks()] if asked else []))
    # The tiers hold the first save of all and the second may be theirs too; each further one is the folder's alone.
    assert 2 <= max(alive) <= config.checkpoint.copies == 3


def test_the_last_good_one_stays_where_newer_ones_are_damaged_or_half_there(
    recipe: Recipe, disk: Path, bucket: Path
) -> None:
    config = recipe("training.steps=4", "checkpoint.every=2", "schedule.kind=constant")
    config = config.changed(
        checkpoint={"tiers": [{"place": str(disk), "every": 2}, {"place": f"file://{bucket}", "every": 2}]}
    )
    train(config)
    for folder in (bucket, config.folder / "checkpoints"):
        next((folder / "step-00000004").glob("*.safetensors")).unlink()
    next((disk / "step-00000004").glob("*.json")).unlink()
    (bucket / "step-00000003").mkdir()
    (bucket / "step-00000003/shard-00001.safetensors").write_bytes(b"half")
    train(config.changed(training={"steps": 5}, checkpoint={"every": 0, "tiers": tables(disk, bucket, every=0)}))
    for folder in (bucket, config.folder / "checkpoints", disk):
        assert [step for step in steps(folder) if step != 4] == [2, 5], folder
    for path in (bucket / "step-00000002", bucket / "step-00000005"):
        verify(path)


def test_what_a_tier_cannot_delete_is_told_and_survived(recipe: Recipe, disk: Path, bucket: Path) -> None:
    saves = Saves()
    config = recipe("checkpoint.every=2", tiers(tier(disk, 2), tier(bucket, 2)))
    busy = OSError(16, "Device or resource busy")
    with (
        refused(Store, "remove", lambda self, name: name == "step-00000002", CheckpointError("busy")),
        refused(local_disk.LocalDisk, "_drop", lambda self, path: "step-00000002" in str(path), busy),
    ):
        train(config, saves)
    told = sorted(text for _, text in saves.notes)
    assert len(told) == 2 and all("no longer needed and cannot be deleted" in text for text in told)
    assert steps(disk) == [2, 4, 6] and steps(config.folder / "checkpoints") == [4, 6]


def test_a_half_upload_is_never_a_checkpoint(recipe: Recipe, bucket: Path) -> None:
    config = recipe("checkpoint.every=3", tiers(tier(bucket, 3)))
    for name in ("shard-00001.safetensors", "index.json", "run.json", "SHA256SUMS"):
        lose(config.folder)
        lose(bucket)
        with refused(Store, "put", lambda self, file, *_, name=name: file == f"step-00000006/{name}", NO_NET):
            train(config, Saves())
        assert (bucket / "step-00000006").exists() == (name != "shard-00001.safetensors")
        lose(config.folder)
        trainer = open_trainer(config)
        assert trainer.resume() and trainer.step == 3


@pytest.mark.parametrize(
    ("module", "function"), [("local_disk", "write_parts"), ("local_disk", "write_whole"), ("store", "_give_up")]
)
def test_a_run_killed_while_it_writes_into_a_tier_ends_in_the_same_bytes(
    recipe: Recipe, disk: Path, bucket: Path, whole: dict[str, Any], module: str, function: str
) -> None:
    config = recipe(*DROPOUT, both(disk, bucket))
    assert run_apart(die_in_tier, config, module, function) == -signal.SIGKILL
    for path in list_checkpoints(bucket):
        if (path / "SHA256SUMS").exists():
            verify(path)
    assert [path.name for path in disk.glob("step-*") if list(path.glob("*.json"))] or function != "_give_up"
    train(config)
    assert_same_bits(final_tensors(config), whole)
    assert steps(disk)[-1] == steps(bucket)[-1] == 6


def die_in_tier(config: RunConfig, module: str, function: str) -> None:
    """Train, and be killed where the local disk has step 4, or the store step 3, half."""
    target: Any = {"local_disk": local_disk, "store": store}[module]
    real = getattr(target, function)

    def call(first: Any, *rest: Any) -> Any:
        if function == "_give_up" or "step-00000004" in str(first):
            die()
        return real(first, *rest)

    def torn(parts: Any) -> Iterator[memoryview]:
        yield next(streamed(parts))
        raise OSError("torn")

    with mock.patch.object(target, function, call), mock.patch.object(object_store, "streamed", torn):
        train(config, Saves())


def test_a_new_run_whose_store_refuses_does_not_begin(recipe: Recipe, bucket: Path) -> None:
    config = recipe(tiers(tier(bucket, 3)))
    with refused(Store, "_opened", lambda *_: True, NO_NET), pytest.raises(CheckpointError, match="is unreachable"):
        open_trainer(config).resume()
    with (
        refused(ObjectStore, "_steps", lambda *_: True, CheckpointError("no answer")),
        pytest.raises(CheckpointError, match=r"no answer; no other place .* would begin anew"),
    ):
        open_trainer(config).resume()
    train(config)
    heard = Recorder()
    with refused(ObjectStore, "_steps", lambda *_: True, CheckpointError("no answer")):
        assert open_trainer(config, [heard]).resume(), "the folder has it"
    assert f"the store file://{bucket} cannot be asked for checkpoints: no answer" in heard.notes


def test_a_place_of_another_run_is_refused(recipe: Recipe, disk: Path, bucket: Path, tmp_path: Path) -> None:
    for place in (disk, bucket):
        config = recipe(tiers(tier(place, 3)))
        train(config)
        other = recipe(tiers(tier(place, 3)), f'folder="{tmp_path / "other"}"', "optimizer.learning_rate=1e-4")
        with pytest.raises(ConfigError, match=r"has checkpoints of a run in a folder run, and this one's is other"):
            open_trainer(other).resume()


def test_a_checkpoint_of_the_local_disk_in_another_layout_is_passed_over(recipe: Recipe, disk: Path) -> None:
    config = recipe(tiers(tier(disk, 3)))
    train(config)
    for path in list_checkpoints(disk):
        (file,) = path.glob("shard-*.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "processes": 4}))
    heard = Recorder()
    assert open_trainer(config, [heard]).resume()
    assert "it is of 4 processes, and there are 1" in heard.notes[0] and "/run/checkpoints/" in heard.notes[1]


def test_a_life_that_is_no_longer_the_newest_writes_into_no_tier(
    recipe: Recipe, disk: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe("checkpoint.every=0", tiers(tier(disk, 3), tier(bucket, 3)))
    (config.folder / "supervision").mkdir(parents=True)
    (config.folder / "supervision/generation").write_text("3")
    monkeypatch.setenv("ZILI_GENERATION", "2")
    saves = Saves()
    with pytest.raises(CheckpointError, match="a newer life of this run"):
        open_trainer(config, [saves]).fit()
    assert steps(disk) == steps(bucket) == [] and len(saves.notes) >= 2


def test_choices_are_those_of_the_checkpoint_in_a_store(recipe: Recipe, bucket: Path) -> None:
    """With the folder gone, what is left to "auto" is what the run used."""
    from zili import chips
    from zili.chips.device import Device
    from zili.training.tiers.choosing import newest_state_of

    config = recipe(tiers(tier(bucket, 3)))
    train(config)
    lose(config.folder)
    state = newest_state_of(config, Device(chips.activate(chips.find_backend("cpu"))))
    assert state is not None and state.step == 6 and RunConfig.model_validate(state.config) == config


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only root mounts a small disk")
    yield folder
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=False, capture_output=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file: Path) -> None:
    with suppress(OSError), file.open("wb", buffering=0) as opened:
        while opened.write(bytes(10_000)):
            pass


@pytest.mark.parametrize("how", ["full", "read-only", "vanished"])
def test_a_local_disk_that_is_full_read_only_or_vanishes(recipe: Recipe, small_disk: Path, how: str) -> None:
    def befall() -> None:
        if how == "full":
            fill(small_disk / "others")
        elif how == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        else:
            subprocess.run(["umount", "-l", str(small_disk)], check=True)
            small_disk.rmdir()
            small_disk.write_text("no folder")

    saves = Saves()
    config = recipe("training.steps=8", "checkpoint.every=2", tiers(tier(small_disk / "scratch", 2)))
    train(config, saves, At(3, befall))
    said = {"full": "No space left", "read-only": "Read-only file system", "vanished": "Not a directory"}[how]
    assert saves.notes and all(said in text for _, text in saves.notes), saves.notes
    assert saves.notes[0][0] in (4, 5) and "step 2 in the local disk" in saves.notes[0][1]
    assert steps(config.folder / "checkpoints") == [6, 8]
    if how == "vanished":
        small_disk.unlink()
        small_disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small_disk)], check=True)
