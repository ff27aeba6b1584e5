"""Weights and inputs that are not finite end a conversion with one line that names the first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support import tiny_models
from support.command_line import run
from support.folders import contents
from support.quantized_sources import is_linear, section, write_compressed_tensors
from torch import Tensor

CONFIG = tiny_models.config()
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"

RULES = "rules: [{match: lm_head, scheme: bf16}, {match: '*', scheme: %s, quantizer: %s}]"
INT4 = "{name: w4a16, group: 32}"
CALIBRATED = {
    "static": RULES % ("w8a8-static", "nearest"),
    "gptq": RULES % (INT4, "gptq"),
    "smooth": "transforms: [smooth]\n" + RULES % (INT4, "mse"),
    "awq": "transforms: [awq]\n" + RULES % (INT4, "mse"),
}


def write(folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Without a tokenizer: calibrated with random token ids."""
    return tiny_models.write(folder, CONFIG, weights, tokenizer=False)


def refused(source: Path, recipe: str | Path) -> str:
    out = source.parent / "out"
    said = ("--quiet", "--calibration-tokens", "512", "--threads", "1")
    line = run("convert", source, out, "--recipe", recipe, *said).one_line_error()
    assert not (out / "qwen3_ascend.json").exists()
    return line


def with_nan(name: str) -> dict[str, Tensor]:
    weights = tiny_models.tensors(CONFIG)
    weights[name].view(-1)[5] = torch.nan
    return weights


def overflowing() -> dict[str, Tensor]:
    """A model of finite weights whose first layer adds infinity to the residual stream."""
    weights = tiny_models.tensors(CONFIG)
    for name in ("up_proj", "down_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"] *= 1e30
    return weights


@pytest.fixture(params=CALIBRATED)
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"schema: 1\nname: {request.param}\n{CALIBRATED[request.param]}\n")
    return path


def test_inputs_that_overflow(recipe: Path, tmp_path: Path) -> None:
    line = refused(write(tmp_path / "source", overflowing()), recipe)
    assert "model.layers.0.mlp.down_proj" in line and "calibration" in line


def test_a_damaged_weight_that_the_inputs_show(recipe: Path, tmp_path: Path) -> None:
    line = refused(write(tmp_path / "source", with_nan(NORM)), recipe)
    assert f"{NORM} holds nan at [5]" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("recipe", "name"), [("w8a8-calibrated", DOWN), ("w8a8-static", DOWN)])
def test_a_damaged_weight_that_transforms_spread(recipe: str, name: str, tmp_path: Path) -> None:
    """It is found in a linear that does not hold it."""
    line = refused(write(tmp_path / "source", with_nan(name)), recipe)
    assert f"{name} holds nan at [0, 5]" in line


def test_a_damaged_gain_that_is_absorbed(tmp_path: Path) -> None:
    recipe = tmp_path / "rotated.yaml"
    recipe.write_text(f"schema: 1\nname: x\ntransforms: [rotate]\n{RULES % ('w8a8', 'nearest')}\n")
    assert f"{NORM} holds nan at [5]" in refused(write(tmp_path / "source", with_nan(NORM)), recipe)


def test_a_damaged_code_beside_a_scale_without_axes(tmp_path: Path) -> None:
    """FP8 with one scale for the whole, as some tools save it."""
    weights: dict[str, Tensor] = {}
    for name, tensor in tiny_models.tensors(CONFIG).items():
        if not is_linear(name):
            weights[name] = tensor
            continue
        scale = tensor.float().abs().max() / 448
        weights[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale"] = scale.clone()
    weights[DOWN].view(torch.uint8)[0, 5] = 0x7F
    float8 = {"type": "float", "strategy": "tensor"}
    said = section(float8, {**float8, "dynamic": True}, format="float-quantized")
    said["config_groups"]["group_0"]["format"] = "float-quantized"
    source = write_compressed_tensors(
        tmp_path / "source", CONFIG, weights, said=said, tokenizer=False
    )
    assert f"{DOWN} holds nan at [0, 5]" in refused(source, "w8a8-calibrated")


@pytest.mark.parametrize("recipe", ["w8a16", "gptq"])
def test_nothing_is_measured_of_such_a_model(recipe: str, tmp_path: Path) -> None:
    source, file = write(tmp_path / "source", overflowing()), tmp_path / "sensitivities.json"
    if recipe in CALIBRATED:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"schema: 1\nname: x\n{CALIBRATED[recipe]}\n")
        recipe = str(path)
    done = run("sensitivity", source, file, "--recipe", recipe, "--calibration-tokens", "512")
    assert "not finite" in done.err.splitlines()[-1] and done.code == 1
    assert not any(b"null" in data for data in contents(tmp_path).values())
