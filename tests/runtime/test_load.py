"""Loading trusts nothing: a changed byte is named before the first token."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command_line import run
from support.folders import flip_a_byte

from qwen3_ascend import SamplingParams, load
from qwen3_ascend.errors import CheckpointError

NAME = "model.layers.2.mlp.down_proj.weight"


def test_a_flipped_byte_is_named(w8a8_copy: Path) -> None:
    flip_a_byte(w8a8_copy, NAME)
    with pytest.raises(CheckpointError, match=f"tensor {NAME} in ascend-00001.*differ"):
        load(w8a8_copy)
    done = run("generate", w8a8_copy, "--prompt", "x")
    assert done.code == 1 and done.err.startswith("Error:") and NAME in done.err


def test_checking_can_be_left_out(w8a8_copy: Path) -> None:
    flip_a_byte(w8a8_copy, NAME)
    llm = load(w8a8_copy, verify=False)
    assert llm.generate(["What does river mean?"], SamplingParams(max_new_tokens=3))[0].token_ids


def test_progress_counts_every_stage_to_its_end(w8a8_copy: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    load(
        w8a8_copy,
        progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    assert list(seen) == ["loading layers"]
    for steps in seen.values():
        total = steps[0][1]
        assert steps == [(done, total) for done in range(1, total + 1)]
