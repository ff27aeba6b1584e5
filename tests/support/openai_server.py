"""The server in this process, and as a program."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_ascend.runtime import LLM
from qwen3_ascend.runtime.options import ServeOptions
from qwen3_ascend.runtime.serving.server import Server, open_socket, url_of
from support.command_line import PROGRAM, obey_interrupts

NAME = "tiny"


@contextmanager
def served(llm: LLM, **options: Any) -> Iterator[str]:
    """The address of a server around a model, whose engine runs on a thread meanwhile."""
    chosen = ServeOptions(port=0, **{"grace": 0, **options})
    with open_socket(chosen) as bound:
        server, ready = Server(llm, NAME, bound, chosen), threading.Event()
        thread = threading.Thread(target=_run, args=[server, ready.set])
        thread.start()
        assert ready.wait(30)
        try:
            yield url_of(bound)
        finally:
            server.stop()
            thread.join(60)
            assert not thread.is_alive(), "it does not end"


def _run(server: Server, ready: Callable[[], None]) -> None:
    with suppress(SystemExit):  # of an engine that has failed
        server.run(ready)


@dataclass(frozen=True)
class ServerProgram:
    """`qwen3-ascend serve`, running."""

    process: subprocess.Popen[str]
    url: str
    said: str

    def end(self, number: int = signal.SIGTERM, timeout: float = 60) -> tuple[int, str]:
        """Sends a signal; how the program has ended, and what it said after its first lines."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, err


@contextmanager
def server_program(checkpoint: Path, *options: str) -> Iterator[ServerProgram]:
    """A program that serves on a free port; killed in the end if it is still there."""
    command = [*PROGRAM, "serve", str(checkpoint), "--port", "0", *options]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=obey_interrupts
    )
    assert process.stderr is not None
    try:
        said = ""
        while (found := re.search(r" at (http://\S+/v1);", said)) is None:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield ServerProgram(process, found[1], said)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
