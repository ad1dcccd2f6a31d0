"""SentencePiece models as tokenizers of ours: the same ids as the sentencepiece package gives, on everything."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zili.data.sentencepiece import definition_of
from zili.data.tokenizer import Tokenizer
from zili.errors import DataError

sentencepiece = pytest.importorskip("sentencepiece")
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tokenizers"
TEXTS = [
    *("", " ", "a", " a", "a ", "  a  b   c", "\n", "\n\n", "\t\tx = 1\n", "1234567890", "_", "__", "_____"),
    *("你好，世界！", "😀😃", "e\u0301", "\u3000", "a\u2581b", "\x00\x01", "\ufeff", "한국어", "ß€", "=" * 97),
    *("__init__", "<_user>hi<_bot>", "<s>", "\n</s>\n", "1<unk>2", "\n<0x41>\n", "\n<0x7E>", "\n<think>\n"),
    *("<reserve1>x", "x<reserve1> y", "<reserve", " " * 70 + "x", "哈" * 33, "-" * 65, "#" * 40 + "\n" + " " * 31),
]
CHARACTERS = [*"abcdefghij  \n\t_0123456789你好的是中国<>/reserv=-#.,'", "😀", "\u3000", "é", "ß", "한", "國", "\x7f"]


def train(folder: Path, **settings_: object) -> Path:
    """A small model as TeleChat's are: control and user-defined pieces, bytes for the rest, digits apart."""
    rng = random.Random(0)
    parts = ["th", "mo", "del", "tr", "ain", "re", "turn", "你", "好", "天气", "模型", "训练", "self", ".", "=", "<s"]
    words = ["    ", "==", "--", *("".join(rng.choices(parts, k=rng.randint(1, 4))) for _ in range(300))]
    lines = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(800)]
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(lines), encoding="utf-8")
    arguments: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "control_symbols": ["<_start>", "<_end>", "<_user>", "<_bot>", "<think>"],
        "user_defined_symbols": ["0", "1", "2", "_", "__", "\n", "\t", "<reserve1>"],
        "minloglevel": 2,
        **settings_,
    }
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(folder / "tokenizer"), **arguments)
    return folder / "tokenizer.model"


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, object]:
    path = train(tmp_path_factory.mktemp("model"), add_dummy_prefix=request.param)
    return Tokenizer.from_folder(path.parent), sentencepiece.SentencePieceProcessor(str(path))


def check(pair: tuple[Tokenizer, object], text: str) -> None:
    ours, theirs = pair
    ids = theirs.encode(text)  # type: ignore[attr-defined]
    assert ours.encode(text).tolist() == ids
    assert ours.decode(ids) == theirs.decode(ids)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_sentencepiece_s(pair: tuple[Tokenizer, object], text: str) -> None:
    check(pair, text)


@given(text=st.text(st.sampled_from(CHARACTERS), max_size=80))
@settings(max_examples=400)
def test_any_text(pair: tuple[Tokenizer, object], text: str) -> None:
    check(pair, text)


@given(text=st.text(max_size=60))
@settings(max_examples=200)
def test_any_unicode(pair: tuple[Tokenizer, object], text: str) -> None:
    check(pair, text)


def test_control_pieces_are_special_and_never_come_from_text(pair: tuple[Tokenizer, object]) -> None:
    ours, theirs = pair
    for name in ("<_start>", "<_end>", "<_user>", "<_bot>"):
        assert ours.special_id(name) == theirs.piece_to_id(name)  # type: ignore[attr-defined]
        assert ours.special_id(name) not in ours.encode(f"say {name} now").tolist()
    assert ours.vocab_size == theirs.get_piece_size()  # type: ignore[attr-defined]


def test_transformers_reads_what_is_saved(pair: tuple[Tokenizer, object], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = pair
    ours.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        if text and not any(name in text for name in ("<_", "<s>", "</s>", "<unk>", "<think>")):
            assert loaded.encode(text, add_special_tokens=False) == theirs.encode(text)  # type: ignore[attr-defined]


def test_normalisation_that_the_model_has_is_kept(tmp_path: Path) -> None:
    path = train(tmp_path, normalization_rule_name="nmt_nfkc")
    pair = Tokenizer.from_folder(tmp_path), sentencepiece.SentencePieceProcessor(str(path))
    for text in ("ＡＢＣ１２", "①", "ﬁne", "你好 model"):
        check(pair, text)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: train(folder, model_type="unigram", vocab_size=330), "only byte pair encoding"),
        (lambda folder: train(folder, remove_extra_whitespaces=True), "treatment of spaces"),
        (lambda folder: train(folder, treat_whitespace_as_suffix=True), "treatment of spaces"),
        (lambda folder: _written(folder, b"not a model at all"), "not a SentencePiece model"),
        (lambda folder: _written(folder, b""), "no pieces"),
    ],
)
def test_what_is_not_read_is_said(tmp_path: Path, make: Callable[[Path], Path], said: str) -> None:
    with pytest.raises(DataError, match=said):
        definition_of(make(tmp_path))


def _written(folder: Path, content: bytes) -> Path:
    (folder / "tokenizer.model").write_bytes(content)
    return folder / "tokenizer.model"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["telechat2", "telechat3"])
def test_telechat_s_own_models_on_megabytes(name: str) -> None:
    """Python's sources and these documents: 1.8 M tokens of code, English and Chinese, and every piece by itself."""
    path = SHARED / f"{name}.model"
    if not path.is_file():
        pytest.skip(f"{path} is not here: TeleChat's tokenizers are not ours to ship")
    theirs = sentencepiece.SentencePieceProcessor(str(path))
    pair = Tokenizer(definition_of(path)), theirs
    rng = random.Random(0)
    for text in [*TEXTS, *("".join(rng.choices(CHARACTERS, k=rng.randint(1, 60))) for _ in range(2000))]:
        check(pair, text)
    pieces = [number for number in range(theirs.get_piece_size()) if not theirs.is_byte(number)]
    for number in pieces:
        if not theirs.is_control(number) and not theirs.is_unknown(number):
            check(pair, theirs.id_to_piece(number).replace("\u2581", " "))
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for file in [*sources, *(SHARED.parent.parent / "facts").glob("*.md")]:
        check(pair, file.read_text(encoding="utf-8", errors="replace"))
    assert pair[0].special_id("<_user>") == 4
