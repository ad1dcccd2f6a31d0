"""OpenAI's API over an engine: `/v1/chat/completions`, `/v1/completions` and what belongs to them."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
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
from zili.serving.delivery import Whole, events, whole
from zili.serving.engine import Ask, Engine, Guide
from zili.serving.gate import Gate, Limits, too_much
from zili.serving.guides import Form, TooManyForms
from zili.serving.intake import Aside, Intake
from zili.serving.keys import Holder, Keys, TooMuch
from zili.serving.metrics import CONTENT_TYPE, Metrics
from zili.serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from zili.serving.refusal import ErrorBody, Refusal
from zili.serving.reply import Reply
from zili.serving.streaming import Said, Stream
from zili.serving.structure import Forms

T = TypeVar("T")

_STRETCH = 1 << 16
"""Characters of a text that are counted at a time, where it may be too long."""
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
    403: {"model": ErrorBody, "description": "Who needs no key has come by a name that may be anybody's."},
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
    app.exception_handler(HTTPException)(_no_route)
    app.exception_handler(Exception)(_failed)
    app.add_middleware(Gate, keys=served.keys, limits=served.limits)
    if served.origins:  # outside the gate: before it asks with a key a browser asks without whether it may
        methods = ["GET", "POST"]
        app.add_middleware(CORSMiddleware, allow_origins=served.origins, allow_methods=methods, allow_headers=["*"])
    app.state.intake = Intake()
    app.router.route_class = Aside
    api = _Api(served, app.state.intake)

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
    app.post("/tokenize", response_model=None)(api.tokenize)
    app.post("/detokenize", response_model=None)(api.detokenize)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html", headers=_HEADERS)

    app.mount("/page", StaticFiles(directory=_PAGE))
    return app


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _no_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refusal(error.status_code, str(error.detail), headers=error.headers).response()


async def _failed(_: Request, error: Exception) -> Response:
    return Refusal(500, f"the server failed ({type(error).__name__})").response()


@dataclass(frozen=True)
class _Ready:
    """What is asked, as the engine takes it."""

    given: list[list[int]]
    """Prompts."""
    answers: int
    """To each of them."""
    form: dict[str, Any] | None
    """What of the request says how answers must look."""
    bias: dict[int, float]
    thinking: bool = False
    """Whether the prompt opens the answer's thoughts."""

    @property
    def each(self) -> list[list[int]]:
        """The prompt of each answer."""
        return [prompt for prompt in self.given for _ in range(self.answers)]


def _texts_in(value: Any) -> Iterator[str]:
    """All texts in what was given as JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts_in(inner)


class _Api:
    """The routes."""

    def __init__(self, served: Served, intake: Intake) -> None:
        self.served, self._intake = served, intake
        self.tokenizer, self.engine = served.tokenizer, served.engine
        self.metrics = Metrics(served.engine, served.name)
        template = served.template or ChatTemplate.named("chatml")
        manners = self._manners = template.manners(served.tokenizer)
        self.stop_ids = manners.end_ids(served.tokenizer)
        self._end_texts = manners.end_texts(served.tokenizer) if served.template else ()
        # A few, since each compiles in a process that takes a CPU.
        self._compiling = ThreadPoolExecutor(2, "zili-forms")
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

    async def tokenize(self, asked: TokenizeRequest, request: Request) -> dict[str, Any]:
        """A text's ids."""
        ids = await self._aside(request, self._encoded, asked.prompt)
        ids = [*self.tokenizer.begin_ids, *ids] if asked.add_special_tokens else ids
        return {"tokens": ids, "count": len(ids), "max_model_len": self.engine.context}

    async def detokenize(self, asked: DetokenizeRequest, request: Request) -> dict[str, Any]:
        """The text of ids."""
        await self._aside(request, self._known, asked.tokens)
        return {"prompt": await self._aside(request, self.tokenizer.decode, asked.tokens)}

    async def chat(self, asked: ChatRequest, request: Request) -> Any:
        """The next turn of a conversation."""
        self._check(asked, asked.n)
        ready = await self._aside(request, self._conversation, asked)
        guide = await self._guide(ready)
        top = asked.top_logprobs if asked.logprobs else None
        streams = self._begin(request, asked, ready, asked.longest, top, guide)
        head = self._head("chatcmpl", "chat.completion", asked)
        replies = [Reply(thinking=ready.thinking, tools=bool(asked.offered)) for _ in streams]
        tellers = [wording.Told(self.tokenizer, skip_special=asked.skip_special_tokens) for _ in streams]
        if asked.stream:
            chunk = head | {"object": "chat.completion.chunk"}
            delta = partial(self._delta, asked, replies, tellers)
            return self._events(request, asked, streams, chunk, delta, ready.given)
        answers = await whole(streams, request, self.served.limits.answer_seconds)
        choices = await self._aside(request, self._said, asked, answers, replies, tellers)
        return {**head, "choices": choices, "usage": wording.usage(streams, ready.given)}

    def _said(
        self, asked: ChatRequest, answers: list[Whole], replies: list[Reply], tellers: list[wording.Told]
    ) -> list[dict[str, Any]]:
        choices = []
        for index, (answer, reply) in enumerate(zip(answers, replies, strict=True)):
            parts = reply.push(answer.text) + reply.finish()
            finish = "tool_calls" if parts.calls and answer.finish == "stop" else answer.finish
            choice = {"index": index, "message": wording.message(parts), "finish_reason": finish}
            told = tellers[index].chat(answer.tokens) if asked.logprobs else None
            choices.append({**choice, "logprobs": told})
        return choices

    async def complete(self, asked: CompletionRequest, request: Request) -> Any:
        """What follows a text."""
        self._check(asked, len(asked.prompts) * asked.n)
        if asked.stream and asked.echo:
            raise Refusal(400, "echo is not streamed", param="echo")
        ready = await self._aside(request, self._texts, asked)
        guide = await self._guide(ready)
        streams = self._begin(request, asked, ready, asked.max_tokens, asked.logprobs, guide, of_prompt=asked.echo)
        head = self._head("cmpl", "text_completion", asked)
        # What is echoed shows its special tokens, too.
        before: list[Sequence[int]] = [() if asked.echo else prompt for prompt in ready.each]
        skip = asked.skip_special_tokens and not asked.echo
        tellers = [wording.Told(self.tokenizer, prompt, skip_special=skip) for prompt in before]
        if asked.stream:
            return self._events(request, asked, streams, head, partial(self._text, asked, tellers), ready.given)
        answers = await whole(streams, request, self.served.limits.answer_seconds)
        choices = await self._aside(request, self._continued, asked, answers, streams, tellers)
        return {**head, "choices": choices, "usage": wording.usage(streams, ready.given)}

    def _continued(
        self, asked: CompletionRequest, answers: list[Whole], streams: list[Stream], tellers: list[wording.Told]
    ) -> list[dict[str, Any]]:
        choices = []
        for index, (answer, stream) in enumerate(zip(answers, streams, strict=True)):
            text, told = answer.text, answer.tokens
            if asked.echo:
                given = asked.prompts[index // asked.n]  # without the BOS token that was put before it
                before = given if isinstance(given, str) else self.tokenizer.decode(given)
                text, told = before + text, [*stream.answer.prompt, *told]
            logprobs = tellers[index].completion(told) if asked.logprobs is not None else None
            choices.append({"index": index, "text": text, "finish_reason": answer.finish, "logprobs": logprobs})
        return choices

    # ---- what is asked

    async def _aside(self, request: Request, work: Callable[..., T], *given: Any) -> T:
        """What takes longer for larger bodies."""
        return await self._intake.aside(request.state.size, work, *given)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.served.name:
            raise Refusal(
                404,
                f"the model {name[:100]!r} is not served here; there is {self.served.name!r}",
                param="model",
                code="model_not_found",
            )

    def _check(self, asked: ChatRequest | CompletionRequest, answers: int) -> None:
        """Before anything is done for it."""
        self._check_model(asked.model)
        if answers > self.served.limits.waiting:
            raise Refusal(400, f"{answers} answers are asked for at once; {self.served.limits.waiting} may be")

    def _conversation(self, asked: ChatRequest) -> _Ready:
        prompt = self._rendered(asked)
        # Some templates open an answer's thoughts themselves.
        thinking = bool(Manners.opening(self.tokenizer.decode(prompt[-16:])))
        return _Ready([prompt], asked.n, asked.formed, self._bias(asked.logit_bias), thinking)

    def _texts(self, asked: CompletionRequest) -> _Ready:
        prompts = [self._ids(prompt, begin=asked.add_special_tokens) for prompt in asked.prompts]
        return _Ready(prompts, asked.n, asked.formed, self._bias(asked.logit_bias))

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
            self._check_fit(_texts_in([turns, options]))
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

    def _ids(self, prompt: str | list[int], *, begin: bool) -> list[int]:
        if isinstance(prompt, str):
            self._check_fit([prompt])
            before = self.tokenizer.begin_ids if begin else ()
            return [*before, *self._encoded(prompt)] or [self.tokenizer.start_id]
        self._known(prompt)
        return prompt

    def _check_fit(self, texts: Iterable[str]) -> None:
        """Refuse what is far longer than the context, before memory is taken for all of it."""
        texts, most = list(texts), 2 * self.engine.context
        if sum(map(len, texts)) <= _STRETCH:
            return
        count = 0
        for text in texts:
            for start in range(0, len(text), _STRETCH):
                count += len(self._encoded(text[start : start + _STRETCH]))
                if count > most + _STRETCH:
                    raise Refusal(
                        400,
                        f"the context holds {self.engine.context} tokens; what is asked has more than {count:,}",
                        code="context_length_exceeded",
                    )

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
        ready: _Ready,
        longest: int | None,
        top: int | None,
        guide: Callable[[], Guide] | None,
        *,
        of_prompt: bool = False,
    ) -> list[Stream]:
        prompts, most = ready.each, self.served.limits.waiting
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
        holder: Holder | None = getattr(request.state, "holder", None)
        try:
            for number, prompt in enumerate(prompts):
                most = self._longest(prompt, longest, holder, len(prompts) - number)
                ends = frozenset() if asked.ignore_eos and guide is None else self.stop_ids
                ask = Ask(
                    prompt,
                    most,
                    asked.sampling(seed + number),
                    ends | set(asked.stop_token_ids),
                    log_probabilities=top,
                    of_prompt=of_prompt,
                    bias=ready.bias,
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
                    holder=holder,
                )
                streams.append(stream)
        except TooMuch as error:
            for stream in streams:
                stream.cancel()
            raise too_much(error) from error
        except (Refusal, ConfigError) as error:
            for stream in streams:
                stream.cancel()
            if isinstance(error, Refusal):
                raise
            raise Refusal(400, str(error), code="context_length_exceeded") from error
        return streams

    def _longest(self, prompt: list[int], longest: int | None, holder: Holder | None, answers: int) -> int:
        """Tokens of an answer at most: as asked, else what the context has room for, and the holder's quota has for
        each of so many answers."""
        room = self.engine.context - len(prompt)
        if longest is not None:
            if longest > room:
                raise Refusal(
                    400,
                    f"the context holds {self.engine.context} tokens; {len(prompt)} of the prompt and {longest} of "
                    "the answer are more",
                    param="max_tokens",
                    code="context_length_exceeded",
                )
            return longest
        free = holder.free() if holder is not None else None
        return room if free is None else max(1, min(room, free // answers - len(prompt)))

    def _bias(self, given: dict[str, float | None] | None) -> dict[int, float]:
        try:
            bias = {int(token): value for token, value in (given or {}).items() if value is not None}
        except ValueError as error:
            raise Refusal(400, "its keys are the ids of tokens", param="logit_bias") from error
        if any(not 0 <= token < self.tokenizer.vocab_size for token in bias):
            raise Refusal(400, f"a token is beyond {self.tokenizer.vocab_size}", param="logit_bias")
        return bias

    async def _guide(self, ready: _Ready) -> Form | None:
        if ready.form is None:
            return None
        compile_ = partial(self._forms.asked, ready.form, tagged=self._tagged, thinking=ready.thinking)
        try:
            # It takes seconds, in which the others go on.
            return await asyncio.get_running_loop().run_in_executor(self._compiling, compile_)
        except TooManyForms as error:
            raise Refusal(503, str(error), code="busy", headers={"Retry-After": "1"}) from error
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
