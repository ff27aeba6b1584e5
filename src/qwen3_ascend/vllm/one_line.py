"""Errors that a user can mend, in one line, though vLLM ends with the traceback of whatever it
dies of."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from qwen3_ascend.errors import UserError


@contextmanager
def say_in_one_line(speaks: bool = True) -> Iterator[None]:
    """Errors of the user within the block end the process with their line and nothing else.

    In the process of the user they stay exceptions, which a program may catch; only the traceback
    of an uncaught one is left out. An engine or worker runs in a process of vLLM's own, which
    prints the traceback of every exception but SystemExit. Of ranks that meet the same error, one
    speaks.
    """
    try:
        yield
    except UserError as error:
        if multiprocessing.parent_process() is None:
            _leave_out_traceback()
            raise
        if speaks:
            print(_line(error), file=sys.stderr, flush=True)
        raise SystemExit(1) from error


def _line(error: BaseException) -> str:
    return f"qwen3-ascend: error: {error}"


def _leave_out_traceback() -> None:
    """Prints uncaught errors of the user as one line from now on."""
    earlier = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, UserError):
            print(_line(error), file=sys.stderr)
        else:
            earlier(kind, error, trace)

    sys.excepthook = hook
