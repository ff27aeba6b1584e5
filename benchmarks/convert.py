"""Conversion against `cp`, against the hash's own limit, and against llm-compressor.

    python benchmarks/convert.py                                   Qwen3-0.6B shapes, 1.2 GB
    python benchmarks/convert.py --model 8b --layers 2             its embedding and two layers
    python benchmarks/convert.py --peer-python other/bin/python    with llm-compressor, see below

Makes a random-weight checkpoint (kept in --workdir), reads it once so that it is in the page cache,
and then runs in turn, --repeat times: `cp` of the weights, `cp` and a sync, and our conversion to
w8a8 in FRACTAL_NZ with a SHA-256 of every byte read and of every byte written, synced to disk. The
best of each counts, because other work on the machine only ever adds. "work" is without start and
imports. Private memory is what no other process shares and no file backs (RssAnon); the base is
the interpreter with everything imported, just before it begins.

Why a C kernel: on two Zen 4 cores torch operators on whole tensors reached 0.2 to 0.28 of cp's
rate, most of it spent in the byte transpose; with --fallback the same pipeline runs on torch
operators over small blocks. Of the processor time of a conversion, hashing is half by now.

llm-compressor, the peer (data-free W8A8, which writes row-major int8):

    python -m venv peer && peer/bin/pip install llmcompressor
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import random_model

PEER = """
import json, sys, time
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
source, output = sys.argv[1:]
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
recipe = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
oneshot(model=model, recipe=recipe)
model.save_pretrained(output, save_compressed=True)
used = {"work": time.perf_counter() - started, "cpu": time.process_time()}
print(json.dumps(used))
"""


@dataclass(frozen=True)
class Figures:
    """Of one process: seconds in all, of its work, and of processors at work; memory in bytes."""

    wall: float
    work: float
    cpu: float
    peak_rss: int
    base_private: int
    peak_private: int


def child(
    source: str, output: str, threads: int | None, max_memory: int | None, recipe: str
) -> None:
    """What the measured process does."""
    from qwen3_ascend.convert import convert_checkpoint

    base = status(os.getpid())["RssAnon"]
    started, cpu = time.perf_counter(), time.process_time()
    convert_checkpoint(source, output, recipe, threads=threads, max_memory=max_memory)
    found = {"work": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    print(json.dumps({**found, "base": base, "rss": status(os.getpid())["VmHWM"]}))


def status(pid: int) -> dict[str, int]:
    """The memory lines of /proc/PID/status, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in pairs}


def measure(command: list[str], environment: dict[str, str], quiet: bool = False) -> Figures:
    """Runs a process that prints what `child` prints, and watches its memory."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL if quiet else None, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, status(process.pid).get("RssAnon", 0))
        except OSError:
            break
        time.sleep(0.01)
    said = process.communicate()[0].strip().splitlines()
    wall = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    data = json.loads(said[-1])
    return Figures(
        wall, data["work"], data.get("cpu", 0), data.get("rss", 0), data.get("base", 0), peak
    )


def copy(files: list[Path], folder: Path, sync: bool) -> float:
    """Seconds that cp takes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    started = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(folder)], check=True)
    if sync:
        subprocess.run(["sync", *(str(folder / file.name) for file in files)], check=True)
    return time.perf_counter() - started


def hash_rate() -> float:
    """Bytes a second of SHA-256 on one processor, best of five."""
    block, rates = os.urandom(1 << 18), []
    for _ in range(5):
        started, digest = time.perf_counter(), hashlib.sha256()
        for _ in range(400):
            digest.update(block)
        rates.append(400 * len(block) / (time.perf_counter() - started))
    return max(rates)


def warm(files: list[Path]) -> None:
    """Brings files into the page cache."""
    for file in files:
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def main() -> None:
    """Prints the table."""
    options = parse()
    workdir = Path(options.workdir or Path(tempfile.gettempdir()) / "qwen3-ascend-benchmark")
    data = random_model.config(options.model, options.layers)
    label = f"{options.model}-{data['num_hidden_layers']}"
    source = random_model.ensure(workdir / label, data)
    files = sorted(source.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    layers = data["num_hidden_layers"]
    print(f"Qwen3-{options.model} shapes, {layers} layers: {nbytes / 1e9:.2f} GB in {len(files)} "
          f"file(s); other work on this machine: load {os.getloadavg()[0]:.1f}")  # fmt: skip
    warm(files)
    output = workdir / "out"
    environment = {"QWEN3_ASCEND_NATIVE": "0"} if options.fallback else {}
    command = [sys.executable, __file__, "--child", str(source), str(output)]
    for name in ("threads", "max_memory", "recipe"):
        if getattr(options, name) is not None:
            command.append(f"--{name.replace('_', '-')}={getattr(options, name)}")
    copies, synced, ours = [], [], []
    for _ in range(options.repeat):
        copies.append(copy(files, workdir / "copy", False))
        synced.append(copy(files, workdir / "copy", True))
        shutil.rmtree(workdir / "copy")
        shutil.rmtree(output, ignore_errors=True)
        ours.append(measure(command, environment))
    report(nbytes, output, copies, synced, ours)
    if options.peer_python:
        peer(options.peer_python, source, workdir / "peer", nbytes, ours)
    else:
        print("llm-compressor: not run; see --help for how to get it")
    shutil.rmtree(output)


def report(
    nbytes: int, output: Path, copies: list[float], synced: list[float], ours: list[Figures]
) -> None:
    """Prints our figures beside cp's and the hash's."""
    from qwen3_ascend import native

    written = sum(file.stat().st_size for file in output.glob("ascend-*"))
    best = min(run.work for run in ours)
    rate = hash_rate()
    processors = len(os.sched_getaffinity(0))
    hashing = max((nbytes + written) / rate / processors, nbytes / rate)

    def line(what: str, times: list[float], note: str = "") -> None:
        spread = f"{min(times):6.2f} s  (median {statistics.median(times):.2f})"
        print(f"{what:28} {spread}  {nbytes / min(times) / 1e9:5.2f} GB/s of source  {note}")

    line("cp", copies)
    line("cp and sync", synced)
    line("convert, work", [run.work for run in ours], f"{min(copies) / best:.2f} x cp, "
         f"{min(synced) / best:.2f} x cp and sync")  # fmt: skip
    line("convert, whole process", [run.wall for run in ours])
    cpu = min(run.cpu for run in ours)
    print(f"processor time of the work: {cpu:.2f} s, so {cpu / processors:.2f} s on {processors} "
          "idle processor(s)")  # fmt: skip
    print(f"hashing alone: {rate / 1e9:.2f} GB/s a processor, so {hashing:.2f} s for the "
          f"{nbytes / 1e9:.2f} GB read and {written / 1e9:.2f} GB written")  # fmt: skip
    private = max(run.peak_private for run in ours)
    base = max(run.base_private for run in ours)
    print(f"peak RSS {max(run.peak_rss for run in ours) / 2**20:.0f} MiB, peak private memory "
          f"{private / 2**20:.0f} MiB, of which {base / 2**20:.0f} before it began: "
          f"{(private - base) / 2**20:.0f} MiB")  # fmt: skip
    print(f"kernels: {native.describe()}")


def peer(python: str, source: Path, output: Path, nbytes: int, ours: list[Figures]) -> None:
    """Runs llm-compressor once in its own interpreter."""
    shutil.rmtree(output, ignore_errors=True)
    run = measure(
        [python, "-c", PEER, str(source), str(output)], {"CUDA_VISIBLE_DEVICES": ""}, quiet=True
    )
    shutil.rmtree(output, ignore_errors=True)
    work, cpu = min(figures.work for figures in ours), min(figures.cpu for figures in ours)
    print(f"llm-compressor, work {run.work:.2f} s, {nbytes / run.work / 1e9:.2f} GB/s, processor "
          f"time {run.cpu:.2f} s, peak private memory {run.peak_private / 2**20:.0f} MiB"
    )  # fmt: skip
    print(f"ours takes 1/{run.work / work:.1f} of its time, 1/{run.cpu / cpu:.1f} of its processor "
          "time (the peer's includes imports)")  # fmt: skip


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=random_model.SHAPES, default="0.6b")
    parser.add_argument("--layers", type=int, help="only so many, of a model that is larger")
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-memory", type=int, help="bytes")
    parser.add_argument("--workdir", help="holds the models between runs; default: below /tmp")
    parser.add_argument("--fallback", action="store_true", help="torch instead of the C kernels")
    parser.add_argument("--peer-python", help="an interpreter that has llmcompressor")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    given = parse()
    if given.child:
        child(*given.child, given.threads, given.max_memory, given.recipe)
    else:
        main()
