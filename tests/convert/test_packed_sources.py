"""Sources in GPTQ, AWQ and packed compressed-tensors: taken for w4a16, or decoded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.command_line import run
from support.folders import contents, finished_weights
from support.hub_client import REPO, talk_to
from support.hub_server import HubServer
from support.int4_recipes import w4a16_recipe
from support.native_cases import runnable_paths
from support.quantized_sources import (
    DATA,
    PACKED,
    asymmetric_integers,
    grouped_integers,
    section,
    source_weights,
    write_ascendv1,
    write_compressed_tensors,
    write_packed,
)
from torch import Tensor

from qwen3_ascend import ConvertOptions, SamplingParams, convert_checkpoint, load
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import BF16, W4A16, W8A8, pieces
from qwen3_ascend.convert.export.exporting import export_checkpoint
from qwen3_ascend.convert.plan import make_plan
from qwen3_ascend.convert.recipe import Recipe
from qwen3_ascend.convert.source import open_source
from qwen3_ascend.errors import RecipeError

DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.1.mlp.up_proj"

WITH_DIGESTS = (
    "gptqmodel", "gptqmodel-act-order", "gptqmodel-v2", "auto-round-gptq-asymmetric",
    "auto-round-awq", "auto-round-awq-symmetric",
)  # fmt: skip
"""What the tools have written, beside the hashes of what they decode it to."""

SYMMETRIC = ("gptqmodel", "auto-round-awq-symmetric", "llm-compressor-int4")
ASYMMETRIC = (
    "gptqmodel-v2", "auto-round-gptq-asymmetric", "auto-round-awq", "llm-compressor-int4-asymmetric"
)  # fmt: skip
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output of eight lies in bits 4i to 4i + 3 of a word: AutoAWQ's `order_map`
(`WQLinear_GEMM.from_linear`)."""

GROUPS = tiny_models.config(
    hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64,
)  # fmt: skip


def parts(out: Path) -> dict[str, Linear]:
    """The linears of a checkpoint by their names in the source; their tensors are codes."""
    reader, found = CheckpointReader(out), {}
    for name, entry in reader.manifest.linears.items():
        stored, start = reader.linear(name), 0
        for part, rows in entry.parts:
            span = slice(start, start + rows)
            codes = {
                suffix: tensor[span] if suffix == "weight" else tensor[..., span]
                for suffix, tensor in stored.codes().items()
            }
            found[part] = Linear(entry.scheme, (rows, entry.shape[1]), stored.layout, codes)
            start += rows
    return found


def floats(out: Path) -> dict[str, Tensor]:
    """What a checkpoint's linears stand for, float32 by the names of the source."""
    return {part: linear.scheme.decode(linear.tensors) for part, linear in parts(out).items()}


@pytest.mark.parametrize("name", WITH_DIGESTS)
def test_the_floats_are_those_of_the_tools(name: str, tmp_path: Path) -> None:
    """gptqmodel's and auto-round's own code has decoded the same files; see the README there."""
    convert_checkpoint(DATA / name, tmp_path / "out", "bf16")
    found = parts(tmp_path / "out")
    expected = json.loads((DATA / name / "decoded.json").read_text())
    assert len(expected) == 7
    for weight, digest in expected.items():
        stored = found[weight.removesuffix(".weight")].tensors["weight"]
        assert stored.dtype == torch.bfloat16
        bits = stored.contiguous().view(torch.int16).numpy().tobytes()
        assert hashlib.sha256(bits).hexdigest() == digest, weight


@pytest.mark.parametrize("name", ["llm-compressor-int4", "llm-compressor-int4-asymmetric"])
def test_the_floats_are_those_of_compressed_tensors(name: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor

    convert_checkpoint(DATA / name, tmp_path / "out", "bf16")
    said = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
    arguments = QuantizationArgs(**said["config_groups"]["group_0"]["weights"])
    weights, found = source_weights(DATA / name), floats(tmp_path / "out")
    linears = [n.removesuffix(".weight_packed") for n in weights if n.endswith(".weight_packed")]
    assert len(linears) == 7
    for linear in linears:
        held = {
            n.rpartition(".")[2]: tensor
            for n, tensor in weights.items()
            if n.startswith(f"{linear}.")
        }
        expected = decompressed(PackedQuantizationCompressor, held, arguments)
        assert torch.equal(found[linear], expected.float()), linear


def decompressed(compressor: Any, held: Mapping[str, Tensor], arguments: Any) -> Tensor:
    """The weight that the package makes of the tensors of a linear."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size(held["weight_shape"].tolist())
    integers = unpack_from_int32(held["weight_packed"], 4, shape)
    zeros = held.get("weight_zero_point")
    if zeros is not None:
        zeros = unpack_from_int32(zeros, 4, held["weight_scale"].shape, packed_dim=0)
    floats: Tensor = dequantize(integers, held["weight_scale"], zeros, args=arguments)
    return floats


def assert_taken(source: Path, out: Path, group: int, zero_points: bool = False) -> None:
    """Integers are the source's, and scales the source's in bfloat16."""
    scheme = W4A16(group, zero_points)
    weights, found, manifest = source_weights(source), parts(out), Manifest.read(out)
    held = [n for n in weights if n.endswith((".scales", ".weight_scale"))]
    assert held
    for name in held:
        linear = found[name.rpartition(".")[0]]
        scales = weights[name] if name.endswith(".scales") else weights[name].t()
        assert linear.scheme == scheme
        assert torch.equal(linear.tensors["scale"], scales.bfloat16())
        assert ("offset" in linear.tensors) == zero_points
    for entry in manifest.linears.values():
        taken = entry.scheme == scheme
        assert entry.codes == ("taken" if taken else "chosen")
        assert taken or (entry.scheme == BF16() and entry.sqnr_db is None)
    assert run("verify", out).code == 0
    done = run("verify", out, "--against", source)
    assert (done.code, done.err) == (0, "")


def has_rounded_scales(source: Path) -> bool:
    """Whether bfloat16 lacks some scales of a source."""
    scales = (t for n, t in source_weights(source).items() if n.endswith("scales"))
    return any(not torch.equal(tensor, tensor.bfloat16().to(tensor.dtype)) for tensor in scales)


@pytest.mark.parametrize("name", [*SYMMETRIC, *ASYMMETRIC])
def test_what_is_taken(name: str, tmp_path: Path) -> None:
    """Each weight is its integer, less its zero point, times its scale, which bfloat16 may have to
    round. That is the float that the tools decode it to; see the tests of those."""
    done = run("convert", DATA / name, tmp_path / "out")
    assert done.code == 0 and "decoded" not in done.err
    assert_taken(DATA / name, tmp_path / "out", 32, zero_points=name in ASYMMETRIC)
    convert_checkpoint(DATA / name, tmp_path / "floats", "bf16")
    exact, found = floats(tmp_path / "floats"), floats(tmp_path / "out")
    entries = Manifest.read(tmp_path / "out").linears.values()
    figures = [entry.sqnr_db for entry in entries if entry.sqnr_db is not None]
    rounded = has_rounded_scales(DATA / name)
    assert bool(figures) == rounded and all(figure > 45 for figure in figures)
    for linear, weight in exact.items():
        # One rounding of the scale, and one of the weight that it is held against.
        assert bool(((found[linear] - weight).abs() <= weight.abs() * 2**-7).all())
        if not rounded:
            assert torch.equal(found[linear].bfloat16(), weight.bfloat16())
    (answer,) = load(tmp_path / "out", kv_cache_tokens=256).generate(
        [[5, 17, 3]], SamplingParams(max_new_tokens=5, ignore_eos=True)
    )
    assert len(answer.token_ids) == 5


def test_integers_and_zero_points_of_awq(tmp_path: Path) -> None:
    """By AutoAWQ's own order of the outputs, one integer at a time."""
    convert_checkpoint(DATA / "auto-round-awq", tmp_path / "out")
    weights, found = source_weights(DATA / "auto-round-awq"), parts(tmp_path / "out")
    words, zeros = (weights[f"model.layers.0.mlp.down_proj.{n}"] for n in ("qweight", "qzeros"))
    codes = found["model.layers.0.mlp.down_proj"].tensors
    for column in range(words.shape[1]):
        for place, number in enumerate(AWQ_ORDER):
            output = 8 * column + number
            integers, zero = ((t[:, column] >> 4 * place) & 15 for t in (words, zeros))
            assert torch.equal(codes["weight"][output], (integers - 8).to(torch.int8))
            assert torch.equal(codes["offset"][:, output], (8 - zero).bfloat16())
    assert len({*codes["offset"].flatten().tolist()}) > 2


def test_what_is_decoded(tmp_path: Path) -> None:
    source = DATA / "gptqmodel-act-order"
    done = run("convert", source, tmp_path / "out")
    assert done.code == 0 and "are decoded: " in done.err and "act-order" in done.err
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.recipe["name"] == "w8a8"
    assert {e.scheme for n, e in manifest.linears.items() if n != "lm_head"} == {W8A8()}
    assert {e.codes for e in manifest.linears.values()} == {"chosen"}
    assert run("verify", tmp_path / "out", "--against", source).code == 0


def decoded_source(tmp_path: Path, data: dict[str, Any], group: int, zero_points: bool) -> Path:
    """The floats that packed weights stand for, as a source of bfloat16."""
    weights = tiny_models.tensors(data)
    choose = asymmetric_integers if zero_points else grouped_integers
    for name in [n for n in weights if "_proj" in n]:
        integers, scales, *zeros = choose(weights[name], group)
        zero = zeros[0].repeat_interleave(group, 1) if zeros else 8
        spread = scales.float().repeat_interleave(group, 1)
        weights[name] = ((integers - zero) * spread).bfloat16()
    return tiny_models.write(tmp_path / "floats", data, weights)


@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("recipe", ["w8a8", "bf16", "w8a16", "w4a16-plain"])
def test_a_recipe_makes_of_it_what_it_makes_of_the_floats(
    recipe: str, format: str, zero_points: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also w4a16 with other groups: nothing is taken then."""
    source = write_packed(
        tmp_path / "source", GROUPS, format=format, group=64, zero_points=zero_points
    )
    expected = decoded_source(tmp_path, GROUPS, 64, zero_points)
    convert_checkpoint(expected, tmp_path / "expected", recipe)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    manifest = convert_checkpoint(source, tmp_path / "out", recipe)
    assert finished_weights(tmp_path / "out") == finished_weights(tmp_path / "expected")
    assert {e.codes for e in manifest.linears.values()} == {"chosen"}
    assert run("verify", tmp_path / "out", "--against", source).code == 0


def test_a_recipe_that_takes(tmp_path: Path) -> None:
    source = write_packed(tmp_path / "source", GROUPS, group=128, floats=[DOWN])
    manifest = convert_checkpoint(source, tmp_path / "out", "w4a16-plain")
    codes = {name: entry.codes for name, entry in manifest.linears.items()}
    assert {name for name, said in codes.items() if said == "chosen"} == {DOWN, "lm_head"}
    assert manifest.linears[DOWN].scheme == W4A16(128)


def test_a_recipe_without_zero_points_chooses_others(tmp_path: Path) -> None:
    """And one with them takes what is there, in groups of the same size."""
    source = write_packed(tmp_path / "source", GROUPS, format="awq", group=128, zero_points=True)
    recipes = {"chosen": w4a16_recipe(128), "taken": w4a16_recipe(128, zero_points=True)}
    for codes, recipe in recipes.items():
        out = tmp_path / codes
        manifest = convert_checkpoint(source, out, recipe)
        assert manifest.linears[DOWN].codes == codes
        assert run("verify", out, "--against", source).code == 0
    taken, chosen = (Manifest.read(tmp_path / n).linears[DOWN].sqnr_db for n in ("taken", "chosen"))
    assert taken is not None and chosen is not None and taken > chosen + 25


def test_a_recipe_with_transforms_takes_nothing(tmp_path: Path) -> None:
    """Weights are others then. Nothing makes floats of what int8 sources hold."""
    recipe = w4a16_recipe(32)
    transformed = Recipe(recipe.name, "", recipe.rules, recipe.verbatim, ("cle",))
    with open_source(str(write_packed(tmp_path / "gptq"))) as source:
        for chosen, codes in ((recipe, "taken"), (transformed, "chosen")):
            plan = make_plan(source.config, source.slots, chosen, quantization=source.quantization)
            assert {i.encoding.codes for i in plan.items if "qkv" in i.name} == {codes}
    w8a8 = Recipe("eight", "", Recipe.load("w8a8").rules, {}, ("cle",))
    done = run("convert", write_ascendv1(tmp_path / "int8"), tmp_path / "out", "--recipe", "bf16")
    done.one_line_error("gives bf16 to")
    with (
        open_source(str(tmp_path / "int8")) as source,
        pytest.raises(RecipeError, match="eight transforms the weights of model.layers.0"),
    ):
        make_plan(source.config, source.slots, w8a8, quantization=source.quantization)


# The machinery of every conversion.


@pytest.mark.parametrize(
    ("format", "zero_points"), [("gptq", False), ("awq", False), ("gptq", True), ("awq", True)]
)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_any_division(
    format: str, zero_points: bool, group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both layouts of w4a16: pieces are of outputs in one, of inputs in the other."""
    source = write_packed(
        tmp_path / "source", GROUPS, format=format, group=group, zero_points=zero_points
    )
    convert_checkpoint(source, tmp_path / "first", options=ConvertOptions(threads=1))
    assert_taken(source, tmp_path / "first", group, zero_points)
    layouts = {e.layout.format for e in Manifest.read(tmp_path / "first").linears.values()}
    assert layouts == ({"nd"} if group == 32 else {"nz", "nd"})  # the head is plain
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4000)
    for number, path in enumerate(["0", *runnable_paths()][:2]):
        name = "QWEN3_ASCEND_NATIVE" if path == "0" else "QWEN3_ASCEND_CPU"
        monkeypatch.setenv(name, path)
        out = tmp_path / f"out{number}"
        convert_checkpoint(source, out, options=ConvertOptions(threads=number + 1))
        assert contents(out) == contents(tmp_path / "first")
        monkeypatch.delenv(name)


def test_the_figure_is_that_of_the_rounded_scales(tmp_path: Path) -> None:
    source = write_packed(tmp_path / "source", GROUPS, group=64)
    manifest = convert_checkpoint(source, tmp_path / "out")
    weights, found = tiny_models.tensors(GROUPS), floats(tmp_path / "out")
    integers, scales = grouped_integers(weights[f"{DOWN}.weight"], 64)
    exact = (integers - 8).double() * scales.double().repeat_interleave(64, 1)
    noise = (found[DOWN].double() - exact).square().sum()
    figure = 10 * math.log10(float(exact.square().sum() / noise))
    assert manifest.linears[DOWN].sqnr_db == pytest.approx(figure, abs=0.01) and figure > 50


def test_what_is_said(tmp_path: Path) -> None:
    source, out = write_packed(tmp_path / "source"), tmp_path / "out"
    plan = run("convert", source, out, "--dry-run")
    assert plan.code == 0 and "w4a16 (group 32), taken" in plan.out and not out.exists()
    done = run("convert", source, out)
    assert "keep the codes of the source" in done.out and "rounded to bfloat16: mean" in done.out
    shown = run("inspect", out).out
    assert "quantized already (gptq), recipe as-source" in shown and "taken, 5" in shown
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    done = run("convert", source, out)
    assert done.code == 0 and "nothing to do" in done.err


@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("group", [32, 128])
def test_an_export_comes_back(group: int, zero_points: bool, tmp_path: Path) -> None:
    """The weight files are those of the checkpoint that was exported, byte for byte."""
    recipe = w4a16_recipe(group, zero_points)
    convert_checkpoint(tiny_models.write(tmp_path / "source", GROUPS), tmp_path / "made", recipe)
    export_checkpoint(tmp_path / "made", tmp_path / "exported", "compressed-tensors")
    convert_checkpoint(tmp_path / "exported", tmp_path / "back")
    assert finished_weights(tmp_path / "back") == finished_weights(tmp_path / "made")
    assert_taken(tmp_path / "exported", tmp_path / "back", group, zero_points)


def test_an_integer_that_differs_is_named(tmp_path: Path) -> None:
    source = write_packed(tmp_path / "source", zero_points=True)
    convert_checkpoint(source, tmp_path / "out")
    for suffix in ("qweight", "scales", "qzeros"):
        weights = source_weights(source)
        weights[f"{UP}.{suffix}"][1, 0] *= 2
        other = write_packed(tmp_path / suffix, zero_points=True)
        save_file(weights, other / "model.safetensors")
        done = run("verify", tmp_path / "out", "--against", other)
        done.one_line_error("linear model.layers.1.mlp.gate_up_proj", "codes are not the source's")


def test_from_a_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_model(REPO, DATA / "gptqmodel")
    talk_to(hub, tmp_path / "cache", monkeypatch)
    convert_checkpoint(REPO, tmp_path / "out", options=ConvertOptions(low_disk=True))
    convert_checkpoint(DATA / "gptqmodel", tmp_path / "local")
    assert finished_weights(tmp_path / "out") == finished_weights(tmp_path / "local")


def test_an_interrupted_conversion(tmp_path: Path) -> None:
    source, out = write_packed(tmp_path / "source"), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen3_ascend.convert.pipeline.Conversion.release", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, out, options=ConvertOptions(threads=1))
    assert (out / ".partial").exists()
    convert_checkpoint(source, out, options=ConvertOptions(threads=1))
    convert_checkpoint(source, tmp_path / "at once", options=ConvertOptions(threads=1))
    assert contents(out) == contents(tmp_path / "at once")


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


# What cannot be right.

SECTIONS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "three bits": ("gptq", {"bits": 3}, ["bits"]),
    "no group": ("gptq", {"group_size": None}, ["group_size"]),
    "a group of nothing": ("gptq", {"group_size": 0}, ["group_size is 0"]),
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, ["checkpoint_format", "marlin"]),
    "settings of their own": (
        "gptq", {"dynamic": {"-:.*up_proj": {}, "+:.*down.*": {"bits": 8}}}, ["'+:.*down.*'"]
    ),
    "another layout": ("awq", {"version": "gemv"}, ["version", "gemv"]),
    "eight bits": ("awq", {"bits": 8}, ["bits"]),
}  # fmt: skip


def refused(source: Path, *mentions: str) -> None:
    for options in ((), ("--dry-run",)):
        done = run("convert", source, source.parent / "out", *options)
        done.one_line_error(*mentions)
        assert not (source.parent / "out").exists()


@pytest.mark.parametrize(("format", "change", "mentions"), SECTIONS.values(), ids=SECTIONS)
def test_sections(format: str, change: dict[str, Any], mentions: list[str], tmp_path: Path) -> None:
    source = write_packed(tmp_path / "source", format=format, said=change)
    refused(source, "config.json: quantization_config", "original model", *mentions)


@pytest.mark.parametrize(
    ("weights", "mentions"),
    [
        ({"num_bits": 3, "strategy": "group", "group_size": 32}, ["num_bits 3"]),
        ({"num_bits": 4, "strategy": "tensor"}, ["strategy 'tensor'"]),
        ({"num_bits": 4, "strategy": "group", "group_size": None}, ["group_size None"]),
        ({"num_bits": 4, "type": "float", "strategy": "group"}, ["type is 'float'"]),
    ],
)
def test_sections_of_compressed_tensors(
    weights: dict[str, Any], mentions: list[str], tmp_path: Path
) -> None:
    said = section(weights, format="pack-quantized")
    said["config_groups"]["group_0"]["format"] = "pack-quantized"
    source = write_compressed_tensors(tmp_path / "source", said=said)
    refused(source, "config.json: quantization_config: group_0", *mentions)


HEADERS: dict[str, tuple[dict[str, Tensor | None], list[str]]] = {
    "no scales": ({f"{UP}.scales": None}, [f"no tensor {UP}.scales", "gptq of 4 bits"]),
    "other groups": ({f"{UP}.scales": torch.ones(1, 96).half()}, ["[1, 96]", "[2, 96]"]),
    "other words": ({f"{UP}.qweight": torch.ones(96, 8).int()}, ["[96, 8]", "[8, 96]"]),
    "bytes": ({f"{UP}.qweight": torch.ones(8, 96).to(torch.int8)}, ["I8", "not I32"]),
    "other zero points": ({f"{UP}.qzeros": torch.ones(2, 96).int()}, ["[2, 96]", "[2, 12]"]),
    "an order of fewer": ({f"{UP}.g_idx": torch.zeros(32).int()}, ["[32]", "[64]"]),
    "one linear of three": (
        {**{f"{UP}.{s}": None for s in ("qweight", "qzeros", "scales", "g_idx")},
         f"{UP}.weight": torch.ones(96, 64)},
        ["gate_up_proj", "gate_proj: gptq of 4 bits", "up_proj: floats"],
    ),
}  # fmt: skip


def rewritten(source: Path, changes: Mapping[str, Tensor | None]) -> Path:
    found = {**source_weights(source), **changes}
    save_file({n: t for n, t in found.items() if t is not None}, source / "model.safetensors")
    return source


@pytest.mark.parametrize(("changes", "mentions"), HEADERS.values(), ids=HEADERS)
def test_headers(changes: dict[str, Tensor | None], mentions: list[str], tmp_path: Path) -> None:
    refused(rewritten(write_packed(tmp_path / "source"), changes), *mentions)


def test_an_order_that_is_missing(tmp_path: Path) -> None:
    source = write_packed(tmp_path / "source", said={"desc_act": True})
    refused(rewritten(source, {f"{UP}.g_idx": None}), f"no tensor {UP}.g_idx", "order")


def test_shapes_that_no_kernel_takes(tmp_path: Path) -> None:
    """Groups as long as a row: said by name, and any other recipe decodes them."""
    data = tiny_models.config(num_attention_heads=2)
    source = write_packed(tmp_path / "source", data, group=32, said={"group_size": 64})
    weights = load_file(source / "model.safetensors")
    for name in [n for n in weights if n.endswith((".scales", ".qzeros"))]:
        weights[name] = weights[name][: -(-weights[name].shape[0] // 2)].contiguous()
    for name in [n for n in weights if n.endswith(".g_idx")]:
        weights[name] = weights[name] // 2
    save_file(weights, source / "model.safetensors")
    refused(source, "recipe as-source: model.layers.0", "npu_weight_quant_batchmatmul")
    assert run("convert", source, tmp_path / "eight", "-q", "--recipe", "w8a8").code == 0


VALUES: dict[str, tuple[str, Callable[[Tensor], Any], list[str]]] = {
    "zero points": (f"{UP}.qzeros", lambda t: t[1, 2].fill_(0x77777776),
                    ["holds 0x77777776 at [1, 2]", "all 8"]),
    "zero points of version 2": (f"{UP}.qzeros", lambda t: t.fill_(-0x77777778),
                                 ["holds 0x88888888 at [0, 0]", "version"]),
    "an order": (f"{UP}.g_idx", lambda t: t[3].fill_(1), ["holds 1 at [3]", "groups of 32"]),
    "a scale of zero": (f"{UP}.scales", lambda t: t[1, 5].fill_(0.0), ["holds 0.0 at [1, 5]"]),
    "no number": (f"{UP}.scales", lambda t: t[1, 5].fill_(float("nan")), ["holds nan at [1, 5]"]),
    "infinity": (f"{UP}.scales", lambda t: t[1, 5].fill_(float("inf")), ["holds inf at [1, 5]"]),
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["w8a8", None])
@pytest.mark.parametrize(("name", "change", "mentions"), VALUES.values(), ids=VALUES)
def test_values(
    name: str, change: Callable[[Tensor], Any], mentions: list[str], recipe: str | None,
    tmp_path: Path,
) -> None:  # fmt: skip
    source = write_packed(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    change(weights[name])
    rewritten(source, weights)
    options = () if recipe is None else ("--recipe", recipe)
    done = run("convert", source, tmp_path / "out", "-q", *options)
    done.one_line_error(f"tensor {name}", *mentions)
    assert not (tmp_path / "out").exists()


def test_a_negative_scale_is_taken(tmp_path: Path) -> None:
    """auto-round writes them: the weight of the largest magnitude is -8, whatever its sign."""
    source = write_packed(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights[f"{UP}.scales"][0] *= -1
    rewritten(source, weights)
    convert_checkpoint(source, tmp_path / "out")
    assert_taken(source, tmp_path / "out", 32)
