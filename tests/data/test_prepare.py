import gzip
import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from zili.data import Document, Tokenizer, prepare, read_documents
from zili.data.prepare import Prepared
from zili.data.spool import Spool
from zili.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path, make_texts: Callable) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, text in enumerate(make_texts(80, seed=8, longest=200)):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    (folder / "twin.txt").write_bytes((folder / "000.txt").read_bytes())
    return folder


def run(corpus: Path, **options: object) -> Prepared:
    settings: dict = {"vocab_size": 300, "held_out_fraction": 0.2, **options}
    return prepare([corpus], corpus.parent / "data", **settings)


def test_prepares_both_sides(corpus: Path) -> None:
    done = run(corpus)
    texts = {document.text for document in read_documents([corpus])}
    held_out = [document.text for document in read_documents([done.held_out_text])]
    stored = [done.tokenizer.decode(ids[:-1]) for ids in done.held_out.iter_documents()]
    trained = [done.tokenizer.decode(ids[:-1]) for ids in done.train.iter_documents()]
    assert held_out == stored and 4 < len(held_out) < 30
    assert set(trained) | set(held_out) == texts and not set(trained) & set(held_out)
    assert len(trained) + len(held_out) == 81, "both twins, on one side"
    assert done.held_out.manifest.text_bytes == sum(len(text.encode()) for text in held_out)
    assert "below" in done.held_out.manifest.split and done.train.manifest.sources[0].name == "corpus/000.txt"
    assert not done.reused and any("MB/s" in line for line in done.lines)
    assert any(line.startswith("encoder: ") for line in done.lines)


def test_held_out_text_does_not_teach_the_tokenizer(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    train = Tokenizer.train
    monkeypatch.setattr(Tokenizer, "train", lambda texts, size: seen.extend(texts) or train(texts, size))
    done = run(corpus)
    held_out = {document.text for document in read_documents([done.held_out_text])}
    assert seen and not held_out & set(seen)
    whole = sum(len(text.encode()) for text in seen)
    seen.clear()
    run(corpus, tokenizer_bytes=whole // 4)
    assert whole / 8 < sum(len(text.encode()) for text in seen) <= whole / 4


def test_is_reused_until_something_changes(corpus: Path) -> None:
    first = run(corpus)
    again = run(corpus)
    assert again.reused and "reused" in again.lines[0]
    assert again.train.identity() == first.train.identity()
    (corpus / "001.txt").write_text("new text")
    changed = run(corpus)
    assert not changed.reused and "changed since the last time: sources" in changed.lines[0]
    assert "held_out_fraction" in run(corpus, held_out_fraction=0.3).lines[0]


def test_is_rebuilt_when_damaged(corpus: Path) -> None:
    folder = run(corpus).folder
    (folder / "train.bin").write_bytes(b"")
    repaired = run(corpus)
    assert not repaired.reused and "train.bin" in repaired.lines[0]
    (folder / "prepared.json").write_text("{")
    assert "damaged" in run(corpus).lines[0]


def test_preparing_twice_gives_the_same_bytes(corpus: Path) -> None:
    first, second = run(corpus), prepare([corpus], corpus.parent / "b", vocab_size=300, held_out_fraction=0.2)
    assert first.train.identity() == second.train.identity()
    assert first.tokenizer.sha256 == second.tokenizer.sha256


@pytest.mark.parametrize("size", [3_000, 40_000])
def test_one_file_is_cut_so_that_some_is_held_out(tmp_path: Path, size: int) -> None:
    text = "\n\n".join(f"Paragraph {i} of a novel 自立." for i in range(size // 30))
    (tmp_path / "novel.txt").write_text(text)
    done = prepare([tmp_path / "novel.txt"], tmp_path / "data", vocab_size=300)
    assert any("cut into" in line for line in done.lines)
    stores = (done.train, done.held_out)
    pieces = [done.tokenizer.decode(ids[:-1]) for store in stores for ids in store.iter_documents()]
    assert sorted("".join(pieces)) == sorted(text) and len(done.held_out) >= 1
    assert all(piece in text for piece in pieces)


@pytest.mark.parametrize("text", ["tiny", "the same\n"])
def test_too_little_text(tmp_path: Path, listing: Callable, text: str) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(DataError, match=r"leave none to train on.*Give more text"):
        prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "data")
    assert listing() == ["a.txt", "b.txt", "c.txt"]


def test_a_given_tokenizer_is_used(corpus: Path, tokenizer: Tokenizer) -> None:
    done = run(corpus, tokenizer=tokenizer)
    assert done.tokenizer.sha256 == tokenizer.sha256
    assert run(corpus, tokenizer=tokenizer).reused
    assert "tokenizer" in run(corpus).lines[0]


def test_bad_input_leaves_nothing(corpus: Path, listing: Callable) -> None:
    (corpus / "bad.txt").write_bytes(b"\xff")
    before = listing()
    with pytest.raises(DataError, match=r"bad\.txt: line 1, byte 0"):
        run(corpus)
    assert listing() == before
    done = run(corpus, on_error="skip")
    assert "1 broken UTF-8" in done.lines[1]


def test_a_failed_rebuild_keeps_the_old_data(corpus: Path, listing: Callable) -> None:
    first = run(corpus)
    before = listing()
    (corpus / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(DataError):
        run(corpus)
    (corpus / "bad.txt").unlink()
    assert listing() == before and run(corpus).train.identity() == first.train.identity()


def test_a_kill_leaves_nothing_that_is_taken_for_whole(corpus: Path, listing: Callable) -> None:
    code = f"""
import os
from zili.data import prepare
def die(stage, done, total):
    if stage == "encode": os._exit(9)
prepare([{str(corpus)!r}], {str(corpus.parent / "data")!r}, vocab_size=300, progress=die)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert any(name.startswith("data.partial/") for name in listing())
    assert not (corpus.parent / "data").exists()
    assert not run(corpus).reused
    assert not any("partial" in name for name in listing())


def test_text_that_changes_once_it_was_read_is_as_it_was(corpus: Path) -> None:
    def meddle(stage: str, done: int, total: int | None) -> None:
        if stage == "tokenizer":
            (corpus / "000.txt").write_text("meanwhile")

    wanted = prepare([corpus], corpus.parent / "before", vocab_size=300, held_out_fraction=0.2)
    done = run(corpus, progress=meddle)
    assert done.train.identity() == wanted.train.identity() and done.held_out.identity() == wanted.held_out.identity()
    assert "changed" in run(corpus).lines[0]


OPENED: Counter[str] = Counter()
sys.addaudithook(lambda event, given: OPENED.update([str(given[0])]) if event == "open" else None)


@pytest.mark.parametrize("few", [False, True])
def test_each_source_is_opened_once(corpus: Path, make_texts: Callable, few: bool) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(30, seed=3)).encode()
    (corpus / "a.jsonl").write_bytes(lines)
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress(lines) + gzip.compress(lines))
    (corpus / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (corpus / "binary.txt").write_bytes(b"\0" * 20_000)
    pq.write_table(pa.table({"text": make_texts(30, seed=4), "other": list(range(30))}), corpus / "d.parquet")
    whole = corpus.parent / "whole.txt"
    whole.write_bytes(lines)
    sources = [whole] if few else [corpus]
    OPENED.clear()
    done = prepare(sources, corpus.parent / "data", vocab_size=300, held_out_fraction=0.2)
    files = [whole] if few else sorted(corpus.iterdir())
    assert {OPENED[str(file)] for file in files} == {1}
    recorded = {source.name.rpartition("/")[2]: source.sha256 for source in done.train.manifest.sources}
    assert recorded == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert not (done.folder / "spool").exists()
    OPENED.clear()
    assert prepare(sources, corpus.parent / "data", vocab_size=300, held_out_fraction=0.2).reused
    assert {OPENED[str(file)] for file in files} == {1}


def test_a_spool_gives_back_what_went_by(tmp_path: Path) -> None:
    documents = [Document("", "a"), Document("naïve\r\n自立\u2028", "b:1"), Document("x" * 100_000, "文")]
    spool = Spool(tmp_path / "spool")
    assert list(spool.keeping(documents)) == list(spool) == list(spool) == documents
    spool.remove()
    assert not list(tmp_path.iterdir())


def test_a_refused_text_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        prepare([tmp_path / "none"], tmp_path / "runs" / "deep" / "data")
    assert not list(tmp_path.iterdir())


def test_somebody_elses_folder_is_left_alone(corpus: Path) -> None:
    mine = corpus.parent / "data"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="was not made by zili"):
        run(corpus)
    assert (mine / "thesis.txt").read_text() == "mine"


def test_progress_goes_through_the_stages(corpus: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    run(corpus, progress=lambda *call: calls.append(call))
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == ["read", "tokenizer", "encode"]
    assert all(total is None or done <= total for _, done, total in calls)


def test_no_paths_of_this_machine_are_written(corpus: Path) -> None:
    folder = run(corpus).folder
    for path in folder.rglob("*.json*"):
        assert str(corpus.parent) not in path.read_text()
    assert json.loads((folder / "prepared.json").read_text())["held_out_fraction"] == 0.2
