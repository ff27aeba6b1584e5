"""The command `llm`: streamed and whole, and a conversation that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from handover.clients.program import client
from support.openai_server import ServerProgram

from qwen3_ascend import SamplingParams
from qwen3_ascend.runtime import LLM

QUESTION = "What does river mean?"
MODEL = """
- model_id: mine
  model_name: tiny
  api_base: {url}
  api_key_name: none
"""


@pytest.fixture
def folder(server: ServerProgram, tmp_path: Path) -> Path:
    (tmp_path / "extra-openai-models.yaml").write_text(MODEL.format(url=server.url))
    return tmp_path


def ask(clients: str, folder: Path, *options: str) -> str:
    environment = {"LLM_USER_PATH": str(folder)}
    return client(clients, "-m", "llm", "prompt", "-m", "mine", *options, environment=environment)


@pytest.mark.parametrize("options", [(), ("--no-stream",)])
def test_an_answer(options: tuple[str, ...], clients: str, folder: Path, expected: LLM) -> None:
    (whole,) = expected.generate(QUESTION)
    assert ask(clients, folder, QUESTION, *options) == whole.text + "\n"


def test_options_and_a_second_turn(clients: str, folder: Path, expected: LLM) -> None:
    (cut,) = expected.generate(QUESTION, SamplingParams(max_new_tokens=7))
    limits = ("-o", "temperature", "0", "-o", "max_tokens", "7")
    assert ask(clients, folder, QUESTION, *limits) == cut.text + "\n"
    conversation = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": cut.text},
        {"role": "user", "content": "What does oxygen mean?"},
    ]
    assert ask(clients, folder, "What does oxygen mean?", "--continue") == (
        expected.chat(conversation).text + "\n"
    )
