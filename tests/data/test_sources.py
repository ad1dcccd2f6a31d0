import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zili.data import Census, fingerprint, read_documents, standard_library_files
from zili.data.sources import list_files
from zili.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "config.txt").write_text("no")
    (root / ".hidden.md").write_text("no")
    (root / "z.md").write_text("z")
    (root / "a.TXT").write_text("a")
    (root / "b" / "c.py").write_text("c")
    (root / "photo.jpg").write_bytes(b"\xff\xd8")
    (root / "zeros.txt").write_bytes(b"a\0b")
    (root / "empty.txt").write_text(" \n")
    return root


def test_order_and_what_is_left_out(folder: Path) -> None:
    census = Census()
    names = [document.source for document in read_documents([folder], census=census)]
    assert names == ["corpus/a.TXT", "corpus/z.md", "corpus/b/c.py"]
    assert census.skipped == {"hidden": 2, "of another kind": 1, "binary": 1, "empty": 1}
    assert census.left_out == "1 binary, 1 empty, 2 hidden, 1 of another kind"
    assert census.documents == 3 and census.text_bytes == 3


def test_a_file_reached_twice_is_read_once(folder: Path) -> None:
    census = Census()
    files = list_files([folder / "z.md", folder, f"{folder}/b/../b"], census)
    assert [file.name for file in files][:2] == ["z.md", "corpus/a.TXT"]
    assert len(files) == 5 and census.skipped["given twice"] == 2


def test_an_odd_pipe_in_a_folder_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")
    census = Census()
    assert len(list(read_documents([folder], census=census))) == 3
    assert census.skipped["not a regular file"] == 1


def test_explicit_file_of_unknown_suffix_is_read(tmp_path: Path) -> None:
    path = tmp_path / "NOTES"
    path.write_text("read me")
    assert [document.text for document in read_documents([path])] == ["read me"]


@pytest.mark.parametrize("paths", [[], ["."], ["only.jpg"]])
def test_nothing_readable(tmp_path: Path, paths: list[str]) -> None:
    (tmp_path / "only.jpg").write_bytes(b"\xff\xd8\0")
    with pytest.raises(DataError, match=r"no readable text|binary"):
        list(read_documents([tmp_path / path for path in paths]))


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.txt: no such file"):
        list(read_documents([tmp_path / "absent.txt"], on_error="skip"))


def test_fingerprint_is_that_of_the_reading(folder: Path) -> None:
    census = Census()
    list(read_documents([folder], census=census))
    before = fingerprint([folder])
    assert census.fingerprint() == before
    record = census.files[0]
    assert (record.name, record.bytes, record.sha256) == ("corpus/a.TXT", 1, hashlib.sha256(b"a").hexdigest())
    (folder / "z.md").write_text("Z")
    assert fingerprint([folder]) != before


def test_fingerprint_does_not_depend_on_the_place(folder: Path, tmp_path: Path) -> None:
    before = fingerprint([folder])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.rename(elsewhere / "corpus")
    assert fingerprint([elsewhere / "corpus"]) == before


def test_standard_library_reads_whole() -> None:
    files = standard_library_files()
    names = [file.name for file in files]
    assert any(name.endswith("/asyncio/base_events.py") for name in names)
    assert not any("site-packages" in name or "/test/" in name for name in names)
    assert not any(name.startswith("/") for name in names)
    census = Census()
    for _ in read_documents(files, on_error="skip", census=census):
        pass
    assert census.documents > 500 and census.text_bytes > 8_000_000


def test_reading_text_needs_no_torch() -> None:
    code = "import sys, zili.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_suffixes_are_case_blind(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL.gz").write_bytes(gzip.compress(b'{"text": "hi"}\n'))
    assert [document.text for document in read_documents([tmp_path])] == ["hi"]


def test_one_string_is_no_list_of_paths() -> None:
    with pytest.raises(DataError, match=r"'notes' is a string, where a list of paths is meant: give \['notes'\]"):
        list_files("notes")
