"""Being stopped: Ctrl-C and SIGTERM end a command with one line and the usual exit code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(BaseException):
    """A signal has ended the command. `str` is the line to print, `exit_code` 128 + the signal."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


@contextmanager
def stoppable(hint: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM within the block into Stopped.

    Args:
        hint: what the user may do now; asked after everything in the block has been closed.
    """
    try:
        with _terminable():
            yield
    except KeyboardInterrupt:
        raise Stopped(f"interrupted{hint()}", 128 + signal.SIGINT) from None
    except _Terminated:
        raise Stopped(f"terminated{hint()}", 128 + signal.SIGTERM) from None


class _Terminated(BaseException):
    """SIGTERM, as Ctrl-C is KeyboardInterrupt."""


@contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise_terminated(number: int, frame: Any) -> None:
    raise _Terminated
