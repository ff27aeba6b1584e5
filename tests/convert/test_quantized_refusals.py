"""Quantized sources that cannot be taken as they are: one line each, and nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import tiny_models
from support.command_line import run
from support.quantized_sources import (
    DATA,
    DESCRIPTION,
    WRITERS,
    int8_weights,
    section,
    source_weights,
    write_ascendv1,
    write_compressed_tensors,
)
from torch import Tensor


def refused(source: Path, *mentions: str) -> None:
    out = source.parent / "refused"
    for options in ((), ("--dry-run",)):
        done = run("convert", source, out, *options)
        done.one_line_error(*mentions)
        assert not out.exists()


REAL_DESCRIPTIONS = {
    "static": ["q_proj.weight is 'W8A8'", "calibration has fixed"],
    "mix": ["q_proj.weight is 'W8A8_MIX'", "for decoding"],
    "w4a8": ["q_proj.weight is 'W4A8_DYNAMIC'", "no scheme for it yet"],
    "asym": ["model.layers.0.input_layernorm.bias", "anti-outlier"],
    "kv": ["k_proj.kv_cache_scale", "key/value cache"],
}


@pytest.mark.parametrize(("name", "mentions"), REAL_DESCRIPTIONS.items())
def test_other_types_of_modelslim(name: str, mentions: list[str], tmp_path: Path) -> None:
    """The descriptions are ModelSlim's own."""
    source = write_ascendv1(tmp_path / "source")
    shutil.copyfile(DATA / "refused" / f"{name}.json", source / DESCRIPTION)
    refused(source, DESCRIPTION, "W8A8_DYNAMIC", *mentions)


UP = "model.layers.1.mlp.up_proj"

ENTRIES: dict[str, tuple[dict[str, object], list[str]]] = {
    "weights of 16 bits": ({f"{UP}.weight": "W8A16"}, [UP, "W8A16", "float activations"]),
    "an unknown type": ({f"{UP}.weight": "W2A2"}, [UP, "'W2A2'", "no scheme"]),
    "no type": ({f"{UP}.weight": 8}, [UP, "is 8"]),
    "nothing said": ({f"{UP}.weight": None}, [f"says nothing of {UP}.weight", "another model"]),
    "key/value cache": ({"kv_quant_type": "C8"}, ["kv_quant_type is 'C8'", "key/value cache"]),
    "cache of older versions": ({"kv_cache_type": "C8"}, ["kv_cache_type", "key/value cache"]),
    "attention": ({"fa_quant_type": "FAKQuant"}, ["fa_quant_type", "attention"]),
    "messages": ({"reduce_quant_type": "per_channel"}, ["reduce_quant_type", "ranks"]),
    "rotations": ({"metadata": {"quarot": {"max_tp_size": 4}}}, ["quarot", "rotations"]),
    "smoothing": ({f"{UP}.div.mul_scale": "FLOAT"}, [f"{UP}.div.mul_scale", "divides"]),
    "smoothing inside": ({f"{UP}.linear.weight": "W8A8_DYNAMIC"}, [f"{UP}.linear.weight"]),
    "an embedding": ({"model.embed_tokens.weight": "W8A8_DYNAMIC"}, ["model.embed_tokens.weight"]),
    "an unknown key": ({"new_quant": {"bits": 4}}, ["new_quant", "no scheme"]),
}


@pytest.mark.parametrize(("entries", "mentions"), ENTRIES.values(), ids=ENTRIES)
def test_descriptions(entries: dict[str, object], mentions: list[str], tmp_path: Path) -> None:
    source = write_ascendv1(tmp_path / "source", describe=entries)
    refused(source, DESCRIPTION, *mentions)


NOT_MINE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "four bits": (section({"num_bits": 4}), ["weights: num_bits is 4 and not 8"]),
    "floats": (section({"type": "float"}), ["weights: type is 'float'"]),
    "groups": (section({"strategy": "group", "group_size": 32}), ["strategy is 'group'"]),
    "one scale": (section({"strategy": "tensor"}), ["weights: strategy is 'tensor'"]),
    "asymmetric": (section({"symmetric": False}), ["weights: symmetric is False"]),
    "static": (section(None, {"strategy": "tensor", "dynamic": False}),
               ["input_activations: strategy is 'tensor'"]),
    "static for tokens": (section(None, {"dynamic": False}), ["input_activations: dynamic"]),
    "asymmetric activations": (section(None, {"symmetric": False}),
                               ["input_activations: symmetric"]),
    "local": (section(None, {"dynamic": "local"}), ["dynamic is 'local'"]),
    "cache": (section(kv_cache_scheme={"num_bits": 8, "type": "int"}), ["kv_cache_scheme is set"]),
    "sparse": (section(sparsity_config={"format": "sparse-24-bitmask"}), ["sparsity_config"]),
    "rotated": (section(transform_config={"config_groups": {}}), ["transform_config is set"]),
    "sparse and packed": (section(format="marlin-24"), ["format is 'marlin-24'"]),
    "not compressed": (section(quantization_status="frozen"), ["quantization_status is 'frozen'"]),
    "no pattern": (section(ignore=["re:(lm_head"]), ["'re:(lm_head' is no pattern"]),
    "no groups": ({"quant_method": "compressed-tensors", "format": "int-quantized"},
                  ["config_groups"]),
    "groups by name": (section(config_groups={"W8A8": ["Linear"]}), ["config_groups"]),
}  # fmt: skip


@pytest.mark.parametrize(("said", "mentions"), NOT_MINE.values(), ids=NOT_MINE)
def test_sections(said: dict[str, Any], mentions: list[str], tmp_path: Path) -> None:
    source = write_compressed_tensors(tmp_path / "source", said=said)
    refused(source, "config.json: quantization_config", *mentions)


@pytest.mark.parametrize("key", ["input_activations", "weights"])
def test_what_a_group_leaves_alone(key: str, tmp_path: Path) -> None:
    said = section()
    said["config_groups"]["group_0"][key] = None
    refused(write_compressed_tensors(tmp_path / "source", said=said), f"{key} are not quantized")


def test_quantized_outputs(tmp_path: Path) -> None:
    said = section()
    said["config_groups"]["group_0"]["output_activations"] = {"num_bits": 8}
    refused(write_compressed_tensors(tmp_path / "source", said=said), "output_activations")


def changed(
    weights: Mapping[str, Tensor], changes: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    return {n: t for n, t in {**weights, **changes}.items() if t is not None}


SHAPES: dict[str, tuple[dict[str, Tensor | None], list[str]]] = {
    "no scale": ({f"{UP}.weight_scale": None}, [f"no tensor {UP}.weight_scale"]),
    "floats": ({f"{UP}.weight": torch.ones(96, 64)}, [f"{UP}.weight is F32", "not I8"]),
    "packed": ({f"{UP}.weight": torch.ones(48, 64).to(torch.int8)}, ["[48, 64]", "[96, 64]"]),
    "group scales": ({f"{UP}.weight_scale": torch.ones(96, 2)}, ["[96, 2]", "[96, 1]"]),
    "one scale": ({f"{UP}.weight_scale": torch.ones(1)}, [f"{UP}.weight_scale", "[1]"]),
    "scales of integers": (
        {f"{UP}.weight_scale": torch.ones(96, 1, dtype=torch.int64)}, ["I64", "F32"]
    ),
    "codes of a float": ({"lm_head.weight": torch.ones(320, 64).to(torch.int8)},
                         ["lm_head.weight is I8"]),
    "static": ({f"{UP}.input_scale": torch.ones(1)}, [f"{UP}.input_scale"]),
    "rotation": ({"model.layers.0.self_attn.o_proj.heads_rotation": torch.ones(4, 4)},
                 ["heads_rotation", "rotations"]),
    "cache": ({"model.layers.0.self_attn.k_proj.kv_cache_scale": torch.ones(64)},
              ["kv_cache_scale", "key/value cache"]),
    "norm": ({"model.norm.bias": torch.ones(64)}, ["model.norm.bias", "anti-outlier"]),
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(("changes", "mentions"), SHAPES.values(), ids=SHAPES)
def test_tensors_that_are_not_as_they_are_said(
    changes: dict[str, Tensor | None], mentions: list[str], writer: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    whole = int8_weights(tiny_models.tensors(tiny_models.config()))
    source = writer(tmp_path / "source", weights=whole)
    file = next(source.glob("*.safetensors"))
    found: Mapping[str, Tensor | None] = {**source_weights(source), **changes}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, file)
    (source / "quant_model_weights.safetensors.index.json").unlink(missing_ok=True)
    file.rename(source / ("model.safetensors" if file.name.startswith("model") else
                          "quant_model_weights.safetensors"))  # fmt: skip
    refused(source, *mentions)


VALUES: dict[str, tuple[str, float, list[str]]] = {
    "an offset": (f"{UP}.weight_offset", 3.0, ["holds 3.0 at [7, 0]", "asymmetric"]),
    "no number": (f"{UP}.weight_scale", float("nan"), ["holds nan at [7, 0]", "damaged"]),
    "infinity": (f"{UP}.weight_scale", float("inf"), ["holds inf at [7, 0]"]),
}


@pytest.mark.parametrize(("name", "value", "mentions"), VALUES.values(), ids=VALUES)
def test_values_that_cannot_be(
    name: str, value: float, mentions: list[str], tmp_path: Path
) -> None:
    weights = int8_weights(tiny_models.tensors(tiny_models.config()))
    for scale in [n for n in weights if n.endswith("_scale")]:
        weights[f"{scale.removesuffix('_scale')}_offset"] = torch.zeros_like(weights[scale])
    weights[name][7, 0] = value
    source = write_ascendv1(tmp_path / "source", weights=weights)
    done = run("convert", source, tmp_path / "out", "-q")
    done.one_line_error(name, *mentions)
    assert not (tmp_path / "out").exists()


def test_zero_points_of_zero(tmp_path: Path) -> None:
    """Old versions of compressed-tensors wrote them for symmetric weights too."""
    weights = int8_weights(tiny_models.tensors(tiny_models.config()))
    for scale in [n for n in weights if n.endswith("_scale")]:
        point = f"{scale.removesuffix('_scale')}_zero_point"
        weights[point] = torch.zeros(weights[scale].shape, dtype=torch.int8)
    source = write_compressed_tensors(tmp_path / "source", weights=weights)
    assert run("convert", source, tmp_path / "out", "-q").code == 0
    assert run("verify", tmp_path / "out", "--against", source).code == 0
    weights[f"{UP}.weight_zero_point"][5, 0] = -3
    source = write_compressed_tensors(tmp_path / "other", weights=weights)
    done = run("convert", source, tmp_path / "asymmetric", "-q")
    done.one_line_error(f"{UP}.weight_zero_point holds -3 at [5, 0]", "asymmetric")
    assert not (tmp_path / "asymmetric").exists()


@pytest.mark.parametrize(
    ("said", "mentions"),
    [
        ({"quant_method": "ascend", "kv_quant_type": "C8"}, ["kv_quant_type is 'C8'"]),
        ({"quant_method": "gptq"}, ["already quantized (gptq)"]),
        (section(), [DESCRIPTION, "compressed-tensors: remove the one"]),
    ],
)
def test_what_config_json_says_beside_a_description(
    said: dict[str, Any], mentions: list[str], tmp_path: Path
) -> None:
    data = tiny_models.config(quantization_config=said)
    refused(write_ascendv1(tmp_path / "source", data), "config.json", *mentions)


def test_ascend_without_a_description(tmp_path: Path) -> None:
    data = tiny_models.config(quantization_config={"quant_method": "ascend"})
    source = write_ascendv1(tmp_path / "source", data, file="model.safetensors", index=None)
    (source / DESCRIPTION).unlink()
    refused(source, "quantization_config", "already quantized (ascend)", DESCRIPTION)


def test_two_models_in_a_folder(tmp_path: Path) -> None:
    source = write_ascendv1(tmp_path / "source")
    shutil.copyfile(source / DESCRIPTION, source / "quant_model_description_w8a8.json")
    refused(source, DESCRIPTION, "quant_model_description_w8a8.json", "two quantized models")


def test_a_description_without_weights(tmp_path: Path) -> None:
    source = write_ascendv1(tmp_path / "source")
    for path in source.glob("quant_model_weights*"):
        path.unlink()
    refused(source, "part of a quantized model of ModelSlim", DESCRIPTION)
