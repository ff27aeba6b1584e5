"""The interface: which addresses there are, and how a request is taken in and answered."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3_ascend.errors import UserError
from qwen3_ascend.files.text import parse_size
from qwen3_ascend.runtime.answer import Piece
from qwen3_ascend.runtime.llm import LLM
from qwen3_ascend.runtime.options import ServeOptions
from qwen3_ascend.runtime.serving.engine_loop import EngineLoop, Job
from qwen3_ascend.runtime.serving.parameters import (
    ChatParameters,
    P,
    Parameters,
    StreamOptions,
    TextParameters,
    parse,
)
from qwen3_ascend.runtime.serving.refusal import Refusal
from qwen3_ascend.runtime.serving.replies import Choice, Completion, Usage
from qwen3_ascend.runtime.serving.requests import Prepared, prepare_chat, prepare_text

JSON = "application/json"
EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy is not to collect events
}


class Places:
    """Counts what is taken in, so that there is an end to it."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Holds so many places within the block; a Refusal if they are not free."""
        if self._taken + count > self._most:
            line = f"the server takes in at most {self._most} answers at a time; try again later"
            raise Refusal(429, line, code="rate_limit_exceeded", headers={"retry-after": "1"})
        self._taken += count
        try:
            yield
        finally:
            self._taken -= count


@dataclass(frozen=True)
class Service:
    """What all addresses share.

    Attributes:
        llm: whose tokenizer and limits are read; only the engine's loop computes with it.
        engine: the loop.
        name: of the model.
        options: limits.
        places: for answers.
        preparing: lets one request at a time be encoded, on a thread beside the event loop.
        started: when, in seconds since 1970.
    """

    llm: LLM
    engine: EngineLoop
    name: str
    options: ServeOptions
    places: Places
    preparing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    started: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class Kind(Generic[P]):
    """One of the two kinds of completions.

    Attributes:
        parameters: of a request.
        prepare: makes work of them.
        prefix: of the number of a response.
        whole: names the object of a response.
        chunk: names the object of an event.
    """

    parameters: type[P]
    prepare: Callable[[P, LLM, int], Prepared]
    prefix: str
    whole: str
    chunk: str


CHAT = Kind(ChatParameters, prepare_chat, "chatcmpl", "chat.completion", "chat.completion.chunk")
TEXT = Kind(TextParameters, prepare_text, "cmpl", "text_completion", "text_completion")


def make_app(llm: LLM, engine: EngineLoop, name: str, options: ServeOptions) -> ASGIApp:
    """The server without its sockets.

    Args:
        llm: that `engine` computes with.
        engine: whose `run` somebody calls.
        name: of the model, for clients.
        options: limits.
    """
    service = Service(llm, engine, name, options, Places(options.max_requests))
    models = Models(service)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", Completions(service, CHAT), methods=["POST"]),
            Route("/v1/completions", Completions(service, TEXT), methods=["POST"]),
            Route("/v1/models", models.all),
            Route("/v1/models/{name:path}", models.one),
            Route("/health", models.health),
            Route("/ping", models.health),
        ],
        exception_handlers={
            Refusal: _refused,
            UserError: _user_error,
            HTTPException: _http_error,
            Exception: _defect,
        },
    )
    return AccessLog(app) if options.access_log else app


class Models:
    """What is served, and whether it is well."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._model = {
            "id": service.name,
            "object": "model",
            "created": service.started,
            "owned_by": "qwen3-ascend",
            "max_model_len": service.llm.longest,
        }

    async def all(self, http: Request) -> Response:
        """The one model, as a list."""
        return JSONResponse({"object": "list", "data": [self._model]})

    async def one(self, http: Request) -> Response:
        """The model by its name."""
        _check_model(http.path_params["name"], self._service.name)
        return JSONResponse(self._model)

    async def health(self, http: Request) -> Response:
        """200 while requests are computed."""
        self._service.engine.check()
        return Response()


class Completions(Generic[P]):
    """An address that answers prompts."""

    def __init__(self, service: Service, kind: Kind[P]) -> None:
        self._service, self._kind = service, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request; see ASGI."""
        with self._service.places.taken(1), suppress(ClientDisconnect):
            self._service.engine.check()
            most = parse_size(self._service.options.max_body)
            await self._take(await _body(Request(scope, receive), most), receive, send)

    async def _take(self, body: bytes, receive: Receive, send: Send) -> None:
        service = self._service
        parameters = parse(body, self._kind.parameters)
        _check_model(parameters.model, service.name)
        _check_stream(parameters)
        async with service.preparing:
            prepared = await asyncio.to_thread(
                self._kind.prepare, parameters, service.llm, service.options.max_requests
            )
        with service.places.taken(len(prepared.replies) - 1):
            job = Job(prepared.answers, prepared.scores)
            try:
                service.engine.submit(job)
                answering = self._answer(parameters, prepared, job, send)
                await _while_connected(receive, answering)
            finally:
                service.engine.abort(job)

    async def _answer(self, parameters: P, prepared: Prepared, job: Job, send: Send) -> None:
        kind = self._kind
        name = kind.chunk if parameters.stream else kind.whole
        blank = Completion(
            f"{kind.prefix}-{uuid.uuid4().hex}", name, int(time.time()), self._service.name, []
        )
        await job.scored()
        if parameters.stream:
            options = parameters.stream_options or StreamOptions()
            await _send_events(_events(blank, prepared, job, options), send)
        else:
            body = (await _whole(blank, prepared, job)).encode()
            await Response(body, media_type=JSON)({"type": "http"}, _nothing, send)


async def _whole(blank: Completion, prepared: Prepared, job: Job) -> Completion:
    """The response once all answers have ended."""
    replies = prepared.replies
    pieces: list[list[Piece]] = [[] for _ in replies]
    async for place, piece in job.pieces():
        pieces[place].append(piece)
    choices = [reply.whole(_joined(its)) for reply, its in zip(replies, pieces, strict=True)]
    written = sum(len(piece.token_ids) for its in pieces for piece in its)
    return msgspec.structs.replace(
        blank, choices=choices, usage=_usage(prepared.prompt_tokens, written)
    )


async def _events(
    blank: Completion, prepared: Prepared, job: Job, options: StreamOptions
) -> AsyncIterator[bytes]:
    """The response as it comes, in JSON objects."""
    written = 0

    def event(*choices: Choice) -> bytes:
        usage: Any = msgspec.UNSET
        if options.continuous_usage_stats:
            usage = _usage(prepared.prompt_tokens, written)
        elif options.include_usage:
            usage = None
        return msgspec.structs.replace(blank, choices=choices, usage=usage).encode()

    replies = prepared.replies
    for choice in (choice for reply in replies for choice in reply.opening()):
        yield event(choice)
    if not prepared.answers:  # a prompt that is only to be echoed
        for reply in replies:
            yield event(reply.chunk(_joined([])))
    async for place, piece in job.pieces():
        written += len(piece.token_ids)
        if piece.text or piece.logprobs or piece.finish_reason:
            yield event(replies[place].chunk(piece))
    if options.include_usage:
        usage = _usage(prepared.prompt_tokens, written)
        yield msgspec.structs.replace(blank, usage=usage).encode()


async def _send_events(events: AsyncIterator[bytes], send: Send) -> None:
    """Sends server-sent events. What goes wrong once the response has begun is one of them."""
    headers = [(name.encode(), value.encode()) for name, value in EVENT_STREAM.items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        async for data in events:
            await send(_part(b"data: " + data + b"\n\n", more=True))
            await asyncio.sleep(0)  # so that it is noticed in time if the client has gone
    except Refusal as refusal:
        data = msgspec.json.encode(refusal.to_json())
        await send(_part(b"data: " + data + b"\n\n", more=True))
    await send(_part(b"data: [DONE]\n\n", more=False))


def _part(body: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _usage(read: int, written: int) -> Usage:
    return Usage(read, written, read + written)


def _joined(pieces: list[Piece]) -> Piece:
    """One piece that holds all; where there is none, nothing was to be generated."""
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.token_ids),
        tuple(one for piece in pieces for one in piece.logprobs),
        pieces[-1].finish_reason if pieces else "length",
    )


async def _body(http: Request, most: int) -> bytes:
    """The body of a request; a Refusal if it is no JSON, or too large."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:  # which a page in a browser cannot send to another site unasked
        raise Refusal(415, f"the content-type must be {JSON}, not {kind or 'left out'}")
    parts, length = [], 0
    async for part in http.stream():
        length += len(part)
        if length > most:
            raise Refusal(
                413, f"the body is larger than {most} bytes", headers={"connection": "close"}
            )
        parts.append(part)
    return b"".join(parts)


def _check_model(asked: str | None, name: str) -> None:
    if asked is not None and asked != name:
        line = f"there is no model {asked}; this server has {name}"
        raise Refusal(404, line, "model", "model_not_found")


def _check_stream(parameters: Parameters) -> None:
    if parameters.stream_options is not None and not parameters.stream:
        raise Refusal(400, "stream_options needs stream: true", "stream_options")


async def _while_connected(receive: Receive, answering: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine to its end, or until the client has gone."""
    tasks = [asyncio.ensure_future(answering), asyncio.ensure_future(_disconnected(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def _refused(http: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.to_json(), error.status, error.headers)


async def _user_error(http: Request, error: Exception) -> Response:
    return await _refused(http, Refusal(400, " ".join(str(error).split())))


async def _http_error(http: Request, error: Exception) -> Response:
    """What the router says: there is no such address, or it takes another method."""
    assert isinstance(error, HTTPException)
    line = f"{http.method} {http.url.path}: {error.detail}"
    return await _refused(http, Refusal(error.status_code, line, headers=error.headers))


async def _defect(http: Request, error: Exception) -> Response:
    """A defect of ours; the traceback goes to the server's standard error."""
    return await _refused(http, Refusal(500, "the server has failed at this request"))


@dataclass(frozen=True)
class AccessLog:
    """Prints a line for each request that has been answered."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on; see ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            seconds = time.perf_counter() - started
            what = f"{scope['method']} {scope['path']!r}"
            print(f"{what} {status or 'gone'} {seconds:.2f} s", file=sys.stderr, flush=True)
