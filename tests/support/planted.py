"""The trained tiny model with mixtures of experts: the same function, and a router that is known.

Each expert is the MLP of its layer, and a token's weights add up to one, so the mixture gives what
the MLP gave, whichever experts are chosen. The router's rows are opposite pairs of directions, and
one of zeros: of each pair one logit is positive, so that of three pairs three are, and the last
expert is never among the two greatest.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from support import tiny_models
from support.tiny_models import DATA

PAIRS = 3
EXPERTS = 2 * PAIRS + 1
NEVER = EXPERTS - 1
"""The expert that no token is given to."""

PER_TOKEN = 2


def write_tiny_mixture(folder: Path) -> Path:
    """Saves the model."""
    dense = load_file(DATA / "model.safetensors")
    data = json.loads((DATA / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        layer, is_mlp, linear = name.partition(".mlp.")
        if not is_mlp:
            weights[name] = tensor
            continue
        for expert in range(EXPERTS):
            weights[f"{layer}.mlp.experts.{expert}.{linear}"] = tensor.clone()
        if linear == "down_proj.weight":
            weights[f"{layer}.mlp.gate.weight"] = router(data["hidden_size"], generator)
    mixture = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": PER_TOKEN,
        "moe_intermediate_size": data["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return tiny_models.write(folder, {**data, **mixture}, weights)


def router(hidden: int, generator: torch.Generator) -> Tensor:
    """bfloat16 [EXPERTS, hidden]."""
    half = torch.randn(PAIRS, hidden, generator=generator) / hidden**0.5
    return torch.cat([half, -half, torch.zeros(1, hidden)]).bfloat16()
