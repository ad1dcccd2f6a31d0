"""A tokenizer and a tiny model to serve."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from served import tiny_shape

from zili.config.model import ModelConfig
from zili.data.tokenizer import Tokenizer
from zili.models.decoder import Decoder

TEXTS = ["def read(self):\n    return self.data\n", "春眠不觉晓，处处闻啼鸟。", "hello, hello, world 👋🏽 "] * 4


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=300)


@pytest.fixture(scope="session")
def shape() -> ModelConfig:
    return tiny_shape(64, init_std=0.4)


@pytest.fixture(scope="session")
def model(shape: ModelConfig) -> Decoder:
    return Decoder(shape).eval()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and on a busy machine lose a hundredfold waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
