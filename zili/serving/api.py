"""OpenAI's API over an engine: `/v1/chat/completions`, `/v1/completions` and what belongs to them."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import zili
from zili.data.chat import ChatTemplate
from zili.data.manners import Manners
from zili.data.tokenizer import Tokenizer
from zili.errors import ConfigError, DataError
from zili.serving import wording
from zili.serving.delivery import events, whole
from zili.serving.engine import Ask, Engine, Guide
from zili.serving.gate import Gate, Limits
from zili.serving.keys import Keys
from zili.serving.metrics import CONTENT_TYPE, Metrics
from zili.serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from zili.serving.refusal import ErrorBody, Refusal
from zili.serving.reply import Reply
from zili.serving.streaming import Said, Stream
from zili.serving.structure import Forms, Part

_PAGE = Path(__file__).with_name("page")
_HEADERS = {
    # The page brings everything along; what a model writes can neither run nor fetch.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "It cannot be answered as it is."},
    401: {"model": ErrorBody, "description": "The key is not known."},
    404: {"model": ErrorBody, "description": "There is no such model."},
    408: {"model": ErrorBody, "description": "The request did not come in time."},
    413: {"model": ErrorBody, "description": "The request is too large."},
    429: {"model": ErrorBody, "description": "The key's rate or quota is used up; see Retry-After."},
    500: {"model": ErrorBody, "description": "A defect, of the server or of the model's weights."},
    503: {"model": ErrorBody, "description": "Too many are waiting; see Retry-After."},
    504: {"model": ErrorBody, "description": "The answer took too long."},
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
    limits: Limits = field(default_factory=Limits)
    origins: Sequence[str] = ()
    """Of other web pages that may ask, such as https://chat.example.org; "*": any."""
    created: int = field(default_factory=lambda: int(time.time()))


def make_app(served: Served) -> FastAPI:
    """The application; the engine is closed by whoever opened it."""
    app = FastAPI(
        title="Zili",
        version=zili.__version__,
        summary="OpenAI's API over a model of yours.",
        docs_url=None,  # they would fetch from a CDN
        redoc_url=None,
        responses=_REFUSALS,
    )
    app.exception_handler(Refusal)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_no_route)
    app.exception_handler(Exception)(_failed)
    app.add_middleware(Gate, keys=served.keys, limits=served.limits)
    if served.origins:  # outside the gate: before it asks with a key a browser asks without whether it may
        methods = ["GET", "POST"]
        app.add_middleware(CORSMiddleware, allow_origins=served.origins, allow_methods=methods, allow_headers=["*"])
    api = _Api(served)

    @app.get("/health", response_class=JSONResponse)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(api.metrics.text(), media_type=CONTENT_TYPE)

    answered: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
    app.get("/v1/models")(api.models)
    app.get("/v1/models/{name:path}")(api.model)
    app.post("/v1/chat/completions", response_model=None, responses=answered)(api.chat)
    app.post("/v1/completions", response_model=None, responses=answered)(api.complete)
    app.post("/tokenize")(api.tokenize)
    app.post("/detokenize")(api.detokenize)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html", headers=_HEADERS)

    app.mount("/page", StaticFiles(directory=_PAGE))
    return app


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return Refusal(400, f"{place}: {first['msg']}" if place else str(first["msg"]), param=place or None).response()


async def _no_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refusal(error.status_code, str(error.detail), headers=error.headers).response()


async def _failed(_: Request, error: Exception) -> Response:
    return Refusal(500, f"the server failed ({type(error).__name__})").response()


class _Api:
    """The routes."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.tokenizer, self.engine = served.tokenizer, served.engine
        self.metrics = Metrics(served.engine, served.name)
        template = served.template or ChatTemplate.named("chatml")
        manners = self._manners = template.manners(served.tokenizer)
        self.stop_ids = manners.end_ids(served.tokenizer)
        self._end_texts = manners.end_texts(served.tokenizer) if served.template else ()
        self._forms = Forms(served.tokenizer, self.stop_ids)
        self._tagged = manners.calls == "tagged"

    async def models(self) -> dict[str, Any]:
        """The one that is served."""
        return {"object": "list", "data": [await self.model(self.served.name)]}

    async def model(self, name: str) -> dict[str, Any]:
        """One by its name."""
        self._check_model(name)
        about = {"id": self.served.name, "object": "model", "created": self.served.created, "owned_by": "zili"}
        return {**about, "max_model_len": self.engine.context}

    async def tokenize(self, asked: TokenizeRequest) -> dict[str, Any]:
        """A text's ids."""
        ids = self._encoded(asked.prompt)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.engine.context}

    async def detokenize(self, asked: DetokenizeRequest) -> dict[str, Any]:
        """The text of ids."""
        self._known(asked.tokens)
        return {"prompt": self.tokenizer.decode(asked.tokens)}

    async def chat(self, asked: ChatRequest, request: Request) -> Any:
        """The next turn of a conversation."""
        self._check_model(asked.model)
        prompt = self._rendered(asked)
        # Some templates open an answer's thoughts themselves.
        thinking = bool(Manners.opening(self.tokenizer.decode(prompt[-16:])))
        guide = await self._guide(partial(asked.form_with_calls, tagged=self._tagged), thinking=thinking)
        top = asked.top_logprobs if asked.logprobs else None
        streams = self._begin(request, asked, [prompt] * asked.n, asked.longest, top, guide)
        head = self._head("chatcmpl", "chat.completion", asked)
        replies = [Reply(thinking=thinking, tools=bool(asked.offered)) for _ in streams]
        tellers = [wording.Told(self.tokenizer, skip_special=asked.skip_special_tokens) for _ in streams]
        if asked.stream:
            chunk = head | {"object": "chat.completion.chunk"}
            return self._events(request, asked, streams, chunk, partial(self._delta, asked, replies, tellers), [prompt])
        choices = []
        for index, answer in enumerate(await whole(streams, request, self.served.limits.answer_seconds)):
            parts = replies[index].push(answer.text) + replies[index].finish()
            finish = "tool_calls" if parts.calls and answer.finish == "stop" else answer.finish
            choice = {"index": index, "message": wording.message(parts), "finish_reason": finish}
            told = tellers[index].chat(answer.tokens) if asked.logprobs else None
            choices.append({**choice, "logprobs": told})
        return {**head, "choices": choices, "usage": wording.usage(streams, [prompt])}

    async def complete(self, asked: CompletionRequest, request: Request) -> Any:
        """What follows a text."""
        self._check_model(asked.model)
        if asked.stream and asked.echo:
            raise Refusal(400, "echo is not streamed", param="echo")
        prompts = [self._ids(prompt) for prompt in asked.prompts]
        each = [prompt for prompt in prompts for _ in range(asked.n)]
        guide = await self._guide(lambda: asked.form)
        streams = self._begin(request, asked, each, asked.max_tokens, asked.logprobs, guide, of_prompt=asked.echo)
        head = self._head("cmpl", "text_completion", asked)
        # What is echoed shows its special tokens, too.
        before: list[Sequence[int]] = [() if asked.echo else prompt for prompt in each]
        skip = asked.skip_special_tokens and not asked.echo
        tellers = [wording.Told(self.tokenizer, prompt, skip_special=skip) for prompt in before]
        if asked.stream:
            return self._events(request, asked, streams, head, partial(self._text, asked, tellers), prompts)
        choices = []
        for index, answer in enumerate(await whole(streams, request, self.served.limits.answer_seconds)):
            text, told = answer.text, answer.tokens
            if asked.echo:
                text, told = self.tokenizer.decode(each[index]) + text, [*streams[index].answer.prompt, *told]
            logprobs = tellers[index].completion(told) if asked.logprobs is not None else None
            choices.append({"index": index, "text": text, "finish_reason": answer.finish, "logprobs": logprobs})
        return {**head, "choices": choices, "usage": wording.usage(streams, prompts)}

    # ---- what is asked

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.served.name:
            raise Refusal(
                404,
                f"the model {name!r} is not served here; there is {self.served.name!r}",
                param="model",
                code="model_not_found",
            )

    def _rendered(self, asked: ChatRequest) -> list[int]:
        if self.served.template is None:
            raise Refusal(400, "the model has no chat template: use /v1/completions", param="messages")
        if asked.offered and not self._manners.tools:
            raise Refusal(400, "tools: the chat template of this model has no place for them", param="tools")
        begin = asked.add_generation_prompt
        options = {
            "add_generation_prompt": not asked.continue_final_message if begin is None else begin,
            "continue_final_message": asked.continue_final_message,
            "tools": asked.offered or None,
            **self._effort(asked.reasoning_effort),
            **asked.chat_template_kwargs,
        }
        try:
            turns = [message.plain() for message in asked.messages]
            return self.served.template.render(self.tokenizer, turns, **options).ids
        except (DataError, TypeError) as error:
            raise Refusal(400, str(error), param="messages") from error

    def _effort(self, effort: str | None) -> dict[str, str]:
        """The template's option, where it has one."""
        word = "reasoning_effort"
        assert self.served.template is not None
        if effort is not None and word in self.served.template.source:
            return {word: effort}
        if effort not in (None, "medium", *(() if self._manners.thinks else ("none",))):
            raise Refusal(400, f"{word}: the chat template of this model knows none", param=word)
        return {}

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._encoded(prompt) or [self.tokenizer.end_id]
        self._known(prompt)
        return prompt

    def _encoded(self, text: str) -> list[int]:
        try:
            return self.tokenizer.encode_marked(text)
        except DataError as error:
            raise Refusal(400, str(error), param="prompt") from error

    def _known(self, ids: Sequence[int], param: str = "prompt") -> None:
        beyond = next((id_ for id_ in ids if id_ >= self.tokenizer.vocab_size), None)
        if beyond is not None:
            raise Refusal(400, f"token {beyond}: the tokenizer has {self.tokenizer.vocab_size}", param=param)

    def _begin(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        longest: int | None,
        top: int | None,
        guide: Callable[[], Guide] | None,
        *,
        of_prompt: bool = False,
    ) -> list[Stream]:
        most = self.served.limits.waiting
        if len(prompts) > most:
            raise Refusal(400, f"{len(prompts)} answers are asked for at once; {most} may be")
        if sum(self.engine.load) + len(prompts) > self.engine.slots + most:
            message = f"{self.engine.load[1]} answers wait already, {most} may"
            raise Refusal(503, message, code="busy", headers={"Retry-After": "1"})
        if longest is not None and asked.min_tokens > longest:
            raise Refusal(
                400, f"min_tokens is {asked.min_tokens}, and at most {longest} are asked for", param="min_tokens"
            )
        self._known(asked.stop_token_ids, "stop_token_ids")
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
                ends = frozenset() if asked.ignore_eos and guide is None else self.stop_ids
                ask = Ask(
                    prompt,
                    room if longest is None else longest,
                    asked.sampling(seed + number),
                    ends | set(asked.stop_token_ids),
                    log_probabilities=top,
                    of_prompt=of_prompt,
                    bias=self._bias(asked.logit_bias),
                    guide=guide,
                    min_new_tokens=asked.min_tokens,
                )
                texts = self._end_texts if isinstance(asked, ChatRequest) and not asked.ignore_eos else ()
                stream = Stream(
                    self.engine,
                    self.tokenizer,
                    ask,
                    [*asked.stops, *texts],
                    skip_special=asked.skip_special_tokens,
                    goes_on=isinstance(asked, CompletionRequest),
                    metrics=self.metrics,
                    used=used,
                )
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

    async def _guide(self, form: Callable[[], Part | None], *, thinking: bool = False) -> Callable[[], Guide] | None:
        def made() -> Callable[[], Guide] | None:
            part = form()
            return None if part is None else self._forms.of(part, thinking=thinking)

        try:
            # Compiling a large one takes seconds, in which the others go on.
            return await asyncio.to_thread(made)
        except ConfigError as error:
            raise Refusal(400, str(error), param="response_format") from error

    # ---- what is answered

    def _head(self, kind: str, name: str, asked: ChatRequest | CompletionRequest) -> dict[str, Any]:
        created = int(time.time())
        return {
            "id": f"{kind}-{asked.request_id or uuid.uuid4().hex}",
            "object": name,
            "created": created,
            "model": self.served.name,
        }

    def _events(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        streams: list[Stream],
        head: dict[str, Any],
        choice: Callable[[int, Said, bool], dict[str, Any]],
        prompts: list[list[int]],
    ) -> Response:
        none_yet = {"usage": None} if asked.with_usage else {}

        def chunk(index: int, said: Said, first: bool) -> dict[str, Any]:
            return {**head, "choices": [choice(index, said, first)], **none_yet}

        def last() -> dict[str, Any]:
            return {**head, "choices": [], "usage": wording.usage(streams, prompts)}

        return events(streams, request, self.served.limits.answer_seconds, chunk, last if asked.with_usage else None)

    def _delta(
        self,
        asked: ChatRequest,
        replies: list[Reply],
        tellers: list[wording.Told],
        index: int,
        said: Said,
        first: bool,
    ) -> dict[str, Any]:
        reply, before = replies[index], replies[index].calls
        parts = reply.push(said.text)
        if said.finish:
            parts += reply.finish()
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
        delta |= {"content": parts.content} if parts.content else {}
        delta |= {"reasoning_content": parts.reasoning} if parts.reasoning else {}
        calls = [{"index": before + number, **wording.called(call)} for number, call in enumerate(parts.calls)]
        delta |= {"tool_calls": calls} if calls else {}
        finish = "tool_calls" if reply.calls and said.finish == "stop" else said.finish
        logprobs = tellers[index].chat(said.tokens) if asked.logprobs else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _text(
        self, asked: CompletionRequest, tellers: list[wording.Told], index: int, said: Said, first: bool
    ) -> dict[str, Any]:
        logprobs = tellers[index].completion(said.tokens) if asked.logprobs is not None else None
        return {"index": index, "text": said.text, "logprobs": logprobs, "finish_reason": said.finish}
