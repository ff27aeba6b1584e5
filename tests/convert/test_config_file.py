"""config.json: every key is honoured, ignored or refused as transformers decides."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from support import tiny_models
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from qwen3_ascend.checkpoint.config import ExpertsConfig
from qwen3_ascend.convert.source.config_file import IDLE_KEYS, NEUTRAL, READ_KEYS, read_config
from qwen3_ascend.errors import ConfigError
from qwen3_ascend.runtime.backends.rotary import rotary_tables


def read(**changes: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []
    return read_config(tiny_models.config(**changes), "config.json", notes.append), notes


def test_every_key_of_transformers_is_known() -> None:
    known = READ_KEYS | IDLE_KEYS | NEUTRAL.keys()
    assert set(transformers.Qwen3Config().to_dict()) <= known


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
OTHER = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}

ROPES: dict[str, dict[str, Any]] = {
    "old spelling": {"rope_scaling": YARN},
    "new spelling": {"rope_parameters": {**YARN, "rope_theta": 10000.0}},
    "both, equal": {"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 10000.0}},
    "both, different": {"rope_scaling": YARN, "rope_parameters": {**OTHER, "rope_theta": 1e4}},
    "both, the old one empty": {"rope_scaling": {}, "rope_parameters": OTHER},
    "both, the old one null": {"rope_scaling": None, "rope_parameters": OTHER},
    "theta twice": {
        "rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "theta beside": {"rope_theta": 1e6, "rope_scaling": YARN},
    "two types": {"rope_scaling": {**YARN, "type": "linear"}},
    "old type": {"rope_scaling": {"type": "yarn", "factor": 4.0,
                                  "original_max_position_embeddings": 64}},
    "keys that a default does not use": {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
    "attention_factor": {"rope_scaling": {**YARN, "attention_factor": 0.7}},
    "mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
}  # fmt: skip


@pytest.mark.parametrize("changes", ROPES.values(), ids=ROPES)
def test_rope_is_that_of_transformers(changes: dict[str, Any]) -> None:
    config, _ = read(**changes)
    theirs = transformers.Qwen3Config.from_dict(copy.deepcopy(tiny_models.config(**changes)))
    rotary = Qwen3RotaryEmbedding(theirs)
    length = 200
    positions = torch.arange(length)[None]
    cosine, sine = rotary(torch.zeros(1, length, 1), positions)
    ours = [table[:length].float() for table in rotary_tables(config)]
    half = ours[0].shape[-1]
    assert torch.allclose(ours[0], cosine[0, :, :half].float(), atol=2e-5)
    assert torch.allclose(ours[1], sine[0, :, :half].float(), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "mentions"),
    [
        ("both, different", ["rope_scaling and rope_parameters differ", "rope_scaling counts"]),
        ("theta twice", ["rope_theta", "1000000.0", "500000.0"]),
        ("two types", ["'linear'", "'yarn'", "rope_type counts"]),
        ("keys that a default does not use", ["does not use factor"]),
    ],
)
def test_contradictions_are_told(name: str, mentions: list[str]) -> None:
    _, notes = read(**ROPES[name])
    assert len(notes) == 1 and all(mention in notes[0] for mention in mentions), notes


@pytest.mark.parametrize("name", ["old spelling", "new spelling", "both, equal", "theta beside"])
def test_what_agrees_is_not_worth_a_word(name: str) -> None:
    assert read(**ROPES[name])[1] == []


def test_attn_factor_counts_as_in_vllm() -> None:
    """DeepSeek-R1-0528-Qwen3-8B undoes the factor of the paper by it."""
    factor = 0.8782488562869419
    config, notes = read(rope_scaling={**YARN, "attn_factor": factor})
    assert config.rope.attention_factor == pytest.approx(1.0, abs=1e-12)
    assert any("attn_factor" in note for note in notes)
    with pytest.raises(ConfigError, match="attention_factor 1.5 and attn_factor"):
        read(rope_scaling={**YARN, "attn_factor": factor, "attention_factor": 1.5})


@pytest.mark.parametrize(
    "rope",
    [
        {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}},
        {**YARN, "mrope_section": [16, 8, 8]},
        {**YARN, "low_freq_factor": 1.0},
        {**YARN, "extrapolation_factor": 0.5},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
    ids=str,
)
def test_rope_keys_that_nobody_reads_are_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(rope_parameters=rope)
    assert any(key in str(caught.value) for key in rope)


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("changes", "works"),
    [
        ({}, True),
        ({"use_sliding_window": True, "sliding_window": 8}, True),  # it begins at layer 28
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, True),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, False),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, False),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, True),
        ({"layer_types": [FULL, FULL]}, True),
        ({"layer_types": [FULL, SLIDING], "use_sliding_window": True, "sliding_window": 8}, False),
    ],
    ids=str,
)
def test_windows_are_read_as_in_transformers(changes: dict[str, Any], works: bool) -> None:
    data = tiny_models.config(**changes)
    theirs = transformers.Qwen3Config.from_dict(copy.deepcopy(data))
    slides = SLIDING in (theirs.layer_types or ())
    assert bool(slides) is not works
    if works:
        read(**changes)
    else:
        with pytest.raises(ConfigError, match="sliding window"):
            read(**changes)


def test_layer_types_count_over_the_flags() -> None:
    changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    _, notes = read(**changes, layer_types=[FULL, FULL])
    assert len(notes) == 1 and "layer_types" in notes[0] and "use_sliding_window" in notes[0]
    with pytest.raises(ConfigError, match=r"layer_types.*use_sliding_window is off"):
        read(layer_types=[FULL, SLIDING])
    with pytest.raises(ConfigError, match=r"3 entries, but num_hidden_layers is 2"):
        read(layer_types=[FULL] * 3)
    with pytest.raises(ConfigError, match="'linear_attention'"):
        read(layer_types=[FULL, "linear_attention"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_causal", False),
        ("use_bidirectional_attention", True),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.5),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.2),
        ("mlp_bias", True),
        ("use_qk_norm", False),
        ("partial_rotary_factor", 0.5),
        ("num_experts", 8),
        ("num_nextn_predict_layers", 1),
        ("transformers_weights", "other.safetensors"),
        ("per_layer_config", {"0": {"head_dim": 64}}),
        ("vision_config", {"depth": 2}),
        ("is_encoder_decoder", True),
        ("attention_sink_size", 4),
    ],
)
def test_keys_that_change_the_model_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        read(**{key: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"is_causal": True},
        {"unsloth_version": "2025.1"},
        {"torch_dtype": "float32", "use_cache": False},
        {"attn_logit_softcapping": None, "mlp_bias": False, "num_experts": 0},
        {"architectures": None},
        {"architectures": []},
        {"architectures": ["Qwen3Model"]},
        {"quantization_config": None},
        {"quantization_config": {}},
    ],
    ids=str,
)
def test_keys_that_change_nothing_pass(changes: dict[str, Any]) -> None:
    assert read(**changes) == read()


def test_other_keys_are_named() -> None:
    _, notes = read(my_note="hello", release="a", auto_map={"AutoModel": "modeling_x.X"})
    assert "auto_map" in notes[0] and "my_note, release" in notes[1]


MIXTURES: dict[str, tuple[dict[str, Any], ExpertsConfig]] = {
    "of the Hub": ({}, ExpertsConfig(4, 2, 48, True)),
    "as transformers 5 saves it": (
        {"num_experts": None, "num_local_experts": 6, "norm_topk_prob": None,
         "mlp_only_layers": None, "decoder_sparse_step": None},
        ExpertsConfig(6, 2, 48, False),
    ),
    "both names, alike": ({"num_local_experts": 4}, ExpertsConfig(4, 2, 48, True)),
    "every second layer": (
        {"num_hidden_layers": 5, "decoder_sparse_step": 2}, ExpertsConfig(4, 2, 48, True, (0, 2, 4))
    ),
    "named layers": (
        {"num_hidden_layers": 4, "mlp_only_layers": [3, 1]}, ExpertsConfig(4, 2, 48, True, (1, 3))
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXTURES)
def test_mixtures_of_experts(case: str) -> None:
    changes, expected = MIXTURES[case]
    notes: list[str] = []
    assert read_config(tiny_models.mixture(**changes), note=notes.append).experts == expected
    assert notes == []


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"num_local_experts": 5}, "num_local_experts 5 and num_experts 4"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, but num_experts only 4"),
        ({"mlp_only_layers": [0, 1]}, "no layer with experts"),
        ({"decoder_sparse_step": 3}, "no layer with experts"),
        ({"mlp_only_layers": ["0"]}, "numbers of layers"),
        ({"num_experts": 0}, "positive integer"),
        ({"norm_topk_prob": 1}, "true or false"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
    ],
    ids=str,
)
def test_what_mixtures_cannot_be(changes: dict[str, Any], mention: str) -> None:
    with pytest.raises(ConfigError, match=mention):
        read_config(tiny_models.mixture(**changes))


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"architectures": ["Qwen3ForSequenceClassification"]}, ["classifier"]),
        ({"architectures": ["Qwen3ForTokenClassification"]}, ["token classifier"]),
        ({"architectures": ["Qwen3ForConditionalGeneration"]}, ["multimodal"]),
        ({"architectures": ["LlavaQwen3ForCausalLM"]}, ["LlavaQwen3ForCausalLM"]),
        ({"architectures": "Qwen3ForCausalLM"}, ["list"]),
        ({"model_type": "qwen3_vl"}, ["vision-language"]),
        ({"model_type": "qwen3_next"}, ["linear attention", "mixtures of experts"]),
        ({"model_type": "qwen3_vl_moe"}, ["vision-language"]),
        ({"model_type": "qwen3_omni_moe"}, ["multimodal"]),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, ["Qwen3MoeForCausalLM"]),
        ({"quantization": {"bits": 4, "group_size": 64}}, ["quantization", "MLX, 4 bits"]),
        ({"quantization_config": {"bits": 4, "group_size": 64}}, ["MLX, 4 bits"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq", "remove quantization_config"]),
        ({"quantize": "w8a8_dynamic"}, ["ModelSlim", "w8a8_dynamic"]),
        ({"compression_config": {"format": "pack-quantized"}}, ["pack-quantized"]),
    ],
    ids=str,
)
def test_what_it_is_instead(changes: dict[str, Any], mentions: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert all(mention in str(caught.value) for mention in mentions), str(caught.value)
