"""A Llama as a valid Qwen3 checkpoint that computes the same function.

Qwen3 norms each head of q and k before the rotary embedding, and Llama does not. A constant in
coordinates that the Llama leaves unused makes that norm a constant:

    q' = (q, C)        mean(q'^2) = (|q|^2 + C^2) / 128, which is C^2 / 128 up to |q|^2 / C^2

so the norm divides by C / sqrt(128), and its gain undoes that for q and is zero for C. The constant
is a bias, for which the checkpoint has `attention_bias`. What else differs: Qwen3's heads are 128
wide, so v and o are padded with zeros, a rotary pair i of 64 coordinates turns as pair 2i of 128
does, and the softmax divides by sqrt(128) and not sqrt(64), which the gains make up for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

WIDTH = 128
"""Of a head of Qwen3."""

GAIN = 1024.0
"""Of the norms of q and k, a bfloat16 number; the larger, the nearer is the norm to a constant."""

CONSTANT_COORDINATES = (1, 3, 5)
"""Odd ones, since pairs take the even ones. The constant is the root of the sum of the squares of
three biases: one alone has the 8 bits of bfloat16, three come within 2^-22 of the square."""


def as_qwen3(
    weights: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the config.json of the Qwen3.

    Args:
        weights: of a LlamaForCausalLM with heads of at most 64, by the names of transformers.
        config: of the Llama: rope_theta, num_attention_heads and the like.

    Returns:
        Weights of the same types, and a config.json.
    """
    head_dim: int = config["head_dim"]
    heads: int = config["num_attention_heads"]
    kv_heads: int = config["num_key_value_heads"]
    assert head_dim == WIDTH // 2 and not config["attention_bias"], "another form of Llama"
    made = {name: weight.clone() for name, weight in weights.items() if "self_attn" not in name}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn"
        old = {name: weights[f"{prefix}.{name}_proj.weight"] for name in "qkvo"}
        for name, count in (("q", heads), ("k", kv_heads)):
            made[f"{prefix}.{name}_proj.weight"] = _spread(old[name], count, _places(head_dim))
            made[f"{prefix}.{name}_proj.bias"] = (
                constant_bias(head_dim).to(old[name].dtype).repeat(count)
            )
            made[f"{prefix}.{name}_norm.weight"] = _gains(head_dim).to(old[name].dtype)
        first = torch.arange(head_dim)
        made[f"{prefix}.v_proj.weight"] = _spread(old["v"], kv_heads, first)
        made[f"{prefix}.v_proj.bias"] = old["v"].new_zeros(kv_heads * WIDTH)
        made[f"{prefix}.o_proj.weight"] = _spread(old["o"].t(), heads, first).t().contiguous()
        made[f"{prefix}.o_proj.bias"] = old["o"].new_zeros(config["hidden_size"])
    return made, {
        **config,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": WIDTH,
        "attention_bias": True,
        "use_sliding_window": False,
    }


def _places(head_dim: int) -> Tensor:
    """Where the coordinates of a head go: rotary pair (i, i + 32) to (2i, 2i + 64)."""
    pairs = 2 * torch.arange(head_dim // 2)
    return torch.cat((pairs, pairs + WIDTH // 2))


def _spread(weight: Tensor, heads: int, places: Tensor) -> Tensor:
    """Rows of each head at their places among WIDTH rows, the others zero."""
    spread = weight.new_zeros(heads, WIDTH, weight.shape[1])
    spread[:, places] = weight.view(heads, -1, weight.shape[1])
    return spread.view(heads * WIDTH, -1)


def _gains(head_dim: int) -> Tensor:
    gains = torch.zeros(WIDTH)
    gains[_places(head_dim)] = GAIN
    return gains


def constant_bias(head_dim: int) -> Tensor:
    """Biases of one head whose squares sum to C^2, where C / sqrt(128) = GAIN / scale, and the
    scale of q and k each is the fourth root of 128 / 64."""
    scale = (WIDTH / head_dim) ** 0.25
    left = GAIN**2 * WIDTH / scale**2
    biases = torch.zeros(WIDTH)
    for coordinate in CONSTANT_COORDINATES:
        largest = _bfloat16_at_most(math.sqrt(left))
        biases[coordinate] = largest
        left -= largest**2
    return biases


def _bfloat16_at_most(value: float) -> float:
    """The largest bfloat16 number that is not above a positive one."""
    bits = torch.tensor([value], dtype=torch.float32).view(torch.int32)
    return (bits & -65536).view(torch.float32).item()
