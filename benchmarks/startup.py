"""From the start of a process to its first token, and what memory it then has, against llama.cpp.

    python benchmarks/startup.py                            Qwen3-0.6B shapes
    python benchmarks/startup.py --model 8b --layers 18     half of the layers of 8B
    python benchmarks/startup.py --model 8b --drop-source   all of them: 26 GB of disk, then 18

The same random weights, ours as they are converted, llama.cpp's as a GGUF file. Both map them, and
the files are read once before each start, so that they are in the page cache as far as memory holds
them. A process loads them, reads a prompt of 16 tokens and says which the next one is. All else is
as each has it by itself: ours verifies what it loads, takes a quarter of the memory for its cache
and imports torch; llama.cpp is a C program (peers/first_token.c) with a context of 512 tokens.

Private memory is what no file backs (RssAnon in /proc/PID/status), read when the token is there.
For ours, what Python, torch and our own modules take is told apart. The sides take turns, --repeat
rounds after one that does not count; the quickest start of each counts, and the most memory. Equal
tokens tell that both sides compute the same model, unless the last bits of random weights decide.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import random_model
import torch
from peers.environments import environment
from peers.gguf_model import ensure_gguf
from peers.llama_cpp import COUNTERPARTS
from process_memory import MAPPED, PRIVATE, status

from qwen3_ascend import ConvertOptions, convert_checkpoint
from qwen3_ascend.checkpoint.manifest import MANIFEST_NAME

OURS = Path(__file__).with_name("first_token.py")

PROMPT = 16
"""Tokens."""

IMPORTED, TOKEN = "imports", "token"
"""The stage of ours after which it begins to load, and the last one of every side."""


@dataclass(frozen=True)
class Start:
    """One process.

    Attributes:
        stages: seconds from the start until each stage was done, in their order.
        token: the first one.
        imported: bytes of private memory before anything was loaded; 0 where nothing tells.
        private: the same when the token was there.
        mapped: bytes of touched pages of mapped files then.
    """

    stages: Mapping[str, float]
    token: int
    imported: int
    private: int
    mapped: int


def start(command: Sequence[str]) -> Start:
    """Runs a process that prints a line after each stage, until its last, which is the token.

    Raises:
        SystemExit: if it ends before.
    """
    stages: dict[str, float] = {}
    said: dict[str, int] = {}
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while TOKEN not in stages:
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{' '.join(command)} ended before its first token")
            stage, value = line.split()
            stages[stage] = time.perf_counter() - began
            said[stage] = int(value)
        memory = status(process.pid)
        process.communicate()
    return Start(stages, said[TOKEN], said.get(IMPORTED, 0), memory[PRIVATE], memory[MAPPED])


def best(starts: Sequence[Start]) -> Start:
    """The quickest of several, with the most memory that any had."""
    return replace(
        min(starts, key=lambda each: each.stages[TOKEN]),
        imported=max(each.imported for each in starts),
        private=max(each.private for each in starts),
        mapped=max(each.mapped for each in starts),
    )


def table(found: Mapping[str, Start], stored: Mapping[str, int]) -> Iterator[str]:
    """A table in Markdown.

    Args:
        found: the best of each side.
        stored: bytes of the weight files of each side.
    """
    yield (
        "| engine | first token | after the imports | stages | private | beyond the imports "
        "| of the weights | mapped | the token |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, each in found.items():
        added = each.private - each.imported
        cells = [
            name,
            f"{each.stages[TOKEN]:.2f} s",
            f"{each.stages[TOKEN] - each.stages.get(IMPORTED, 0):.2f} s",
            ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in durations(each).items()),
            f"{each.private / 2**20:.0f} MiB",
            f"{added / 2**20:.0f} MiB",
            f"{100 * added / stored[name]:.1f} %",
            f"{each.mapped / 2**20:.0f} MiB",
            str(each.token),
        ]
        yield f"| {' | '.join(cells)} |"


def durations(one: Start) -> dict[str, float]:
    """Seconds of each stage by itself."""
    ends = list(one.stages.values())
    begins = [0.0, *ends[:-1]]
    return {stage: end - begin for stage, begin, end in zip(one.stages, begins, ends, strict=True)}


@dataclass(frozen=True)
class Side:
    """One of those that start.

    Attributes:
        name: for the table.
        command: loads, and prints its stages.
        files: with its weights.
    """

    name: str
    command: list[str]
    files: list[Path]


def our_side(chosen: argparse.Namespace, recipe: str, threads: int) -> Side:
    """Ours, converted unless that was done before."""
    data = random_model.config(chosen.model, chosen.layers)
    source = chosen.workdir / f"{chosen.model}-{data['num_hidden_layers']}"
    output = source.with_name(f"{source.name}-{recipe}")
    if not (output / MANIFEST_NAME).exists():
        random_model.ensure(source, data)
        convert_checkpoint(source, output, recipe, ConvertOptions(overwrite=True))
        if chosen.drop_source:
            shutil.rmtree(source)
    words = [sys.executable, OURS, output, threads, PROMPT]
    return Side(f"ours {recipe}", [*map(str, words)], sorted(output.glob("*.safetensors")))


def llama_side(chosen: argparse.Namespace, kind: str, threads: int) -> Side:
    """llama.cpp, with a model that is written unless that was done before."""
    data = random_model.config(chosen.model, chosen.layers)
    path = chosen.workdir / f"{chosen.model}-{data['num_hidden_layers']}-{kind}.gguf"
    model = ensure_gguf(path, data, kind)
    words = [environment("llama-cpp") / "first_token", model, threads, PROMPT]
    return Side(f"llama.cpp {kind}", [*map(str, words)], [model])


def read_once(files: Sequence[Path]) -> None:
    """Brings files into the page cache."""
    buffer = memoryview(bytearray(1 << 23))
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def main() -> None:
    """Starts every side in turn, and prints a table."""
    chosen = parse()
    threads = chosen.threads or torch.get_num_threads()
    sides = [our_side(chosen, recipe, threads) for recipe in chosen.recipes]
    kinds = dict.fromkeys(COUNTERPARTS[r] for r in chosen.recipes if r in COUNTERPARTS)
    sides += [llama_side(chosen, kind, threads) for kind in kinds]
    starts: dict[str, list[Start]] = {side.name: [] for side in sides}
    for number in range(chosen.repeat + 1):
        for side in sides:
            read_once(side.files)
            found = start(side.command)
            if number:  # the first brings programs and libraries into memory
                starts[side.name].append(found)
    layers = random_model.config(chosen.model, chosen.layers)["num_hidden_layers"]
    print(f"{random_model.processor()}, {threads} threads; {chosen.model}, {layers} layers\n")
    stored = {side.name: sum(file.stat().st_size for file in side.files) for side in sides}
    print("\n".join(table({name: best(each) for name, each in starts.items()}, stored)))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="0.6b", choices=random_model.SHAPES)
    parser.add_argument("--layers", type=int, help="only so many")
    parser.add_argument("--recipes", nargs="+", default=["w8a8-head"])
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, help="of both sides; default: torch's own choice")
    parser.add_argument(
        "--drop-source", action="store_true", help="remove the source once it is converted"
    )
    parser.add_argument(
        "--workdir", type=Path, default=Path(tempfile.gettempdir()) / "qwen3-ascend",
        help="keeps the models between runs",
    )  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    main()
