"""Every recipe that ships, with every model that quality is measured on: converted, verified, and
the same tokens from a CPU and from real torch_npu on a simulated device, eager and captured.

The simulated device adds up floats in the order of the CPU (ascend_sim/README.md), so that nothing
is left to ties. smol-qwen3 is a model of 135 million weights: `make simulated-smol`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ascend_sim
import pytest
from support.outliers import write_tiny_outlier
from support.planted import write_tiny_mixture
from support.tiny_models import DATA

from qwen3_ascend import ConvertOptions, RecipeError, SamplingParams, convert_checkpoint, load
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.verify import verify
from qwen3_ascend.recipes import names, text
from qwen3_ascend.runtime.backends.npu import backend
from qwen3_ascend.runtime.backends.npu.capabilities import Capabilities, probe
from qwen3_ascend.runtime.backends.npu.experts import EXPERT_GATES

Tokens = list[tuple[int, ...]]

PROMPTS = [
    "What does river mean?", "What does music mean?", "What is the capital of France?",
    "Why is the sky blue?", "Count from one to ten.",
]  # fmt: skip
PARAMS = SamplingParams(max_new_tokens=24, ignore_eos=True)
"""All answers end at once: a product of one row alone torch may add up in another order."""

FEW_TOKENS = ConvertOptions(calibration_tokens=1024)
MODELS = ("tiny", "tiny-outlier", "tiny-moe", "smol")


def refusal(model: str, recipe: str) -> str | None:
    """What planning says of a recipe that a model cannot take."""
    if model == "tiny-moe":
        if "smooth" in text(recipe) or "w8a8-static" in text(recipe):
            return "experts can only have the schemes|between the linears of one MLP"
        return None
    if "experts" in text(recipe):
        return r"\*\.mlp\.experts\.\*(\.down_proj)?'\) decides nothing"
    if model == "smol" and "scheme: w4a8" in text(recipe):
        return r"\[1920, 576\], but npu_quant_matmul wants a multiple of 256 inputs"
    return None


def is_tried(model: str, recipe: str) -> bool:
    """A mixture becomes the recipes that are made for one, and those of schemes that no such recipe
    has; what it is refused costs nothing to try."""
    if model != "tiny-moe" or refusal(model, recipe):
        return True
    return recipe.startswith("moe-") or recipe in ("bf16", "w8a16")


def cases(refused: bool) -> list[Any]:
    """(model, recipe) of those that are refused, or of all others."""
    return [
        pytest.param((model, recipe), id=f"{model}-{recipe}", marks=marks)
        for model in MODELS
        for marks in [[pytest.mark.smol] if model == "smol" else []]
        for recipe in names()
        if is_tried(model, recipe)
        if (refusal(model, recipe) is not None) == refused
    ]


@pytest.fixture(scope="session")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_outlier(tmp_path_factory.mktemp("models") / "tiny-outlier")


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_mixture(tmp_path_factory.mktemp("models") / "tiny-moe")


@pytest.fixture(autouse=True)
def gate_as_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate of int8 experts in the form that rounds as the definition does: the codes of the
    fused one may be one off, so that its tokens are others (test_mixtures.py)."""

    def probed(config: Qwen3Config) -> Capabilities:
        found = probe(config)
        return found.using("expert_gate", EXPERT_GATES[2]) if config.experts else found

    monkeypatch.setattr(backend, "probe", probed)


def source(model: str, request: pytest.FixtureRequest) -> Path:
    if model == "smol":
        return Path(os.environ["QWEN3_ASCEND_SMOL"])  # the Makefile says where it is
    if model == "tiny":
        return DATA
    folder: Path = request.getfixturevalue("mixture" if model == "tiny-moe" else "outlier")
    return folder


@dataclass(frozen=True)
class Converted:
    """A checkpoint, and what a CPU answers."""

    folder: Path
    tokens: Tokens


@pytest.fixture(scope="session", params=cases(refused=False))
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Converted]:
    """One at a time."""
    model, recipe = request.param
    folder = tmp_path_factory.mktemp("recipes") / recipe
    convert_checkpoint(source(model, request), folder, recipe, FEW_TOKENS)
    verdict = verify(folder)
    assert verdict.ok, verdict.problems
    yield Converted(folder, answers(folder, device="cpu"))
    shutil.rmtree(folder)


def answers(folder: Path, **options: Any) -> Tokens:
    llm = load(folder, kv_cache_tokens=2048, block_size=128, max_batch=len(PROMPTS), **options)
    return [answer.token_ids for answer in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_device_answers_as_a_cpu(converted: Converted, graph: bool) -> None:
    """The captured batch is padded: five rows in a graph of eight."""
    assert answers(converted.folder, device="npu", graph=graph) == converted.tokens
    assert bool(ascend_sim.trace.replays()) == graph
    assert len(set(converted.tokens)) == len(PROMPTS)


@pytest.mark.parametrize("case", cases(refused=True))
def test_what_a_model_cannot_take_is_refused(
    case: tuple[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, recipe = case
    with pytest.raises(RecipeError, match=refusal(model, recipe)):
        convert_checkpoint(source(model, request), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
