import hashlib
import json
import os
import struct
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from zili.data import Census, Document, Tokenizer, TokenStore, build_store, read_documents
from zili.data.indexed import token_type, write_index
from zili.errors import DataError


def read_as_megatron(prefix: Path) -> tuple[type, list[np.ndarray]]:
    """Documents of an indexed data set, written from the definition of Megatron's `_IndexReader` alone."""
    dtypes = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32}
    dtypes[8] = np.uint16
    raw = Path(f"{prefix}.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack("<Q", raw[9:17])
    (code,) = struct.unpack("<B", raw[17:18])
    (sequences,) = struct.unpack("<Q", raw[18:26])
    (entries,) = struct.unpack("<Q", raw[26:34])
    assert version == 1
    lengths = np.frombuffer(raw, np.int32, sequences, 34)
    pointers = np.frombuffer(raw, np.int64, sequences, 34 + lengths.nbytes)
    documents = np.frombuffer(raw, np.int64, entries, 34 + lengths.nbytes + pointers.nbytes)
    assert len(raw) == 34 + lengths.nbytes + pointers.nbytes + documents.nbytes
    tokens = Path(f"{prefix}.bin").read_bytes()
    rows = [np.frombuffer(tokens, dtypes[code], n, p) for n, p in zip(lengths, pointers, strict=True)]
    return dtypes[code], [np.concatenate(rows[a:b]) for a, b in pairwise(documents)]


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, str(i)) for i, text in enumerate(texts)]


@pytest.mark.parametrize(("kind", "code"), [("<u2", 8), ("<i4", 4)])
def test_golden_index_bytes(kind: str, code: int) -> None:
    stream = BytesIO()
    write_index(stream, np.dtype(kind), array("i", [3, 1]))
    size = np.dtype(kind).itemsize
    assert stream.getvalue() == (
        b"MMIDIDX\x00\x00" + b"\x01\0\0\0\0\0\0\0" + bytes([code])
        + b"\x02\0\0\0\0\0\0\0" + b"\x03\0\0\0\0\0\0\0"
        + b"\x03\0\0\0" + b"\x01\0\0\0"
        + b"\0\0\0\0\0\0\0\0" + bytes([3 * size]) + b"\0\0\0\0\0\0\0"
        + b"\0\0\0\0\0\0\0\0" + b"\x01\0\0\0\0\0\0\0" + b"\x02\0\0\0\0\0\0\0"
    )  # fmt: skip


def test_token_type_follows_megatrons_rule() -> None:
    assert [token_type(size).name for size in (8192, 65_499, 65_500, 131_072)] == ["uint16"] * 2 + ["int32"] * 2


def test_an_independent_reader_finds_the_texts(tokenizer: Tokenizer, tmp_path: Path, make_texts: Callable) -> None:
    texts = make_texts(40, seed=2)
    report = build_store(documents(texts), tokenizer, tmp_path / "s")
    dtype, rows = read_as_megatron(tmp_path / "s")
    assert dtype is np.uint16
    assert [tokenizer.decode(row[:-1]) for row in rows] == texts
    assert all(row[-1] == tokenizer.end_id for row in rows)
    assert report.documents == 40 and report.tokens == sum(map(len, rows))
    assert report.text_bytes == sum(len(text.encode()) for text in texts)

    store = TokenStore.open(tmp_path / "s")
    assert all(np.array_equal(a, b) for a, b in zip(store.iter_documents(), rows, strict=True))
    assert np.array_equal(store.document(7), rows[7]) and len(store) == 40
    assert np.array_equal(store.tokens, np.concatenate(rows))
    store.verify()
    store.check_tokenizer(tokenizer)


def test_wide_vocabularies_are_int32(tokenizer: Tokenizer, tmp_path: Path) -> None:
    definition = json.loads(tokenizer.definition)
    definition["model"]["vocab"] |= {f"<{i}>": i for i in range(320, 66_000)}
    wide = Tokenizer(json.dumps(definition), end_token="<65999>")
    build_store(documents(["自立", "b"]), wide, tmp_path / "s")
    dtype, rows = read_as_megatron(tmp_path / "s")
    assert dtype is np.int32 and rows[0][-1] == 65_999
    assert TokenStore.open(tmp_path / "s").document(1).tolist() == rows[1].tolist()


def test_manifest_says_where_it_comes_from(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("自立")
    (folder / ".b.txt").write_text("hidden")
    census = Census()
    build_store(read_documents([folder], census=census), tokenizer, tmp_path / "s", census=census)
    manifest = json.loads((tmp_path / "s.json").read_text())
    source = {"name": "corpus/a.txt", "bytes": 6, "sha256": hashlib.sha256("自立".encode()).hexdigest()}
    assert manifest["sources"] == [{**source, "documents": 1}]
    assert manifest["left_out"] == {"hidden": 1}
    assert (manifest["text_bytes"], manifest["documents"]) == (6, 1)
    for suffix in (".bin", ".idx"):
        raw = (tmp_path / f"s{suffix}").read_bytes()
        assert manifest["files"][suffix] == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert str(tmp_path) not in json.dumps(manifest)


def test_another_tokenizer_is_refused(stores: list[TokenStore], make_texts: Callable) -> None:
    other = Tokenizer.train(make_texts(200, seed=0), vocab_size=300)
    with pytest.raises(DataError, match=r"built with tokenizer .*320 tokens.*300.*again with this one"):
        stores[0].check_tokenizer(other)


@pytest.fixture
def built(tokenizer: Tokenizer, tmp_path: Path, make_texts: Callable) -> Path:
    build_store(documents(make_texts(10, seed=4)), tokenizer, tmp_path / "s")
    return tmp_path / "s"


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("left", [0, 10, -1])
def test_cut_off_files_are_named_with_their_bytes(built: Path, suffix: str, left: int) -> None:
    path = Path(f"{built}{suffix}")
    size = path.stat().st_size
    os.truncate(path, left % size)
    with pytest.raises(DataError, match=rf"s\{suffix}: .*{left % size}.* Build the store again"):
        TokenStore.open(built)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_missing_files_are_named(built: Path, suffix: str) -> None:
    Path(f"{built}{suffix}").unlink()
    with pytest.raises(DataError, match=rf"s\{suffix}: (missing|no such)"):
        TokenStore.open(built)


def test_foreign_and_broken_files(built: Path, tokenizer: Tokenizer) -> None:
    index, manifest = Path(f"{built}.idx"), Path(f"{built}.json")
    good = index.read_bytes()
    index.write_bytes(b"TNTIDX\0\0\0" + good[9:])
    with pytest.raises(DataError, match="not a Megatron token index"):
        TokenStore.open(built)
    index.write_bytes(good)
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**fields, "tokens": 1}))
    with pytest.raises(DataError, match="files of two stores"):
        TokenStore.open(built)
    manifest.write_text(json.dumps({**fields, "format": "zili token store 9"}))
    with pytest.raises(DataError, match="this version reads"):
        TokenStore.open(built)
    manifest.write_text("{")
    with pytest.raises(DataError, match="not a manifest"):
        TokenStore.open(built)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_one_changed_bit_is_found(built: Path, suffix: str) -> None:
    path = Path(f"{built}{suffix}")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    store = TokenStore.open(built)
    with pytest.raises(DataError, match=rf"s\{suffix}: content changed"):
        store.verify()


def test_lengths_that_do_not_fit_the_offsets_are_found(built: Path) -> None:
    path = Path(f"{built}.idx")
    raw = bytearray(path.read_bytes())
    raw[34] += 1
    raw[38] -= 1  # the sum stays
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"s\.idx: damaged"):
        TokenStore.open(built)


def breaking_off() -> Iterator[Document]:
    yield from documents(["some text"] * 3)
    raise KeyboardInterrupt


def test_an_interrupted_build_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path, listing: Callable) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_store(breaking_off(), tokenizer, tmp_path / "s")
    with pytest.raises(DataError, match="no documents"):
        build_store([], tokenizer, tmp_path / "s")
    assert listing() == []


def test_an_interrupted_build_leaves_the_old_store(built: Path, tokenizer: Tokenizer, listing: Callable) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_store(breaking_off(), tokenizer, built)
    assert listing() == ["s.bin", "s.idx", "s.json"]
    TokenStore.open(built).verify()


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_renaming_leaves_no_store_that_opens(
    built: Path, tokenizer: Tokenizer, renames: int, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    code = f"""
import os, pathlib
from zili.data import Document, Tokenizer, build_store
done, replace = 0, pathlib.Path.replace
def dying(self, target):
    global done
    if done == {renames}: os._exit(9)
    done += 1
    return replace(self, target)
pathlib.Path.replace = dying
tokenizer = Tokenizer.from_folder({str(tmp_path / "tokenizer")!r})
build_store([Document("other", "0")], tokenizer, {str(built)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with pytest.raises(DataError, match="half-built"):
        TokenStore.open(built)
    build_store(documents(["again"]), tokenizer, built)
    TokenStore.open(built).verify()
    assert not list(tmp_path.glob("*.partial"))


def test_a_disk_that_refuses(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        build_store(documents(["x"]), tokenizer, tmp_path / "file" / "s")


def test_progress_and_many_batches(
    tokenizer: Tokenizer, tmp_path: Path, make_texts: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make_texts(60, seed=6)
    build_store(documents(texts), tokenizer, tmp_path / "once")
    monkeypatch.setattr("zili.data.building._BATCH_BYTES", 1000)
    seen: list[int] = []
    report = build_store(documents(texts), tokenizer, tmp_path / "often", progress=seen.append)
    assert len(seen) > 5 and seen == sorted(seen) and seen[-1] == report.text_bytes
    assert TokenStore.open(tmp_path / "once").identity() == TokenStore.open(tmp_path / "often").identity()
