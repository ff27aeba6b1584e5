"""Outlier channels in a model that stays the same function, bit by bit.

Large language models have channels of activations that are far larger than the others; small ones
lack them. Powers of two are multiplied into the gains of norms, rows of up and rows of v, and out
of what reads those, so that every product and sum has the same significant bits as before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwen3_ascend.convert.transforms.parts import LayerParts, ModelParts

SHARE = 0.02
"""Of the channels of a place that are made large."""

LEAST, MOST = 3, 6
"""Their factors are 2^3 to 2^6."""

KEPT = 0.9
"""Of the residual channels that are large somewhere, the share that is large at any one norm."""


def plant(state: Mapping[str, Tensor], model: ModelParts, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with outlier channels; the residual ones are the same in every layer, as in
    real models."""
    generator = torch.Generator().manual_seed(seed)
    planted = {name: tensor.clone() for name, tensor in state.items()}
    shared = _factors(model.hidden_size, generator)
    for layer in model.layers:
        _plant_norms(planted, layer, shared, generator)
        for mlp in layer.mlps:
            factors = _factors(len(planted[f"{mlp.up}.weight"]), generator)
            planted[f"{mlp.up}.weight"] *= factors[:, None]
            planted[f"{mlp.down}.weight"] /= factors
        factors = _factors(model.num_kv_heads * model.head_dim, generator)
        _scale_values(planted, layer, model, factors)
    return planted


def _plant_norms(
    planted: dict[str, Tensor], layer: LayerParts, shared: Tensor, generator: torch.Generator
) -> None:
    norms = {
        layer.input_norm: layer.attention_readers,
        layer.post_attention_norm: layer.mlp_readers,
    }
    for norm, readers in norms.items():
        is_kept = torch.rand(len(shared), generator=generator) < KEPT
        factors = torch.where(is_kept, shared, torch.ones(()))
        planted[f"{norm}.weight"] *= factors
        for reader in readers:
            planted[f"{reader}.weight"] /= factors


def _scale_values(
    planted: dict[str, Tensor], layer: LayerParts, model: ModelParts, factors: Tensor
) -> None:
    planted[f"{layer.value}.weight"] *= factors[:, None]
    if f"{layer.value}.bias" in planted:
        planted[f"{layer.value}.bias"] *= factors
    group = model.num_heads // model.num_kv_heads
    heads = factors.view(model.num_kv_heads, 1, model.head_dim).expand(-1, group, -1)
    planted[f"{layer.output}.weight"] /= heads.flatten()


def _factors(channels: int, generator: torch.Generator) -> Tensor:
    factors = torch.ones(channels)
    count = max(2, round(SHARE * channels))
    at = torch.randperm(channels, generator=generator)[:count]
    factors[at] = 2.0 ** torch.randint(LEAST, MOST + 1, (count,), generator=generator).float()
    return factors
