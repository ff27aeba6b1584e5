"""The plan: made of headers alone, it says what will happen and refuses what cannot."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny_models
from support.command_line import run
from support.recipe_notes import recipe_notes

from qwen3_ascend import Recipe, convert_checkpoint, recipes
from qwen3_ascend.checkpoint.architecture import LinearSpec, model_spec
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.schemes import W4A16, W8A8, W8A16, Scheme, w4a16
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.convert.plan import Plan, make_plan
from qwen3_ascend.convert.source.config_file import read_config
from qwen3_ascend.errors import ConfigError, RecipeError, SourceError, UserError
from qwen3_ascend.files.json_file import plain, typed
from qwen3_ascend.files.safetensors import TensorSlot


def slots(data: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSlot]:
    """Headers of a model, without a byte of it."""
    found: dict[str, TensorSlot] = {}
    position = 0
    for name, shape in tiny_models.shapes(data).items():
        stop = position + torch.Size(shape).numel() * dtype.itemsize
        found[name] = TensorSlot(dtype, shape, position, stop)
        position = stop
    return found


def plan(data: dict[str, Any], recipe: str | Recipe = "w8a8", **options: Any) -> Plan:
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    return make_plan(read_config(data), slots(data), chosen, **options)


def rules(*lines: tuple[str, str | Scheme]) -> Recipe:
    said = ((m, s if isinstance(s, str) else json.dumps(s.to_json())) for m, s in lines)
    text = [f'{{match: "{match}", scheme: {scheme}}}' for match, scheme in said]
    return Recipe.parse(f"{{schema: 1, name: test, rules: [{', '.join(text)}]}}", "test")


QWEN3_8B = tiny_models.config(
    hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
)  # fmt: skip
QWEN3_0_6B = QWEN3_8B | tiny_models.config(
    hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
QWEN3_30B_A3B = tiny_models.mixture(
    hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
    num_experts_per_tok=8, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
    head_dim=128, vocab_size=151936, max_position_embeddings=40960,
)  # fmt: skip


@pytest.mark.parametrize(
    ("data", "parameters", "expected"),
    [
        (QWEN3_8B, 8_190_735_360, {"bf16": 16.0, "w8a8": 9.22, "w8a8-plain": 9.22}),
        (QWEN3_0_6B, 596_049_920, {"bf16": 16.0, "w8a8": 14.28, "w8a8-plain": 10.11}),
    ],
    ids=["8B", "0.6B"],
)
def test_published_models(
    data: dict[str, Any], parameters: int, expected: dict[str, float]
) -> None:
    """The parameter counts are those of the models on the Hub. Rotated, the tied
    head of 0.6B is read and stored as well."""
    for recipe, bits in expected.items():
        made = plan(data, recipe)
        assert made.parameters == parameters
        assert made.bits_per_weight == pytest.approx(bits, abs=0.005)
        is_untied = data["tie_word_embeddings"] and not made.config.tie_word_embeddings
        assert made.source_bytes == 2 * (parameters + is_untied * 151936 * 1024)
        assert sum(len(shard.tensors) for shard in made.weight_files) == sum(
            len(item.forms) for item in made.items
        )


@pytest.mark.parametrize("recipe", recipes.names())
def test_bits_that_a_recipe_states(recipe: str) -> None:
    """Of the linears of the layers in the shapes of 0.6B, or of 30B-A3B, scales included."""
    items = plan(QWEN3_30B_A3B if recipe.startswith("moe-") else QWEN3_0_6B, recipe).items
    linears = [i for i in items if ".layers." in i.name and isinstance(i.spec, LinearSpec)]
    bits = 8 * sum(item.nbytes for item in linears)
    weights = sum(math.prod(item.shape) for item in linears)
    assert recipe_notes(recipe)["Bits"] == f"{bits / weights:.3f}".rstrip("0").rstrip(".")


def test_every_tensor_is_read_once_and_written_once() -> None:
    data = tiny_models.config(attention_bias=False)
    made = plan(data)
    read = [name for item in made.items for name in item.reads]
    assert sorted(read) == sorted(tiny_models.shapes(data))
    written = [name for shard in made.weight_files for name in shard.tensors]
    assert len(set(written)) == len(written)
    names = [spec.name for spec in model_spec(read_config(data))]
    assert [item.name for item in made.items] == names


def test_files_are_cut_at_the_size_asked_for() -> None:
    made = plan(tiny_models.config(), "bf16", max_file_bytes=30_000)
    assert len(made.weight_files) > 3
    for shard in made.weight_files:
        sizes = [form.nbytes for form in shard.tensors.values()]
        assert sum(sizes) <= 30_000 or len(sizes) == 1
    flat = [name for shard in made.weight_files for name in shard.tensors]
    assert flat == [name for item in made.items for name in item.forms]
    assert made.weight_files[0].file == f"ascend-00001-of-{len(made.weight_files):05d}.safetensors"


def test_refusals_name_the_tensor() -> None:
    data = tiny_models.config()
    config, recipe, good = read_config(data), Recipe.load("bf16"), slots(data)
    name = "model.layers.1.self_attn.k_norm.weight"
    with pytest.raises(SourceError, match=f"no tensor {name}"):
        make_plan(config, {key: slot for key, slot in good.items() if key != name}, recipe)
    with pytest.raises(SourceError, match=rf"{name} is \[33\].*\[32\]"):
        make_plan(config, good | {name: replace(good[name], shape=(33,))}, recipe)
    with pytest.raises(SourceError, match="model.layers.9.mlp.up_proj.weight"):
        make_plan(config, good | {"model.layers.9.mlp.up_proj.weight": good[name]}, recipe)
    with pytest.raises(SourceError, match=f"{name} is F8_E4M3"):
        make_plan(config, good | {name: replace(good[name], dtype=torch.float8_e4m3fn)}, recipe)


def test_what_may_be_left_out_is_said() -> None:
    data = tiny_models.config(tie_word_embeddings=True)
    extra = {"lm_head.weight": TensorSlot(torch.bfloat16, (320, 64), 0, 0)}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = TensorSlot(torch.float32, (16,), 0, 0)
    made = make_plan(read_config(data), slots(data) | extra, Recipe.load("w8a8"))
    assert set(made.ignored) == set(extra) and all(made.ignored.values())


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (rules(("*.k_proj", "bf16"), ("lm_head", "bf16"), ("*", "w8a8")), {}, "one fused linear"),
        (rules(("*.up_proj", "w8a8"), ("*", "bf16")), {}, "gate_proj: bf16.*up_proj: w8a8"),
        (rules(("*.experts.*", "w8a8"), ("*", "bf16")), {}, "rule 1 .*experts.* decides nothing"),
        (rules(("*", "bf16"), ("*.mlp.*", "w8a8")), {}, "rule 2 .* decides nothing"),
        (rules(("*", "bf16"), ("*", "bf16")), {}, "rule 2 .* decides nothing"),
        (rules(("*.mlp.*", "w8a8"),), {}, "no rule matches"),
        (rules(("*", "w8a8")), {"intermediate_size": 65536}, r"it is \[64, 65536\].*than 65535"),
        (rules(("*", "w8a16")), {"intermediate_size": 65536},
         r"down_proj: it is \[64, 65536\], but npu_weight_quant_batchmatmul refuses .*than 65535"),
        (rules(("*", W4A16())), {"hidden_size": 128},
         r"qkv_proj: .*\[\d+, 128\].*more inputs than a group of 128 has; give it a smaller"),
        (rules(("lm_head", W4A16(32)), ("*", "bf16")), {"vocab_size": 321},
         r"lm_head: .*321 is no multiple of eight; give it the scheme w8a16"),
    ],
)  # fmt: skip
def test_recipes_that_do_not_fit(recipe: Recipe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(tiny_models.config(**changes), recipe)


@pytest.mark.parametrize("vocabulary", [65535, 65536, 151936])
@pytest.mark.parametrize("tied", [False, True])
def test_an_output_projection_of_any_size_may_be_quantized(vocabulary: int, tied: bool) -> None:
    data = tiny_models.config(vocab_size=vocabulary, tie_word_embeddings=tied)
    made, plain = plan(data, "w8a8-head"), plan(data, "w8a8-plain")
    head = made.items[-1]
    assert (head.name, head.scheme) == ("lm_head", W8A8())
    assert head.reads == ("model.embed_tokens.weight" if tied else "lm_head.weight",)
    assert not made.config.tie_word_embeddings and plain.config.tie_word_embeddings == tied
    assert made.parameters == plain.parameters
    padded = -(-vocabulary // 32) * 32
    assert made.output_bytes - plain.output_bytes == padded * 64 + vocabulary * (
        4 - (0 if tied else 128)
    )


@pytest.mark.parametrize(
    ("group", "hidden", "inner", "expected"),
    [
        (128, 256, 768, (w4a16.NZ, w4a16.NZ)),
        (64, 192, 320, (w4a16.NZ, w4a16.NZ)),
        (32, 256, 768, (w4a16.ROWS, w4a16.ROWS)),  # the kernel takes no such group in NZ
        (128, 256, 832, (w4a16.NZ, w4a16.ROWS)),  # down_proj has six and a half groups
        (64, 200, 768, (w4a16.ROWS, w4a16.ROWS)),  # its outputs fill no strip of 64
    ],
)
def test_the_layout_of_int4_depends_on_group_and_shape(
    group: int, hidden: int, inner: int, expected: tuple[Layout, Layout]
) -> None:
    """Of gate_up, with `hidden` inputs, and of down, with as many outputs."""
    data = tiny_models.config(
        hidden_size=hidden, intermediate_size=inner, head_dim=64, num_attention_heads=4
    )
    items = {item.name: item for item in plan(data, rules(("*", W4A16(group)))).items}
    layer = "model.layers.1.mlp"
    found = (items[f"{layer}.gate_up_proj"].layout, items[f"{layer}.down_proj"].layout)
    assert found == expected
    down = items[f"{layer}.down_proj"].stored
    assert down["scale"].shape == (-(-inner // group), hidden)
    assert down["weight"].dtype == torch.int32
    assert down["weight"].nbytes == inner * hidden // 2


@pytest.mark.parametrize("scheme", [W8A16(), W4A16(32)], ids=str)
def test_a_head_of_codes_is_laid_out_like_any_other_weight(scheme: Scheme) -> None:
    made = plan(tiny_models.config(), rules(("lm_head", scheme), ("*", "bf16")))
    assert made.items[-1].layout != ND and made.items[-1].scheme == scheme


def test_dry_run_writes_nothing_and_tells_the_truth(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    done = run("convert", source, tmp_path / "out", "--dry-run", "--json")
    assert done.code == 0 and not (tmp_path / "out").exists()
    said = json.loads(done.out)
    convert_checkpoint(source, tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out")
    assert said["files"] == list(manifest.weight_files)
    assert said["output_bytes"] == sum(tensor.nbytes for tensor in manifest.stored().values())
    linears = {item["name"]: item for item in said["items"] if item["name"] in manifest.linears}
    assert {n: (i["scheme"], i["layout"]) for n, i in linears.items()} == {
        n: (e.scheme.to_json(), plain(e.layout)) for n, e in manifest.linears.items()
    }
    assert {item["name"] for item in said["items"]} == {*manifest.linears, *manifest.tensors}
    text = run("convert", source, tmp_path / "other", "--dry-run")
    assert text.code == 0 and "model.layers.*.self_attn.qkv_proj (x2)" in text.out
    assert not (tmp_path / "other").exists()
    run("convert", source, tmp_path / "other", "--json").one_line_error("--dry-run")


def test_dry_run_obeys_the_memory_limit(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    limit = ("--dry-run", "--max-memory", "100MiB", "--threads", "7")
    said = json.loads(run("convert", source, tmp_path / "out", *limit, "--json").out)
    assert said["working_bytes"] <= 100 << 20 and said["threads"] < 7
    few = ("--dry-run", "--max-memory", "1MiB")
    run("convert", source, tmp_path / "out", *few).one_line_error("bytes of memory are too little")


@pytest.mark.parametrize(
    ("gigabytes", "cards"), [(25, (1, 1)), (26, (2, 1)), (51, (2, 1)), (52, (3, 2)), (221, (9, 5))]
)
def test_cards_that_hold_the_weights(gigabytes: int, cards: tuple[int, int]) -> None:
    """Of 32 and of 64 GB, a fifth of which is left."""
    assert ASCEND_A2_A3.cards(gigabytes << 30) == {32 << 30: cards[0], 64 << 30: cards[1]}


def test_the_dry_run_tells_the_cards(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    text = run("convert", source, tmp_path / "out", "--dry-run").out
    assert "held by 1 card of 32 GB or 1 card of 64 GB, with a fifth left for the cache" in text
    said = json.loads(run("convert", source, tmp_path / "out", "--dry-run", "--json").out)
    assert said["cards"] == {"32 GB": 1, "64 GB": 1}


JUNK = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
    | st.lists(st.integers(0, 3), max_size=2) | st.dictionaries(st.text(max_size=3), st.integers())
)  # fmt: skip
KEYS = [
    *tiny_models.mixture(), "rope_parameters", "rope_scaling", "layer_types", "quantization_config",
    "sliding_window",
]  # fmt: skip
ROPE_KEYS = [
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "mscale",
    "mscale_all_dim", "attention_factor", "beta_fast", "beta_slow", "truncate",
    "partial_rotary_factor",
]  # fmt: skip


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([tiny_models.config(), tiny_models.mixture()]),
    st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=3),
)
def test_any_config_is_refused_in_words_or_read(
    made: dict[str, Any], changes: dict[str, Any]
) -> None:
    try:
        config = read_config({**made, **changes})
    except ConfigError:
        return
    assert typed(plain(config), Qwen3Config, "model") == config


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(ROPE_KEYS), JUNK, max_size=4))
def test_any_rope_is_refused_in_words_or_read(changes: dict[str, Any]) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **changes}
    try:
        config = read_config({**tiny_models.config(), "rope_parameters": rope})
    except UserError:
        return
    assert config.context_length >= config.max_position
