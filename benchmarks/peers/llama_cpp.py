"""llama.cpp's own benchmark, run and read: each run is a process that loads the model by itself.

llama-batched-bench is used for one answer as for several, because it measures what generate.py
measures of ours: prompts, then steps that continue all of them from where the prompts end. Its
times leave out loading. It warms up with a few tokens only, after which a prompt of 128 took 1.1
times what llama-bench measures; so each run reads the prompts twice, and the faster time counts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from peers.environments import environment

COUNTERPARTS = {"w8a8-head": "Q8_0", "w8a8": "Q8_0", "w8a16": "Q8_0", "bf16": "BF16"}
"""For recipes of ours, the type of llama.cpp's weights that they are held against."""

PROGRAM = "llama-batched-bench"

CONTEXT_UNIT = 256
"""llama.cpp rounds the context of each sequence up to a multiple of this."""

LEAST_CONTEXT = 4096
"""Tokens; with a context below the 2048 of its batches the program may abort (build 11434)."""

AGAIN = 1
"""Steps after the second reading of the prompts."""

LAST = 16
"""Tokens of prompts that come last: what the program prints at its end is lost at times, since it
does not wait for the thread that prints (common/log.cpp)."""


@dataclass(frozen=True)
class Times:
    """Seconds of a run: until every prompt has been read, and of the steps after that."""

    prefill: float
    decode: float


def program() -> Path:
    """llama-batched-bench: the one on PATH if there is one, else built from source."""
    found = shutil.which(PROGRAM)
    return Path(found) if found else environment("llama-cpp") / PROGRAM


def version(bench: Path) -> str:
    """What a program that was found says of itself; of what it was built, if it was."""
    pins = Path(__file__).parent / "requirements/llama-cpp.txt"
    if shutil.which(PROGRAM) is None:
        return next(line.split()[0] for line in pins.read_text().splitlines() if "==" in line)
    said = subprocess.run([bench, "--version"], capture_output=True, text=True)
    return next(line for line in (said.stderr + said.stdout).splitlines() if "version" in line)


def command(bench: Path, model: Path, threads: int, batch: int, prompt: int, new: int) -> list[str]:
    """The command that reads `batch` prompts and then takes `new` steps."""
    room = batch * -(-(prompt + new) // CONTEXT_UNIT) * CONTEXT_UNIT
    words = {
        "-m": model, "-t": threads, "-tb": threads, "-c": max(room, LEAST_CONTEXT),
        "-npp": f"{prompt},{LAST}", "-ntg": f"{new},{AGAIN}", "-npl": batch,
        "--output-format": "jsonl",
    }  # fmt: skip
    return [str(bench), *(str(part) for word in words.items() for part in word)]


def measure(bench: Path, model: Path, threads: int, batch: int, prompt: int, new: int) -> Times:
    """Runs it once.

    Raises:
        SystemExit: with the end of what it says, if it fails.
    """
    words = command(bench, model, threads, batch, prompt, new)
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed: {(done.stderr or done.stdout)[-300:].strip()}")
    return times(done.stdout, batch, prompt, new)


def times(output: str, batch: int, prompt: int, new: int) -> Times:
    """What a run printed about this work.

    Raises:
        ValueError: if it does not say all of it; it leaves out what does not fit into its context.
    """
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    found = {line["tg"]: line for line in lines if (line["pl"], line["pp"]) == (batch, prompt)}
    if not {new, AGAIN} <= found.keys():
        raise ValueError(f"no figures of {batch} x {prompt} + {new} tokens in: {output[-300:]!r}")
    return Times(min(line["t_pp"] for line in found.values()), found[new]["t_tg"])
