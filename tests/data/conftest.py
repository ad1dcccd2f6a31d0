"""A small tokenizer and small stores, built once."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from zili.data import Document, Tokenizer, TokenStore, build_store

TEXT = "self reliance 自立 kemandirian trains, checks: def f(x): return x * 2  \n\n 中国电信 naïve 3.14 it's"
WORDS = TEXT.split(" ")
MakeTexts = Callable[..., list[str]]


def _make_texts(count: int, seed: int, longest: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


@pytest.fixture(scope="session")
def make_texts() -> MakeTexts:
    """`make_texts(count, seed, longest)`: texts of 1 to `longest` words."""
    return _make_texts


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(_make_texts(200, seed=0), vocab_size=320)


@pytest.fixture(scope="session")
def stores(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[TokenStore]:
    """Two stores of unlike size and document length."""
    folder = tmp_path_factory.mktemp("stores")
    for name, count, longest in (("short", 120, 12), ("long", 25, 400)):
        documents = [Document(text, f"{name}:{i}") for i, text in enumerate(_make_texts(count, 1, longest))]
        build_store(documents, tokenizer, folder / name)
    return [TokenStore.open(folder / name) for name in ("short", "long")]


@pytest.fixture
def listing(tmp_path: Path) -> Callable[[], list[str]]:
    """`listing()`: names of everything now below `tmp_path`."""
    return lambda: sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
