"""A tiny model that is served, for tests of the API and the page."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import openai

from zili.config.model import ModelConfig
from zili.data.dialect import Dialect
from zili.data.tokenizer import Tokenizer
from zili.models.decoder import Decoder
from zili.serving.generate.engine import Answer, Engine
from zili.serving.generate.generation import Ask, Token
from zili.serving.http.api import Served
from zili.serving.http.gate import Limits
from zili.serving.http.keys import Holder, Key, Keys
from zili.serving.http.server import make_server

KEY = "sk-of-the-tests"
KEYS = Keys(
    (
        Holder("tests", Key(key=KEY)),
        Holder("seldom", Key(key="sk-seldom", requests_per_minute=2)),
        Holder("little", Key(key="sk-little", tokens_per_day=10)),
        Holder("two hundred", Key(key="sk-two-hundred", tokens_per_day=200)),
        Holder("hundred", Key(key="sk-hundred", tokens_per_day=100)),
    )
)


@dataclass
class Place:
    url: str
    served: Served
    model: Decoder
    """The same as is served, for comparison."""

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any, key: str = KEY) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


class Scripted:
    """An engine that says what it is told to, whatever is asked; it notes the prompts."""

    context, load, usage, slots = 4096, (0, 0), 0.0, 16

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.text = ""
        self.prompts: list[str] = []

    def submit(self, ask: Ask, notify: Callable[[], None] | None = None) -> Answer:
        self.prompts.append(self._tokenizer.decode(list(ask.prompt)))
        answer = Answer(ask, notify)
        for id_ in self._tokenizer.encode(self.text).tolist():
            answer._say(Token(id_, None, {}))
        answer._say(finished="stop")
        return answer


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.train(["What is the colour of snow? white", "Und der Himmel ist blau."] * 4, 300)


def tiny_shape(context: int, init_std: float = 0.3) -> ModelConfig:
    return ModelConfig(
        vocab_size=320,
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn_hidden_size=48,
        max_length=context,
        init_std=init_std,
    )


@contextmanager
def listening(served: Served) -> Iterator[str]:
    """Where `served` is reached."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        server = make_server(served)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


@contextmanager
def slowed(engine: Engine) -> Iterator[None]:
    """Each step takes a tenth of a second more, so that an answer lasts as long as a test needs it."""
    step = engine._step

    def slowly() -> None:
        time.sleep(0.1)
        step()

    with mock.patch.object(engine, "_step", slowly):
        yield


def serve_a_tiny_model(keys: Keys, context: int = 256, limits: Limits | None = None) -> Iterator[Place]:
    """Until the iterator is closed."""
    tokenizer = tiny_tokenizer()
    models = [Decoder(tiny_shape(context)).eval() for _ in range(2)]
    for model in models:
        model.init_weights(1)
    with Engine(models[0], slots=4, vocabulary=tokenizer.vocab_size) as engine:
        served = Served(engine, tokenizer, Dialect.named("telechat2", tokenizer), "tiny", keys, limits or Limits())
        with listening(served) as url:
            yield Place(url, served, models[1])
