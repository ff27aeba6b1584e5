"""From the start of a process to its first text: how long it takes, what of it is imports, and how
much memory is the process's own by then.

    python benchmarks/first_text.py CHECKPOINT [--repeat 5] [options of generate]

Each run is `qwen3-ascend generate` in a process of its own. The clock starts before the process and
ends with the first byte of its answer. Imports are timed within it, where Python finds and loads a
module. Memory is what no other process shares (Private_Dirty of smaps_rollup): mapped weights
are not in it. The fastest of the runs counts, because other work on the machine only ever adds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHILD = """
import importlib._bootstrap as bootstrap, json, sys, threading, time
find_and_load, main, depth, seconds = bootstrap._find_and_load, threading.get_ident(), 0, {}
def timed(name, importer):
    global depth
    if threading.get_ident() != main:
        return find_and_load(name, importer)
    depth, started = depth + 1, time.perf_counter()
    try:
        return find_and_load(name, importer)
    finally:
        depth -= 1
        if not depth:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
bootstrap._find_and_load = timed
from qwen3_ascend.cli import main as command
try:
    command(sys.argv[2:], standalone_mode=False)
finally:
    open(sys.argv[1], "w").write(json.dumps(seconds))
"""


@dataclass(frozen=True)
class Start:
    """One run: seconds to the first text, and of imports by module; own memory in bytes."""

    text: float
    imports: dict[str, float]
    private: int

    @property
    def beyond(self) -> float:
        """Seconds that are not imports."""
        return self.text - sum(self.imports.values())


def run(checkpoint: str, options: list[str]) -> Start:
    """Starts a process, and waits for its first byte."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "imports.json"
        command = [sys.executable, "-c", CHILD, str(report), "generate", checkpoint, *options]
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None
            if not child.stdout.read(1):
                raise SystemExit(f"no text came of: {' '.join(command[4:])}")
            seconds = time.perf_counter() - started
            private = private_bytes(child.pid)
            child.stdout.read()
        return Start(seconds, json.loads(report.read_text()), private)


def private_bytes(process: int) -> int:
    """Memory of a process that is no other's and no file's; Linux only."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not say what is private")


def main() -> None:
    """Prints the fastest run, and the imports that take most of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--prompt", default="What does river mean?")
    chosen, options = parser.parse_known_args()
    options += ["--prompt", chosen.prompt]
    runs = [run(chosen.checkpoint, options) for _ in range(chosen.repeat)]
    best = min(runs, key=lambda one: one.text)
    imports = sum(best.imports.values())
    print(f"first text after {best.text:.2f} s: imports {imports:.2f} s, else {best.beyond:.2f} s")
    print(f"own memory then: {best.private / 1e6:.0f} MB")
    for name, seconds in sorted(best.imports.items(), key=lambda item: -item[1])[:6]:
        print(f"  {seconds * 1e3:6.0f} ms  {name}")


if __name__ == "__main__":
    main()
