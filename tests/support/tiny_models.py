"""Small random Qwen3 models in the Hugging Face layout, written without transformers.

The tensor names and shapes are spelled out here a second time on purpose: what the package derives
from a configuration is held against this list, not against itself.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "data" / "tiny-qwen3"
"""A small trained model; see its README."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def config(**changes: Any) -> dict[str, Any]:
    """A config.json; a change to None removes the key."""
    data = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        **changes,
    }
    return {key: value for key, value in data.items() if value is not None}


def shapes(data: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that transformers' Qwen3ForCausalLM saves."""
    hidden, inner, head = data["hidden_size"], data["intermediate_size"], data["head_dim"]
    query, value = data["num_attention_heads"] * head, data["num_key_value_heads"] * head
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (data["vocab_size"], hidden)}
    for layer in range(data["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q_proj", query), ("k_proj", value), ("v_proj", value)):
            found[f"{prefix}.self_attn.{name}.weight"] = (rows, hidden)
            if data["attention_bias"]:
                found[f"{prefix}.self_attn.{name}.bias"] = (rows,)
        found[f"{prefix}.self_attn.o_proj.weight"] = (hidden, query)
        if data["attention_bias"]:
            found[f"{prefix}.self_attn.o_proj.bias"] = (hidden,)
        found[f"{prefix}.self_attn.q_norm.weight"] = (head,)
        found[f"{prefix}.self_attn.k_norm.weight"] = (head,)
        found[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        found[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        found[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        found[f"{prefix}.input_layernorm.weight"] = (hidden,)
        found[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not data["tie_word_embeddings"]:
        found["lm_head.weight"] = (data["vocab_size"], hidden)
    return found


def tensors(data: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random bfloat16 weights, scaled so that logits spread and attention is not flat.

    The embedding is small beside what the layers add; otherwise a tied model would repeat its
    last token for ever.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise: Tensor = torch.randn(shape, generator=generator)
        if "norm" in name:
            centre = 2.0 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
            return centre + 0.3 * noise
        if name.endswith(".bias"):
            return 0.5 * noise
        if "embed_tokens" in name:
            return 0.15 * noise
        return 1.5 * noise / math.sqrt(shape[1])

    return {name: draw(name, shape).bfloat16() for name, shape in shapes(data).items()}


def write(
    folder: Path,
    data: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    *,
    shards: int = 1,
    tokenizer: bool = True,
) -> Path:
    """Saves a model; with several shards, also their index."""
    data = config() if data is None else data
    weights = tensors(data) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data))
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors")
    else:
        write_shards(folder, _dealt(weights, shards))
    for name in TOKENIZER_FILES if tokenizer else ():
        shutil.copyfile(DATA / name, folder / name)
    return folder


def write_shards(folder: Path, parts: Sequence[Mapping[str, Tensor]]) -> None:
    """Saves each part as a file of weights, and their index."""
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(dict(part), folder / file)
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for part in parts for tensor in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _dealt(weights: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Deals the tensors out in turn, so that every fused linear is spread over several files."""
    return [dict(list(weights.items())[number::count]) for number in range(count)]
