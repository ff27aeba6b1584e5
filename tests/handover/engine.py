"""Runs of real vllm-ascend on the simulated device, from the tests' own environment.

The engine has an environment of its own; VLLM_ASCEND_PYTHON names its Python.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PYTHON = os.environ.get("VLLM_ASCEND_PYTHON")
PROGRAM = Path(__file__).with_name("run_vllm_ascend.py")
PATIENCE = 600
"""Seconds. A start takes ten on an idle machine, with two ranks and graphs forty."""


@dataclass(frozen=True)
class Answer:
    """What the engine made of a prompt, greedily."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str


@dataclass(frozen=True)
class EngineRun:
    """`loading` and `generation` have one entry a rank: see device_work.py for their names."""

    answers: list[Answer]
    loading: list[dict[str, Any]]
    generation: list[dict[str, Any]]
    output: str

    @property
    def tokens(self) -> list[list[int]]:
        return [answer.tokens for answer in self.answers]


class EngineFailed(AssertionError):
    """The engine ended with an error; the text is what it said."""


def serve(model: Path, folder: Path, *options: str, **environment: str) -> EngineRun:
    """Starts the engine with `model`, asks it, ends it. `options` are those of run_vllm_ascend.py.
    Raises EngineFailed."""
    assert PYTHON is not None, "VLLM_ASCEND_PYTHON is not set"
    command = [PYTHON, str(PROGRAM), str(model), str(folder), *options]
    run = subprocess.run(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    if run.returncode:
        raise EngineFailed(run.stdout)
    report = json.loads((folder / "answers.json").read_text())
    return EngineRun(
        answers=[Answer(**each) for each in report["answers"]],
        loading=[json.loads(each.read_text()) for each in sorted(folder.glob("loading-*.json"))],
        generation=report["generation"],
        output=run.stdout,
    )
