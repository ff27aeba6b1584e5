"""A Llama in the form of a Qwen3 computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support import llama_as_qwen3, tiny_models
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM

CONFIG: dict[str, Any] = {
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 192,
    "intermediate_size": 160,
    "max_position_embeddings": 512,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 320,
}


def test_logits_are_the_llamas(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**CONFIG, initializer_range=0.1)).eval()
    drawn = {name: w for name, w in llama.state_dict().items() if name != "lm_head.weight"}
    weights = {name: weight.bfloat16().float() for name, weight in drawn.items()}
    llama.load_state_dict(weights, strict=False)
    made, config = llama_as_qwen3.as_qwen3(weights, CONFIG)
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in made.values())
    folder = tiny_models.write(tmp_path / "qwen3", config, made, tokenizer=False)
    qwen3 = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(300)[None]
    with torch.inference_mode():
        expected, found = llama(tokens).logits, qwen3(tokens).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_constant_is_what_the_gains_undo() -> None:
    biases = llama_as_qwen3.constant_bias(64).double()
    assert torch.equal(biases, biases.bfloat16().double())
    square = llama_as_qwen3.GAIN**2 * 128 / 2**0.5
    assert abs(float(biases.square().sum()) / square - 1) < 2.0**-20
