"""What an export holds: the checkpoint's integers, under the names that other engines ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support import tiny_models
from support.command_line import run
from support.folders import contents
from support.group_scheme import NZ, GroupInt4
from support.static_inputs import write_static
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CompressedTensorsConfig, Qwen3ForCausalLM

from qwen3_ascend import ConvertOptions, convert_checkpoint
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import SCHEMES
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.convert import WritingOptions, export_checkpoint
from qwen3_ascend.convert.export import item as export_item
from qwen3_ascend.convert.export.record import verify_export
from qwen3_ascend.convert.recipe import Recipe
from qwen3_ascend.errors import OptionError
from qwen3_ascend.files.hashing import file_sha256

FORMS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "num_key_value_heads": 1},
    "odd-sizes": {
        "hidden_size": 72, "intermediate_size": 50, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 20, "attention_bias": True, "vocab_size": 331,
    },
}  # fmt: skip

RECIPES = ("w8a8-plain", "w8a8-attention-bf16", "w8a8-head")

QUANTIZED = ("ascendv1", "compressed-tensors")

WEIGHTS = {"ascendv1": "quant_model_weights", "compressed-tensors": "model", "huggingface": "model"}


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> dict[str, Any]:
    return tiny_models.config(**FORMS[request.param])


@pytest.fixture(scope="module")
def source(form: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("source") / "model", form)


@pytest.fixture(scope="module", params=RECIPES)
def checkpoint(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint of every form with every recipe; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint") / str(request.param)
    convert_checkpoint(source, folder, str(request.param))
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an export, found as transformers finds it: through the index."""
    (index,) = folder.glob("*.index.json")
    found = {}
    for name, file in json.loads(index.read_text())["weight_map"].items():
        with safe_open(folder / file, "pt") as weights:
            assert weights.metadata() == {"format": "pt"}
            found[name] = weights.get_tensor(name)
    held = {path.name for path in folder.glob("*.safetensors")}
    assert held == set(json.loads(index.read_text())["weight_map"].values())
    return found


def exported_linears(checkpoint: Path) -> Iterator[tuple[str, Linear, slice]]:
    """Every linear of Hugging Face, with the stored one that it is a part of, and where."""
    reader = CheckpointReader(checkpoint)
    for name, entry in reader.manifest.linears.items():
        row = 0
        for part, rows in entry.parts:
            source = "lm_head" if name == "lm_head" else part
            yield source, reader.linear(name), slice(row, row + rows)
            row += rows


def expected(checkpoint: Path, format: str) -> dict[str, Tensor]:
    """What an export has to hold, from the codes of whole linears."""
    reader = CheckpointReader(checkpoint)
    found = {name: reader.tensor(name) for name in reader.manifest.tensors}
    for source, linear, rows in exported_linears(checkpoint):
        if linear.bias is not None:
            found[f"{source}.bias"] = linear.bias[rows]
        if linear.scheme.name == "bf16" or format == "huggingface":
            found[f"{source}.weight"] = linear.dequantize()[rows].bfloat16()
            continue
        codes = linear.codes()
        found[f"{source}.weight"] = codes["weight"][rows]
        scale = codes["scale"][rows][:, None]
        found[f"{source}.weight_scale"] = (
            scale.bfloat16() if format == "compressed-tensors" else scale
        )
        if format == "ascendv1":
            found[f"{source}.weight_offset"] = torch.zeros_like(scale)
    return found


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_element_is_the_checkpoints(name: str, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = export_checkpoint(checkpoint, out, name)
    assert_equal(tensors(out), expected(checkpoint, name))
    assert {path.name for path in out.glob("*.safetensors")} == {
        f"{WEIGHTS[name]}-00001-of-00001.safetensors"
    }
    assert set(record.tensors) == set(expected(checkpoint, name)) and verify_export(out).ok


@pytest.mark.parametrize("changes", [FORMS["biased"], FORMS["untied"]], ids=["biased", "untied"])
def test_static_inputs_as_modelslim_writes_them(changes: dict[str, Any], tmp_path: Path) -> None:
    """The formulas of on_w8a8_static in msmodelslim 26.1.0, on what it would have chosen."""
    data = tiny_models.config(**changes)
    source = tiny_models.write(tmp_path / "source", data, tokenizer=False)
    write_static(source, tmp_path / "made", tokens=64)
    export_checkpoint(tmp_path / "made", tmp_path / "out", "ascendv1")
    found = tensors(tmp_path / "out")
    described = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert described["model_quant_type"] == "W8A8" and verify_export(tmp_path / "out").ok
    held: set[str] = set()
    for part, linear, rows in exported_linears(tmp_path / "made"):
        if linear.scheme.name == "bf16":
            continue
        names = ("weight", "deq_scale", "quant_bias", "input_scale", "input_offset")
        weight, deq_scale, quant_bias, scale, offset = (found[f"{part}.{name}"] for name in names)
        held |= {f"{part}.{name}" for name in names}
        assert {described[f"{part}.{name}"] for name in names} == {"W8A8"}
        assert weight.dtype == torch.int8 and torch.equal(weight, linear.codes()["weight"][rows])
        assert scale.shape == offset.shape == (1,) and scale.dtype == offset.dtype == torch.float32
        bias = found.get(f"{part}.bias", torch.zeros(len(weight)))
        correction = weight.float().sum(1) * offset
        expected = torch.round(bias.float() / deq_scale - correction).to(torch.int32)
        assert (quant_bias - expected).abs().max() <= 1  # which of two sums is rounded
        assert deq_scale.dtype == torch.float32 and quant_bias.dtype == torch.int32
        # deq_scale is that of the reciprocal which engines multiply by, as bfloat16.
        plain = linear.dequantize()[rows]
        ratio = (weight.float() * (deq_scale / scale)[:, None]).norm() / plain.norm()
        assert abs(float(ratio) - 1) <= 2.0**-8
    assert held and not [name for name in found if name.endswith("weight_scale")]


def test_scales_lose_nothing_as_bfloat16(checkpoint: Path) -> None:
    for _, linear, _ in exported_linears(checkpoint):
        if linear.scheme.name == "w8a8":
            scale = linear.codes()["scale"]
            assert torch.equal(scale.bfloat16().float(), scale)


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_bfloat16_comes_back_as_it_was(changes: dict[str, Any], tmp_path: Path) -> None:
    """Convert and export: the source's own tensors, under its names, bit by bit."""
    data = tiny_models.config(**changes)
    source = tiny_models.write(tmp_path / "source", data, shards=3)
    convert_checkpoint(source, tmp_path / "out", "bf16")
    export_checkpoint(tmp_path / "out", tmp_path / "back", "huggingface")
    assert_equal(tensors(tmp_path / "back"), tiny_models.tensors(data))


def loaded(folder: Path) -> Qwen3ForCausalLM:
    """A folder as transformers loads it; nothing is missing, left over or made up."""
    model: Qwen3ForCausalLM
    model, info = Qwen3ForCausalLM.from_pretrained(folder, output_loading_info=True)  # type: ignore[misc]
    assert not any(info.values()), info  # type: ignore[has-type]
    return model


def logits(model: Qwen3ForCausalLM) -> Tensor:
    ids = torch.arange(7, 47)[None]
    with torch.no_grad():
        found: Tensor = model.eval().float()(ids).logits
    return found


def test_transformers_loads_the_bfloat16(checkpoint: Path, tmp_path: Path) -> None:
    """And the logits are those of the dequantized weights."""
    export_checkpoint(checkpoint, tmp_path / "hf", "huggingface")
    model = loaded(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    found = logits(model)
    state = {f"{name}.weight": linear.dequantize()[rows]
             for name, linear, rows in exported_linears(checkpoint)}  # fmt: skip
    model.load_state_dict(state, strict=False)
    wanted = logits(model)
    # A weight is off by at most 2^-9 of itself. The largest difference seen is 0.013.
    assert (found - wanted).std() < 0.03 * wanted.std()


def test_compressed_tensors_reads_it(checkpoint: Path, tmp_path: Path) -> None:
    """The real library, through transformers, takes the codes as codes of the right scheme, and
    turns them into the weights that we mean."""
    pytest.importorskip("compressed_tensors")
    export_checkpoint(checkpoint, tmp_path / "ct", "compressed-tensors")
    model = loaded(tmp_path / "ct")
    for name, linear, rows in exported_linears(checkpoint):
        module = model.get_submodule(name)
        scheme = getattr(module, "quantization_scheme", None)
        assert (scheme is not None) == (linear.scheme.name == "w8a8"), name
        if scheme is not None:
            assert scheme.weights.strategy == "channel" and scheme.weights.symmetric
            assert scheme.input_activations.strategy == "token" and scheme.input_activations.dynamic
            assert torch.equal(weight_of(module), linear.codes()["weight"][rows]), name
    plain = Qwen3ForCausalLM.from_pretrained(
        tmp_path / "ct", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    for name, linear, rows in exported_linears(checkpoint):
        assert torch.equal(
            weight_of(plain.get_submodule(name)), linear.dequantize()[rows].bfloat16()
        ), name


def weight_of(module: torch.nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


MODELSLIM = """
lm_head.weight                                   bfloat16 [320, 256]  FLOAT
model.embed_tokens.weight                        bfloat16 [320, 256]  FLOAT
model.layers.0.input_layernorm.weight            bfloat16 [256]       FLOAT
model.layers.0.mlp.down_proj.weight              int8     [256, 512]  W8A8_DYNAMIC
model.layers.0.mlp.down_proj.weight_offset       float32  [256, 1]    W8A8_DYNAMIC
model.layers.0.mlp.down_proj.weight_scale        float32  [256, 1]    W8A8_DYNAMIC
model.layers.0.mlp.gate_proj.weight              int8     [512, 256]  W8A8_DYNAMIC
model.layers.0.mlp.gate_proj.weight_offset       float32  [512, 1]    W8A8_DYNAMIC
model.layers.0.mlp.gate_proj.weight_scale        float32  [512, 1]    W8A8_DYNAMIC
model.layers.0.mlp.up_proj.weight                int8     [512, 256]  W8A8_DYNAMIC
model.layers.0.mlp.up_proj.weight_offset         float32  [512, 1]    W8A8_DYNAMIC
model.layers.0.mlp.up_proj.weight_scale          float32  [512, 1]    W8A8_DYNAMIC
model.layers.0.post_attention_layernorm.weight   bfloat16 [256]       FLOAT
model.layers.0.self_attn.k_norm.weight           bfloat16 [64]        FLOAT
model.layers.0.self_attn.k_proj.weight           int8     [128, 256]  W8A8_DYNAMIC
model.layers.0.self_attn.k_proj.weight_offset    float32  [128, 1]    W8A8_DYNAMIC
model.layers.0.self_attn.k_proj.weight_scale     float32  [128, 1]    W8A8_DYNAMIC
model.layers.0.self_attn.o_proj.weight           int8     [256, 256]  W8A8_DYNAMIC
model.layers.0.self_attn.o_proj.weight_offset    float32  [256, 1]    W8A8_DYNAMIC
model.layers.0.self_attn.o_proj.weight_scale     float32  [256, 1]    W8A8_DYNAMIC
model.layers.0.self_attn.q_norm.weight           bfloat16 [64]        FLOAT
model.layers.0.self_attn.q_proj.weight           int8     [256, 256]  W8A8_DYNAMIC
model.layers.0.self_attn.q_proj.weight_offset    float32  [256, 1]    W8A8_DYNAMIC
model.layers.0.self_attn.q_proj.weight_scale     float32  [256, 1]    W8A8_DYNAMIC
model.layers.0.self_attn.v_proj.weight           int8     [128, 256]  W8A8_DYNAMIC
model.layers.0.self_attn.v_proj.weight_offset    float32  [128, 1]    W8A8_DYNAMIC
model.layers.0.self_attn.v_proj.weight_scale     float32  [128, 1]    W8A8_DYNAMIC
model.norm.weight                                bfloat16 [256]       FLOAT
"""
"""Every tensor that msmodelslim 26.1.0 wrote for a Qwen3 of this shape (and a larger vocabulary),
and its type in quant_model_description.json, which had these other keys:"""

MODELSLIM_OTHERS = {
    "version": "1.0.0",
    "model_quant_type": "W8A8_DYNAMIC",
    "metadata": {},
    "group_size": 0,
    "optional": {},
}


def test_ascendv1_is_what_modelslim_writes(tmp_path: Path) -> None:
    data = tiny_models.config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, head_dim=64
    )
    source = tiny_models.write(tmp_path / "source", data)
    convert_checkpoint(source, tmp_path / "out", "w8a8")
    export_checkpoint(tmp_path / "out", tmp_path / "av1", "ascendv1")
    description = json.loads((tmp_path / "av1" / "quant_model_description.json").read_text())
    found = sorted(
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {[*tensor.shape]} {description[name]}"
        for name, tensor in tensors(tmp_path / "av1").items()
    )
    assert found == [" ".join(line.split()) for line in MODELSLIM.strip().splitlines()]
    assert {key: description[key] for key in description if "." not in key} == MODELSLIM_OTHERS
    assert (tmp_path / "av1" / "quant_model_weights.safetensors.index.json").is_file()


def test_every_tensor_has_its_type(checkpoint: Path, tmp_path: Path) -> None:
    """And the head has one also where it is no tensor; a bias of any linear is a float."""
    export_checkpoint(checkpoint, tmp_path / "av1", "ascendv1")
    description = json.loads((tmp_path / "av1" / "quant_model_description.json").read_text())
    held = tensors(tmp_path / "av1")
    assert set(held) | {"lm_head.weight"} | set(MODELSLIM_OTHERS) == set(description)
    quantized = {name for name, linear, _ in exported_linears(checkpoint)
                 if linear.scheme.name == "w8a8"}  # fmt: skip
    for name in {*held, "lm_head.weight"}:
        linear, _, suffix = name.rpartition(".")
        is_code = linear in quantized and suffix != "bias"
        assert description[name] == ("W8A8_DYNAMIC" if is_code else "FLOAT"), name
        assert "norm.bias" not in name  # would switch every norm of vllm-ascend to another operator


def test_what_compressed_tensors_ignores(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "ct", "compressed-tensors")
    section = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    linears = {name: linear.scheme.name for name, linear, _ in exported_linears(checkpoint)}
    floats = {name for name, scheme in linears.items() if scheme == "bf16"}
    stored = CheckpointReader(checkpoint).manifest.linears.items()
    fused = {name for name, entry in stored if entry.scheme.name == "bf16"}  # as SGLang asks
    assert set(section["ignore"]) == floats | fused | ({"lm_head"} - set(linears))
    targets = section["config_groups"]["group_0"]["targets"]
    assert targets == (["Linear", "lm_head"] if linears.get("lm_head") == "w8a8" else ["Linear"])


# What travels along.


def test_the_configuration_says_what_is_there(
    checkpoint: Path, source: Path, tmp_path: Path
) -> None:
    before = json.loads((source / "config.json").read_text())
    for name in WEIGHTS:
        export_checkpoint(checkpoint, tmp_path / name, name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config.pop("quantization_config", None) is None or name == "compressed-tensors"
        tied = before["tie_word_embeddings"] and checkpoint.name != "w8a8-head"
        assert config == {**before, "tie_word_embeddings": tied}
        assert AutoConfig.from_pretrained(tmp_path / name).num_hidden_layers == 2


@pytest.mark.parametrize(
    ("said", "becomes"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"dtype": None, "torch_dtype": "float16"}, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float16"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"dtype": None}, {"torch_dtype": "bfloat16"}),
    ],
)
def test_the_type_of_the_weights(
    said: dict[str, Any], becomes: dict[str, str], tmp_path: Path
) -> None:
    """Under the keys that the source uses; old programs know torch_dtype only."""
    data = tiny_models.config(num_hidden_layers=1, architectures=["Qwen3Model"], **said)
    source = tiny_models.write(tmp_path / "source", data)
    convert_checkpoint(source, tmp_path / "out", "bf16")
    export_checkpoint(tmp_path / "out", tmp_path / "hf", "huggingface")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {key: value for key, value in config.items() if "dtype" in key} == becomes
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert AutoConfig.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


def test_small_files_travel_along(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source", tiny_models.config(num_hidden_layers=1))
    (source / "LICENSE").write_text("as you like")
    (source / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    convert_checkpoint(source, tmp_path / "out", "w8a8")
    for name in WEIGHTS:
        out = tmp_path / name
        export_checkpoint(tmp_path / "out", out, name)
        found, before = contents(out), contents(source)
        same = {*before} - {"config.json", "model.safetensors"}
        assert len(same) == 6 and all(found[file] == before[file] for file in same)
        assert "qwen3_ascend.json" not in found
        assert AutoTokenizer.from_pretrained(out)("river").input_ids
        card = found["README.md"].decode()
        for word in ("source", "w8a8", f"--format {name}", "vllm serve", "qwen3_ascend_export"):
            assert word in card
        assert str(tmp_path) not in "".join(
            data.decode() for file, data in found.items() if file.endswith((".md", ".json"))
        )


# The same bytes, whatever the machine.

# If one of these changes, EXPORTER_VERSION in convert/export/identity.py has to go up as well.
PINNED = {
    "ascendv1": "ba991001914c1876ab87fd5299eb39c2d263ad9b59200497465c34e7fe7a5e35",
    "compressed-tensors": "653879dafde3df66d314c9244b7248f204da193c1164a112dcbcfd7cb4790f93",
    "huggingface": "ea1e20ebd98e8f822b1255bfeb61c0d655837f0aed21840d9bc19bd3e8061217",
}


@pytest.mark.parametrize("name", PINNED)
def test_pinned_bytes(name: str, tiny_source: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_source, tmp_path / "made", "w8a8-plain")
    export_checkpoint(tmp_path / "made", tmp_path / "out", name)
    assert file_sha256(next((tmp_path / "out").glob("*.safetensors"))) == PINNED[name]


def test_threads_and_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_models.write(tmp_path / "source", tiny_models.config(**FORMS["odd-sizes"]))
    convert_checkpoint(source, tmp_path / "out", "w8a8-attention-bf16")
    for name in WEIGHTS:
        export_checkpoint(tmp_path / "out", tmp_path / name, name)
        with monkeypatch.context() as patch:
            patch.setattr(export_item, "PIECE_WEIGHTS", 1000)
            patch.setenv("QWEN3_ASCEND_NATIVE", "0")
            for threads in (1, 3):
                again = tmp_path / f"{name}{threads}"
                options = WritingOptions(threads=threads, max_memory=300 << 20)
                export_checkpoint(tmp_path / "out", again, name, options)
                assert contents(again) == contents(tmp_path / name)


def test_many_files(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "out", options=ConvertOptions(max_file_bytes=30_000))
    for name, stem in WEIGHTS.items():
        out = tmp_path / name
        export_checkpoint(tmp_path / "out", out, name, WritingOptions(max_file_bytes=40_000))
        files = sorted(path.name for path in out.glob("*.safetensors"))
        assert len(files) > 3
        assert files == [f"{stem}-{i:05d}-of-{len(files):05d}.safetensors"
                         for i in range(1, len(files) + 1)]  # fmt: skip
        assert_equal(tensors(out), expected(tmp_path / "out", name))


# What is refused.


def test_nothing_quantized_is_no_quantized_format(tiny_bf16: Path, tmp_path: Path) -> None:
    for name in QUANTIZED:
        refused = run("export", tiny_bf16, tmp_path / "out", "--format", name)
        refused.one_line_error("nothing in this checkpoint is quantized", name, "huggingface")
        assert not (tmp_path / "out").exists()


def test_a_head_that_is_too_large_for_one_kernel(tmp_path: Path) -> None:
    data = tiny_models.config(num_hidden_layers=1, vocab_size=65536, hidden_size=32, head_dim=8)
    source = tiny_models.write(tmp_path / "source", data, tokenizer=False)
    convert_checkpoint(source, tmp_path / "out", "w8a8-head")
    refused = run("export", tmp_path / "out", tmp_path / "av1", "--format", "ascendv1")
    refused.one_line_error("lm_head", "65536 outputs", "65535", "w8a8")
    export_checkpoint(tmp_path / "out", tmp_path / "ct", "compressed-tensors")


def test_a_scheme_without_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named with the format; as bfloat16, anything can be exported."""
    monkeypatch.setitem(SCHEMES, GroupInt4.name, GroupInt4)
    monkeypatch.setitem(ASCEND_A2_A3.layouts, GroupInt4.name, NZ)
    source = tiny_models.write(tmp_path / "source")
    rules = "[{match: '*.down_proj', scheme: {name: group-int4}}, {match: '*', scheme: w8a8}]"
    recipe = Recipe.parse(f"schema: 1\nname: grouped\nrules: {rules}", "here")
    convert_checkpoint(source, tmp_path / "out", recipe)
    for name in QUANTIZED:
        with pytest.raises(
            OptionError, match=rf"{name} cannot state .*0.mlp.down_proj.*group-int4"
        ):
            export_checkpoint(tmp_path / "out", tmp_path / name, name)
    export_checkpoint(tmp_path / "out", tmp_path / "hf", "huggingface")
    assert_equal(tensors(tmp_path / "hf"), expected(tmp_path / "out", "huggingface"))


def test_an_unknown_format(tiny_w8a8: Path, tmp_path: Path) -> None:
    run("export", tiny_w8a8, tmp_path / "out", "--format", "gguf").one_line_error(
        "gguf", "ascendv1"
    )
    run("export", tiny_w8a8, tmp_path / "out").one_line_error("--format")
    with pytest.raises(OptionError, match="format: 'gguf' is not known; known: ascendv1"):
        export_checkpoint(tiny_w8a8, tmp_path / "out", "gguf")
