"""Compressors: what they write can be read back, by the command-line tools too, and known text helps."""

from __future__ import annotations

import argparse
import lzma
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from zili.errors import DataError
from zili.evaluation.compressors import compressor_figures, xz, zstd

RAW = "".join(f"line {i}: the quick brown fox, 敏捷的狐狸 {i * i}\n" for i in range(800)).encode()


def test_round_trips() -> None:
    assert lzma.decompress(xz(RAW)) == RAW
    assert zstandard.decompress(zstd(RAW)) == RAW
    dictionary = zstandard.ZstdCompressionDict(RAW, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    assert zstandard.ZstdDecompressor(dict_data=dictionary).decompress(zstd(RAW, RAW)) == RAW


@pytest.mark.parametrize(("tool", "options", "ours"), [("xz", ["-9e"], xz), ("zstd", ["-19"], zstd)])
def test_same_size_as_the_tool(tool: str, options: list[str], ours: Callable[[bytes], bytes], tmp_path: Path) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    raw = Path(argparse.__file__).read_bytes()
    (tmp_path / "text").write_bytes(raw)  # a file, since the tools do better when they know the size
    command = [tool, *options, "-c", str(tmp_path / "text")]
    theirs = subprocess.run(command, capture_output=True, check=True).stdout
    assert len(ours(raw)) == pytest.approx(len(theirs), rel=0.01, abs=24)  # headers, checksums, versions


def test_random_bytes_do_not_compress() -> None:
    draw = random.Random(1)
    noise = "".join(chr(draw.randrange(128)) for _ in range(20_000))
    for figure in compressor_figures([noise]):
        assert 7.0 <= figure.bits_per_byte < 7.5  # seven random bits a byte


def test_bits_per_byte_of_joined_documents() -> None:
    half = len(RAW) // 2
    whole, parts = (
        compressor_figures([RAW.decode()]),
        compressor_figures([RAW[:half].decode(), RAW[half:].decode()]),
    )
    assert whole == parts
    assert [r.name for r in whole] == ["xz -9e", "zstd -19"]
    for figure in whole:
        assert figure.bytes == len(RAW)
        assert figure.bits_per_byte == 8 * figure.compressed_bytes / len(RAW)


def test_knowing_the_training_text_helps_and_is_named() -> None:
    text = RAW.decode()
    found = compressor_figures([text[:3000]], training_texts=[text], training_bytes=20_000)
    alone, known = found[1], found[2]
    assert known.bits_per_byte < alone.bits_per_byte / 5
    assert (alone.seen, known.seen) == ("nothing but this text", "20\u202fkB of the training text")


def test_nothing_to_compress() -> None:
    with pytest.raises(DataError, match="no text"):
        compressor_figures(["", ""])
