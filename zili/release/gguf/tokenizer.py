"""Tokenizers in GGUF files, to and from the text of a `tokenizer.json`.

Two kinds are known: byte-level byte pair encoding with merges ("gpt2", its way of splitting text named by
`tokenizer.ggml.pre`), and SentencePiece's byte pair encoding with scores ("llama"). Source: ggml-org/llama.cpp
src/llama-vocab.cpp for what each name of a split means.
"""

from __future__ import annotations

import json
from typing import Any

from zili.data.chat import ChatTemplate
from zili.data.dialect import Dialect
from zili.data.sentencepiece import SPACE, Kind, Piece, definition, split_by
from zili.data.tokenizer import SPLIT, Tokenizer, after_bos
from zili.errors import CheckpointError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


_DIGITS = {"type": "Digits", "individual_digits": True}
_SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(True)],
    "smollm": [_DIGITS, _byte_level(True)],
    "qwen2": [split_by(SPLIT), _byte_level(False)],
    "llama-bpe": [split_by(_LLAMA3), _byte_level(False)],
}
_ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id"}
_ROLES |= {"pad_token": "padding_token_id"}
_ENDS = ("eos", "eot", "eom")
"""Tokens after which llama.cpp takes an answer for ended."""
_WITH_BOS = ("llama-bpe", "llama3", "llama-v3")


# ---- in


def read_tokenizer(reader: Any, where: object) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
    """The text of a `tokenizer.json` and the contents of a `tokenizer_config.json` and a `generation_config.json`; None
    where the file has none.

    Raises:
        CheckpointError: a kind of tokenizer, or a way of splitting text, that is not known.
    """
    kind = _value(reader, "model")
    if kind in (None, "none", "no_vocab"):
        return None
    texts = _value(reader, "tokens")
    kinds = [Kind(number) for number in _value(reader, "token_type") or [Kind.NORMAL] * len(texts)]
    if kind == "gpt2":
        text = _byte_level_definition(reader, texts, kinds, where)
    elif kind == "llama":
        scores = _value(reader, "scores") or [0.0] * len(texts)
        pieces = [Piece(text, score, kind) for text, score, kind in zip(texts, scores, kinds, strict=True)]
        prefix = _value(reader, "add_space_prefix")
        text = definition(pieces, dummy_prefix=True if prefix is None else bool(prefix))
    else:
        raise CheckpointError(f"{where}: a tokenizer of kind {kind!r}; gpt2 and llama are read")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, key in _ROLES.items():
        number = _value(reader, key)
        if number is not None and number < len(texts):
            config[role] = texts[number]
    template = reader.get_field("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template.contents()
    if _adds_bos(reader, kind) and "bos_token" in config:
        text = after_bos(text, config["bos_token"])
    named = (_value(reader, f"{key}_token_id") for key in _ENDS)
    ends = list(dict.fromkeys(number for number in named if number is not None and number < len(texts)))
    return text, config, {"eos_token_id": ends} if len(ends) > 1 else {}


def _adds_bos(reader: Any, kind: str) -> bool:
    """Whether a text begins after the BOS token: as the file says, else as llama.cpp has it for its kind."""
    said = _value(reader, "add_bos_token")
    return bool(said) if said is not None else kind == "llama" or _value(reader, "pre") in _WITH_BOS


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(f"tokenizer.ggml.{key}")
    return None if field is None else field.contents()


def _byte_level_definition(reader: Any, texts: list[str], kinds: list[Kind], where: object) -> str:
    pre = _value(reader, "pre") or "default"
    pre = "gpt-2" if pre == "gpt2" else pre
    if pre not in _SPLITS:
        raise CheckpointError(f"{where}: splits text as {pre!r}, which is not known; {', '.join(_SPLITS)} are")
    added = [
        {
            "id": number,
            "content": text,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": kind != Kind.USER_DEFINED,
        }
        for number, (text, kind) in enumerate(zip(texts, kinds, strict=True))
        if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
    ]
    steps = _SPLITS[pre]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {text: number for number, text in enumerate(texts)},
            "merges": [merge.split(" ") for merge in _value(reader, "merges") or []],
        },
    }
    return json.dumps(content, ensure_ascii=False)


# ---- out


def write_tokenizer(writer: Any, tokenizer: Tokenizer, vocabulary: int, template: ChatTemplate | None) -> None:
    """Put `tokenizer` into a GGUF file of a model with `vocabulary` rows; rows beyond it are unused tokens. The ends
    that a GGUF file has names for are the tokenizer's and the template's.

    Raises:
        CheckpointError: it is of no kind that llama.cpp has.
    """
    content = json.loads(tokenizer.definition)
    model = content["model"]
    if model.get("type") != "BPE" or model.get("dropout"):
        raise CheckpointError(f"llama.cpp has no tokenizer of type {model.get('type')!r}, only byte pair encoding")
    texts, kinds = _tokens(content, vocabulary)
    if model.get("byte_fallback"):
        _write_pieces(writer, content, texts, kinds)
    else:
        _write_byte_level(writer, content, texts, kinds)
    for key, role in (("bos", "bos_token"), ("unk", "unk_token"), ("pad", "pad_token")):
        number = tokenizer.token_id(tokenizer.roles[role]) if role in tokenizer.roles else None
        if number is not None:
            getattr(writer, f"add_{key}_token_id")(number)
    writer.add_eos_token_id(tokenizer.end_id)
    for key, number in zip(_ENDS[1:], _other_ends(tokenizer, template), strict=False):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", number)
    writer.add_add_bos_token(bool(tokenizer.begin_ids))
    writer.add_add_eos_token(False)
    if template:
        writer.add_chat_template(template.without_marks)


def _other_ends(tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """Besides the end token: first the one that the template ends a turn with."""
    marks = Dialect(template, tokenizer).manners.ends[:1] if template else ()
    turns = [tokenizer.token_id(mark.text) for mark in marks]
    ends = dict.fromkeys([*(number for number in turns if number is not None), *sorted(tokenizer.end_ids)])
    return [number for number in ends if number != tokenizer.end_id]


def _tokens(content: dict[str, Any], vocabulary: int) -> tuple[list[str], list[Kind]]:
    texts = [f"[UNUSED{number}]" for number in range(vocabulary)]
    kinds = [Kind.UNUSED] * vocabulary
    for text, number in content["model"]["vocab"].items():
        texts[number], kinds[number] = text, Kind.NORMAL
    for token in content["added_tokens"]:
        number = token["id"]
        texts[number] = token["content"]
        kinds[number] = Kind.CONTROL if token["special"] else Kind.USER_DEFINED
    return texts, kinds


def _write_byte_level(writer: Any, content: dict[str, Any], texts: list[str], kinds: list[Kind]) -> None:
    steps = _steps(content["pre_tokenizer"], "pretokenizers")
    name = next((name for name, known in _SPLITS.items() if _same_split(steps, known)), None)
    if name is None or content["normalizer"] is not None:
        raise CheckpointError(
            f"llama.cpp splits text by rules it knows by name, and this tokenizer's are none of {', '.join(_SPLITS)}; "
            "export another layout"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([_joined(merge) for merge in content["model"]["merges"]])


def _same_split(steps: list[dict[str, Any]], known: list[dict[str, Any]]) -> bool:
    """Whether two splits do the same; `trim_offsets` and the like only say where tokens came from."""

    def said(one: dict[str, Any]) -> tuple[Any, ...]:
        keys = ("type", "pattern", "behavior", "add_prefix_space", "use_regex", "individual_digits")
        return tuple(one.get(key) for key in keys)

    return [said(one) for one in steps] == [said(one) for one in known]


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    steps: list[dict[str, Any]] = part[key] if part["type"] == "Sequence" else [part]
    return steps


def _write_pieces(writer: Any, content: dict[str, Any], texts: list[str], kinds: list[Kind]) -> None:
    """Scores that rank pieces as the merges do.

    After a piece of type USER_DEFINED llama.cpp puts a space before the text that follows, and SentencePiece does not.
    So such a piece is a normal one wherever merging finds it by itself: a character, or two such pieces together.
    """
    normalizers = _steps(content["normalizer"], "normalizers")
    known = ({"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    if any(one not in known for one in normalizers):
        raise CheckpointError("llama.cpp has no such normalisation of text as this tokenizer's; export another layout")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(content["model"]["merges"]):
        ranks.setdefault(_joined(merge).replace(" ", ""), rank)
    own = set(_user_defined(content))
    found = {text for text in own if len(text) == 1}
    for text in sorted(own, key=len):
        if any(text[:cut] in found and text[cut:] in found for cut in range(1, len(text))):
            found.add(text)
            ranks[text] = -1_000_000 - len(text)  # the longest first, and before all others
    unknown = content["model"].get("unk_token")
    scores = []
    for number, text in enumerate(texts):
        if kinds[number] == Kind.NORMAL and _is_byte(text):
            kinds[number] = Kind.BYTE
        elif kinds[number] == Kind.NORMAL and text in own - found:
            kinds[number] = Kind.USER_DEFINED
        elif text == unknown:
            kinds[number] = Kind.UNKNOWN
        # A single character is no union of others, and is never merged to.
        scores.append(-float(ranks[text]) if text in ranks else -1e6)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(any(one["type"] == "Prepend" for one in normalizers))


def _user_defined(content: dict[str, Any]) -> list[str]:
    """What `zili.data.sentencepiece` makes of them: alternatives of one pattern."""
    steps = _steps(content["pre_tokenizer"], "pretokenizers")
    if not steps:
        return []
    vocabulary = content["model"]["vocab"]
    if any(step["type"] != "Split" for step in steps):
        raise CheckpointError("llama.cpp has no such split of text as this tokenizer's; export another layout")
    import re

    pattern = re.compile(steps[0]["pattern"]["Regex"])
    return [text for text in vocabulary if pattern.fullmatch(text)]


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _joined(merge: list[str] | str) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)
