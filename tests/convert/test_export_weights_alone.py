"""w8a16 and w4a16 in the formats of others: read back by compressed-tensors itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.int4_recipes import w4a16_recipe
from support.quantized_sources import write_packed
from transformers import CompressedTensorsConfig, Qwen3ForCausalLM

from qwen3_ascend import convert_checkpoint
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.convert import export_checkpoint
from qwen3_ascend.convert.export.record import verify_export
from qwen3_ascend.convert.recipe import Recipe
from qwen3_ascend.errors import OptionError

SCHEMES = {
    "w8a16": "w8a16",
    "w4a16": "{name: w4a16, group: 128}",
    "w4a16-g32": "{name: w4a16, group: 32}",
    "w4a16-g32-zero-points": "{name: w4a16, group: 32, zero_points: true}",
    "w4a16-zero-points": "{name: w4a16, zero_points: true}",
}
FORM: dict[str, Any] = {"hidden_size": 160, "intermediate_size": 384, "attention_bias": True}


def recipe(scheme: str, head: str = "bf16") -> Recipe:
    rules = f"[{{match: lm_head, scheme: {head}}}, {{match: '*', scheme: {scheme}}}]"
    return Recipe.parse(f"schema: 1\nname: alone\nrules: {rules}", "here")


def converted(folder: Path, made: Recipe, **form: Any) -> Path:
    data = tiny_models.config(**{**FORM, "head_dim": 64, "num_attention_heads": 4, **form})
    source = tiny_models.write(folder / "source", data, tokenizer=False)
    convert_checkpoint(source, folder / "out", made)
    return folder / "out"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("head", [False, True], ids=["plain head", "quantized head"])
def test_compressed_tensors_reads_what_is_stored(scheme: str, head: bool, tmp_path: Path) -> None:
    """The codes by its own packing, and the weights as transformers decodes them: each weight is
    the one of the checkpoint, also under negative scales."""
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    hidden = 160 if scheme.startswith("w4a16-g32") else 256  # whole groups
    said = SCHEMES[scheme]
    out = converted(tmp_path, recipe(said, said if head else "bf16"), hidden_size=hidden)
    export_checkpoint(out, tmp_path / "ct", "compressed-tensors")
    assert not verify_export(tmp_path / "ct").problems
    stored = load_file(next((tmp_path / "ct").glob("model-*.safetensors")))
    model = Qwen3ForCausalLM.from_pretrained(
        tmp_path / "ct", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    reader, negative = CheckpointReader(out), 0
    for name, entry in reader.manifest.linears.items():
        linear, row = reader.linear(name), 0
        codes, weight = linear.codes()["weight"], linear.dequantize()
        for part, outputs in entry.parts:
            rows = slice(row, row + outputs)
            row += outputs
            found = model.get_submodule(part).weight
            assert isinstance(found, torch.Tensor)
            assert torch.equal(found, weight[rows].bfloat16()), part
            if linear.scheme.name == "bf16":
                continue
            bits = 8 if scheme == "w8a16" else 4
            packed = stored[f"{part}.weight_packed"]
            assert torch.equal(packed, packing.pack_to_int32(codes[rows], bits)), part
            assert stored[f"{part}.weight_shape"].tolist() == [outputs, entry.shape[1]]
            negative += int((stored[f"{part}.weight_scale"] < 0).sum())
            if "zero-points" in scheme:
                zeros = -linear.codes()["offset"][:, rows].t().to(torch.int8)
                packed = packing.pack_to_int32(zeros, bits, packed_dim=0)
                assert torch.equal(stored[f"{part}.weight_zero_point"], packed), part
                assert len(zeros.unique()) > 2
    assert bool(negative) == (scheme in ("w4a16", "w4a16-g32"))


def test_what_config_says(tmp_path: Path) -> None:
    out = converted(tmp_path, recipe("{name: w4a16, group: 32}"))
    export_checkpoint(out, tmp_path / "ct", "compressed-tensors")
    section = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    (group,) = section["config_groups"].values()
    assert section["format"] == group["format"] == "pack-quantized"
    assert group["input_activations"] is None
    weights = group["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (4, "group", 32)


def test_what_config_says_of_zero_points(tmp_path: Path) -> None:
    out = converted(tmp_path, w4a16_recipe(32, zero_points=True))
    export_checkpoint(out, tmp_path / "ct", "compressed-tensors")
    section = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    weights = section["config_groups"]["group_0"]["weights"]
    assert weights["symmetric"] is False and weights["zp_dtype"] == "torch.int8"


def test_zero_points_that_no_format_has_words_for(tmp_path: Path) -> None:
    """Those of older GPTQ go up to 16; words of eight cannot be divided between parts."""
    source = write_packed(tmp_path / "gptq", zero_points=True)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.qzeros"][0, 3] = -1
    save_file(weights, source / "model.safetensors")
    convert_checkpoint(source, tmp_path / "sixteen")
    message = r"layers.1.mlp.gate_up_proj cannot be exported.*zero point is 16, which 4 bits"
    with pytest.raises(OptionError, match=message):
        export_checkpoint(tmp_path / "sixteen", tmp_path / "ct", "compressed-tensors")
    form = {"head_dim": 4, "num_attention_heads": 10, "num_key_value_heads": 1}
    out = converted(tmp_path, w4a16_recipe(32, zero_points=True), hidden_size=64, **form)
    with pytest.raises(OptionError, match=r"k_proj has 4 outputs.*packs the zero points of eight"):
        export_checkpoint(out, tmp_path / "ct", "compressed-tensors")
    export_checkpoint(tmp_path / "sixteen", tmp_path / "hf", "huggingface")


def test_ascendv1_states_w8a16_and_not_w4a16(tmp_path: Path) -> None:
    out = converted(tmp_path / "8", recipe("w8a16"))
    export_checkpoint(out, tmp_path / "av1", "ascendv1")
    said = json.loads((tmp_path / "av1" / "quant_model_description.json").read_text())
    part = "model.layers.0.self_attn.q_proj"
    assert {said[f"{part}.{end}"] for end in ("weight", "weight_scale", "weight_offset")} == {
        "W8A16"
    }
    stored = load_file(next((tmp_path / "av1").glob("*.safetensors")))
    linear = CheckpointReader(out).linear("model.layers.0.self_attn.qkv_proj")
    weight = stored[f"{part}.weight"].float() * stored[f"{part}.weight_scale"]
    assert torch.equal(weight, linear.dequantize()[: len(weight)])
    assert not stored[f"{part}.weight_offset"].any()
    out = converted(tmp_path / "4", recipe("{name: w4a16, group: 32}"))
    with pytest.raises(OptionError, match=r"ascendv1 cannot state .*qkv_proj.*w4a16 \(group 32\)"):
        export_checkpoint(out, tmp_path / "no", "ascendv1")


@pytest.mark.parametrize(
    ("scheme", "head", "message"),
    [
        ("w8a8", "w8a16", "one quantized scheme, but .* has w8a8 and lm_head has w8a16"),
        ("{name: w4a16, group: 64}", "bf16", "qkv_proj has 160 inputs.*whole groups of 64 only"),
    ],
)
def test_what_compressed_tensors_cannot_state(
    scheme: str, head: str, message: str, tmp_path: Path
) -> None:
    out = converted(tmp_path, recipe(scheme, head))
    with pytest.raises(OptionError, match=message):
        export_checkpoint(out, tmp_path / "ct", "compressed-tensors")
    assert not (tmp_path / "ct").exists()
    export_checkpoint(out, tmp_path / "hf", "huggingface")
