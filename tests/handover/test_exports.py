"""Real engines load what `export` writes, and compute what our runtime does of the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from handover.agreement import agreement
from handover.engines import Engines
from qwen3_ascend.convert import export_checkpoint

RECIPES = ["checkpoint", "checkpoint_with_tie", "checkpoint_with_head"]
"""Fixtures: the default recipe, one whose head is the embedding, and one whose head is int8."""

PERPLEXITY = 0.002
"""Relative difference at most. More than tokens could not be asked of vLLM's CPU backend: where the
processor has no VNNI, its int8 product saturates (oneDNN)."""

FLOAT_PERPLEXITY = 0.01
"""Of dequantized weights, which are rounded, and whose activations are not quantized."""


def exported(checkpoint: Path, format: str, folder: Path) -> Path:
    output = folder / f"{checkpoint.name}-{format}"  # by which `engines` knows what was run
    export_checkpoint(checkpoint, output, format)
    return output


@pytest.mark.parametrize("recipe", RECIPES)
def test_vllm_on_cpu_computes_the_same_integers(
    recipe: str,
    engines: Engines,
    prompts: list[list[int]],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    checkpoint: Path = request.getfixturevalue(recipe)
    model = exported(checkpoint, "compressed-tensors", tmp_path)
    found = agreement(checkpoint, engines.on_cpu(model, prompts).answers)
    print(found)
    assert found.perplexity == pytest.approx(found.own_perplexity, rel=PERPLEXITY)


def test_vllm_on_cpu_loads_the_floats(
    engines: Engines, prompts: list[list[int]], checkpoint: Path, tmp_path: Path
) -> None:
    model = exported(checkpoint, "huggingface", tmp_path)
    found = agreement(checkpoint, engines.on_cpu(model, prompts).answers)
    print(found)
    assert found.perplexity == pytest.approx(found.own_perplexity, rel=FLOAT_PERPLEXITY)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_vllm_ascend_gives_the_same_tokens_from_every_format(
    engines: Engines, prompts: list[list[int]], checkpoint: Path, tmp_path: Path, graphs: bool
) -> None:
    """The raw checkpoint through the plugin, and both exports, which have to be cast."""
    few = prompts[::5]
    raw = engines.on_ascend(checkpoint, few, graphs=graphs)
    for format in ("ascendv1", "compressed-tensors"):
        model = exported(checkpoint, format, tmp_path)
        report = engines.on_ascend(model, few, graphs=graphs)
        assert report.tokens == raw.tokens, format
        assert all(loading["format_casts"] > 0 for loading in report.loading), format


@pytest.mark.parametrize(("recipe", "format"), [("moe-w8a8", "ascendv1"), ("bf16", "huggingface")])
def test_vllm_ascend_and_mixtures_of_experts(
    recipe: str,
    format: str,
    engines: Engines,
    prompts: list[list[int]],
    mixtures: dict[str, Path],
    tmp_path: Path,
) -> None:
    """The raw checkpoint by our operators, and the export as vllm-ascend itself has it: by its own,
    which stand-ins compute (engine_patches.py)."""
    few, checkpoint = prompts[::5], mixtures[recipe]
    raw = engines.on_ascend(checkpoint, few)
    report = engines.on_ascend(exported(checkpoint, format, tmp_path), few)
    assert report.tokens == raw.tokens
    (work,) = report.data["generation"]
    assert work["launches"]["aclnnMoeInitRoutingV3"] > 0 and work["fallbacks"] == []
    assert ("aclnnGroupedMatmulSwigluQuantWeightNZ" in work["launches"]) == (recipe != "bf16")


def test_vllm_ascend_and_a_quantized_head(
    engines: Engines, prompts: list[list[int]], checkpoint_with_head: Path, tmp_path: Path
) -> None:
    """AscendV1 has a word for it; in compressed-tensors vllm-ascend 0.23.0 knows of no such head,
    and says so."""
    few = prompts[::5]
    raw = engines.on_ascend(checkpoint_with_head, few)
    model = exported(checkpoint_with_head, "ascendv1", tmp_path)
    assert engines.on_ascend(model, few).tokens == raw.tokens
    model = exported(checkpoint_with_head, "compressed-tensors", tmp_path)
    with pytest.raises(
        AssertionError, match=r"no module or parameter named 'lm_head.weight_scale'"
    ):
        engines.on_ascend(model, few)
