"""Fast encoding of many documents, with the engine chosen by proof and the choice said in a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zili.data.tokenizer import Tokenizer
from zili.errors import DataError

Engine = Literal["auto", "gigatoken", "tokenizers"]
Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""Ids of all documents one after another `[T]`, and each document's number of ids `[N]`."""

_SAMPLE = 128 * 1024  # characters compared before an engine is believed: 0.1 s of the slow one
_AUDIT = 4096  # characters compared again with every batch
_PROBES = (
    *("", " ", "\n", "a\0b", "\r\n\r\n \t x  y", "it's 3.14159 WE'LL", "x" * 5000, " " * 3000 + "x"),
    *("自立 means to stand on one's own feet。", "e\u0301 \u200d 👩‍👩‍👧 \U0010ffff", "ÀÉ ﬁ Ⅻ ½ ①"),
)


@dataclass(frozen=True, slots=True)
class Encoder:
    """The engine that encodes, and why it is this one."""

    name: str
    reason: str
    encode: Callable[[Sequence[str]], Encoded]

    def __str__(self) -> str:
        return f"encoder: {self.name} ({self.reason})"


def choose_encoder(tokenizer: Tokenizer, sample: Sequence[str], engine: Engine = "auto") -> Encoder:
    """gigatoken if it is installed, loads the tokenizer and gives the same ids; else `tokenizers`.

    Args:
        sample: documents of the text to come; 128 thousand characters of it are compared, spread over all.
        engine: a name insists on that engine.
    Raises:
        DataError: gigatoken was insisted on and is not fit; the message says why.
    """
    if engine == "tokenizers":
        return Encoder("tokenizers", "asked for", lambda texts: _encode_plain(tokenizer, texts))
    try:
        encode, version = _load_gigatoken(tokenizer)
    except ImportError:
        why = "gigatoken is not installed; `pip install 'zili[fast]'` encodes many times faster"
    except Exception as error:  # any failure of an optional engine is a reason not to use it
        why = f"gigatoken cannot load this tokenizer: {str(error).splitlines()[0]}"
    else:
        texts = [*_PROBES, *tokenizer.special_tokens, *_excerpts(sample)]
        if same_ids(tokenizer, encode, texts):
            return Encoder("gigatoken", f"{version}, ids equal tokenizers' on {len(texts)} texts", encode)
        why = f"gigatoken's ids differ from tokenizers' on {len(texts)} texts"
    if engine == "gigatoken":
        raise DataError(f"{why}. Use engine 'auto' or 'tokenizers'.")
    return Encoder("tokenizers", why, lambda texts: _encode_plain(tokenizer, texts))


def audit(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Compare the engine with `tokenizers` once more on the middle document's first characters.

    Raises `DataError` when they differ: the sample was too kind to the engine, and the store would be wrong.
    """
    if encoder.name == "tokenizers" or not texts:
        return
    text = texts[len(texts) // 2][:_AUDIT]
    if not same_ids(tokenizer, encoder.encode, [text]):
        raise DataError(
            f"{encoder.name} and tokenizers give different ids for {text[:40]!r}... "
            "Build again with engine='tokenizers', and report the text to gigatoken."
        )


def same_ids(tokenizer: Tokenizer, encode: Callable[[Sequence[str]], Encoded], texts: Sequence[str]) -> bool:
    """Whether `encode` gives `tokenizers`' ids for every one of `texts`."""
    ids, lengths = encode(texts)
    expected_ids, expected_lengths = _encode_plain(tokenizer, texts)
    return np.array_equal(lengths, expected_lengths) and np.array_equal(ids, expected_ids)


def _excerpts(sample: Sequence[str]) -> list[str]:
    documents = sample[:: max(1, len(sample) // 64)][:64]
    return [text[: _SAMPLE // max(1, len(documents))] for text in documents]


def _encode_plain(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    # Its own threads: two processes on two cores reached 0.85 of their rate (6 to 7 MB/s).
    ids = tokenizer.encode_batch(texts)
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    flat = np.concatenate(ids).astype(np.uint32) if ids else np.empty(0, np.uint32)
    return flat, lengths


def _load_gigatoken(tokenizer: Tokenizer) -> tuple[Callable[[Sequence[str]], Encoded], str]:
    from importlib.metadata import version

    import awkward
    import gigatoken

    definition = json.loads(tokenizer.definition)
    # gigatoken has no switch that takes special tokens for text; unlisted, it does not know them.
    added = definition.get("added_tokens") or []
    definition["post_processor"] = None  # nor one that leaves out what is put before and after a text
    definition["added_tokens"] = [token for token in added if not token.get("special")]
    engine = gigatoken.Tokenizer.from_json(json.dumps(definition, ensure_ascii=False))

    def encode(texts: Sequence[str]) -> Encoded:
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        rows = engine.encode_batch(list(texts))
        return awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows))

    return encode, version("gigatoken")
