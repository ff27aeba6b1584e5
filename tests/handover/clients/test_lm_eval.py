"""lm-eval finds the perplexity through the server that the model itself has."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from handover.clients import heldout
from handover.clients.program import client
from handover.engines import Engines
from support.openai_server import ServerProgram

from qwen3_ascend.runtime import LLM

WINDOWS = """
import json, sys
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
tokens, prefix, length = json.load(sys.stdin)
windows = get_rolling_token_windows(tokens, prefix, max_seq_len=length, context_len=1)
print(json.dumps([make_disjoint_window(window) for window in windows]))
"""


def loglikelihood(llm: LLM, text: str, clients: str) -> float:
    """Of a text in natural logarithms, in the windows that lm-eval cuts it into."""
    asked = [llm.tokenizer.encode(text), llm.tokenizer.eos_token_id, heldout.CONTEXT - 2]
    windows = json.loads(client(clients, "-c", WINDOWS, stdin=json.dumps(asked)))
    total = 0.0
    for before, following in windows:
        tokens = [*before, *following]
        rows = llm.logits(tokens[:-1]).log_softmax(-1)[len(before) - 1 :]
        total += float(rows.gather(1, torch.tensor(following)[:, None]).double().sum())
    return total


@pytest.mark.parametrize("concurrent", [1, 4])
def test_perplexity(
    concurrent: int, clients: str, server: ServerProgram, expected: LLM, tiny_w8a8: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    found = heldout.perplexity(clients, server.url, "tiny", tiny_w8a8, tmp_path, concurrent)
    texts = heldout.documents()
    total = sum(loglikelihood(expected, text, clients) for text in texts)
    of_bytes = math.exp(-total / sum(len(text.encode()) for text in texts))
    of_words = math.exp(-total / sum(len(text.split()) for text in texts))
    print(f"\nbyte perplexity {found['byte_perplexity']}, own {of_bytes}")
    assert found["byte_perplexity"] == pytest.approx(of_bytes, rel=1e-6)
    assert found["word_perplexity"] == pytest.approx(of_words, rel=1e-5)


def test_vllm_finds_the_same_perplexity(
    clients: str, engines: Engines, server: ServerProgram, tiny_w8a8: Path, tmp_path: Path
) -> None:
    """Of the same checkpoint, through the plugin. The last bit of a sum moves codes of activations,
    which is 0.03 % of a perplexity here (test_plugin_on_cpu.py)."""
    options = ("--dtype", "float32", "--served-model-name", "tiny")
    length = ("--max-model-len", str(heldout.CONTEXT))
    with engines.serving(tiny_w8a8, *options, *length) as url:
        found = _in(tmp_path / "vllm", clients, f"{url}/v1", tiny_w8a8)
    own = _in(tmp_path / "own", clients, server.url, tiny_w8a8)
    print(f"\nbyte perplexity of vLLM {found['byte_perplexity']}, own {own['byte_perplexity']}")
    for name in ("byte_perplexity", "word_perplexity"):
        assert found[name] == pytest.approx(own[name], rel=2e-3), name


def _in(folder: Path, clients: str, url: str, tokenizer: Path) -> dict[str, float]:
    folder.mkdir()
    return heldout.perplexity(clients, url, "tiny", tokenizer, folder)
