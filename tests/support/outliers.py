"""tiny-outlier: the tiny model with outlier channels, which computes the same function bit by bit.

    PYTHONPATH=tests python -m support.outliers out/models/tiny-outlier

Real models have a few channels of activations that are many times larger than the others, which
is what makes quantization of activations hard. Here they are planted: some channels of each norm,
and some outputs of v and up, grow by a power of two, which the inputs of the next linear take back.
Powers of two are exact, so every logit keeps its bits.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.tiny_models import DATA

SHARE = 0.02
"""Of the channels, those that grow."""

LEAST, MOST = 3, 6
"""Powers of two by which they grow: 8 to 64 times."""

KEPT = 0.9
"""How likely a channel of the residual stream grows in a norm, given that it grows at all: real
models have their outliers in the same channels in every layer, though not in all."""

CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
)  # fmt: skip


def plant(weights: dict[str, Tensor], query_group: int, head_dim: int, seed: int = 0) -> None:
    """Plants outliers in place.

    Args:
        weights: of a Qwen3 without biases, by the names of transformers.
        query_group: query heads that read one key/value head.
        head_dim: width of a head.
        seed: which channels, and by how much.
    """
    generator = torch.Generator().manual_seed(seed)
    shared = _factors(weights["model.norm.weight"].numel(), generator)
    layers = sum(name.endswith(".input_layernorm.weight") for name in weights)
    for layer in range(layers):
        attention, mlp = (f"model.layers.{layer}.{part}" for part in ("self_attn", "mlp"))
        for norm, readers in (
            ("input_layernorm", [f"{attention}.{name}_proj" for name in "qkv"]),
            ("post_attention_layernorm", [f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
        ):
            kept = torch.rand(len(shared), generator=generator) < KEPT
            factors = torch.where(kept, shared, torch.ones(()))
            weights[f"model.layers.{layer}.{norm}.weight"] *= factors
            for reader in readers:
                weights[f"{reader}.weight"] /= factors
        factors = _factors(weights[f"{mlp}.up_proj.weight"].shape[0], generator)
        weights[f"{mlp}.up_proj.weight"] *= factors[:, None]
        weights[f"{mlp}.down_proj.weight"] /= factors
        factors = _factors(weights[f"{attention}.v_proj.weight"].shape[0], generator)
        weights[f"{attention}.v_proj.weight"] *= factors[:, None]
        by_query = factors.view(-1, 1, head_dim).expand(-1, query_group, -1).reshape(-1)
        weights[f"{attention}.o_proj.weight"] /= by_query


def _factors(channels: int, generator: torch.Generator) -> Tensor:
    factors = torch.ones(channels)
    count = max(2, round(SHARE * channels))
    chosen = torch.randperm(channels, generator=generator)[:count]
    powers = torch.randint(LEAST, MOST + 1, (count,), generator=generator)
    factors[chosen] = 2.0 ** powers.float()
    return factors


def write_tiny_outlier(folder: Path) -> Path:
    """Writes the model, as bfloat16 like the tiny model itself."""
    weights = load_file(DATA / "model.safetensors")
    plant(weights, query_group=2, head_dim=128)
    folder.mkdir(parents=True, exist_ok=True)
    for name in CARRIED:
        shutil.copyfile(DATA / name, folder / name)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    print(write_tiny_outlier(parser.parse_args().folder))
