"""Tasks that are run as they come: in bounds, and the first error ends them all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.threads import run_as_they_come


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_task_is_run_and_few_are_asked_for_ahead(threads: int) -> None:
    begun, ended, lock = 0, 0, threading.Lock()
    ahead: list[int] = []

    def task() -> None:
        nonlocal ended
        time.sleep(0.001)
        with lock:
            ended += 1

    def tasks() -> Iterator[Callable[[], None]]:
        nonlocal begun
        for _ in range(60):
            with lock:
                begun += 1
                ahead.append(begun - ended)
            yield task

    run_as_they_come(tasks(), threads, threading.Event())
    assert ended == 60
    assert max(ahead) <= 2 * threads + 1


@pytest.mark.parametrize("place", ["task", "making"])
@pytest.mark.parametrize("error", [CheckpointError("no"), KeyboardInterrupt()], ids=["error", "^C"])
def test_an_error_ends_everything(place: str, error: BaseException) -> None:
    stopped, ended = threading.Event(), []

    def task(number: int) -> None:
        if place == "task" and number == 3:
            raise error
        for _ in range(100):
            if stopped.wait(0.001):
                return
        ended.append(number)

    def tasks() -> Iterator[Callable[[], None]]:
        for number in range(100):
            if place == "making" and number == 4:
                raise error
            yield lambda number=number: task(number)  # type: ignore[misc]

    with pytest.raises(type(error)) as caught:
        run_as_they_come(tasks(), 2, stopped)
    assert caught.value is error and stopped.is_set()
    assert len(ended) < 10
