"""Sockets, signals and threads around the interface."""

from __future__ import annotations

import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from qwen3_ascend.errors import OptionError, os_errors
from qwen3_ascend.files.paths import user_path
from qwen3_ascend.runtime.llm import LLM
from qwen3_ascend.runtime.options import ServeOptions
from qwen3_ascend.runtime.serving.app import make_app
from qwen3_ascend.runtime.serving.engine_loop import EngineLoop

LAST_WORDS = 3
"""Seconds for responses to be sent once their answers have been ended."""

BACKLOG = 2048
"""Connections that wait to be accepted; what the system allows may be less."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def open_socket(options: ServeOptions) -> socket.socket:
    """A socket that is bound, and refuses connections until it is served.

    Raises:
        OptionError: if the address is taken, unknown or not allowed.
    """
    place = f"--host {options.host} --port {options.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"{place}: {reason}; --port 0 takes any port that is free") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Where clients find it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def model_name(checkpoint: Path, options: ServeOptions) -> str:
    """The name by which clients ask for the model."""
    return options.served_model_name or user_path(checkpoint).resolve().name


def serve(
    llm: LLM, name: str, bound: socket.socket, options: ServeOptions, ready: Callable[[], None]
) -> None:
    """Answers until Ctrl-C or SIGTERM; on the main thread, which computes meanwhile.

    Args:
        llm: that answers.
        name: of the model, for clients.
        bound: from `open_socket`.
        options: limits.
        ready: called once connections are accepted.

    Raises:
        OptionError: if somebody else listens there by now.
        SystemExit: in the end, if the engine has failed; its traceback is on standard error.
    """
    engine = EngineLoop(llm)
    server = _http_server(make_app(llm, engine, name, options), options)
    with os_errors(OptionError):
        bound.listen(BACKLOG)
    with (
        ThreadPoolExecutor(1, "event loop") as pool,
        _stopping(lambda: _stop(server, engine, options.grace)),
    ):
        front = pool.submit(_serve_http, server, bound, engine)
        ready()
        failed = _compute(engine)
        front.result()
    if failed:
        raise SystemExit(1)


def _http_server(app: ASGIApp, options: ServeOptions) -> uvicorn.Server:
    config = uvicorn.Config(
        app, loop="asyncio", http="h11", ws="none", lifespan="off", log_level="warning",
        access_log=False, server_header=False,
        timeout_graceful_shutdown=options.grace + LAST_WORDS,
    )  # fmt: skip
    return uvicorn.Server(config)


def _serve_http(server: uvicorn.Server, bound: socket.socket, engine: EngineLoop) -> None:
    try:
        server.run([bound])
    finally:
        engine.close("the server has ended")


def _compute(engine: EngineLoop) -> bool:
    """Whether the engine has failed. Clients are told so for as long as the server is there."""
    try:
        engine.run()
    except Exception as error:
        traceback.print_exception(error)
        return True
    return False


def _stop(server: uvicorn.Server, engine: EngineLoop, grace: float) -> None:
    """Takes nothing in any more; what runs has some seconds to end."""
    server.should_exit = True
    timer = threading.Timer(grace, engine.close, ["the server is shutting down"])
    timer.daemon = True
    timer.start()


@contextmanager
def _stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` at the first Ctrl-C or SIGTERM within the block; the second ends the process,
    whatever its threads do."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + number)
        stop()

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
