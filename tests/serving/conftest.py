"""One model and one server for all tests of the interface."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.openai_server import served

from qwen3_ascend import load
from qwen3_ascend.runtime import LLM

QUESTION = "What does river mean?"


@pytest.fixture(scope="package")
def llm(tiny_w8a8: Path) -> LLM:
    """In float32, where an answer does not depend on what is computed beside it."""
    return load(tiny_w8a8, dtype="float32", block_size=16, kv_cache_tokens=8192)


@pytest.fixture(scope="package")
def expected(tiny_w8a8: Path) -> LLM:
    """The same model, for what is to be answered."""
    return load(tiny_w8a8, dtype="float32", block_size=16, kv_cache_tokens=2048)


@pytest.fixture(scope="package")
def url(llm: LLM) -> Iterator[str]:
    """The address of a server with the model."""
    with served(llm, max_requests=32, max_body="64KiB") as address:
        yield address


@pytest.fixture
def idle(llm: LLM) -> Callable[[], None]:
    """Waits until nothing is computed, and holds every block to be free."""

    def wait() -> None:
        pool, until = llm._engine.scheduler.pool, time.monotonic() + 30
        while llm.open or pool.free_blocks < pool.num_blocks - 1:
            assert time.monotonic() < until, "a request is stuck, or a block is lost"
            time.sleep(0.01)
        pool.check_integrity([])

    return wait
