import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from zili.data import Census, Document, fingerprint, read_documents
from zili.errors import DataError

TEXTS = ["自立 self\r\nreliance", "line\u2028separator \x85 and \x0c feed", "emoji 👩‍👩‍👧"]


def lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def zstd_in_frames(raw: bytes) -> bytes:
    half = len(raw) // 2
    return zstandard.compress(raw[:half]) + zstandard.compress(raw[half:])


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstd_in_frames,
}


@pytest.mark.parametrize("suffix", PACK)
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACK[suffix](b"\xef\xbb\xbf" + lines(TEXTS) + b"\n  \n" + lines(["last"])[:-1]))
    documents = list(read_documents([path]))
    assert [document.text for document in documents] == [*TEXTS, "last"]
    assert documents[-1].source == f"a{suffix}:6"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    texts = [*TEXTS, *map(str, range(600))]
    column = pa.array([text.encode() for text in texts] if kind == pa.binary() else texts).cast(kind)
    pq.write_table(pa.table({"body": column, "n": range(len(texts))}), path, row_group_size=100)
    documents = list(read_documents([path], text_field="body"))
    assert [document.text for document in documents] == texts
    assert documents[-1].source == "a.parquet:603"


def test_text_is_kept_byte_for_byte_but_for_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXTS[0].encode())
    assert [document.text for document in read_documents([path])] == TEXTS[:1]


def parquet_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


BROKEN_UTF8_COLUMN = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"okb\xff"))
GOOD = lines(["good"])
BAD = {
    "utf8.txt": (b"ab\ncd\xff", r"utf8\.txt: line 2, byte 5: broken UTF-8", 0),
    "utf16.txt": ("hello".encode("utf-16"), r"zero bytes, so it is binary or UTF-16", 0),
    "utf8.jsonl": (GOOD + b'{"text": "\xff"}\n', r"line 2, byte 10 of the line: broken UTF-8", 1),
    "json.jsonl": (GOOD + b'{"text": "a\n' + GOOD, r"line 2, column 12: broken JSON", 2),
    "list.jsonl": (b'["text"]\n', r"line 1: list where an object", 0),
    "deep.jsonl": (b"[" * 100_000 + b"\n", r"line 1: JSON nested too deep", 0),
    "field.jsonl": (
        lines(["x"], "texts"),
        r"line 1: no field 'text'; fields there: 'id', 'texts'; nearest 'texts'",
        0,
    ),
    "number.jsonl": (b'{"text": 3}\n', r"line 1: field 'text' is int", 0),
    "surrogate.jsonl": (b'{"text": "a\\ud800"}\n' + GOOD, r"line 1, character 1: lone surrogate U\+D800", 1),
    "cut.jsonl.gz": (
        gzip.compress(lines(TEXTS * 3000))[:-20],
        r"cut\.jsonl\.gz: after line \d+: cannot be read",
        None,
    ),
    "cut.jsonl.zst": (
        zstandard.compress(lines(["x" * 50] * 9000))[:-9],
        r"after line \d+: cannot be read",
        None,
    ),
    "digits.jsonl": (b'{"text": ' + b"1" * 9999 + b"}\n" + GOOD, r"line 1: broken JSON \(Exceeds the limit", 1),
    "not.jsonl.gz": (b"plain", r"not\.jsonl\.gz: after line 0", 0),
    "cut.parquet": (parquet_bytes(pa.table({"text": TEXTS}))[:-9], r"after row 0: cannot be read", 0),
    "field.parquet": (
        parquet_bytes(pa.table({"Text": TEXTS})),
        r"no field 'text'; fields there: 'Text'; nearest",
        0,
    ),
    "null.parquet": (parquet_bytes(pa.table({"text": ["a", None]})), r"row 2: field 'text' is NoneType", 1),
    "utf8.parquet": (
        parquet_bytes(pa.table({"text": BROKEN_UTF8_COLUMN})),
        r"row 2, byte 1 of the text: broken UTF-8",
        1,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error_or_counted(tmp_path: Path, name: str) -> None:
    raw, message, readable = BAD[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents([tmp_path / name]))
    assert str(tmp_path / name) in str(caught.value) and "--on-error skip" in str(caught.value)

    (tmp_path / "fine.txt").write_text("fine")
    census = Census()
    documents = list(read_documents([tmp_path], on_error="skip", census=census))
    assert documents[-1 if name < "fine" else 0].text == "fine"
    assert sum(census.skipped.values()) == 1
    if readable is not None:
        assert len(documents) == 1 + readable


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd_in_frames])
@pytest.mark.parametrize("body", [lines(TEXTS), json.dumps([{"text": text} for text in TEXTS], indent=1).encode()])
def test_json_of_lines_or_of_an_array(tmp_path: Path, body: bytes, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.json{ {bytes: '', gzip.compress: '.gz'}.get(pack, '.zst') }"
    path.write_bytes(pack(b"\xef\xbb\xbf" + body))
    documents = list(read_documents([path]))
    assert [document.text for document in documents] == TEXTS and documents[-1].source == f"{path.name}:3"
    (tmp_path / "b.ndjson").write_bytes(lines(TEXTS))
    census = Census()
    # In a folder a .json is mostly somebody's settings.
    assert len(list(read_documents([tmp_path], census=census))) == 3 and census.left_out == "1 of another kind"


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "gbk").mkdir()
    for name in ("说明.txt", "说明.jsonl", "坏.jsonl"):
        path = tmp_path / "gbk" / os.fsdecode(name.encode("gbk"))
        path.write_bytes(b"{" if name[0] == "坏" else lines(TEXTS))
    census = Census()
    with pytest.raises(DataError) as refused:
        list(read_documents([tmp_path / "gbk"]))
    assert "\\xbb\\xb5.jsonl: line 1" in str(refused.value)
    documents = list(read_documents([tmp_path / "gbk"], census=census, on_error="skip"))
    assert {document.source for document in documents} >= {"gbk/˵\\xc3\\xf7.jsonl:1"}
    assert all(document.to_json().encode() for document in documents) and len(documents) == 4
    assert census.fingerprint() == fingerprint([tmp_path / "gbk"])


def test_unreadable_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: object, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.txt").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        with pytest.raises(DataError, match=r"a\.txt: cannot be read \(Permission denied\)"):
            list(read_documents([tmp_path / "a.txt"], census=Census(), on_error="skip"))
    monkeypatch.setattr("os.scandir", denied)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        list(read_documents([tmp_path]))


def test_written_documents_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes("".join(Document(text, "x").to_json() + "\n" for text in TEXTS).encode())
    assert [document.text for document in read_documents([path])] == TEXTS
