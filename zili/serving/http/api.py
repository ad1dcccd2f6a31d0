"""OpenAI's API over an engine: `/v1/chat/completions`, `/v1/completions` and what belongs to them."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import zili
from zili.data.dialect import Dialect
from zili.data.tokenizer import Tokenizer
from zili.errors import ConfigError
from zili.serving.forms.guides import Form, TooManyForms
from zili.serving.forms.structure import Forms
from zili.serving.generate.engine import Engine
from zili.serving.http.answers import AnswerPiece, Answers, Asked, Beginner, refusal_of
from zili.serving.http.choices import ChatChoices, Choices, CompletionChoices, usage
from zili.serving.http.gate import Aside, Gate, Intake, Limits
from zili.serving.http.keys import Keys
from zili.serving.http.metrics import CONTENT_TYPE, Metrics
from zili.serving.http.prompts import Prompts, Ready
from zili.serving.http.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from zili.serving.http.refusal import ErrorBody, Refusal, busy

T = TypeVar("T")

_MOST_FORMING = 32
"""Forms that wait to be compiled, which may take five seconds each."""
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
    dialect: Dialect | None
    """How it is spoken to; None: it completes texts alone."""
    name: str
    keys: Keys = field(default_factory=Keys)
    """Clients must send one of these keys; without keys anyone may ask."""
    limits: Limits = field(default_factory=Limits)
    origins: Sequence[str] = ()
    """Origins of other web pages whose scripts may ask, such as https://chat.example.org; "*": any."""
    hosts: Sequence[str] = ()
    """Names by which whoever needs no key may ask on this machine, as behind a proxy."""
    created: int = field(default_factory=lambda: int(time.time()))


def make_app(served: Served) -> FastAPI:
    """The application; the engine is closed by whoever opened it."""
    app = _bare_app()
    app.add_middleware(Gate, keys=served.keys, limits=served.limits, hosts=served.hosts)
    if served.origins:  # outside the gate: before it asks with a key a browser asks without whether it may
        methods = ["GET", "POST"]
        app.add_middleware(CORSMiddleware, allow_origins=served.origins, allow_methods=methods, allow_headers=["*"])
    app.state.intake = Intake()
    app.router.route_class = Aside
    _add_routes(app, _Api(served, app.state.intake))
    app.mount("/page", StaticFiles(directory=_PAGE))
    return app


def _bare_app() -> FastAPI:
    """Without routes; whatever fails in it is answered as a `Refusal`."""
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
    return app


def _add_routes(app: FastAPI, api: _Api) -> None:
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


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _no_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refusal(error.status_code, str(error.detail), headers=error.headers).response()


async def _failed(_: Request, error: Exception) -> Response:
    return Refusal(500, f"the server failed ({type(error).__name__})").response()


def _field_of(form: dict[str, Any], message: str) -> str:
    """The field that asked for a form, by what is said about it."""
    if message.startswith("tools:") or not form.keys() & {"structured_outputs", "response_format"}:
        return "tools"
    return "structured_outputs" if form.get("structured_outputs") else "response_format"


@dataclass(frozen=True)
class Telling:
    """One request's answers, and how they are put."""

    asked: Asked
    ready: Ready
    answers: Answers
    choices: Choices
    head: dict[str, Any]
    """What the answer, or each event of it, begins with."""

    def whole(self, answers: Sequence[AnswerPiece]) -> dict[str, Any]:
        """All of it, from whole answers."""
        told = [self.choices.whole(index, answer) for index, answer in enumerate(answers)]
        return {**self.head, "choices": told, "usage": self._usage()}

    async def events(self, request: Request, seconds: float) -> AsyncIterator[str]:
        """A server-sent event for each piece."""
        so_far: dict[str, Any] = {"usage": None} if self.asked.with_usage else {}
        try:
            async with aclosing(self.answers.pieces(request, seconds)) as pieces:
                async for index, piece in pieces:
                    so_far |= {"usage": self._usage()} if self.asked.with_usage_so_far else {}
                    yield _event({**self.head, "choices": [self.choices.piece(index, piece)], **so_far})
            if self.asked.with_usage:
                yield _event({**self.head, "choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status was sent long ago
            yield _event(refusal_of(error).body())

    def _usage(self) -> dict[str, Any]:
        return usage(self.answers.streams, self.ready.given)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class _Api:
    """The routes."""

    def __init__(self, served: Served, intake: Intake) -> None:
        self.served, self._intake = served, intake
        self.tokenizer, self.engine = served.tokenizer, served.engine
        self.metrics = Metrics(served.engine, served.name)
        self._prompts = Prompts(served.tokenizer, served.dialect, served.engine.context)
        self._beginner = Beginner(served.engine, served.tokenizer, served.limits, self.metrics, self._prompts)
        # A few, since each compiles in a process that takes a CPU.
        self._compiling = ThreadPoolExecutor(2, "zili-forms")
        self._forming = 0
        self._forms = Forms(served.tokenizer, self._prompts.end_ids, self._prompts.tags)

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
        ids = await self._aside(request, self._prompts.encoded, asked.prompt)
        ids = [*self.tokenizer.begin_ids, *ids] if asked.add_special_tokens else ids
        return {"tokens": ids, "count": len(ids), "max_model_len": self.engine.context}

    async def detokenize(self, asked: DetokenizeRequest, request: Request) -> dict[str, Any]:
        """The text of ids."""
        await self._aside(request, self._prompts.known, asked.tokens)
        return {"prompt": await self._aside(request, self.tokenizer.decode, asked.tokens)}

    async def chat(self, asked: ChatRequest, request: Request) -> Any:
        """The next turn of a conversation."""
        self._check(asked, asked.n)
        ready = await self._aside(request, self._prompts.conversation, asked)
        answers = await self._begun(request, asked, ready)
        choices = ChatChoices(asked, len(answers.streams), self.tokenizer)
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        head = self._head("chatcmpl", kind, asked)
        return await self._told(request, Telling(asked, ready, answers, choices, head))

    async def complete(self, asked: CompletionRequest, request: Request) -> Any:
        """What follows a text."""
        self._check(asked, len(asked.prompts) * asked.n)
        if asked.stream and asked.echo:
            raise Refusal(400, "echo is not streamed", param="echo")
        ready = await self._aside(request, self._prompts.texts, asked)
        answers = await self._begun(request, asked, ready)
        choices = CompletionChoices(asked, answers.streams, ready, self.tokenizer)
        head = self._head("cmpl", "text_completion", asked)
        return await self._told(request, Telling(asked, ready, answers, choices, head))

    # ---- what is asked

    async def _aside(self, request: Request, work: Callable[..., T], *given: Any) -> T:
        """What takes longer for larger bodies."""
        return await self._intake.aside(request.state.size, work, *given)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.served.name:
            message = f"the model {name[:100]!r} is not served here; there is {self.served.name!r}"
            raise Refusal(404, message, param="model", code="model_not_found")

    def _check(self, asked: Asked, answers: int) -> None:
        """Before anything is done for it."""
        self._check_model(asked.model)
        if answers > self.served.limits.waiting:
            raise Refusal(400, f"{answers} answers are asked for at once; {self.served.limits.waiting} may be")
        if asked.longest is not None and asked.min_tokens > asked.longest:
            message = f"min_tokens is {asked.min_tokens}, and at most {asked.longest} are asked for"
            raise Refusal(400, message, param="min_tokens")
        self._prompts.known(asked.stop_token_ids, "stop_token_ids")

    async def _begun(self, request: Request, asked: Asked, ready: Ready) -> Answers:
        guide = await self._guide(ready)
        self._beginner.check_room(asked, ready, request.state.held)
        return self._beginner.begin(asked, ready, guide, getattr(request.state, "holder", None))

    async def _guide(self, ready: Ready) -> Form | None:
        if ready.form is None:
            return None
        if self._forming >= _MOST_FORMING:
            raise busy(f"{self._forming} forms wait to be compiled already")
        style = self._prompts.call_style
        compile_ = partial(self._forms.asked, ready.form, style=style, thinking=ready.thinking)
        self._forming += 1
        try:
            # It takes seconds, in which the others go on.
            return await asyncio.get_running_loop().run_in_executor(self._compiling, compile_)
        except TooManyForms as error:
            raise busy(str(error)) from error
        except ConfigError as error:
            raise Refusal(400, str(error), param=_field_of(ready.form, str(error))) from error
        finally:
            self._forming -= 1

    # ---- what is answered

    def _head(self, kind: str, name: str, asked: Asked) -> dict[str, Any]:
        made = f"{kind}-{asked.request_id or uuid.uuid4().hex}"
        return {"id": made, "object": name, "created": int(time.time()), "model": self.served.name}

    async def _told(self, request: Request, telling: Telling) -> Any:
        """Whole, or as it comes."""
        if telling.asked.stream:
            # nginx keeps pieces back until it has many, unless it is asked not to.
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            events = telling.events(request, self.served.limits.answer_seconds)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        try:
            answers = await telling.answers.whole(request, self.served.limits.answer_seconds)
        except Exception as error:
            raise refusal_of(error) from error
        return await self._aside(request, telling.whole, answers)
