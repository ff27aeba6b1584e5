"""Memory does not grow with the model: it is watched while a process converts or exports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support import tiny_models
from support.command_line import run
from support.quantized_sources import (
    fp8_weights,
    int8_weights,
    quantize,
    write_ascendv1,
    write_fp8,
    write_packed,
)

from qwen3_ascend.convert import ConvertOptions, plan_conversion
from qwen3_ascend.convert.budget import Budget
from qwen3_ascend.convert.conversion import plan_budget

WATCHED = """
import json, re, sys, threading, time
from pathlib import Path
from qwen3_ascend.convert import ConvertOptions, convert_checkpoint
from qwen3_ascend.convert import WritingOptions, export_checkpoint
from qwen3_ascend.convert.output import production

production.DROP_BYTES = 16 << 20  # far less than the model, which is small

def resident():
    status = Path("/proc/self/status").read_text()
    return [int(re.search(rf"Rss{kind}:\\s+(\\d+)", status)[1]) << 10 for kind in ("Anon", "File")]

def watch():
    while True:
        seen.append(resident())
        time.sleep(0.002)

seen = [resident()]
threading.Thread(target=watch, daemon=True).start()
kind, source, out, what = sys.argv[1:]
if kind == "convert":
    memory = "1GiB" if what.endswith(".yaml") else "256MiB"
    options = ConvertOptions(threads=2, max_memory=memory, calibration_tokens=2048)
    convert_checkpoint(source, out, what or None, options)
else:
    export_checkpoint(source, out, what, WritingOptions(threads=2, max_memory="256MiB"))
print(json.dumps([max(figures) - figures[0] for figures in zip(*seen)]))
"""

BIG = tiny_models.config(
    hidden_size=1024, intermediate_size=12_330, num_hidden_layers=1, vocab_size=41_000
)
"""An embedding of 84 MB, a fused linear of 50 MB in bfloat16 whose parts end within a strip, and a
head."""


def watched(*arguments: str | Path, threads: int = 2) -> tuple[int, int]:
    """The most private and mapped memory that a work adds, in bytes."""
    program = WATCHED.replace("threads=2", f"threads={threads}")
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    private, mapped = json.loads(done.stdout)
    return private, mapped


def test_large_tensors_are_never_whole(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source", BIG, tokenizer=False)
    assert (source / "model.safetensors").stat().st_size > 230e6
    for recipe in ("w8a8-plain", "bf16"):
        private, mapped = watched("convert", source, tmp_path / recipe, recipe)
        assert private < 80 << 20
        assert mapped < 100 << 20  # of 230: what was read is given back as the work goes on
    # Rotated, a linear that mixes its outputs is whole, as float32: down has 50 MB.
    private, mapped = watched("convert", source, tmp_path / "w8a8", "w8a8")
    assert private < (80 << 20) + 2 * 50.5e6
    assert mapped < 100 << 20
    exports = [("w8a8", "ascendv1"), ("w8a8", "huggingface"), ("bf16", "huggingface")]
    for recipe, name in exports:
        private, mapped = watched("export", tmp_path / recipe, tmp_path / f"{recipe}-{name}", name)
        assert private < 96 << 20, name
        assert mapped < 100 << 20, name


CALIBRATED = """
schema: 1
name: calibrated
rules:
  - {match: lm_head, scheme: bf16}
  - {match: "*", scheme: w8a8, quantizer: gptq}
"""


def test_calibration_keeps_to_what_is_planned(tmp_path: Path) -> None:
    """A layer of floats, the E[x'x] of its inputs, and what GPTQ makes of them."""
    data = tiny_models.config(hidden_size=512, intermediate_size=2560, num_hidden_layers=1)
    source = tiny_models.write(tmp_path / "source", data, tokenizer=False)
    recipe = tmp_path / "calibrated.yaml"
    recipe.write_text(CALIBRATED)
    options = ConvertOptions(threads=2, max_memory="1GiB", calibration_tokens=2048)
    planned = plan_budget(plan_conversion(source, str(recipe), options)[1], options).working_bytes
    private, _ = watched("convert", source, tmp_path / "out", str(recipe))
    assert planned / 4 < private < planned, (private, planned)
    done = run("convert", source, tmp_path / "little", "--recipe", recipe, "--max-memory", "100MiB")
    done.one_line_error("max_memory", "this model needs", "MiB")


def test_a_quantizer_keeps_to_the_plan(tmp_path: Path) -> None:
    """Integers of whole linears are in memory, and counted; floats are not."""
    source = tiny_models.write(tmp_path / "source", BIG, tokenizer=False)
    recipe = tmp_path / "mse.yaml"
    recipe.write_text(
        "{schema: 1, name: x, rules: [{match: lm_head, scheme: bf16},"
        " {match: '*.o_proj', scheme: {name: w4a16, group: 32}, quantizer: mse},"
        " {match: '*', scheme: w8a8, quantizer: mse}]}"
    )
    plan = plan_conversion(source, str(recipe))[1]
    counted = Budget.fit(plan.piece_bytes, 2, 256 << 20).working_bytes
    private, _ = watched("convert", source, tmp_path / "out", str(recipe))
    assert 40e6 < private < counted < 256 << 20


def test_codes_that_are_taken_are_never_whole(tmp_path: Path) -> None:
    """The head as well, so that most of what is read are codes."""
    weights = int8_weights(tiny_models.tensors(BIG))
    weights["lm_head.weight"], weights["lm_head.weight_scale"] = quantize(weights["lm_head.weight"])
    source = write_ascendv1(tmp_path / "source", BIG, weights, tokenizer=False)
    assert sum(path.stat().st_size for path in source.glob("*.safetensors")) > 160e6
    private, mapped = watched("convert", source, tmp_path / "out", "")
    assert private < 64 << 20
    assert mapped < 100 << 20


def test_codes_that_are_decoded_are_never_whole(tmp_path: Path) -> None:
    weights = fp8_weights(tiny_models.tensors(BIG))
    source = write_fp8(tmp_path / "source", BIG, weights, tokenizer=False)
    for recipe in ("w8a8-plain", "bf16"):
        plan = plan_conversion(source, recipe)[1]
        counted = Budget.fit(plan.piece_bytes, 2, 256 << 20).working_bytes
        private, mapped = watched("convert", source, tmp_path / recipe, recipe)
        assert private < counted < 160 << 20  # two threads with whole linears would take 300 MB
        assert mapped < 100 << 20


def test_integers_that_are_unpacked_are_never_whole(tmp_path: Path) -> None:
    """As a whole they would take 600 MB."""
    data = {**BIG, "intermediate_size": 12_352}  # groups of 64, and whole strips
    source = write_packed(tmp_path / "awq", data, format="awq", group=64, tokenizer=False)
    private, mapped = watched("convert", source, tmp_path / "out", "w8a8-plain")
    assert private < 200 << 20
    assert mapped < 100 << 20


def test_decoded_weights_that_are_changed_keep_to_the_plan(tmp_path: Path) -> None:
    """A rotation needs a whole linear, and equalization looks at whole ones."""
    data = tiny_models.config(hidden_size=1024, intermediate_size=24_576, num_hidden_layers=1)
    source = write_packed(tmp_path / "awq", data, format="awq", group=64, tokenizer=False)
    recipe = tmp_path / "rotated.yaml"
    recipe.write_text(
        "{schema: 1, name: x, transforms: [cle, rotate],"
        " rules: [{match: lm_head, scheme: bf16}, {match: '*', scheme: w8a8}]}"
    )
    options = ConvertOptions(threads=1, max_memory="1GiB")
    counted = plan_budget(plan_conversion(source, str(recipe))[1], options).working_bytes
    private, _ = watched("convert", source, tmp_path / "out", str(recipe), threads=1)
    assert private < counted < 1 << 30
