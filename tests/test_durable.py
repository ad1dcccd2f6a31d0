"""Folders that are held."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from unittest import mock

import pytest

from zili.durable import locked, refused_by_disk, soon, whole_folder, write_whole
from zili.errors import ConfigError


def test_a_folder_is_held_once(tmp_path: Path) -> None:
    with locked(tmp_path / "run") as no_locks:
        assert no_locks is None
        with pytest.raises(ConfigError, match="another process trains"), locked(tmp_path / "run"):
            pass
    with locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run", shared=True), locked(tmp_path / "run", shared=True):
        pass
    with (
        locked(tmp_path / "run", shared=True),
        pytest.raises(ConfigError, match="another process trains"),
        locked(tmp_path / "run"),
    ):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_all_the_same(tmp_path: Path, number: int) -> None:
    """Lustre mounted without `flock` answers ENOSYS, some NFS ENOLCK."""
    with mock.patch.object(fcntl, "flock", side_effect=OSError(number, "it has none")), locked(tmp_path) as no_locks:
        assert no_locks is not None and "it has none" in no_locks


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"), locked(tmp_path / "file" / "run"):
        pass
    broken = OSError(errno.EIO, "it is broken")
    with mock.patch.object(fcntl, "flock", side_effect=broken), pytest.raises(ConfigError, match="it is broken"):
        locked(tmp_path).__enter__()


def test_soon_waits_and_gives_up() -> None:
    answers = iter([False, False, True])
    assert soon(lambda: next(answers))
    assert not soon(lambda: False, patience=0.2)


def test_a_full_disk_leaves_nothing_and_is_named(tmp_path: Path) -> None:
    """What writing raises, other than opening, names no file."""
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("zili.durable.sync", side_effect=full), pytest.raises(OSError) as of_file:
        write_whole(tmp_path / "recipe.toml", "seed = 0")
    with pytest.raises(OSError) as of_folder, whole_folder(tmp_path / "release"):
        raise full
    assert list(tmp_path.iterdir()) == []
    for raised, name in ((of_file, "recipe.toml"), (of_folder, "release")):
        told = refused_by_disk(raised.value)
        assert told is not None and f"No space left on device: '{tmp_path / name}'" in str(told)


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (OSError(errno.EDQUOT, "quota"), True),
        (OSError(errno.EACCES, "forbidden", "a file"), True),
        (OSError(errno.EACCES, "a port"), False),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),  # as safetensors has it
        (OSError(errno.ENAMETOOLONG, "too long", "a file"), True),
        (FileNotFoundError(errno.ENOENT, "a defect of ours, perhaps", "a file"), False),
        (RuntimeError("else"), False),
    ],
)
def test_what_a_disk_refuses_is_told_from_defects(error: Exception, refused: bool) -> None:
    told = refused_by_disk(error)
    assert (told is not None) == refused
    full = "quota" in str(error) or "No space" in str(error)
    assert ("free some space" in str(told)) == full
