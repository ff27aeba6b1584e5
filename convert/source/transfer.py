"""How a download is repeated, reported and cancelled, whichever hub it comes from."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from qwen3_ascend.convert.options import ConvertOptions

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the second attempt, doubled each time, and the most that is ever waited."""

PATIENCE_AT_CLOSE = 2.0
"""Seconds for which a cancelled download may tidy up; its thread does not outlive the process."""


LONGEST_REASON = 300
"""Characters of an error's message that are passed on."""


class Cancelled(BaseException):
    """The conversion has ended while this download was under way.

    No Exception, or a client that retries whatever happens would retry this.
    """


@dataclass(frozen=True)
class Transfer:
    """What all downloads of one conversion share.

    Attributes:
        note: receives a line about each download and each retry.
        arrived: receives how many more bytes of weights have come (less than 0: they were lost).
        retries: further attempts after a first one that failed.
        cancelled: set when nobody waits for the downloads any more.
    """

    note: Callable[[str], None] = lambda line: None
    arrived: Callable[[int], None] = lambda nbytes: None
    retries: int = ConvertOptions.retries
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Cancelled if nobody waits any more."""
        if self.cancelled.is_set():
            raise Cancelled

    def persist(
        self, what: str, action: Callable[[], T], judge: Callable[[Exception], float | None]
    ) -> T:
        """The result of an action that may fail for a while.

        Args:
            what: is being done, for the notes.
            action: is repeated with growing pauses.
            judge: how many seconds an error asks to wait (usually 0), or None for an error that
                would come again; that, and the last of too many, is raised.
        """
        for attempt in range(self.retries + 1):
            try:
                self.check()
                return action()
            except Exception as error:
                asked = None if self.cancelled.is_set() else judge(error)
                if asked is None or attempt == self.retries:
                    raise
                self._wait(what, error, asked, attempt)
        raise AssertionError("not reached")

    def _wait(self, what: str, error: Exception, asked: float, attempt: int) -> None:
        # Jitter: the weight files of many converters must not come back to a busy server in step.
        backoff = FIRST_WAIT * 2.0 ** min(attempt, 10) * random.uniform(0.75, 1.25)
        seconds = min(max(backoff, asked), LONGEST_WAIT)
        self.note(
            f"{what}: {reason(error)}; trying again in {seconds:.1f} s "
            f"({attempt + 1} of {self.retries})"
        )
        self.cancelled.wait(seconds)


def reason(error: Exception) -> str:
    """The first line of an error, or its name if it says nothing; without signed addresses."""
    line = re.sub(r" for url:? \S+", "", str(error).strip().split("\n")[0])
    return line[:LONGEST_REASON] or type(error).__name__


class _Download(threading.Thread):
    """One file on its way, in a thread that cannot keep the process from ending."""

    def __init__(self, fetch: Callable[[str], Path], name: str) -> None:
        super().__init__(name=f"download of {name}", daemon=True)
        self._fetch, self._file = fetch, name
        self._path: Path | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """See threading.Thread."""
        try:
            self._path = self._fetch(self._file)
        except BaseException as error:
            self._error = error

    def result(self) -> Path:
        """The file, once it is here; or the error."""
        self.join()
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path


class Prefetch:
    """Fetches files one at a time in a known order, one ahead of the file asked for last.

    May be asked from several threads.
    """

    def __init__(self, fetch: Callable[[str], Path], order: Sequence[str] = ()) -> None:
        """Nothing is fetched before the first question.

        Args:
            fetch: brings one file here; it may be called from any thread.
            order: in which the files will be needed.
        """
        self._fetch, self._order = fetch, tuple(order)
        self._downloads: dict[str, _Download] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Path:
        """A file, which is waited for; the file after it is on its way then."""
        path = self._start(name).result()
        order = self._order
        if name in order[:-1]:
            self._start(order[order.index(name) + 1])
        return path

    def forget(self, name: str) -> None:
        """Fetches a file anew if it is asked for again."""
        with self._lock:
            self._downloads.pop(name, None)
            self._order = tuple(other for other in self._order if other != name)

    def close(self) -> None:
        """Waits a moment for downloads that have been cancelled."""
        for download in [*self._downloads.values()]:
            download.join(PATIENCE_AT_CLOSE)

    def _start(self, name: str) -> _Download:
        with self._lock:
            download = self._downloads.get(name)
            if download is None:
                download = self._downloads[name] = _Download(self._fetch, name)
                download.start()
            return download
