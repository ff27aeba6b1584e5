"""Sockets, signals and threads around the interface."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from qwen3_ascend.errors import OptionError, UserError, os_errors
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


class Server:
    """A model behind a socket. `run` computes and answers; the event loop has a thread beside."""

    def __init__(self, llm: LLM, name: str, bound: socket.socket, options: ServeOptions) -> None:
        """A server that does not listen yet.

        Args:
            llm: that answers.
            name: of the model, for clients.
            bound: from `open_socket`.
            options: limits.
        """
        self._bound, self._grace = bound, options.grace
        self._engine = EngineLoop(llm)
        self._http = uvicorn.Server(
            uvicorn.Config(
                make_app(llm, self._engine, name, options), loop="asyncio", http="h11", ws="none",
                lifespan="off", log_level="warning", access_log=False, server_header=False,
                timeout_graceful_shutdown=options.grace + LAST_WORDS,
            )
        )  # fmt: skip

    def run(self, ready: Callable[[], None]) -> None:
        """Answers until `stop`; on the thread that has loaded the model, since a device's streams
        belong to a thread.

        Args:
            ready: called once connections are accepted.

        Raises:
            OptionError: if somebody else listens there by now.
            SystemExit: in the end, if the engine has failed; why is on standard error.
        """
        with os_errors(OptionError):
            self._bound.listen(BACKLOG)
        with ThreadPoolExecutor(1, "event loop") as pool:
            front = pool.submit(self._serve_http)
            ready()
            failed = self._compute()
            front.result()
        if failed:
            raise SystemExit(1)

    def stop(self) -> None:
        """Takes nothing in any more; what runs has some seconds to end. From any thread."""
        self._http.should_exit = True
        reason = "the server is shutting down"
        timer = threading.Timer(self._grace, self._engine.close, [reason])
        timer.daemon = True
        timer.start()

    def _serve_http(self) -> None:
        try:
            self._http.run([self._bound])
        finally:
            self._engine.close("the server has ended")

    def _compute(self) -> bool:
        """Whether the engine has failed. Clients are told so for as long as the server is there."""
        try:
            self._engine.run()
        except UserError as error:
            print(f"Error: {error}", file=sys.stderr)
            return True
        except Exception as error:
            traceback.print_exception(error)
            return True
        return False


def serve(server: Server, ready: Callable[[], None]) -> None:
    """Runs a server until Ctrl-C or SIGTERM; see `Server.run`."""
    with _stopping(server.stop):
        server.run(ready)


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
