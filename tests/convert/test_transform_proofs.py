"""A transformed model is the same function: held against transformers, weight by weight."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.outliers import plant
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen3_ascend.convert.source.config_file import read_config
from qwen3_ascend.convert.transforms import TRANSFORMS
from qwen3_ascend.convert.transforms.changes import Changes
from qwen3_ascend.convert.transforms.parts import ModelParts, model_parts
from qwen3_ascend.convert.transforms.whole import (
    changed_state,
    state_changes,
    touched,
)

TOKENS = torch.arange(120).view(2, 60) * 37 % 320
TOLERANCE = 1e-4
"""Largest difference of float32 logits, of the largest logit."""

EXPERTS = 4
FORMS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "head_dim": 16},
    "odd sizes": {"hidden_size": 72, "intermediate_size": 100, "head_dim": 20},
    "experts": {"num_experts": EXPERTS},
    "tied experts": {"num_experts": EXPERTS, "tie_word_embeddings": True, "hidden_size": 40},
    "some layers with experts": {"num_experts": EXPERTS, "mlp_only_layers": [0]},
}
RECIPES = (("cle",), ("rotate",), ("cle", "rotate"), ("rotate", "cle"))


class Model:
    """A random model in a folder of transformers', float32: gains and biases matter, rows are of
    all sizes."""

    def __init__(self, folder: Path, changes: dict[str, Any]) -> None:
        make = tiny_models.mixture if "num_experts" in changes else tiny_models.config
        self.data = make(**changes)
        self.parts = model_parts(read_config(self.data))
        self.folder = folder
        model = _random(self.data)
        generator = torch.Generator().manual_seed(1)
        for name, tensor in model.named_parameters():
            spread = 0.3 if "norm" in name else 1.5 / tensor.shape[-1] ** 0.5
            centre = 1.0 if "norm" in name else 0.0
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:  # rows of all sizes, so that there is something to equalize
                noise *= torch.randn(*tensor.shape[:-1], 1, generator=generator).exp()
            tensor.data = centre + spread * noise
            if name.endswith("layernorm.weight") or name == "model.norm.weight":
                tensor.data[7] = 0  # a channel that nothing reads
        model.save_pretrained(folder)
        self.state = load_file(folder / "model.safetensors")

    @cached_property
    def logits(self) -> Tensor:
        return self.logits_of(self.state)

    def logits_of(self, state: dict[str, Tensor]) -> Tensor:
        """What transformers computes with other weights, in float32."""
        tied = "lm_head.weight" not in state
        save_file(state, self.folder / "model.safetensors", {"format": "pt"})
        is_sparse = any(layer.router is not None for layer in self.parts.layers)
        model_type: Any = Qwen3MoeForCausalLM if is_sparse else Qwen3ForCausalLM
        model, report = model_type.from_pretrained(
            self.folder, dtype=torch.float32, tie_word_embeddings=tied, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        with torch.no_grad():
            found: Tensor = model.eval()(TOKENS).logits
        return found


def _random(data: dict[str, Any]) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    own = ("dtype", "architectures", "model_type")
    known = {key: value for key, value in data.items() if key not in own}
    if "num_experts" not in data:
        return Qwen3ForCausalLM(Qwen3Config(**known))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**known))


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), FORMS[request.param])


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest one, of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def transformed(state: dict[str, Tensor], parts: ModelParts, names: tuple[str, ...]) -> Changes:
    return state_changes(state, parts, [TRANSFORMS[name] for name in names])


@pytest.mark.parametrize("names", RECIPES, ids="+".join)
def test_logits_stay(model: Model, names: tuple[str, ...]) -> None:
    changes = transformed(model.state, model.parts, names)
    state = changed_state(model.state, model.parts, changes)
    assert any(not torch.equal(state[name], tensor) for name, tensor in model.state.items())
    assert difference(model.logits_of(state), model.logits) < TOLERANCE


def test_every_change_matters(model: Model) -> None:
    """Leave out that of one norm, linear, expert, router, head or embedding, and it shows."""
    changes = transformed(model.state, model.parts, ("cle", "rotate"))
    left_out = [n for n in changes.of if ".layers.1." not in n]  # all layers are alike
    assert {model.parts.ends.head, "model.norm", "model.embed_tokens"} < {*left_out}
    for name in left_out:
        without = Changes({n: change for n, change in changes.of.items() if n != name})
        state = changed_state(model.state, model.parts, without)
        if name == model.parts.ends.head and "lm_head.weight" not in state:
            state["lm_head.weight"] = model.state["model.embed_tokens.weight"].clone()
        assert difference(model.logits_of(state), model.logits) > 100 * TOLERANCE, name


def test_every_weight_but_the_norms_of_queries_and_keys_is_turned(model: Model) -> None:
    """Counted over the source's tensors, so that a part that nobody has named is noticed."""
    changes = transformed(model.state, model.parts, ("rotate",))
    left = {name.rpartition(".")[0] for name in model.state} - changes.of.keys()
    assert all(name.endswith(("q_norm", "k_norm")) for name in left), left


@pytest.mark.parametrize("names", RECIPES, ids="+".join)
def test_what_is_said_of_changes_before_they_are_found(
    model: Model, names: tuple[str, ...]
) -> None:
    changes = transformed(model.state, model.parts, names)
    said = touched(model.parts, [TRANSFORMS[name] for name in names])
    assert {name: change.block for name, change in changes.of.items()} == {
        name: touch.block for name, touch in said.items()
    }


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=str)
def test_equalizing_undoes_planted_outliers(changes: dict[str, Any], tmp_path: Path) -> None:
    """Powers of two in both directions: not one bit of the logits changes."""
    model = Model(tmp_path, changes)
    planted = {name: tensor.clone() for name, tensor in model.state.items()}
    plant(planted, query_group=2, head_dim=model.parts.head_dim)
    assert torch.equal(model.logits_of(planted), model.logits)
    found = state_changes(planted, model.parts, [TRANSFORMS["cle"]])
    equalized = changed_state(planted, model.parts, found)
    assert torch.equal(model.logits_of(equalized), model.logits)
    for layer in model.parts.layers:
        for name in (layer.value, layer.mlps[0].up):
            sizes = [s[f"{name}.weight"].square().mean(1).sqrt() for s in (planted, equalized)]
            assert sizes[1].max() / sizes[1].min() < sizes[0].max() / sizes[0].min() / 3


def test_parts_know_their_model() -> None:
    """A layer that is counted twice, or once too few, would be noticed by its names."""
    parts = model_parts(read_config(tiny_models.mixture(num_hidden_layers=3)))
    assert len(parts.layers) == 3 and len({n for u in parts.units for n in u.names}) == 3 + 3 * (
        2 + 3 + 1 + 3 * EXPERTS + 1
    )
    assert replace(parts, layers=parts.layers[:1]).units == (parts.ends, parts.layers[0])
