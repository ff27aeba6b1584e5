"""SIGKILL at any instant, then the same command again: the same bytes, whatever was lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support import tiny_models
from support.quantized_sources import write_ascendv1

TESTS = Path(__file__).parents[1]
DRIVER = (sys.executable, "-m", "support.crash_driver")


def drive(source: Path, workdir: Path, *options: str) -> dict[str, int]:
    workdir.mkdir()
    done = subprocess.run(
        [*DRIVER, source, workdir, *options], capture_output=True, text=True, timeout=550,
        cwd=TESTS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_after_each_step(tmp_path: Path) -> None:
    """A step is a call that changes the output: this is every state that a crash can leave."""
    source = tiny_models.write(tmp_path / "source", tiny_models.config(num_hidden_layers=1))
    found = drive(source, tmp_path / "work", "--steps", "0", "--threads", "1")
    assert found["kills"] == found["trials"] == found["steps"] > 35
    assert 0 < found["completed"] < 15  # it was finished and had only to be tidied up


def test_at_random_instants(tiny_source: Path, tmp_path: Path) -> None:
    """With three threads, and what is continued is killed again."""
    found = drive(
        tiny_source, tmp_path / "work", "--steps", "30", "--instants", "20", "--threads", "3"
    )
    assert found["trials"] == 50 and found["kills"] >= 30


def test_calibrated(tmp_path: Path) -> None:
    """In the middle of calibration, of quantizing, and while hidden states are kept: a run goes on
    from the states between two layers, or makes them again."""
    recipe = tmp_path / "calibrated.yaml"
    rules = '[{match: lm_head, scheme: bf16}, {match: "*", scheme: w8a8, quantizer: gptq}]'
    transforms = "[cle, rotate, smooth]"
    recipe.write_text(f"schema: 1\nname: calibrated\ntransforms: {transforms}\nrules: {rules}\n")
    source = tiny_models.write(tmp_path / "source", tiny_models.config(num_hidden_layers=2))
    for name in tiny_models.TOKENIZER_FILES:  # random token ids are taken
        (source / name).unlink()
    found = drive(
        source, tmp_path / "work", "--recipe", str(recipe), "--steps", "40", "--instants", "8",
        "--threads", "2",
    )  # fmt: skip
    assert found["trials"] == 48 and found["kills"] >= 35


def test_mixtures_of_experts(tmp_path: Path) -> None:
    """In the middle of a linear of all experts, too."""
    data = tiny_models.mixture(num_hidden_layers=1, num_experts=6)
    source = tiny_models.write(tmp_path / "source", data, shards=2)
    found = drive(source, tmp_path / "work", "--steps", "40", "--instants", "10", "--threads", "2")
    assert found["trials"] == min(40, found["steps"]) + 10 and found["kills"] >= 30


def test_calibrated_mixtures_of_experts(tmp_path: Path) -> None:
    """Between two experts of a linear, whose codes are chosen one after the other, as well."""
    recipe = tmp_path / "calibrated.yaml"
    scheme = "{name: w4a16, group: 32}"
    rule = f'{{match: "*.mlp.experts.*", scheme: {scheme}, quantizer: gptq}}'
    rules = f'[{rule}, {{match: "*", scheme: bf16}}]'
    recipe.write_text(f"schema: 1\nname: calibrated\ntransforms: [cle]\nrules: {rules}\n")
    data = tiny_models.mixture(num_hidden_layers=2, moe_intermediate_size=64)
    source = tiny_models.write(tmp_path / "source", data, tokenizer=False)
    found = drive(
        source, tmp_path / "work", "--recipe", str(recipe), "--steps", "30", "--instants", "6",
        "--threads", "2",
    )  # fmt: skip
    assert found["trials"] == 36 and found["kills"] >= 25


def test_a_quantized_source(tmp_path: Path) -> None:
    """Codes that are taken, and a linear whose codes are chosen beside them."""
    data = tiny_models.config(num_hidden_layers=1)
    source = write_ascendv1(tmp_path / "source", data, floats=["model.layers.0.mlp.down_proj"])
    found = drive(source, tmp_path / "work", "--steps", "40", "--instants", "10", "--threads", "2")
    assert found["trials"] == min(40, found["steps"]) + 10 and found["kills"] >= 30
