"""Exports of mixtures of experts: each by itself, and the same codes when they come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_models
from support.command_line import run
from transformers import AutoModelForCausalLM

from qwen3_ascend import Recipe, convert_checkpoint, load
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import W4A8, W4A16, W8A8, W8A16, Scheme
from qwen3_ascend.convert import export_checkpoint
from qwen3_ascend.errors import OptionError

SIZES = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 3}
DATA = tiny_models.mixture(**SIZES, intermediate_size=256, num_hidden_layers=3, mlp_only_layers=[1])
"""The middle layer is dense."""

EXPERTS = "model.layers.{}.mlp.experts.{}_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("mixture"), DATA)


def recipe(scheme: Scheme, others: Scheme | str | None = None) -> Recipe:
    said = scheme.to_json()
    rest = said if others is None else others if isinstance(others, str) else others.to_json()
    rules = [
        {"match": "lm_head", "scheme": "bf16"},
        {"match": "*.mlp.experts.*", "scheme": said},
        {"match": "*", "scheme": rest},
    ]
    return Recipe.parse(json.dumps({"schema": 1, "name": "mine", "rules": rules}), "mine")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize(
    ("form", "scheme"),
    [
        ("ascendv1", W8A8()),
        ("compressed-tensors", W8A8()),
        ("compressed-tensors", W4A16(64)),
    ],
    ids=lambda value: str(value),
)
def test_codes_come_back_as_they_were(
    source: Path, tmp_path: Path, form: str, scheme: Scheme
) -> None:
    """An export is a source like any other: the codes of every expert are taken from it."""
    made = convert_checkpoint(source, tmp_path / "out", recipe(scheme))
    export_checkpoint(tmp_path / "out", tmp_path / "export", form)
    assert run("verify", tmp_path / "export").code == 0
    again = convert_checkpoint(tmp_path / "export", tmp_path / "again")
    for name, entry in made.linears.items():
        if name == "lm_head":
            continue
        found = again.linears[name]
        assert found.codes == "taken" and found.scheme == entry.scheme
        for suffix, tensor in entry.tensors.items():
            assert found.tensors[suffix].blake3 == tensor.blake3, (name, suffix)


def test_bfloat16_is_the_source_bit_by_bit(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "out", "bf16")
    export_checkpoint(tmp_path / "out", tmp_path / "hf", "huggingface")
    expected, found = weights_of(source), weights_of(tmp_path / "hf")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]


def test_transformers_computes_with_what_the_codes_stand_for(source: Path, tmp_path: Path) -> None:
    """Of weights alone it is the same function as here, but for the rounding to bfloat16."""
    convert_checkpoint(source, tmp_path / "out", recipe(W8A16()))
    export_checkpoint(tmp_path / "out", tmp_path / "hf", "huggingface")
    reader, found = CheckpointReader(tmp_path / "out"), weights_of(tmp_path / "hf")
    decoded = reader.linear(EXPERTS.format(2, "down")).dequantize().bfloat16()
    for expert in range(3):
        name = f"model.layers.2.mlp.experts.{expert}.down_proj.weight"
        assert torch.equal(found[name], decoded[expert])
    ids = [5, 9, 200, 31, 7]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    logits = load(tmp_path / "out", device="cpu", dtype="float32").logits(ids)
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()


def test_routers_and_floats_are_told_to_engines(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "out", recipe(W8A8(), "bf16"))
    export_checkpoint(tmp_path / "out", tmp_path / "ct", "compressed-tensors")
    section = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert {"model.layers.0.mlp.gate", "model.layers.2.mlp.gate"} <= {*section["ignore"]}
    assert not any("experts" in name for name in section["ignore"])
    export_checkpoint(tmp_path / "out", tmp_path / "av1", "ascendv1")
    types = json.loads((tmp_path / "av1" / "quant_model_description.json").read_text())
    assert types["model.layers.0.mlp.gate.weight"] == "FLOAT"
    assert types["model.layers.0.mlp.experts.2.up_proj.weight_scale"] == "W8A8_DYNAMIC"
    convert_checkpoint(source, tmp_path / "other", recipe_of_attention())
    export_checkpoint(tmp_path / "other", tmp_path / "ct2", "compressed-tensors")
    section = json.loads((tmp_path / "ct2" / "config.json").read_text())["quantization_config"]
    assert {
        "model.layers.0.mlp.experts", "model.layers.0.mlp.experts.1.gate_proj",
    } <= {*section["ignore"]}  # fmt: skip


def recipe_of_attention() -> Recipe:
    """int8 attention and experts of floats."""
    rules = [
        {"match": "lm_head", "scheme": "bf16"},
        {"match": "*.mlp.*", "scheme": "bf16"},
        {"match": "*", "scheme": "w8a8"},
    ]
    return Recipe.parse(json.dumps({"schema": 1, "name": "mine", "rules": rules}), "mine")


@pytest.mark.parametrize(
    ("form", "scheme"),
    [
        ("ascendv1", W8A16()), ("ascendv1", W4A16(64)), ("ascendv1", W4A8()),
        ("compressed-tensors", W4A8()),
    ],
    ids=lambda value: str(value),
)  # fmt: skip
def test_what_a_format_cannot_state_of_experts_is_refused(
    source: Path, tmp_path: Path, form: str, scheme: Scheme
) -> None:
    convert_checkpoint(source, tmp_path / "out", recipe(scheme, "bf16"))
    with pytest.raises(OptionError, match=rf"{form} cannot state .*experts.gate_up_proj"):
        export_checkpoint(tmp_path / "out", tmp_path / "to", form)
    assert not (tmp_path / "to").exists()


def test_an_export_names_every_tensor_of_the_model(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "out", "moe-w8a8")
    record = export_checkpoint(tmp_path / "out", tmp_path / "hf", "huggingface")
    assert {*record.tensors} == {*tiny_models.shapes(DATA)}
    assert Manifest.read(tmp_path / "out").recipe["name"] == record.recipe
