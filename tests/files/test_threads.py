"""Tasks that are run as they come, or ahead: in bounds, and the first error ends them all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.threads import Ahead, crew, run_all, run_as_they_come


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


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_several_who_share_a_crew_get_their_results_in_order(threads: int) -> None:
    """Each waits for its own; no more are under way, or wait, than there is room for."""
    held, most, lock = 0, 0, threading.Lock()

    def make(owner: int, number: int) -> tuple[int, int]:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        time.sleep(0.0005 * (number % 3))
        return owner, number

    def ask(owner: int) -> list[tuple[int, int]]:
        nonlocal held
        ahead, found = Ahead(helpers, partial(make, owner), 40), []
        for number in range(40):
            found.append(ahead.result(number))
            with lock:
                held -= 1
        ahead.close()
        return found

    with crew(threads) as helpers:
        results = list(run_all([partial(ask, owner) for owner in range(3)], 3))
    assert sorted(results) == [[(owner, number) for number in range(40)] for owner in range(3)]
    assert most <= threads + 3  # and what has just been handed over


def test_who_gives_up_leaves_room_for_others() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise CheckpointError("no")
        return number

    with crew(2) as helpers:
        ahead = Ahead(helpers, make, 9)
        assert [ahead.result(0), ahead.result(1)] == [0, 1]
        with pytest.raises(CheckpointError, match="no"):
            ahead.result(2)
        ahead.close()
        other = Ahead(helpers, str, 9)
        assert [other.result(number) for number in range(9)] == list("012345678")
