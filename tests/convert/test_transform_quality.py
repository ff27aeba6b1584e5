"""What transforms are for: the accuracy of quantized models, as bounds on measured figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.outliers import write_tiny_outlier
from support.tiny_models import DATA

from qwen3_ascend import convert_checkpoint
from qwen3_ascend.evaluation.evaluating import evaluate
from qwen3_ascend.evaluation.options import EvaluationOptions

OPTIONS = EvaluationOptions(window=256, windows=8, dtype="float32", device="cpu")


def divergence(source: Path, recipe: str, out: Path) -> float:
    """The mean KL divergence of a conversion from its source, in thousandths of a nat."""
    convert_checkpoint(source, out, recipe)
    found = evaluate(out, DATA / "heldout.txt", against=source, options=OPTIONS).comparison
    assert found is not None
    return 1000 * found.kl.value


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_outlier(tmp_path_factory.mktemp("outlier") / "model")


def test_outliers_cost_nothing_after_equalizing_and_rotating(outlier: Path, tmp_path: Path) -> None:
    plain = divergence(outlier, "w8a8-plain", tmp_path / "plain")
    rotated = divergence(outlier, "w8a8", tmp_path / "rotated")
    assert plain > 40 and rotated < 1.0


def test_a_model_without_outliers_loses_nothing(tmp_path: Path) -> None:
    plain = divergence(DATA, "w8a8-plain", tmp_path / "plain")
    rotated = divergence(DATA, "w8a8", tmp_path / "rotated")
    assert 0.2 < plain < 1.0 and rotated < 1.15 * plain
