"""Real vllm-ascend and real torch_npu, on a simulated device, serve a checkpoint as it lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from handover.agreement import agreement
from handover.engines import Engines, Report
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.schemes import Input

FRACTAL_NZ = 29
"""Value of aclFormat in CANN's acl_base.h."""

COPIED = (".weight", ".weight_scale", ".deq_scale", ".quant_bias")
"""How parameters are named whose bytes are the checkpoint's."""

SHARE, NEAR_TIE = 0.95, 0.25
"""Of greedy tokens in bf16 against our runtime in float32; and nats between two tokens of which
bf16 may choose either: its rounding is 2^15 times as coarse."""

UNIT = 0.125
"""Of bfloat16 for logits between 16 and 32. A token of a batch and the same token in the middle of
a text are summed up in other orders, which may move the last bit."""


def check_tokens(model: Path, report: Report, ranks: int = 1) -> None:
    """Against our runtime in bfloat16, or in float32 if that rounds at other places: vllm-ascend
    finds the scale of a token from a norm that it has rounded."""
    manifest = Manifest.read(model)
    dynamic = any(each.scheme.input is Input.INT8_PER_TOKEN for each in manifest.linears.values())
    dtype = torch.float32 if dynamic else torch.bfloat16
    nudged = dynamic and manifest.model.experts is not None
    found = agreement(model, report.answers, ranks, dtype, nudged)
    print(found)
    assert found.share >= SHARE
    assert max(found.gaps, default=0) <= (NEAR_TIE if dynamic else UNIT)
    assert found.perplexity == pytest.approx(found.own_perplexity, rel=0.01)
    if not dynamic and report.data["torch"] == torch.__version__:  # whose order of sums both take
        assert found.difference == 0


def linears(loading: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The weights of a rank's linears, with what was copied into each."""
    return {
        name: found
        for name, found in loading["parameters"].items()
        if name.endswith("_proj.weight")
    }


def check_raw_copies(report: Report) -> None:
    """No cast, no copy on the device, and each stored byte copied once into FRACTAL_NZ."""
    for loading in report.loading:
        assert loading["loader"] == "StoredLoader"
        assert loading["format_casts"] == loading["device_to_device_copies"] == 0
        assert loading["hidden_copies"] == 0
        for name, found in linears(loading).items():
            assert found["format"] == FRACTAL_NZ or ".experts." in name, name
        for name, found in loading["parameters"].items():
            if ".experts." not in name and name.endswith(COPIED):
                assert found["copied_bytes"] == found["stored_bytes"], name


@pytest.mark.parametrize(
    "recipe",
    [
        "checkpoint", "checkpoint_with_tie", "checkpoint_of_floats", "checkpoint_with_head",
        "checkpoint_w8a16", "checkpoint_w4a16", "checkpoint_of_zero_points",
        "checkpoint_of_static_inputs",
    ],
)  # fmt: skip
def test_weights_are_copied_once_and_never_cast(
    engines: Engines, prompts: list[list[int]], recipe: str, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(recipe)
    report = engines.on_ascend(model, prompts[::5])
    check_raw_copies(report)
    check_tokens(model, report)


@pytest.mark.parametrize("recipe", ["checkpoint", "checkpoint_of_static_inputs"])
def test_graphs(
    engines: Engines, prompts: list[list[int]], recipe: str, request: pytest.FixtureRequest
) -> None:
    """Decoding captured in ACL graphs (FULL_DECODE_ONLY) after torch.compile, which fuses norms
    with the quantization behind them: it then sees what the norm has not rounded to bf16 yet. With
    fixed scales it fuses them only where vllm-ascend's own operators are, compiled for a card."""
    model: Path = request.getfixturevalue(recipe)
    captured = engines.on_ascend(model, prompts[::5], graphs=True)
    check_raw_copies(captured)
    quantizes = "AddRmsNormDynamicQuant" if recipe == "checkpoint" else "AscendQuant"
    for work in captured.data["generation"]:
        assert work["replays"] > 0
        assert any(quantizes in name for name in work["launches"]), work
        assert not any("AddRmsNormQuant" in name for name in work["launches"]), work
    check_tokens(model, captured)


@pytest.mark.parametrize("recipe", ["checkpoint", "checkpoint_of_static_inputs"])
def test_two_devices_hold_half_of_each_linear(
    engines: Engines, prompts: list[list[int]], recipe: str, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(recipe)
    one = engines.on_ascend(model, prompts[::5])
    two = engines.on_ascend(model, prompts[::5], tensor_parallel_size=2)
    check_raw_copies(two)
    assert len(two.loading) == 2
    for loading in two.loading:
        for name, half in linears(loading).items():
            whole = linears(one.loading[0])[name]
            assert 2 * half["stored_bytes"] == whole["stored_bytes"], name
    check_tokens(model, two, ranks=2)


def test_two_stages_hold_half_of_the_layers(
    engines: Engines, prompts: list[list[int]], checkpoint: Path
) -> None:
    one = engines.on_ascend(checkpoint, prompts[::5])
    two = engines.on_ascend(checkpoint, prompts[::5], pipeline_parallel_size=2)
    check_raw_copies(two)
    first, second = (set(linears(loading)) for loading in two.loading)
    assert len(first) == len(second)
    assert first | second == set(linears(one.loading[0]))
    assert two.tokens == one.tokens


@pytest.mark.parametrize("recipe", ["moe-w8a8", "moe-w4a16-down-w8a8", "moe-w4a8", "bf16"])
def test_mixtures_of_experts(
    engines: Engines, prompts: list[list[int]], mixtures: dict[str, Path], recipe: str
) -> None:
    """By torch_npu's grouped operators, as in our runtime."""
    report = engines.on_ascend(mixtures[recipe], prompts[::5])
    check_raw_copies(report)
    check_experts(report)
    check_tokens(mixtures[recipe], report)


def test_graphs_of_experts(
    engines: Engines, prompts: list[list[int]], mixtures: dict[str, Path]
) -> None:
    captured = engines.on_ascend(mixtures["moe-w8a8"], prompts[::5], graphs=True)
    check_raw_copies(captured)
    for work in captured.data["generation"]:
        assert work["replays"] > 0
        assert work["launches"]["aclnnGroupedMatmulSwigluQuantWeightNzV2"] > 0
    check_tokens(mixtures["moe-w8a8"], captured)


def test_two_devices_share_every_expert(
    engines: Engines, prompts: list[list[int]], mixtures: dict[str, Path]
) -> None:
    """Each quantizes its part of an activation with a scale of its own, which our runtime has only
    for linears by themselves: the same function, but for that."""
    model = mixtures["moe-w8a8"]
    one = engines.on_ascend(model, prompts[::5])
    two = engines.on_ascend(model, prompts[::5], tensor_parallel_size=2)
    check_raw_copies(two)
    check_experts(two)
    for loading in two.loading:
        for name, half in experts(loading).items():
            assert 2 * half["stored_bytes"] == experts(one.loading[0])[name]["stored_bytes"], name
    found = agreement(model, two.answers)
    print(found)
    assert found.share >= 0.9
    assert found.perplexity == pytest.approx(found.own_perplexity, rel=0.02)


def experts(loading: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The weights of a rank's experts."""
    return {name: found for name, found in linears(loading).items() if ".experts." in name}


def check_experts(report: Report) -> None:
    """Each stored byte of experts is copied once; what was copied before to where those of the
    first layer lie now, their operators have been tried with."""
    for loading in report.loading:
        found = experts(loading)
        assert found
        for name, weight in found.items():
            if not name.startswith("model.layers.0."):
                assert weight["copied_bytes"] == weight["stored_bytes"], name


def test_a_draft_is_loaded_likewise(
    engines: Engines, checkpoint_with_tie: Path, checkpoint_of_floats: Path
) -> None:
    """It is the last to be loaded. To draft, vllm-ascend calls operators of its own that are
    compiled for a card, so nothing is asked."""
    model = str(checkpoint_with_tie)
    draft = {"model": model, "method": "draft_model", "num_speculative_tokens": 3}
    report = engines.on_ascend(checkpoint_of_floats, [], speculative_config=draft)
    check_raw_copies(report)
    (loading,) = report.loading
    assert any(name.endswith("weight_scale") for name in loading["parameters"])
