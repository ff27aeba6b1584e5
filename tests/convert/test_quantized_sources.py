"""Sources that are quantized already: taken code for code, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from support.command_line import run
from support.folders import contents, finished_weights, flip_a_byte
from support.hub_client import REPO, talk_to
from support.hub_server import HubServer
from support.native_cases import runnable_paths
from support.quantized_sources import (
    DATA,
    DESCRIPTION,
    REAL,
    WRITERS,
    int8_weights,
    quantize,
    section,
    source_weights,
    types_of,
    write_ascendv1,
    write_compressed_tensors,
)
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qwen3_ascend import ConvertOptions, Recipe, convert_checkpoint, load
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import BF16, W8A8, pieces
from qwen3_ascend.checkpoint.verify import verify
from qwen3_ascend.convert.export.exporting import export_checkpoint

DOWN = "model.layers.0.mlp.down_proj"

EVERYWHERE = Recipe.parse(
    "{schema: 1, name: everywhere, rules: [{match: '*', scheme: w8a8}]}", "test"
)
UP = "model.layers.1.mlp.up_proj"


def assert_taken(source: Path, out: Path) -> None:
    """Every stored weight is the source's: codes, scales, floats and biases."""
    weights, reader = source_weights(source), CheckpointReader(out)
    for name, entry in reader.manifest.linears.items():
        linear, parts = reader.linear(name), [part for part, _ in entry.parts]
        stacked = torch.cat([weights[f"{part}.weight"] for part in parts])
        if f"{parts[0]}.weight_scale" in weights:
            scales = torch.cat([weights[f"{part}.weight_scale"].flatten() for part in parts])
            codes = linear.codes()
            assert (entry.scheme, entry.codes, entry.sqnr_db) == (W8A8(), "taken", None)
            assert torch.equal(codes["weight"], stacked) and stacked.dtype == torch.int8
            assert torch.equal(codes["scale"], scales.float())
        else:
            assert (entry.scheme, entry.codes) == (BF16(), "chosen")
            assert torch.equal(linear.codes()["weight"], stacked.bfloat16())
        if linear.bias is not None:
            biases = torch.cat([weights[f"{part}.bias"] for part in parts])
            assert torch.equal(linear.bias, biases.bfloat16())
    for name in reader.manifest.tensors:
        assert torch.equal(reader.tensor(name), weights[name].bfloat16())
    assert verify(out).ok
    done = run("verify", out, "--against", source)
    assert (done.code, done.err) == (0, "") and f"as {source} says" in done.out


@pytest.mark.parametrize("name", REAL)
def test_what_other_tools_have_written(name: str, tmp_path: Path) -> None:
    convert_checkpoint(DATA / name, tmp_path / "out")
    assert_taken(DATA / name, tmp_path / "out")
    record = Manifest.read(tmp_path / "out").source
    assert record.format == ("ascendv1" if "slim" in name else "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((DATA / name / "config.json").read_text())
    assert config == {k: v for k, v in original.items() if k != "quantization_config"}
    assert not list((tmp_path / "out").glob("quant_model*"))


def test_the_smallest_code_is_there() -> None:
    """Our own codes end at -127; both tools write -128. Products with it are exact as well: see
    tests/runtime/test_int8.py."""
    for name in ("modelslim", "llm-compressor"):
        weights = source_weights(DATA / name).values()
        assert min(int(w.min()) for w in weights if w.dtype == torch.int8) == -128


def test_scales_that_bfloat16_lacks_are_kept() -> None:
    """The test data holds some, so that the comparisons above mean something."""
    weights = source_weights(DATA / "modelslim-float32")
    scale = weights["model.layers.0.mlp.up_proj.weight_scale"]
    assert scale.dtype == torch.float32 and not torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"hidden_size": 70, "intermediate_size": 50, "num_attention_heads": 3,
         "num_key_value_heads": 1, "head_dim": 10},
    ],
    ids=["plain", "bias", "tied", "odd"],
)  # fmt: skip
def test_models(writer: Callable[..., Path], changes: dict[str, Any], tmp_path: Path) -> None:
    source = writer(tmp_path / "source", tiny_models.config(**changes), floats=[DOWN])
    done = run("convert", source, tmp_path / "out")
    assert done.code == 0, done.err
    assert "7 of " in done.out and "keep the codes of the source, code for code" in done.out
    assert_taken(source, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axes", [1, 2])
def test_types_and_shapes_of_scales(dtype: torch.dtype, axes: int, tmp_path: Path) -> None:
    weights = int8_weights(tiny_models.tensors(tiny_models.config()))
    for name in weights:
        if name.endswith("_scale"):
            scale = weights[name].to(dtype)
            weights[name] = scale if axes == 2 else scale.flatten()
    source = write_compressed_tensors(tmp_path / "source", weights=weights)
    convert_checkpoint(source, tmp_path / "out")
    assert_taken(source, tmp_path / "out")


NAMES = {
    "a single file": {"file": "quant_model_weights.safetensors", "index": None},
    "first version": {
        "file": "quant_model_weight_w8a8_dynamic.safetensors", "index": None,
        "description": "quant_model_description_w8a8_dynamic.json",
    },
    "first version in parts": {
        "file": "quant_model_weight_w8a8_dynamic-00001-of-00001.safetensors",
        "index": "quant_model_weight_w8a8_dynamic.safetensors.index.json",
    },
    "names of transformers": {"file": "model.safetensors", "index": None},
}  # fmt: skip


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_names_that_modelslim_has_used(names: dict[str, Any], tmp_path: Path) -> None:
    data = tiny_models.config(quantize="w8a8_dynamic")
    source = write_ascendv1(tmp_path / "source", data, **names)
    convert_checkpoint(source, tmp_path / "out")
    assert_taken(source, tmp_path / "out")
    assert "quantize" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    "said", [{"quant_method": "ascend"}, {"model_quant_type": "W8A8_DYNAMIC", f"{UP}.weight": "?"}]
)
def test_what_config_json_says_beside_it(said: dict[str, Any], tmp_path: Path) -> None:
    data = tiny_models.config(quantization_config=said, quantize="w8a8_dynamic")
    source = write_ascendv1(tmp_path / "source", data)
    convert_checkpoint(source, tmp_path / "out")
    assert_taken(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantize", "quantization_config"} & config.keys()


TARGETS: dict[str, dict[str, Any]] = {
    "a pattern of what is left out": {"ignore": ["re:.*lm_head", "re:model.layers.0.*down_proj$"]},
    "names and a pattern": {
        "targets": ["re:.*(q|k|v|o|gate|up)_proj", "model.layers.1.mlp.down_proj"],
        "ignore": [],
    },
    "what no Qwen3 has": {"ignore": ["lm_head", DOWN, "re:.*mlp.gate$", "visual"]},
}


@pytest.mark.parametrize("said", TARGETS.values(), ids=TARGETS)
def test_targets(said: dict[str, Any], tmp_path: Path) -> None:
    config = section(ignore=said["ignore"])
    config["config_groups"]["group_0"]["targets"] = said.get("targets", ["Linear"])
    source = write_compressed_tensors(tmp_path / "source", floats=[DOWN], said=config)
    convert_checkpoint(source, tmp_path / "out")
    assert_taken(source, tmp_path / "out")


def test_groups(tmp_path: Path) -> None:
    """A name counts before a pattern, and a pattern before a class, as in compressed-tensors."""
    config = section(ignore=["lm_head"])
    groups = config["config_groups"]
    groups["group_1"] = {**groups["group_0"], "targets": ["re:.*layers.1.*"]}
    groups["group_0"] = {**groups["group_0"], "weights": {"num_bits": 4}}
    source = write_compressed_tensors(tmp_path / "source", said=config)
    run("convert", source, tmp_path / "out").one_line_error("group_0", "num_bits is 4")
    groups["group_2"] = {**groups["group_1"], "targets": ["re:.*layers.0.*"]}
    source = write_compressed_tensors(tmp_path / "other", said=config)
    convert_checkpoint(source, tmp_path / "out")
    assert_taken(source, tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_head(tied: bool, tmp_path: Path) -> None:
    """A config.json that ties it although it is there does not count, as with floats."""
    data = tiny_models.config(tie_word_embeddings=tied)
    weights = int8_weights(tiny_models.tensors(tiny_models.config()))
    weights["lm_head.weight"], weights["lm_head.weight_scale"] = quantize(weights["lm_head.weight"])
    for name, source in {
        "slim": write_ascendv1(tmp_path / "slim", data, weights),
        "compressed": write_compressed_tensors(
            tmp_path / "compressed", data, weights, said=section(ignore=[])
        ),
    }.items():
        convert_checkpoint(source, tmp_path / f"{name}-out")
        assert_taken(source, tmp_path / f"{name}-out")
        assert "lm_head" in Manifest.read(tmp_path / f"{name}-out").linears


def test_a_tied_head_that_is_not_ignored(tmp_path: Path) -> None:
    """It has no tensor, so nothing of it was quantized: the embedding stays what it is."""
    data = tiny_models.config(tie_word_embeddings=True)
    source = write_compressed_tensors(tmp_path / "source", data, said=section(ignore=[]))
    convert_checkpoint(source, tmp_path / "out")
    assert_taken(source, tmp_path / "out")
    assert "lm_head" not in Manifest.read(tmp_path / "out").linears


# What it computes.


class Int8(nn.Module):
    """A linear as both formats define it: int8 weights, int8 activations for each token."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.codes, self.scale, self.added = codes, scale, bias

    def forward(self, x: Tensor) -> Tensor:
        token_scale = x.abs().amax(-1, keepdim=True) / 127
        codes = torch.round(x / token_scale).clamp(-128, 127)
        product = (codes.double() @ self.codes.double().t()).float()
        y = product * token_scale * self.scale.float().flatten()
        return y if self.added is None else y + self.added.float()


def reference(source: Path) -> Qwen3ForCausalLM:
    """The source in transformers, with linears of the source's codes."""
    data, weights = json.loads((source / "config.json").read_text()), source_weights(source)
    data.pop("quantization_config", None)
    model: Qwen3ForCausalLM = Qwen3ForCausalLM(Qwen3Config(**data)).float().eval()
    floats = {n: t.float() for n, t in weights.items() if t.dtype != torch.int8}
    model.load_state_dict(floats, strict=False)
    for name in [n for n in weights if n.endswith(".weight_scale")]:
        path = name.removesuffix(".weight_scale")
        parent, _, child = path.rpartition(".")
        int8 = Int8(weights[f"{path}.weight"], weights[name], weights.get(f"{path}.bias"))
        setattr(model.get_submodule(parent), child, int8)
    return model


@pytest.mark.parametrize("name", REAL)
def test_logits(name: str, tmp_path: Path) -> None:
    convert_checkpoint(DATA / name, tmp_path / "out")
    tokens = [5, 17, 3, 250, 90, 41]
    with torch.no_grad():
        expected = reference(DATA / name)(torch.tensor([tokens])).logits[0]
    found = load(tmp_path / "out", dtype="float32", kv_cache_tokens=256).logits(tokens)
    assert float((found - expected).abs().max()) < 0.01 * float(expected.std())


def test_the_weights_that_compressed_tensors_reads(tmp_path: Path) -> None:
    """transformers hands the folder to the compressed-tensors package, which decompresses it."""
    source = DATA / "llm-compressor"
    convert_checkpoint(source, tmp_path / "out")
    decompressed = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(
        str(source), dtype=torch.bfloat16, quantization_config=decompressed
    )
    theirs, reader = dict(model.named_parameters()), CheckpointReader(tmp_path / "out")
    for name, entry in reader.manifest.linears.items():
        stacked = torch.cat([theirs[f"{part}.weight"].detach() for part, _ in entry.parts])
        assert torch.equal(reader.linear(name).dequantize().bfloat16(), stacked.bfloat16())


# Recipes.


def test_a_recipe_decides_on_what_came_as_floats(tmp_path: Path) -> None:
    source = write_ascendv1(tmp_path / "source", floats=[DOWN])
    manifest = convert_checkpoint(source, tmp_path / "out", "w8a8-plain")
    codes = {name: entry.codes for name, entry in manifest.linears.items()}
    assert {name for name, said in codes.items() if said == "chosen"} == {DOWN, "lm_head"}
    assert manifest.linears[DOWN].scheme == W8A8() and (manifest.linears[DOWN].sqnr_db or 0) > 30
    assert manifest.recipe["name"] == "w8a8-plain"
    assert run("verify", tmp_path / "out", "--against", source).code == 0


def test_a_head_is_quantized_on_request(tmp_path: Path) -> None:
    data = tiny_models.config(tie_word_embeddings=True)
    source = write_compressed_tensors(tmp_path / "source", data)
    manifest = convert_checkpoint(source, tmp_path / "out", EVERYWHERE)
    assert manifest.linears["lm_head"].codes == "chosen"
    assert manifest.linears["lm_head"].parts[0][0] == "model.embed_tokens"
    assert run("verify", tmp_path / "out", "--against", source).code == 0


@pytest.mark.parametrize(
    ("recipe", "does"), [("bf16", "gives bf16 to"), ("w8a8", "transforms the weights of")]
)
def test_a_recipe_that_contradicts(recipe: str, does: str, tmp_path: Path) -> None:
    source = write_ascendv1(tmp_path / "source")
    done = run("convert", source, tmp_path / "out", "--recipe", recipe)
    done.one_line_error(f"recipe {recipe} {does} model.layers.0.", "w8a8", "--recipe")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [(), ("--recipe", "w8a8-plain")])
def test_parts_of_a_fused_linear_are_alike(options: tuple[str, ...], tmp_path: Path) -> None:
    source = write_ascendv1(tmp_path / "source", floats=["model.layers.1.self_attn.k_proj"])
    done = run("convert", source, tmp_path / "out", *options)
    done.one_line_error("model.layers.1.self_attn.qkv_proj", "k_proj: floats", "q_proj: w8a8")
    assert not (tmp_path / "out").exists()


# The machinery of every conversion.


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_any_division(
    writer: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes from any number of threads, piece size and kernel; parts end in strips."""
    data = tiny_models.config(
        hidden_size=70, intermediate_size=50, num_attention_heads=3, num_key_value_heads=1,
        head_dim=10, attention_bias=True,
    )  # fmt: skip
    source = writer(tmp_path / "source", data)
    convert_checkpoint(source, tmp_path / "first", options=ConvertOptions(threads=1))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2000)
    for number, path in enumerate(["0", *runnable_paths()]):
        name = "QWEN3_ASCEND_NATIVE" if path == "0" else "QWEN3_ASCEND_CPU"
        monkeypatch.setenv(name, path)
        out = tmp_path / f"out{number}"
        convert_checkpoint(source, out, options=ConvertOptions(threads=number + 1))
        assert contents(out) == contents(tmp_path / "first")
        monkeypatch.delenv(name)


def test_hashes_of_the_source(tmp_path: Path) -> None:
    source = write_ascendv1(tmp_path / "source")
    manifest = convert_checkpoint(
        source, tmp_path / "out", options=ConvertOptions(hash_source=True)
    )
    assert manifest.source.tensors.keys() == source_weights(source).keys()
    weights = source_weights(source)
    weights[f"{UP}.weight_offset"] = -weights[f"{UP}.weight_offset"]  # -0.0
    other = write_ascendv1(tmp_path / "other", weights=weights)
    done = run("verify", tmp_path / "out", "--against", other)
    done.one_line_error(f"source tensor {UP}.weight_offset", "its hash differs")


def test_a_code_that_differs_is_named(tmp_path: Path) -> None:
    source = write_ascendv1(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "out")
    for suffix in ("weight", "weight_scale"):
        weights = source_weights(source)
        weights[f"{UP}.{suffix}"][9, 0] += 1
        other = write_ascendv1(tmp_path / suffix, weights=weights)
        done = run("verify", tmp_path / "out", "--against", other)
        done.one_line_error("linear model.layers.1.mlp.gate_up_proj", "codes are not the source's")


def test_another_source(tmp_path: Path) -> None:
    """The floats that were quantized are not what the codes were taken from."""
    convert_checkpoint(write_ascendv1(tmp_path / "slim"), tmp_path / "out")
    compressed = write_compressed_tensors(tmp_path / "compressed")
    floats = tiny_models.write(tmp_path / "floats")
    for other, name in ((compressed, "compressed-tensors"), (floats, "floats")):
        done = run("verify", tmp_path / "out", "--against", other)
        done.one_line_error("made of a source of ascendv1", f"this one is of {name}")


def test_a_second_run(tmp_path: Path) -> None:
    source, out = write_ascendv1(tmp_path / "source"), tmp_path / "out"
    convert_checkpoint(source, out)
    before = contents(out)
    done = run("convert", source, out)
    assert done.code == 0 and "nothing to do" in done.err and contents(out) == before
    run("convert", source, out, "--recipe", "w8a8-plain").one_line_error("recipe", "--overwrite")
    shutil.rmtree(source)
    run("convert", write_compressed_tensors(source), out).one_line_error("another conversion")


def test_the_same_weights_in_another_format(tmp_path: Path) -> None:
    """The weight files are the same, and so is what becomes of config.json."""
    source, out = write_compressed_tensors(tmp_path / "source"), tmp_path / "out"
    convert_checkpoint(source, out, "w8a8-plain")
    shutil.copyfile(out / "config.json", source / "config.json")
    (source / DESCRIPTION).write_text(json.dumps(types_of(source_weights(source))))
    done = run("convert", source, out, "--recipe", "w8a8-plain")
    done.one_line_error("(differing in: format of the source)")


def test_an_edited_description_does_not_continue(tmp_path: Path) -> None:
    """Codes that were to be taken are now of floats, or the other way round: another conversion."""
    source, out = write_ascendv1(tmp_path / "source", floats=[DOWN]), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen3_ascend.convert.pipeline.Conversion._settle", broken)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, out, "w8a8-plain")
    assert (out / ".partial").exists()
    weights = source_weights(source)
    weights[f"{DOWN}.weight"], weights[f"{DOWN}.weight_scale"] = quantize(weights[f"{DOWN}.weight"])
    write_ascendv1(source, weights=weights)
    done = run("convert", source, out, "--recipe", "w8a8-plain", "-q")
    done.one_line_error("codes of the source")


def broken(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_damage_is_noticed(tmp_path: Path) -> None:
    convert_checkpoint(write_ascendv1(tmp_path / "source"), tmp_path / "out")
    flip_a_byte(tmp_path / "out", "model.layers.1.mlp.down_proj.weight")
    run("verify", tmp_path / "out").one_line_error("model.layers.1.mlp.down_proj.weight")


def test_what_is_said(tmp_path: Path) -> None:
    source = write_ascendv1(tmp_path / "source", floats=[DOWN])
    plan = run("convert", source, tmp_path / "out", "--dry-run")
    assert plan.code == 0 and "w8a8, taken" in plan.out and not (tmp_path / "out").exists()
    items = json.loads(run("convert", source, tmp_path / "out", "--dry-run", "--json").out)["items"]
    codes = {item["name"]: item["codes"] for item in items}
    assert codes[DOWN] == "chosen" and codes["model.layers.0.mlp.gate_up_proj"] == "taken"
    convert_checkpoint(source, tmp_path / "out")
    shown = run("inspect", tmp_path / "out").out
    assert "quantized already (ascendv1), recipe as-source" in shown and "taken" in shown
    card = (tmp_path / "out" / "README.md").read_text()
    assert "quantized already (ascendv1)" in card and "7 linears are its own" in card


@pytest.mark.parametrize("name", REAL)
def test_from_a_hub(
    name: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_model(REPO, DATA / name)
    talk_to(hub, tmp_path / "cache", monkeypatch)
    convert_checkpoint(REPO, tmp_path / "out")
    convert_checkpoint(DATA / name, tmp_path / "local")
    for file in (tmp_path / "local").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert run("verify", tmp_path / "out", "--against", REPO).code == 0
    convert_checkpoint(REPO, tmp_path / "sparing", options=ConvertOptions(low_disk=True))
    assert contents(tmp_path / "sparing") == contents(tmp_path / "out")


def test_a_head_from_a_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are not compared with the embedding that config.json ties them to."""
    weights = int8_weights(tiny_models.tensors(tiny_models.config()))
    weights["lm_head.weight"], weights["lm_head.weight_scale"] = quantize(weights["lm_head.weight"])
    source = write_ascendv1(
        tmp_path / "source", tiny_models.config(tie_word_embeddings=True), weights
    )
    hub.add_model(REPO, source)
    talk_to(hub, tmp_path / "cache", monkeypatch)
    manifest = convert_checkpoint(REPO, tmp_path / "out")
    assert manifest.linears["lm_head"].codes == "taken"
    assert_taken(source, tmp_path / "out")


# There and back again.


@pytest.mark.parametrize("format", ["ascendv1", "compressed-tensors"])
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-head", "w8a8-attention-bf16"])
def test_an_export_comes_back(format: str, recipe: str, tmp_path: Path) -> None:
    """The weight files are those of the checkpoint that was exported, byte for byte."""
    data = tiny_models.config(tie_word_embeddings=recipe == "w8a8-head", attention_bias=True)
    made = tmp_path / "made"
    convert_checkpoint(tiny_models.write(tmp_path / "source", data), made, recipe)
    export_checkpoint(made, tmp_path / "exported", format)
    convert_checkpoint(tmp_path / "exported", tmp_path / "back")
    assert finished_weights(tmp_path / "back") == finished_weights(made)
    assert run("verify", tmp_path / "back", "--against", tmp_path / "exported").code == 0


@pytest.mark.parametrize("format", ["ascendv1", "compressed-tensors"])
@pytest.mark.parametrize("name", REAL)
def test_what_was_taken_is_exported(name: str, format: str, tmp_path: Path) -> None:
    """Also scales that bfloat16 lacks come out as they came in."""
    convert_checkpoint(DATA / name, tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "exported", format)
    weights, exported = source_weights(DATA / name), source_weights(tmp_path / "exported")
    for tensor in [n for n in weights if n.endswith(".weight_scale")]:
        codes = tensor.removesuffix("_scale")
        assert torch.equal(exported[codes], weights[codes])
        assert torch.equal(exported[tensor].float(), weights[tensor].float())
    convert_checkpoint(tmp_path / "exported", tmp_path / "back")
    assert finished_weights(tmp_path / "back") == finished_weights(tmp_path / "out")
