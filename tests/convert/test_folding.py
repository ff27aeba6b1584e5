"""smooth and awq: the same function in transformers, and what their statistics become."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_models
from support.inputs import hessian_of
from torch import Tensor
from transformers import Qwen3ForCausalLM

from qwen3_ascend import native
from qwen3_ascend.checkpoint.schemes.grid import Grid
from qwen3_ascend.convert.source.config_file import read_config
from qwen3_ascend.convert.statistics import InputStatistics
from qwen3_ascend.convert.transforms import TRANSFORMS
from qwen3_ascend.convert.transforms.awq import awq, awq_factors
from qwen3_ascend.convert.transforms.changes import Change, Changes
from qwen3_ascend.convert.transforms.folding import Folding, LayerInputs
from qwen3_ascend.convert.transforms.parts import ModelParts, model_parts
from qwen3_ascend.convert.transforms.smooth import smooth, smooth_factors
from qwen3_ascend.convert.transforms.whole import changed_state, state_changes
from qwen3_ascend.convert.triangle import Triangle

TOKENS = torch.arange(200).view(2, 100) * 37 % 320
TOLERANCE = 1e-4
"""Of the largest logit, or of the largest figure of its kind."""

READERS = {
    "qkv": "self_attn.q_proj", "output": "self_attn.o_proj", "gate_up": "mlp.gate_proj",
    "down": "mlp.down_proj",
}  # fmt: skip
"""A linear that reads each of the four inputs of a layer."""


def run(data: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path) -> Any:
    """Logits of transformers in float32, and the inputs of each layer's linears by place."""
    untied = {**data, "tie_word_embeddings": "lm_head.weight" not in state}
    tiny_models.write(folder, untied, {n: t.contiguous() for n, t in state.items()})
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[tuple[int, str], Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        for place, name in READERS.items():

            def keep(module: Any, inputs: Any, key: tuple[int, str] = (number, place)) -> None:
                seen[key] = inputs[0].flatten(0, 1)

            layer.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        return model(TOKENS).logits, seen


def statistics(x: Tensor) -> InputStatistics:
    least, most = x.amin(0), x.amax(0)
    return InputStatistics(
        len(x), least, most, x.abs().mean(0), x.square().mean(0), Triangle.of(x.t() @ x / len(x))
    )


def rounded(weight: Tensor, squares: Tensor) -> Tensor:
    grid = Grid(4, 32)
    scales = grid.widest_scales(weight)
    return grid.decode(grid.nearest(weight, scales), scales)


def folded(
    method: str, parts: ModelParts, state: Mapping[str, Tensor], changes: Changes, seen: Any
) -> tuple[Changes, list[Folding]]:
    """All layers of a model after smooth or awq."""
    found, layers = dict(changes.of), []
    for number, layer in enumerate(parts.layers):
        of_layer = Changes({n: c for n, c in changes.of.items() if n in layer.names})
        inputs = LayerInputs(**{place: statistics(seen[number, place]) for place in READERS})
        start = Folding(
            parts, layer, lambda n: state[f"{n}.weight"], native.best(), of_layer, inputs
        )
        folding = smooth(start) if method == "smooth" else awq(start, rounded)
        found |= folding.changes.of
        layers.append(folding)
    return Changes(found), layers


@pytest.mark.parametrize("before", [(), ("cle", "rotate")], ids=["alone", "after cle and rotate"])
@pytest.mark.parametrize("method", ["smooth", "awq"])
def test_the_function_stays_and_inputs_become_what_is_said(
    method: str, before: tuple[str, ...], tmp_path: Path
) -> None:
    data = tiny_models.config(attention_bias=True, tie_word_embeddings=bool(before))
    state, parts = tiny_models.tensors(data), model_parts(read_config(data))
    for name in state:
        if "layernorm" in name or name == "model.norm.weight":  # of every size, and dead
            spread = torch.randn(len(state[name]), generator=torch.Generator().manual_seed(3))
            state[name] = state[name] * spread.exp().bfloat16()
            state[name][5] = 0
    expected, _ = run(data, state, tmp_path / "source")
    changes = state_changes(state, parts, [TRANSFORMS[name] for name in before])
    _, seen = run(data, changed_state(state, parts, changes), tmp_path / "before")
    after, layers = folded(method, parts, state, changes, seen)
    stored = changed_state(state, parts, after)
    logits, found = run(data, stored, tmp_path / "after")
    assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max()
    for number, folding in enumerate(layers):
        for norm in (folding.layer.input_norm, folding.layer.post_attention_norm):
            gain = stored[f"{norm}.weight"]
            assert torch.equal(gain, gain.bfloat16().float())
        for place in READERS:
            said, measured = getattr(folding.inputs, place), statistics(found[number, place])
            pairs = {"hessian": (hessian_of(said), hessian_of(measured))}
            for field in ("least", "largest", "mean_magnitude", "mean_square"):
                pairs[field] = getattr(said, field), getattr(measured, field)
            for field, (one, other) in pairs.items():
                assert (one - other).abs().max() <= TOLERANCE * other.abs().max(), (place, field)
    # Something has happened at every place, and in no other one.
    changed = {name for name in after.of if after[name].steps != changes[name].steps}
    assert changed == {name for layer in parts.layers for name in layer.names}


def test_every_place_is_smoothed(tmp_path: Path) -> None:
    """Ranges of inputs come nearer to each other."""
    data = tiny_models.config()
    state, parts = tiny_models.tensors(data), model_parts(read_config(data))
    for layer in parts.layers:
        for name in (layer.input_norm, layer.post_attention_norm):
            state[f"{name}.weight"][3] *= 50
        for name in (layer.value, layer.mlps[0].up):
            state[f"{name}.weight"][4] *= 50
    _, seen = run(data, state, tmp_path / "source")
    _, layers = folded("smooth", parts, state, Changes(), seen)
    for number, folding in enumerate(layers):
        for place in READERS:
            ranges = [
                float(found.magnitude.max() / found.magnitude.median())
                for found in (statistics(seen[number, place]), getattr(folding.inputs, place))
            ]
            assert ranges[1] < ranges[0] / 3, place


def test_smoothing_moves_half_of_the_range() -> None:
    magnitude, largest = torch.tensor([4.0, 1.0, 0.25, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    found = smooth_factors(magnitude, largest)
    assert torch.allclose(found[:3] / found[1], torch.tensor([2.0, 1.0, 0.5]))
    assert torch.isclose(found.log().mean(), torch.tensor(0.0), atol=1e-6)
    assert torch.isfinite(found).all()
    assert torch.allclose(smooth_factors(magnitude[:3], largest[:3], 0.0), torch.ones(3))


def test_awq_finds_what_loses_least() -> None:
    """Held against every ratio that it may choose, with the outputs themselves."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 64, generator=generator) * torch.randn(64, generator=generator).exp()
    weight = torch.randn(40, 64, generator=generator)
    inputs = statistics(x)
    found = awq_factors(inputs, weight, inputs.mean_magnitude, rounded)

    def lost(factors: Tensor) -> float:
        made = rounded(weight * factors, inputs.mean_square) / factors
        return float((x @ (made - weight).t()).square().sum())

    ratios = []
    for step in range(11):
        factors = inputs.mean_magnitude ** (step / 10)
        ratios.append(lost(factors / (factors.max() * factors.min()).sqrt()))
    assert lost(found) <= min(ratios) * (1 + 1e-4) < ratios[0]
    assert min(ratios) != ratios[-1]


def test_a_model_is_read_back(tmp_path: Path) -> None:
    """The helper of these tests writes what it is given: else they would prove nothing."""
    data = tiny_models.config()
    state = tiny_models.tensors(data)
    run(data, state, tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == state.keys() and Change().steps == ()
