"""Errors that a user can mend, in one line, though vLLM ends with the traceback of whatever it
dies of.

An engine and its workers run in processes of vLLM's own. When one of them ends, each process above
it ends with an exception that tells nothing but that. The process that the user has started
therefore names a file, in which the others leave their line, and ends with that line.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from qwen3_ascend.errors import UserError

LAST_WORDS = "QWEN3_ASCEND_LAST_WORDS"
"""Environment variable, inherited by vLLM's processes: the file for the line that ends them."""


@contextmanager
def say_in_one_line(speaks: bool = True) -> Iterator[None]:
    """Errors of the user within the block end the process with their line and nothing else.

    In the process of the user they stay exceptions, which a program may catch; only the traceback
    of an uncaught one is left out. A process of vLLM's own prints the traceback of every exception
    but SystemExit. Of ranks that meet the same error, one speaks.
    """
    try:
        yield
    except UserError as error:
        if multiprocessing.parent_process() is None:
            raise
        if speaks:
            print(_line(error), file=sys.stderr, flush=True)
            with suppress(KeyError, OSError):
                Path(os.environ[LAST_WORDS]).write_text(_line(error))
        raise SystemExit(1) from error


def end_in_one_line() -> None:
    """For the process of the user: what is uncaught and ours to say is one line from now on."""
    if multiprocessing.parent_process() is not None or LAST_WORDS in os.environ:
        return
    handle, name = tempfile.mkstemp(prefix="qwen3-ascend-")
    os.close(handle)
    os.environ[LAST_WORDS] = name
    atexit.register(_forget, name)
    earlier = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = _line(error) if isinstance(error, UserError) else _left_line(name)
        if line:
            print(line, file=sys.stderr)
        else:
            earlier(kind, error, trace)

    sys.excepthook = hook


def _line(error: BaseException) -> str:
    return f"qwen3-ascend: error: {error}"


def _left_line(name: str) -> str:
    with suppress(OSError):
        return Path(name).read_text()
    return ""


def _forget(name: str) -> None:
    os.environ.pop(LAST_WORDS, None)
    with suppress(OSError):
        os.remove(name)
