"""Hundreds of kills: every conversion must be continued and end with the same bytes.

    python benchmarks/kill_resume.py [--layers 2] [--instants 300] [--steps 100] [--recipe w4a16]

On random weights in Qwen3-0.6B's shapes, so that a kill meets half-written tensors of many
megabytes and several files. Prints how many kills there were, and fails at the first difference.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import random_model

TESTS = Path(__file__).parents[1] / "tests"


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--instants", type=int, default=300)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", help="a calibrated one reads 512 random token ids")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = random_model.config("0.6b", options.layers) | {"vocab_size": 20000}
        source = random_model.ensure(Path(folder) / "source", data)
        command = [sys.executable, "-m", "support.crash_driver", str(source), folder]
        command += [f"--{name}={getattr(options, name)}" for name in ("instants", "steps", "seed")]
        command += [f"--recipe={options.recipe}"] if options.recipe else []
        sys.exit(subprocess.run(command, cwd=TESTS).returncode)


if __name__ == "__main__":
    main()
