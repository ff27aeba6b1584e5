"""Calibration on the device: statistics are recorded there, and the written layers run there."""

from __future__ import annotations

from pathlib import Path

import ascend_sim
from support.planted import NEVER, write_tiny_mixture
from support.tiny_models import DATA

from qwen3_ascend import ConvertOptions, convert_checkpoint, load
from qwen3_ascend.convert.recipe import Recipe

RECIPE = """
schema: 1
name: calibrated
rules:
  - {match: lm_head, scheme: bf16}
  - {match: "*", scheme: w8a8, quantizer: gptq}
"""


def test_a_calibrated_conversion_computes_on_the_device(tmp_path: Path) -> None:
    """The device computes in bfloat16, a CPU in float32: the error of each linear is nearly the
    same, and the result runs."""
    recipe = Recipe.parse(RECIPE, "test.yaml")
    ascend_sim.reset_trace()
    made = {}
    for device in ("cpu", "npu"):
        options = ConvertOptions(calibration_tokens=1024, calibration_device=device)
        assert not ascend_sim.trace_entries()
        made[device] = convert_checkpoint(DATA, tmp_path / device, recipe, options)
    assert made["npu"].calibration is not None and made["npu"].calibration.device == "npu"
    launched = {entry.name for entry in ascend_sim.trace_entries()}
    assert {"aclnnAmax", "aclnnReduceSum", "aclnnQuantMatmulWeightNz"} <= launched, launched
    for name, entry in made["cpu"].linears.items():
        expected, found = entry.sqnr_db, made["npu"].linears[name].sqnr_db
        assert expected is not None and found is not None and abs(expected - found) < 0.2
    llm = load(tmp_path / "npu", device="cpu")
    assert llm.generate(["What does river mean?"])[0].text


EXPERTS = """
schema: 1
name: calibrated
rules:
  - {match: "*.mlp.experts.*", scheme: {name: w4a16, group: 64}, quantizer: gptq}
  - {match: "*", scheme: bf16}
"""


def test_what_reaches_each_expert_is_recorded_on_the_device(tmp_path: Path) -> None:
    """The tokens that bfloat16 gives to another expert than float32 are few."""
    recipe, source = Recipe.parse(EXPERTS, "test.yaml"), write_tiny_mixture(tmp_path / "source")
    made = {}
    for device in ("cpu", "npu"):
        options = ConvertOptions(calibration_tokens=1024, calibration_device=device)
        made[device] = convert_checkpoint(source, tmp_path / device, recipe, options)
    for name, entry in made["cpu"].linears.items():
        if ".experts." in name:
            found = made["npu"].linears[name]
            assert found.unreached == entry.unreached == (NEVER,)
            pairs = zip(entry.experts_sqnr_db, found.experts_sqnr_db, strict=True)
            assert all(abs((a or 0) - (b or 0)) < 0.5 for a, b in pairs), name
