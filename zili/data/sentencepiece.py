"""SentencePiece models as the text of a `tokenizer.json`, with the same ids and the same ids of a text.

What SentencePiece does (google/sentencepiece src/bpe_model.cc, normalizer.cc) in terms of Hugging Face's parts. A space
is U+2581, and one is put before the text. A piece that the user defined is matched before anything else, the longest
first. The pair whose union has the highest score is merged first, the leftmost of equals. A character without a piece
is its UTF-8 bytes.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import tokenizers

from zili.data.pointers import what_it_is
from zili.errors import DataError

SPACE = "\u2581"
_BPE = 2


class Kind(IntEnum):
    """What a piece is; the numbers are SentencePiece's, and GGUF's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of a vocabulary; its id is its place."""

    text: str
    score: float
    kind: Kind


def definition_of(path: Path) -> str:
    """The `tokenizer.json` of a SentencePiece model file.

    Raises:
        DataError: not such a file, of another algorithm than byte pair encoding, or the package to read it is missing.
    """
    model = _read(path)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != _BPE:
        raise DataError(f"{path}: a SentencePiece model of type {trainer.model_type}; only byte pair encoding is read.")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces or normalizer.remove_extra_whitespaces:
        raise DataError(f"{path}: its treatment of spaces (suffixes, or removing them) is not read.")
    pieces = [Piece(piece.piece, piece.score, Kind(piece.type)) for piece in model.pieces]
    return definition(pieces, dummy_prefix=normalizer.add_dummy_prefix, charsmap=bytes(normalizer.precompiled_charsmap))


def end_token_of(path: Path) -> str | None:
    """The name of the piece that ends a document, as the model has it."""
    model = _read(path)
    end = model.trainer_spec.eos_id
    return str(model.pieces[end].piece) if 0 <= end < len(model.pieces) else None


def _read(path: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise DataError(f"{path} needs the sentencepiece package: pip install 'zili[release]'.") from error
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own, which is not in its public names
        raise DataError(what_it_is(path, f"{path}: not a SentencePiece model ({error}).")) from error
    if not model.pieces:
        raise DataError(what_it_is(path, f"{path}: not a SentencePiece model (it has no pieces)."))
    return model


def definition(pieces: Sequence[Piece], *, dummy_prefix: bool, charsmap: bytes = b"") -> str:
    """The text of a `tokenizer.json` with these pieces. `charsmap`: SentencePiece's compiled normalisation."""
    vocabulary = {piece.text: number for number, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        raise DataError(f"a SentencePiece model names {len(pieces) - len(vocabulary)} pieces twice.")
    unknown = next((piece.text for piece in pieces if piece.kind == Kind.UNKNOWN), None)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(number, piece.text) for number, piece in enumerate(pieces) if piece.kind in _SPECIAL],
        "normalizer": _normalizer(dummy_prefix, charsmap),
        "pre_tokenizer": _user_defined(pieces),
        "post_processor": None,
        "decoder": _decoder(dummy_prefix),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == Kind.BYTE for piece in pieces),
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(pieces),
        },
    }
    _take_user_defined_whole(content, pieces)
    return json.dumps(content, ensure_ascii=False)


_SPECIAL = (Kind.CONTROL, Kind.UNKNOWN)


def _added(number: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **flags, "special": True}


def _merges(pieces: Sequence[Piece]) -> list[list[str]]:
    """Every way to make a piece of two others, the piece of the highest score first."""
    made = {piece.text for piece in pieces if piece.kind == Kind.NORMAL}
    parts = made | {piece.text for piece in pieces if piece.kind == Kind.USER_DEFINED}
    ranked = sorted((piece for piece in pieces if piece.kind == Kind.NORMAL), key=lambda piece: -piece.score)
    return [
        [piece.text[:cut], piece.text[cut:]]
        for piece in ranked
        # Of equal unions the leftmost is merged first: it is the one whose own left part is the longer.
        for cut in range(len(piece.text) - 1, 0, -1)
        if piece.text[:cut] in parts and piece.text[cut:] in parts
    ]


def _normalizer(dummy_prefix: bool, charsmap: bytes) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _user_defined(pieces: Sequence[Piece]) -> dict[str, Any] | None:
    own = sorted((piece.text for piece in pieces if piece.kind == Kind.USER_DEFINED), key=len, reverse=True)
    return split_by("|".join(re.escape(text) for text in own)) if own else None


def split_by(pattern: str) -> dict[str, Any]:
    """A step of a `tokenizer.json` that takes what matches apart."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _take_user_defined_whole(content: dict[str, Any], pieces: Sequence[Piece]) -> None:
    """A piece that the user defined stands alone and has no merges: text that is a piece must be taken whole.

    Then so would be text that spells a piece without being it: the name of a control token above all, which no text may
    become. Such text, where it stands alone, is cut where merging leaves it cut.
    """
    if content["pre_tokenizer"] is None:
        return
    own = re.compile(content["pre_tokenizer"]["pattern"]["Regex"])
    merging = tokenizers.Tokenizer.from_str(json.dumps({**content, "normalizer": None, "added_tokens": []}))
    texts = [piece.text for piece in pieces if not own.search(piece.text)]
    merged = merging.encode_batch(texts, add_special_tokens=False)
    content["model"]["ignore_merges"] = True
    cuts = [
        cut
        for text, one in zip(texts, merged, strict=True)
        if one.tokens != [text]
        # A character that becomes its bytes has one place for all of them.
        for cut in _cuts(text, sorted(set(one.offsets)))
    ]
    if cuts:
        steps = [content["pre_tokenizer"], split_by("|".join(cuts))]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def _cuts(text: str, places: list[tuple[int, int]]) -> Iterator[str]:
    """Expressions for the parts of a text that is `text` and nothing else."""
    for start, end in places:
        before, part, after = (re.escape(piece) for piece in (text[:start], text[start:end], text[end:]))
        yield rf"(?<=\A{before}){part}(?={after}\z)"


def _decoder(dummy_prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
