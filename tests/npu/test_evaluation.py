"""`eval` on the NPU finds what it finds on the CPU: layers of a checkpoint and of its source."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import DATA

from qwen3_ascend.evaluation import EvaluationOptions, evaluate


@pytest.mark.parametrize("recipe", ["w8a8", "bf16"])
def test_figures_are_those_of_the_cpu(checkpoints: dict[str, Path], recipe: str) -> None:
    found = [
        evaluate(
            checkpoints[recipe], DATA / "heldout.txt", against=DATA,
            options=EvaluationOptions(64, 4, device, "bfloat16"),
        )
        for device in ("npu", "cpu")
    ]  # fmt: skip
    npu, cpu = found
    assert (npu.device, npu.dtype, cpu.device) == ("npu", "bfloat16", "cpu")
    assert npu.reference is not None and cpu.reference is not None
    assert npu.comparison is not None and cpu.comparison is not None
    # Sums of bfloat16 are rounded at other places: a few thousandths of a logit's spread.
    for one, other in ((npu.model, cpu.model), (npu.reference, cpu.reference)):
        assert one.perplexity.value == pytest.approx(other.perplexity.value, rel=5e-3)
    # The source's floats and the checkpoint's are the same, through two ways onto the device.
    bound = 2e-3 if recipe == "w8a8" else 1e-4
    assert npu.comparison.kl.value < bound and cpu.comparison.kl.value < bound
