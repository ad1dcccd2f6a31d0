"""OpenAI's API over an engine: `/v1/chat/completions`, `/v1/completions` and what belongs to them."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

import zili
from zili.data.chat import ChatTemplate
from zili.data.tokenizer import Tokenizer
from zili.errors import ConfigError, DataError
from zili.serving.conversation import Dialogue
from zili.serving.engine import Ask, Engine, Token
from zili.serving.generation import Sampling
from zili.serving.keys import Keys, TooMuch
from zili.serving.metrics import CONTENT_TYPE, Metrics
from zili.serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from zili.serving.reply import Call, Parts, Reply
from zili.serving.streaming import Said, Stream

_OPEN = ("/health", "/metrics", "/openapi.json", "/", "/page")
"""Paths that need no key."""
_PAGE = Path(__file__).with_name("page")
_HEADERS = {
    # The page brings everything along; what a model writes can neither run nor fetch.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Served:
    """A model and how it is spoken to."""

    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate | None
    name: str
    keys: Keys = field(default_factory=Keys)
    """Whoever asks names one of them; none: anyone may ask."""
    created: int = field(default_factory=lambda: int(time.time()))


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def make_app(served: Served) -> FastAPI:
    """The application; the engine is closed by whoever opened it."""
    app = FastAPI(
        title="Zili",
        version=zili.__version__,
        summary="OpenAI's API over a model of yours.",
        docs_url=None,  # they would fetch from a CDN
        redoc_url=None,
    )
    app.exception_handler(Refusal)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.middleware("http")(_with_key(served.keys))
    api = _Api(served)

    @app.get("/health", response_class=JSONResponse)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(api.metrics.text(), media_type=CONTENT_TYPE)

    app.get("/v1/models")(api.models)
    app.post("/v1/chat/completions", response_model=None)(api.chat)
    app.post("/v1/completions", response_model=None)(api.complete)
    app.post("/tokenize")(api.tokenize)
    app.post("/detokenize")(api.detokenize)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html", headers=_HEADERS)

    app.mount("/page", StaticFiles(directory=_PAGE))
    return app


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return _error(error.status, str(error), error.param, error.code)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return _error(400, f"{place}: {first['msg']}" if place else str(first["msg"]), place or None)


def _with_key(keys: Keys) -> Callable[..., Any]:
    async def check(request: Request, proceed: Callable[[Request], Awaitable[Any]]) -> Any:
        path = request.url.path
        if keys.holders and path not in _OPEN and not path.startswith("/page/"):
            holder = keys.find(request.headers.get("authorization", "").removeprefix("Bearer "))
            if holder is None:
                return _error(401, "the key is not known; send it as Authorization: Bearer KEY", code="invalid_api_key")
            try:
                holder.ask()
            except TooMuch as error:
                refused = _error(429, str(error), code="rate_limit_exceeded")
                refused.headers["Retry-After"] = str(error.retry_after)
                return refused
            request.state.used = holder.used
        return await proceed(request)

    return check


class _Api:
    """The routes."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.tokenizer, self.engine = served.tokenizer, served.engine
        self.metrics = Metrics(served.engine, served.name)
        template = served.template or ChatTemplate.named("chatml")
        self.stop_ids = Dialogue(served.tokenizer, template).stop_ids

    async def models(self) -> dict[str, Any]:
        model = {"id": self.served.name, "object": "model", "created": self.served.created, "owned_by": "zili"}
        return {"object": "list", "data": [{**model, "max_model_len": self.engine.context}]}

    async def tokenize(self, asked: TokenizeRequest) -> dict[str, Any]:
        ids = self.tokenizer.encode(asked.prompt).tolist()
        return {"tokens": ids, "count": len(ids), "max_model_len": self.engine.context}

    async def detokenize(self, asked: DetokenizeRequest) -> dict[str, Any]:
        self._known(asked.tokens)
        return {"prompt": self.tokenizer.decode(asked.tokens)}

    async def chat(self, asked: ChatRequest, request: Request) -> Any:
        self._check_model(asked.model)
        if self.served.template is None:
            raise Refusal(400, "the model has no chat template: use /v1/completions", param="messages")
        try:
            turns = [message.plain() for message in asked.messages]
            options = {"add_generation_prompt": True, "tools": asked.offered or None, **asked.chat_template_kwargs}
            prompt = self.served.template.render(self.tokenizer, turns, **options).ids
        except (DataError, TypeError) as error:
            raise Refusal(400, str(error), param="messages") from error
        top = asked.top_logprobs if asked.logprobs else None
        streams = self._begin(request, asked, [prompt] * asked.n, asked.longest, top)
        head = self._head("chatcmpl", "chat.completion")
        # Some templates open an answer's thoughts themselves.
        thinking = self.tokenizer.decode(prompt[-16:]).rstrip().endswith("<think>")
        replies = [Reply(thinking=thinking, tools=bool(asked.offered)) for _ in streams]
        if asked.stream:
            chunk = head | {"object": "chat.completion.chunk"}
            return self._sse(asked, streams, chunk, partial(self._delta, replies=replies), [prompt])
        choices = []
        for index, (said, tokens, finish) in enumerate(await self._all(streams, request)):
            whole = _joined(replies[index].push(said), replies[index].finish())
            calls = [_called(call) for call in whole.calls]
            message: dict[str, Any] = {
                "role": "assistant",
                "content": whole.content if whole.content or not calls else None,
            }
            message |= {"reasoning_content": whole.reasoning} if whole.reasoning else {}
            message |= {"tool_calls": calls} if calls else {}
            choice = {"index": index, "message": {**message, "refusal": None}}
            choice["finish_reason"] = "tool_calls" if calls and finish == "stop" else finish
            choices.append({**choice, "logprobs": self._chat_logprobs(tokens) if asked.logprobs else None})
        return {**head, "choices": choices, "usage": self._usage(streams, [prompt])}

    async def complete(self, asked: CompletionRequest, request: Request) -> Any:
        self._check_model(asked.model)
        prompts = [self._ids(prompt) for prompt in asked.prompts]
        each = [prompt for prompt in prompts for _ in range(asked.n)]
        streams = self._begin(request, asked, each, asked.max_tokens, asked.logprobs, of_prompt=asked.echo)
        head = self._head("cmpl", "text_completion")
        if asked.stream:
            if asked.echo:
                raise Refusal(400, "echo is not streamed", param="echo")
            return self._sse(asked, streams, head, self._text_choice, prompts)
        choices = []
        for index, (said, tokens, finish) in enumerate(await self._all(streams, request)):
            text, told = said, tokens
            if asked.echo:
                text, told = self.tokenizer.decode(each[index]) + said, [*streams[index].answer.prompt, *tokens]
            logprobs = self._logprobs(told) if asked.logprobs is not None else None
            choices.append({"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs})
        return {**head, "choices": choices, "usage": self._usage(streams, prompts)}

    # ---- what is asked

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.served.name:
            raise Refusal(
                404,
                f"the model {name!r} is not served here; there is {self.served.name!r}",
                param="model",
                code="model_not_found",
            )

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt).tolist() or [self.tokenizer.end_id]
        self._known(prompt)
        return prompt

    def _known(self, ids: Sequence[int]) -> None:
        beyond = next((id_ for id_ in ids if id_ >= self.tokenizer.vocab_size), None)
        if beyond is not None:
            raise Refusal(400, f"token {beyond}: the tokenizer has {self.tokenizer.vocab_size}", param="prompt")

    def _begin(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        longest: int | None,
        top: int | None,
        *,
        of_prompt: bool = False,
    ) -> list[Stream]:
        seed = secrets.randbits(32) if asked.seed is None else asked.seed % 2**63
        streams: list[Stream] = []
        used = getattr(request.state, "used", lambda tokens: None)
        try:
            for number, prompt in enumerate(prompts):
                room = self.engine.context - len(prompt)
                if longest is not None and longest > room:
                    raise Refusal(
                        400,
                        f"the context holds {self.engine.context} tokens; {len(prompt)} of the prompt and {longest} of "
                        "the answer are more",
                        param="max_tokens",
                        code="context_length_exceeded",
                    )
                ask = Ask(
                    prompt,
                    room if longest is None else longest,
                    Sampling(asked.temperature, asked.top_p, asked.top_k, asked.repetition_penalty, seed + number),
                    frozenset() if asked.ignore_eos else self.stop_ids,
                    log_probabilities=top,
                    of_prompt=of_prompt,
                    bias=self._bias(asked.logit_bias),
                )
                stream = Stream(self.engine, self.tokenizer, ask, asked.stops, metrics=self.metrics, used=used)
                streams.append(stream)
        except (Refusal, ConfigError) as error:
            for stream in streams:
                stream.cancel()
            if isinstance(error, Refusal):
                raise
            raise Refusal(400, str(error), code="context_length_exceeded") from error
        return streams

    def _bias(self, given: dict[str, float] | None) -> dict[int, float]:
        try:
            bias = {int(token): value for token, value in (given or {}).items()}
        except ValueError as error:
            raise Refusal(400, "its keys are the ids of tokens", param="logit_bias") from error
        if any(not 0 <= token < self.tokenizer.vocab_size for token in bias):
            raise Refusal(400, f"a token is beyond {self.tokenizer.vocab_size}", param="logit_bias")
        return bias

    # ---- what is answered

    async def _all(self, streams: list[Stream], request: Request) -> list[tuple[str, list[Token], str]]:
        """Text, tokens and end of each; whoever hangs up meanwhile frees the slots."""
        gone = asyncio.create_task(_gone(request))
        work = asyncio.gather(*(_whole(stream) for stream in streams))
        try:
            await asyncio.wait((gone, work), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Refusal(499, "the client has gone")
            return await work
        finally:
            gone.cancel()
            work.cancel()
            for stream in streams:
                stream.cancel()

    def _sse(
        self,
        asked: ChatRequest | CompletionRequest,
        streams: list[Stream],
        head: dict[str, Any],
        choice: Callable[[ChatRequest | CompletionRequest, int, Said, bool], dict[str, Any]],
        prompts: list[list[int]],
    ) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            started: set[int] = set()
            try:
                async with aclosing(_merged(streams)) as merged:
                    async for index, said in merged:
                        part = choice(asked, index, said, index not in started)
                        started.add(index)
                        usage = {"usage": None} if asked.with_usage else {}
                        yield _event({**head, "choices": [part], **usage})
                if asked.with_usage:
                    yield _event({**head, "choices": [], "usage": self._usage(streams, prompts)})
                yield "data: [DONE]\n\n"
            except Exception as error:  # the status was sent long ago
                yield _event({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
            finally:
                for stream in streams:
                    stream.cancel()

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    def _delta(
        self,
        asked: ChatRequest | CompletionRequest,
        index: int,
        said: Said,
        first: bool,
        *,
        replies: list[Reply],
    ) -> dict[str, Any]:
        assert isinstance(asked, ChatRequest)
        reply, before = replies[index], replies[index].calls
        parts = reply.push(said.text)
        if said.finish:
            parts = _joined(parts, reply.finish())
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
        delta |= {"content": parts.content} if parts.content else {}
        delta |= {"reasoning_content": parts.reasoning} if parts.reasoning else {}
        calls = [{"index": before + number, **_called(call)} for number, call in enumerate(parts.calls)]
        delta |= {"tool_calls": calls} if calls else {}
        finish = "tool_calls" if reply.calls and said.finish == "stop" else said.finish
        logprobs = self._chat_logprobs(said.tokens) if asked.logprobs else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _text_choice(
        self, asked: ChatRequest | CompletionRequest, index: int, said: Said, first: bool
    ) -> dict[str, Any]:
        assert isinstance(asked, CompletionRequest)
        logprobs = self._logprobs(said.tokens) if asked.logprobs is not None else None
        return {"index": index, "text": said.text, "logprobs": logprobs, "finish_reason": said.finish}

    def _head(self, kind: str, name: str) -> dict[str, Any]:
        created = int(time.time())
        return {"id": f"{kind}-{uuid.uuid4().hex}", "object": name, "created": created, "model": self.served.name}

    @staticmethod
    def _usage(streams: list[Stream], prompts: list[list[int]]) -> dict[str, Any]:
        prompt, said = sum(map(len, prompts)), sum(stream.tokens for stream in streams)
        reused = sum(stream.answer.reused for stream in streams)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": min(reused, prompt)},
        }

    def _chat_logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        content = [
            {
                **self._named(token.id),
                "logprob": token.log_probability,
                "top_logprobs": [
                    {**self._named(id_), "logprob": value}
                    for id_, value in sorted(token.likeliest.items(), key=lambda pair: -pair[1])
                ],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _named(self, id_: int) -> dict[str, Any]:
        text = self.tokenizer.decode([id_])
        return {"token": text, "bytes": list(text.encode())}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        texts = [self.tokenizer.decode([token.id]) for token in tokens]
        offsets = [0]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        likeliest: list[dict[str, float] | None] = []
        for token in tokens:
            if token.log_probability is None:
                likeliest.append(None)
                continue
            top = {self.tokenizer.decode([id_]): value for id_, value in token.likeliest.items()}
            likeliest.append({self.tokenizer.decode([token.id]): token.log_probability, **top})
        return {
            "tokens": texts,
            "token_logprobs": [token.log_probability for token in tokens],
            "top_logprobs": likeliest,
            "text_offset": offsets[:-1],
        }


def _joined(one: Parts, other: Parts) -> Parts:
    return Parts(one.reasoning + other.reasoning, one.content + other.content, one.calls + other.calls)


def _called(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _whole(stream: Stream) -> tuple[str, list[Token], str]:
    text, tokens = [], []
    async for said in stream.pieces():
        text.append(said.text)
        tokens += said.tokens
    assert said.finish is not None
    return "".join(text), tokens, said.finish


async def _merged(streams: list[Stream]) -> AsyncGenerator[tuple[int, Said], None]:
    """Pieces of all streams as they come, each with the number of its stream."""
    pieces: asyncio.Queue[tuple[int, Said | Exception]] = asyncio.Queue()

    async def pump(index: int, stream: Stream) -> None:
        try:
            async for said in stream.pieces():
                pieces.put_nowait((index, said))
        except Exception as error:
            pieces.put_nowait((index, error))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            index, said = await pieces.get()
            if isinstance(said, Exception):
                raise said
            yield index, said
            left -= said.finish is not None
    finally:
        for task in pumps:
            task.cancel()


async def _gone(request: Request) -> None:
    """Returns when whoever asked has hung up."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
