"""Jobs: every one runs to its end, two at a time, and the first error ends them all."""

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path

import pytest

from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.hashing import (
    HASH_BLOCK,
    Job,
    range_job,
    range_sha256,
    run_jobs,
)
from qwen3_ascend.native.sha256 import Digests, HashlibDigests, digests

WAYS = [HashlibDigests(), digests()]


@pytest.mark.parametrize("way", WAYS, ids=["hashlib", "best"])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_files_in_step(way: Digests, threads: int, tmp_path: Path) -> None:
    chance, found, expected = random.Random(1), {}, {}

    def job(path: Path) -> Job:
        digest = way.start()
        yield from range_job(path, 0, path.stat().st_size, digest)
        found[path] = digest.hexdigest()

    for index in range(20):
        path, data = (
            tmp_path / f"{index}",
            chance.randbytes(chance.choice([0, 1, 3 * HASH_BLOCK + 7])),
        )
        path.write_bytes(data)
        expected[path] = hashlib.sha256(data).hexdigest()
    run_jobs(map(job, expected), way, threads)
    assert found == expected
    assert {path: range_sha256(path, 0, path.stat().st_size) for path in expected} == expected


def test_as_many_at_a_time_as_were_asked_for() -> None:
    way, active, most, lock = digests(), set(), 0, threading.Lock()

    def job(number: int) -> Job:
        nonlocal most
        with lock:
            active.add(number)
            most = max(most, len(active))
        for _ in range(5):
            yield [(way.start(), memoryview(b"data"))]
        with lock:
            active.remove(number)

    run_jobs(map(job, range(50)), way, threads=2, jobs_per_thread=3)
    assert 1 < most <= 6 and not active


@pytest.mark.parametrize("place", ["job", "making"])
@pytest.mark.parametrize("error", [CheckpointError("no"), KeyboardInterrupt()], ids=["error", "^C"])
def test_an_error_ends_everything(place: str, error: BaseException) -> None:
    way, ended = digests(), []

    def job(number: int) -> Job:
        for step in range(1000):
            yield [(way.start(), memoryview(b"data"))]
            if place == "job" and number == 3 and step == 5:
                raise error
        ended.append(number)

    def jobs() -> Job:
        for number in range(100):
            if place == "making" and number == 4:
                raise error
            yield job(number)

    with pytest.raises(type(error)) as caught:
        run_jobs(jobs(), way, threads=2)
    assert caught.value is error
    assert len(ended) < 50
    assert threading.active_count() < 20


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="became shorter"):
        range_sha256(path, 0, 100)
