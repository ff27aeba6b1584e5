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


def mixture(**changes: Any) -> dict[str, Any]:
    """A config.json of a model with mixtures of experts."""
    experts = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    return config(**{**experts, **changes})


def has_experts(data: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has a mixture of experts, as transformers decides it."""
    named = layer in data.get("mlp_only_layers", [])
    return (
        bool(data.get("num_experts"))
        and not named
        and ((layer + 1) % data.get("decoder_sparse_step", 1) == 0)
    )


def _mlp_shapes(data: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, prefix = data["hidden_size"], data["intermediate_size"], "mlp"
    found: dict[str, tuple[int, ...]] = {}
    prefixes = [prefix]
    if has_experts(data, layer):
        inner = data["moe_intermediate_size"]
        found["mlp.gate.weight"] = (data["num_experts"], hidden)
        prefixes = [f"mlp.experts.{expert}" for expert in range(data["num_experts"])]
    for prefix in prefixes:
        found[f"{prefix}.gate_proj.weight"] = (inner, hidden)
        found[f"{prefix}.up_proj.weight"] = (inner, hidden)
        found[f"{prefix}.down_proj.weight"] = (hidden, inner)
    return found


def fused(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with those of all experts of a layer in one tensor, as transformers 5 has
    them in memory."""
    found, layers = dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    for name, tensor in weights.items():
        layer, is_expert, rest = name.partition(".mlp.experts.")
        if is_expert:
            layers.setdefault(layer, {})[rest.removesuffix(".weight")] = tensor
        else:
            found[name] = tensor
    for layer, each in layers.items():
        experts = range(len(each) // 3)
        pairs = [torch.cat([each[f"{e}.gate_proj"], each[f"{e}.up_proj"]]) for e in experts]
        found[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(pairs)
        downs = [each[f"{e}.down_proj"] for e in experts]
        found[f"{layer}.mlp.experts.down_proj"] = torch.stack(downs)
    return found


def shapes(data: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that transformers' Qwen3ForCausalLM saves, or its
    Qwen3MoeForCausalLM."""
    hidden = data["hidden_size"]
    head = data.get("head_dim", hidden // data["num_attention_heads"])
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
        for name, shape in _mlp_shapes(data, layer).items():
            found[f"{prefix}.{name}"] = shape
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
