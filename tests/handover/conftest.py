"""Checkpoints, prompts and engines that these tests share. `make handover` runs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.int4_recipes import w4a16_recipe
from support.planted import write_tiny_mixture
from support.static_inputs import write_static
from support.tiny_models import DATA

from handover.engines import Engines
from qwen3_ascend import ConvertOptions, convert_checkpoint
from qwen3_ascend.convert.recipe import Recipe
from qwen3_ascend.runtime.tokenizer import load_tokenizer

NAMES = ("VLLM_CPU", "VLLM_ASCEND", "CLIENTS", "SGLANG", "PLUGIN")
WORDS = (
    "river", "bicycle", "house", "oxygen", "create", "mountain", "love", "table", "computer",
    "king", "water", "run", "happy", "justice", "tree", "planet", "music", "book", "dog", "war",
)  # fmt: skip
EXCERPTS, EXCERPT_STEP, EXCERPT_TOKENS = 20, 200, 128


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Engines in the environments that `make handover` has made."""
    missing = [name for name in NAMES if f"HANDOVER_{name}" not in os.environ]
    if missing:
        pytest.fail(f"run these tests with: make handover ({', '.join(missing)} are not there)")
    cpu, ascend, clients, sglang, plugin = (Path(os.environ[f"HANDOVER_{name}"]) for name in NAMES)
    return Engines(cpu, ascend, clients, sglang, plugin, tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """20 questions and 20 excerpts of a text that the model has not seen, as token ids."""
    tokenizer = load_tokenizer(DATA)
    asked = [
        tokenizer.encode(
            tokenizer.render([{"role": "user", "content": f"What does {word} mean?"}]),
            add_special_tokens=False,
        )
        for word in WORDS
    ]
    text = tokenizer.encode((DATA / "heldout.txt").read_text(), add_special_tokens=False)
    starts = range(0, EXCERPTS * EXCERPT_STEP, EXCERPT_STEP)
    return asked + [text[start : start + EXCERPT_TOKENS] for start in starts]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the default recipe."""
    return converted(tmp_path_factory, "w8a8")


@pytest.fixture(scope="session")
def checkpoint_with_tie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without transforms, whose head is the embedding."""
    return converted(tmp_path_factory, "w8a8-plain")


@pytest.fixture(scope="session")
def checkpoint_of_floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in bf16."""
    return converted(tmp_path_factory, "bf16")


@pytest.fixture(scope="session")
def checkpoint_of_static_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose inputs are quantized under fixed scales and offsets."""
    output = tmp_path_factory.mktemp("checkpoints") / "w8a8-static"
    write_static(DATA, output)
    return output


@pytest.fixture(scope="session")
def checkpoint_with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose head is quantized and therefore apart from the embedding."""
    return converted(tmp_path_factory, "w8a8-head")


@pytest.fixture(scope="session")
def checkpoint_w8a16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with int8 weights, whose activations are floats."""
    return converted(tmp_path_factory, "w8a16")


@pytest.fixture(scope="session")
def checkpoint_w4a16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with int4 weights in groups."""
    return converted(tmp_path_factory, "w4a16-plain")


@pytest.fixture(scope="session")
def checkpoint_of_zero_points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with zero points."""
    return converted(tmp_path_factory, w4a16_recipe(64, zero_points=True))


@pytest.fixture(scope="session")
def tiny_mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with mixtures of experts."""
    return write_tiny_mixture(tmp_path_factory.mktemp("sources") / "tiny-moe")


@pytest.fixture(scope="session")
def mixtures(tiny_mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """It by recipe."""
    folder = tmp_path_factory.mktemp("mixtures")
    for recipe in ("moe-w8a8", "moe-w4a16-down-w8a8", "moe-w4a8", "bf16"):
        options = ConvertOptions(calibration_tokens=1024)
        convert_checkpoint(tiny_mixture, folder / recipe, recipe, options)
    return {found.name: found for found in folder.iterdir()}


@pytest.fixture(scope="session")
def checkpoint_of_experts(mixtures: dict[str, Path]) -> Path:
    """The one with int8 experts and attention."""
    return mixtures["moe-w8a8"]


def converted(factory: pytest.TempPathFactory, recipe: str | Recipe) -> Path:
    output = factory.mktemp("checkpoints") / "out"
    convert_checkpoint(DATA, output, recipe, ConvertOptions())
    return output
