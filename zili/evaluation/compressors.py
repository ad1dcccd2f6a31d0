"""Compressors: what ordinary software needs for the text a model is evaluated on.

Each figure is compressed bits over UTF-8 bytes of the documents joined end to end. Neither the compressor's
own size nor the model's is counted, so the comparison is one of prediction, not of storage.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import zstandard

from zili.errors import DataError
from zili.evaluation.bits_per_byte import limit_bytes
from zili.pages.figures import byte_size

ZSTD_LEVEL = 19
TRAINING_BYTES = 8 << 20
"""Training text shown to zstd: 2.5 s on one core at level 19; twice as much changes the figure under 1 %."""
LARGEST_WINDOW_LOG = 27


@dataclass(frozen=True)
class CompressorFigure:
    """One compressor's figure on the held-out text.

    `seen` says what it knew beforehand: a model has read the training text, `xz` and plain `zstd` have not.
    """

    name: str
    bits_per_byte: float
    bytes: int
    compressed_bytes: int
    seen: str

    def as_json(self) -> dict[str, str | float | int]:
        return asdict(self)


def compressor_figures(
    texts: Iterable[str],
    *,
    training_texts: Iterable[str] | None = None,
    training_bytes: int = TRAINING_BYTES,
) -> list[CompressorFigure]:
    """xz -9e and zstd -19 on `texts` alone and, given `training_texts`, zstd -19 after reading those.

    Args:
        training_texts: what the model was trained on. The first `training_bytes` of it become zstd's dictionary:
            zstd may copy from it as if it stood just before the text. This is the fairest of the three.
    Raises:
        DataError: no text at all.
    """
    raw = "".join(texts).encode("utf-8")
    if not raw:
        raise DataError("there is no text to compress: every document is empty; give files with some text")
    nothing = "nothing but this text"
    found = [
        _figure("xz -9e", raw, xz(raw), nothing),
        _figure(f"zstd -{ZSTD_LEVEL}", raw, zstd(raw), nothing),
    ]
    if training_texts is not None:
        training = "".join(limit_bytes(training_texts, training_bytes)).encode("utf-8")
        if training:
            seen = f"{byte_size(len(training))} of the training text"
            name = f"zstd -{ZSTD_LEVEL} + training text"
            found.append(_figure(name, raw, zstd(raw, training), seen))
    return found


def xz(raw: bytes) -> bytes:
    """What `xz -9e` writes."""
    return lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)


def zstd(raw: bytes, known: bytes | None = None) -> bytes:
    """What `zstd -19` writes; with `known`, what `zstd -19 --long --patch-from=known` does."""
    if known is None:
        return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(raw)
    reach = (len(known) + len(raw)).bit_length()
    parameters = zstandard.ZstdCompressionParameters.from_level(
        ZSTD_LEVEL, window_log=min(max(reach, 10), LARGEST_WINDOW_LOG), enable_ldm=True
    )
    dictionary = zstandard.ZstdCompressionDict(known, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(raw)


def _figure(name: str, raw: bytes, compressed: bytes, seen: str) -> CompressorFigure:
    return CompressorFigure(name, 8 * len(compressed) / len(raw), len(raw), len(compressed), seen)
