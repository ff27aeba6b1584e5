"""Runs a client in its own environment."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def client(
    python: str, *arguments: str | Path, cwd: Path | None = None,
    environment: Mapping[str, str] | None = None, stdin: str = "",
) -> str:  # fmt: skip
    """What it prints; it has to succeed.

    Args:
        python: of its environment.
        arguments: of that, such as ("-m", "llm") or ("-c", script).
        cwd: where it runs.
        environment: further variables.
        stdin: what it is told.
    """
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments], input=stdin, capture_output=True, text=True, cwd=cwd, timeout=500,
        env={**ours, **OFFLINE, "OPENAI_API_KEY": "none", **(environment or {})},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
