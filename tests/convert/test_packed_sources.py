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
from support.native_cases import runnable_paths
from support.quantized_sources import (
    DATA,
    PACKED,
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

TAKEN = ("gptqmodel", "auto-round-awq-symmetric", "llm-compressor-int4")

DECODED = {
    "gptqmodel-act-order": "act-order",
    "gptqmodel-v2": "zero points",
    "auto-round-gptq-asymmetric": "zero points",
    "auto-round-awq": "zero points",
    "llm-compressor-int4-asymmetric": "zero points",
}

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
                suffix: tensor[..., span] if suffix == "scale" else tensor[span]
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


def assert_taken(source: Path, out: Path, group: int) -> None:
    """Integers are the source's, and scales the source's in bfloat16."""
    weights, found, manifest = source_weights(source), parts(out), Manifest.read(out)
    held = [n for n in weights if n.endswith((".scales", ".weight_scale"))]
    assert held
    for name in held:
        linear = found[name.rpartition(".")[0]]
        scales = weights[name] if name.endswith(".scales") else weights[name].t()
        assert linear.scheme == W4A16(group)
        assert torch.equal(linear.tensors["scale"], scales.bfloat16())
    for entry in manifest.linears.values():
        taken = entry.scheme == W4A16(group)
        assert entry.codes == ("taken" if taken else "chosen")
        assert taken or (entry.scheme == BF16() and entry.sqnr_db is None)
    assert run("verify", out).code == 0
    done = run("verify", out, "--against", source)
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken(name: str, tmp_path: Path) -> None:
    """Each weight is its integer times its scale, which bfloat16 may have to round."""
    convert_checkpoint(DATA / name, tmp_path / "out")
    assert_taken(DATA / name, tmp_path / "out", 32)
    convert_checkpoint(DATA / name, tmp_path / "floats", "bf16")
    exact, found = floats(tmp_path / "floats"), floats(tmp_path / "out")
    rounded = {e.sqnr_db for e in Manifest.read(tmp_path / "out").linears.values()} - {None}
    assert bool(rounded) == (name == "gptqmodel")
    for linear, weight in exact.items():
        # One rounding of the scale, and one of the weight that it is held against.
        assert bool(((found[linear] - weight).abs() <= weight.abs() * 2**-7).all())
        if name != "gptqmodel":
            assert torch.equal(found[linear].bfloat16(), weight.bfloat16())
    (answer,) = load(tmp_path / "out", kv_cache_tokens=256).generate(
        [[5, 17, 3]], SamplingParams(max_new_tokens=5, ignore_eos=True)
    )
    assert len(answer.token_ids) == 5


@pytest.mark.parametrize(("name", "why"), DECODED.items())
def test_what_is_decoded(name: str, why: str, tmp_path: Path) -> None:
    done = run("convert", DATA / name, tmp_path / "out")
    assert done.code == 0 and "are decoded: " in done.err and why in done.err
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.recipe["name"] == "w8a8"
    assert {e.scheme for n, e in manifest.linears.items() if n != "lm_head"} == {W8A8()}
    assert {e.codes for e in manifest.linears.values()} == {"chosen"}
    assert run("verify", tmp_path / "out", "--against", DATA / name).code == 0


def decoded_source(tmp_path: Path, data: dict[str, Any], group: int) -> Path:
    """The floats that packed weights stand for, as a source of bfloat16."""
    weights = tiny_models.tensors(data)
    for name in [n for n in weights if "_proj" in n]:
        integers, scales = grouped_integers(weights[name], group)
        spread = scales.float().repeat_interleave(group, 1)
        weights[name] = ((integers - 8) * spread).bfloat16()
    return tiny_models.write(tmp_path / "floats", data, weights)


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("recipe", ["w8a8", "bf16", "w8a16", "w4a16-plain"])
def test_a_recipe_makes_of_it_what_it_makes_of_the_floats(
    recipe: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also w4a16 with other groups: nothing is taken then."""
    source = write_packed(tmp_path / "source", GROUPS, format=format, group=64)
    convert_checkpoint(decoded_source(tmp_path, GROUPS, 64), tmp_path / "expected", recipe)
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


def test_a_recipe_with_transforms_takes_nothing(tmp_path: Path) -> None:
    """Weights are others then. Nothing makes floats of what int8 sources hold."""
    recipe = Recipe.parse(
        "{schema: 1, name: mine, rules: [{match: lm_head, scheme: bf16}, "
        "{match: '*', scheme: {name: w4a16, group: 32}}]}", "here",
    )  # fmt: skip
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


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_any_division(
    format: str, group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both layouts of w4a16: pieces are of outputs in one, of inputs in the other."""
    source = write_packed(tmp_path / "source", GROUPS, format=format, group=group)
    convert_checkpoint(source, tmp_path / "first", options=ConvertOptions(threads=1))
    assert_taken(source, tmp_path / "first", group)
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


@pytest.mark.parametrize("group", [32, 128])
def test_an_export_comes_back(group: int, tmp_path: Path) -> None:
    """The weight files are those of the checkpoint that was exported, byte for byte."""
    recipe = Recipe.parse(
        "{schema: 1, name: mine, rules: [{match: lm_head, scheme: bf16}, "
        f"{{match: '*', scheme: {{name: w4a16, group: {group}}}}}]}}", "here",
    )  # fmt: skip
    convert_checkpoint(tiny_models.write(tmp_path / "source", GROUPS), tmp_path / "made", recipe)
    export_checkpoint(tmp_path / "made", tmp_path / "exported", "compressed-tensors")
    convert_checkpoint(tmp_path / "exported", tmp_path / "back")
    assert finished_weights(tmp_path / "back") == finished_weights(tmp_path / "made")
    assert_taken(tmp_path / "exported", tmp_path / "back", group)


def test_an_integer_that_differs_is_named(tmp_path: Path) -> None:
    source = write_packed(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "out")
    for suffix in ("qweight", "scales"):
        weights = source_weights(source)
        weights[f"{UP}.{suffix}"][1, 0] *= 2
        other = write_packed(tmp_path / suffix)
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
