"""Text to ids and back: a thin wrapper over Hugging Face `tokenizers`, in its own file format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from zili.data.pointers import is_lfs_pointer, what_it_is
from zili.errors import DataError

SPECIAL_TOKENS = ("<_unk>", "<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>")
"""TeleChat2's names at TeleChat2's ids, 0 to 6 (its SentencePiece model), so that chat code serves both."""

# Qwen2's, letter by letter (transformers models/qwen2/tokenization_qwen2.py): fast encoders know a few
# expressions by heart and refuse the rest. Digits stand alone; a word takes the one space before it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

DOCUMENT_ENDS = (
    *("<_end>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>", "<|eos|>"),
    "<｜end▁of▁sentence｜>",
)
"""Names of tokens that end a document, in the order in which they are looked for."""
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
_ROLES: dict[str, str | None] = {"bos_token": "<_start>", "unk_token": "<_unk>", "pad_token": "<_pad>"}


def has_tokenizer(folder: Path) -> bool:
    """Whether `Tokenizer.from_folder` finds one to read."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


class Tokenizer:
    """A tokenizer read from, and kept as, the text of a `tokenizer.json`.

    Encoding never yields a special token's id: a document that spells `<_end>` is text like any other, and
    no user's input can end a turn. Who wants the id asks for it (`special_id`, `encode_marked`). A tokenizer trained
    here gives every text back exactly; one read from elsewhere may normalise.
    """

    def __init__(
        self,
        definition: str,
        *,
        end_token: str | None = None,
        name: str = "tokenizer.json",
        roles: Mapping[str, str | None] | None = None,
        end_ids: Collection[int] = (),
    ) -> None:
        """`roles`: what bos_token, unk_token and pad_token are; None, or one that is not named: TeleChat2's names.
        `end_ids`: after which the model has said what it says, besides `end_token`.
        """
        try:
            self._inner = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"{name}: not a Hugging Face tokenizer.json ({error}).") from error
        self.definition = definition
        self._inner.no_padding()
        self._inner.no_truncation()
        self._inner.encode_special_tokens = True  # meaning: as plain text
        ids = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        added = self._inner.get_added_tokens_decoder()
        self.added_tokens = {token.content: id_ for id_, token in sorted(added.items())}
        self.special_tokens = {token.content: id_ for id_, token in sorted(added.items()) if token.special}
        self.end_token = _end_token(ids, end_token, name)
        self.end_id = ids[self.end_token]
        # Another is an ordinary piece of text: Llama's configuration says 2 where nobody has said anything.
        self.end_ids = frozenset((self.end_id, *set(end_ids).intersection(self.added_tokens.values())))
        """All tokens after which the model it belongs to has said what it says."""
        named = {**_ROLES, **(roles or {})}
        found = {role: token for role in _ROLES if (token := named[role]) is not None and token in ids}
        self.roles: dict[str, str] = {**found, "eos_token": self.end_token}
        """Tokens that templates ask for by role."""
        self.begin_ids = self._begin_ids()
        """What its own rules put before every text: a BOS token for models like Llama, mostly nothing."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 8192) -> Tokenizer:
        """Byte-level byte pair encoding (Sennrich et al. 2016; bytes as in GPT-2) learned from `texts`.

        No normaliser, so that decoding gives the text back exactly. Little text gives fewer than `vocab_size`
        tokens. Raises `DataError` when `vocab_size` cannot hold the 256 bytes and the special tokens.
        """
        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise DataError(f"vocabulary of {vocab_size}: {least} is the least (256 bytes, 7 special tokens).")
        inner = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner.to_str(pretty=True))

    @classmethod
    def from_file(cls, path: str | Path, *, end_token: str | None = None, **rest: Any) -> Tokenizer:
        """Read a `tokenizer.json`; `end_token` names the token that ends a document, if it is unusual; `rest` as the
        class takes it."""
        try:
            definition = Path(path).read_bytes().decode()  # line ends as they are, for the hash
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as a tokenizer.json ({error}).") from error
        if is_lfs_pointer(Path(path)):
            raise DataError(what_it_is(Path(path), ""))
        return cls(definition, end_token=end_token, name=str(path), **rest)

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, end_token: str | None = None, also_ends: Collection[int] = ()
    ) -> Tokenizer:
        """Read `tokenizer.json` of a folder, its roles as `tokenizer_config.json` beside it names them, and all ends
        that `config.json` and `generation_config.json` name, where they are there, and `also_ends`.

        A folder that has SentencePiece's `tokenizer.model` instead gives a tokenizer of the same ids.
        """
        config = _json(Path(folder, "tokenizer_config.json"), needed=True)
        named = {role: _content(token) for role, token in _json(Path(folder, "special_tokens_map.json")).items()}
        named |= {role: _content(token) for role, token in config.items() if role.endswith("_token")}
        rest: dict[str, Any] = {
            "roles": {role: named[role] for role in _ROLES if role in named},
            "end_ids": {*also_ends, *end_ids_in(_json(Path(folder, "generation_config.json")))},
        }
        rest["end_ids"] |= end_ids_in(_json(Path(folder, "config.json")))
        end_token = end_token or named.get("eos_token")
        model = Path(folder, "tokenizer.model")
        if Path(folder, "tokenizer.json").is_file() or not model.is_file():
            return cls.from_file(Path(folder, "tokenizer.json"), end_token=end_token, **rest)
        from zili.data.sentencepiece import definition_of, end_token_of

        definition, bos = definition_of(model), named.get("bos_token")
        if config.get("add_bos_token") is True and bos is not None:  # a tokenizer.json says it itself
            definition = after_bos(definition, bos)
        return cls(definition, end_token=end_token or end_token_of(model), name=str(model), **rest)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers' AutoTokenizer reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.definition, encoding="utf-8", newline="\n")
        config = json.dumps(self._config(), indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(config, encoding="utf-8", newline="\n")
        if len(self.end_ids) > 1:
            ends = json.dumps({"eos_token_id": [self.end_id, *sorted(self.end_ids - {self.end_id})]}) + "\n"
            (folder / "generation_config.json").write_text(ends, encoding="utf-8", newline="\n")

    def _config(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.roles,
            "clean_up_tokenization_spaces": False,
        }

    @property
    def sha256(self) -> str:
        """The sha256 of `tokenizer.json` as it is written, byte for byte."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    @property
    def unknown_id(self) -> int | None:
        """What a character that the vocabulary does not have becomes; None where it has all."""
        unknown = json.loads(self.definition)["model"].get("unk_token")
        return self.token_id(unknown) if isinstance(unknown, str) else None

    def taking_for_text(self, added: Collection[str]) -> Tokenizer:
        """The tokenizer with these added tokens recognised in no text, as special ones are not."""
        if all(token in self.special_tokens for token in added):
            return self
        content = json.loads(self.definition)
        for token in content["added_tokens"]:
            token["special"] = token["special"] or token["content"] in added
        return Tokenizer(json.dumps(content, ensure_ascii=False), end_token=self.end_token, roles=self.roles)

    def _begin_ids(self) -> tuple[int, ...]:
        plain, whole = (self._inner.encode("a", add_special_tokens=added).ids for added in (False, True))
        before = (place for place in range(len(whole)) if plain and whole[place : place + len(plain)] == plain)
        return tuple(whole[: next(before, 0)])

    @property
    def start_id(self) -> int:
        """The token that a text's first is predicted after: what its rules put there, else the one that ended the
        document before, in training. That is not the one that ends a turn of a conversation, where it has both."""
        if self.begin_ids:
            return self.begin_ids[-1]
        others = (name for name in DOCUMENT_ENDS if name not in _TURN_ENDS and name in self.added_tokens)
        name = next(others, self.end_token) if self.end_token in _TURN_ENDS else self.end_token
        return self.added_tokens.get(name, self.end_id)

    def tokens(self) -> dict[str, int]:
        """All tokens, as the vocabulary spells them, with their ids."""
        return self._inner.get_vocab(with_added_tokens=True)

    def token_id(self, text: str) -> int | None:
        """The id of a token as the vocabulary spells it; None: there is none."""
        found: int | None = self._inner.token_to_id(text)
        return found

    @cached_property
    def decoders(self) -> set[str]:
        """The steps by which a token's spelling becomes text: "ByteLevel", "ByteFallback", ..."""
        decoder = json.loads(self.definition).get("decoder") or {}
        return {step["type"] for step in (decoder, *decoder.get("decoders", ())) if "type" in step}

    def bytes_of(self, id_: int) -> bytes:
        """What a token adds to a text in UTF-8, which need be no whole character; b"" for an id without a token.

        At the beginning of a text some tokenizers leave out its space (`drops_first_space`).
        """
        spelled = self._inner.id_to_token(id_)
        if spelled is None or spelled in self.added_tokens:
            return (spelled or "").encode()
        if "ByteLevel" in self.decoders:
            return b"".join(_BYTES.get(letter) or letter.encode() for letter in spelled)
        if "ByteFallback" in self.decoders and len(spelled) == 6 and spelled.startswith("<0x"):
            return bytes([int(spelled[3:5], 16)])
        if self.decoders & {"ByteFallback", "Metaspace"}:
            return spelled.replace("\u2581", " ").encode()
        return self.decode([id_]).encode()

    @property
    def drops_first_space(self) -> bool:
        """Whether a text's first space is one that the tokenizer has put before it."""
        return bool(self.decoders & {"Strip", "Metaspace"})

    def special_id(self, token: str) -> int:
        """The id of a special token by name. Raises `DataError` naming those there are."""
        if token not in self.special_tokens:
            there = ", ".join(self.special_tokens) or "none"
            raise DataError(f"the tokenizer has no special token {token!r}; there are: {there}.")
        return self.special_tokens[token]

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids `[N]` of a text, with no special token added or recognised."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of each text, encoded in parallel. Raises `DataError` for text that is not Unicode."""
        return [np.array(ids, dtype=np.int32) for ids in _encoded(self._inner, texts)]

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which the spellings of special tokens are these tokens: a prompt that its writer made whole.

        Raises: DataError, text that is not Unicode.
        """
        return next(_encoded(self._marking, [text]))

    @cached_property
    def _marking(self) -> tokenizers.Tokenizer:
        inner = tokenizers.Tokenizer.from_str(self.definition)
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = False
        return inner

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        given = [int(id_) for id_ in ids]
        if len(given) < _LONG:
            return self._inner.decode(given, skip_special_tokens=skip_special)
        return self._inner.decode_batch([given], skip_special_tokens=skip_special)[0]  # lets go of Python's lock


def _encoded(inner: tokenizers.Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    try:
        # Of one text, too: `encode` holds Python's lock, for seconds where the text is long.
        encodings = inner.encode_batch_fast(list(texts), add_special_tokens=False)
    except (UnicodeEncodeError, TypeError) as error:
        raise DataError(f"text with a lone surrogate, or no text at all, cannot be encoded ({error}).") from error
    for encoding in encodings:
        yield encoding.ids


def after_bos(definition: str, token: str) -> str:
    """A definition whose rules put `token` before each text; as it is, where it has no such token."""
    content = json.loads(definition)
    added = {one["content"]: one["id"] for one in content["added_tokens"]}
    number = added.get(token, content["model"]["vocab"].get(token))
    if number is None:
        return definition
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    return json.dumps(content, ensure_ascii=False)


def end_ids_in(config: Mapping[str, Any]) -> set[int]:
    """What a config.json or a generation_config.json says ends an answer: one token or several."""
    given = config.get("eos_token_id")
    return {number for number in (given if isinstance(given, list) else [given]) if type(number) is int}


def _json(file: Path, *, needed: bool = False) -> dict[str, Any]:
    """An object, empty where there is no such file, or a broken one that is not needed."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if not needed:
            return {}
        raise DataError(f"{file}: broken JSON ({error}).") from error
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _end_token(ids: dict[str, int], wanted: str | None, name: str) -> str:
    if wanted is not None:
        if wanted not in ids:
            raise DataError(f"{name}: no token {wanted!r} to end documents with.")
        return wanted
    for token in DOCUMENT_ENDS:
        if token in ids:
            return token
    raise DataError(f"{name}: none of {', '.join(DOCUMENT_ENDS)} is in it. Name its end token (end_token=...).")


_LONG = 4096
"""Tokens whose text takes long."""
_CONTEXT = 8
"""Tokens before a text that decide how it begins."""
_CHARACTER = 4
"""Bytes of a character at most, and so tokens."""


def _byte_letters() -> dict[str, bytes]:
    """The letters by which byte-level tokens spell bytes (GPT-2, encoder.py `bytes_to_unicode`)."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [code for code in range(0x100) if code not in seen]
    return {chr(code): bytes([code]) for code in seen} | {chr(0x100 + n): bytes([code]) for n, code in enumerate(other)}


_BYTES = _byte_letters()


class DecodeStream:
    """Ids in one at a time, text out as soon as it is whole, for chat.

    Some tokenizers decode a token differently after another, and one character may take several tokens. So a short
    window is decoded again with each id, and text that ends in U+FFFD waits for its rest.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, before: Sequence[int] = ()) -> None:
        """`before`: ids of the text that this one goes on with. At a beginning some decoders drop a space."""
        self._decode = lambda ids: tokenizer.decode(ids, skip_special=skip_special)
        self._said = list(before[-_CONTEXT:])
        self._waiting: list[int] = []
        while self._said and len(self._waiting) < _CHARACTER and self._decode(self._said).endswith("\ufffd"):
            self._waiting.insert(0, self._said.pop())

    def push(self, id_: int) -> str:
        """The text that `id_` completes; empty while a character is unfinished."""
        self._waiting.append(id_)
        text = self._fresh()
        if not text or text.endswith("\ufffd"):
            return self._settled(text) if len(self._waiting) % (2 * _CHARACTER) == 0 else ""
        self._said, self._waiting = self._waiting, []
        return text

    def _settled(self, text: str) -> str:
        """What of `text` is whole though its end is not: a model may say bytes that never become a character.

        All of it would be decoded again with each of them.
        """
        for kept in range(_CHARACTER, 2 * _CHARACTER):
            before = self._decode(self._said + self._waiting[:-kept])[len(self._decode(self._said)) :]
            if text.startswith(before):
                # Tokens without text are no context: at a beginning some decoders drop a space.
                self._said = self._waiting[:-kept] if before else self._said
                self._waiting = self._waiting[-kept:]
                return before
        return ""

    def finish(self) -> str:
        """What still waits, unfinished characters as U+FFFD."""
        text = self._fresh()
        self._said, self._waiting = [], []
        return text

    def _fresh(self) -> str:
        return self._decode(self._said + self._waiting)[len(self._decode(self._said)) :]
