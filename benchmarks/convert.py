"""Conversion against `cp`, the hash's own limit, transforms, an earlier version, llm-compressor.

    python benchmarks/convert.py                                   Qwen3-0.6B shapes, 1.2 GB
    python benchmarks/convert.py --model 8b --layers 2             its embedding and two layers
    python benchmarks/convert.py --earlier other/src               with another version in turn
    python benchmarks/convert.py --peer-python other/bin/python    with llm-compressor, see below

Makes a random-weight checkpoint (kept in --workdir), reads it once so that it is in the page cache,
and then runs in turn, --repeat times: `cp` of the weights, `cp` and a sync, our conversion to w8a8
in FRACTAL_NZ with a BLAKE3 of every byte written (with --hash-source also of every byte read),
synced to disk, the same after the transforms that need no data (cle and rotate), and the peer. The
best of each counts, because other work on the machine only ever
adds; medians are printed beside them. "work" is without start and imports. Private memory is what
no other process shares and no file backs (RssAnon); the base is the interpreter with everything
imported, just before it begins.

Why a C kernel: on two Zen 4 cores torch operators on whole tensors reached 0.2 to 0.28 of cp's
rate, most of it spent in the byte transpose; with --fallback the same pipeline runs on torch
operators over small blocks.

llm-compressor, the peer, has two ways to data-free W8A8: model_free_ptq, which works on files as we
do, and oneshot, which loads the whole model with transformers. Both write row-major int8; neither
hashes anything or waits for the disk. It needs an environment of its own:

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import random_model
from blake3 import blake3
from process_memory import PRIVATE, status

PLAIN, TRANSFORMED = "w8a8-plain", "w8a8"
"""The recipes that are held against each other: the same scheme without and with transforms."""

PEER = """
import json, shutil, subprocess, sys, time
{imports}
source, output, settle = sys.argv[1:]
subprocess.run(["cp", "-r", source, settle], check=True)
shutil.rmtree(settle)
started = time.perf_counter()
{work}
used = {{"work": time.perf_counter() - started, "cpu": time.process_time()}}
print(json.dumps(used))
"""

PEERS = {
    "model_free_ptq": PEER.format(
        imports="from llmcompressor import model_free_ptq",
        work="""
model_free_ptq(source, output, scheme="W8A8", ignore=["lm_head", "model.embed_tokens"],
               max_workers=2, device="cpu")
""",
    ),
    "oneshot": PEER.format(
        imports="""
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
""",
        work="""
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="W8A8",
                                                 ignore=["lm_head"]))
model.save_pretrained(output, save_compressed=True)
""",
    ),
}


@dataclass(frozen=True)
class Figures:
    """Of one process: seconds in all, of its work, and of processors at work; memory in bytes."""

    wall: float
    work: float
    cpu: float
    peak_rss: int
    base_private: int
    peak_private: int


def child(source: str, output: str, options: argparse.Namespace) -> None:
    """What the measured process does: the command itself, which earlier versions have as well."""
    from qwen3_ascend.cli import main
    from qwen3_ascend.convert import convert_checkpoint  # noqa: F401  imports are no part of it

    command = ["convert", source, output, "--quiet", f"--recipe={options.recipe}"]
    command += [f"--threads={options.threads}"] if options.threads else []
    command += [f"--max-memory={options.max_memory}"] if options.max_memory else []
    command += ["--hash-source"] if options.hash_source else []
    settled = settle(Path(source), Path(output).parent)
    base = status(os.getpid())[PRIVATE]
    started, cpu = time.perf_counter(), time.process_time()
    main.main(command, standalone_mode=False)
    found = {"work": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    print(
        json.dumps({**found, "settled": settled, "base": base, "rss": status(os.getpid())["VmHWM"]})
    )


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
            peak = max(peak, status(process.pid).get(PRIVATE, 0))
        except OSError:
            break
        time.sleep(0.01)
    said = process.communicate()[0].strip().splitlines()
    wall = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    data = json.loads(said[-1])
    return Figures(
        wall - data.get("settled", 0),
        data["work"],
        data.get("cpu", 0),
        data.get("rss", 0),
        data.get("base", 0),
        peak,
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


def settle(source: Path, workdir: Path) -> float:
    """Copies a model and removes the copy, which takes the returned seconds.

    What is timed next, cp or a conversion, then finds memory that has just been in use: other
    memory may cost a virtual machine several times as much, and its host takes back what has been
    free for two seconds.
    """
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(workdir / "settle")], check=True)
    shutil.rmtree(workdir / "settle")
    return time.perf_counter() - started


def written(output: Path) -> int:
    """Bytes of the weight files in a checkpoint."""
    return sum(file.stat().st_size for file in output.glob("ascend-*"))


def hash_rate(start: Callable[[], Any]) -> float:
    """Bytes a second of a hash on one processor, best of five."""
    block, rates = memoryview(os.urandom(1 << 21)), []
    for _ in range(5):
        digest, started = start(), time.perf_counter()
        for _ in range(50):
            digest.update(block)
        rates.append(50 * len(block) / (time.perf_counter() - started))
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
          f"file(s); {random_model.processor()}; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    warm(files)
    output = workdir / "out"
    for name in ("out", "copy", "peer", "settle"):  # of a run that was broken off
        shutil.rmtree(workdir / name, ignore_errors=True)
    environment = {"QWEN3_ASCEND_NATIVE": "0"} if options.fallback else {}
    command = [sys.executable, __file__, "--child", str(source), str(output)]
    for name in ("threads", "max_memory"):
        if getattr(options, name) is not None:
            command.append(f"--{name.replace('_', '-')}={getattr(options, name)}")
    command += ["--hash-source"] if options.hash_source else []
    changed = [*command, f"--recipe={TRANSFORMED}"]
    command.append(f"--recipe={options.recipe}")
    copies: list[float] = []
    synced: list[float] = []
    ours, transformed, earlier = [], [], []
    peers: dict[str, list[Figures]] = {name: [] for name in PEERS if options.peer_python}
    for _ in range(options.repeat):
        for sync, times in ((False, copies), (True, synced)):
            settle(source, workdir)
            times.append(copy(files, workdir / "copy", sync))
            shutil.rmtree(workdir / "copy")
        ours.append(measure(command, environment))
        stored = written(output)
        shutil.rmtree(output)
        if options.recipe == PLAIN:
            transformed.append(measure(changed, environment))
            shutil.rmtree(output)
        if options.earlier:
            earlier.append(measure(command, {**environment, "PYTHONPATH": options.earlier}))
            shutil.rmtree(output)
        for name, runs in peers.items():
            runs.append(peer(options.peer_python, PEERS[name], source, workdir / "peer"))
    report(nbytes, stored + options.hash_source * nbytes, copies, synced, ours)
    if transformed:
        compare_transformed(ours, transformed)
    if earlier:
        compare("earlier version", nbytes, ours, earlier)
    for name, runs in peers.items():
        compare(f"llm-compressor {name}", nbytes, ours, runs)
    if not peers:
        print("llm-compressor: not run; see --help for how to get it")


def report(
    nbytes: int, hashed: int, copies: list[float], synced: list[float], ours: list[Figures]
) -> None:
    """Prints our figures beside cp's and the hash's."""
    from qwen3_ascend import native

    best = min(run.work for run in ours)
    processors = len(os.sched_getaffinity(0))

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
    rate, other = hash_rate(blake3), hash_rate(hashlib.sha256)
    print(f"BLAKE3 alone, a processor: {rate / 1e9:.2f} GB/s (SHA-256: {other / 1e9:.2f}); so at "
          f"least {hashed / rate / processors:.2f} s for the {hashed / 1e9:.2f} GB that are hashed"
    )  # fmt: skip
    private = max(run.peak_private for run in ours)
    base = max(run.base_private for run in ours)
    print(f"peak RSS {max(run.peak_rss for run in ours) / 2**20:.0f} MiB, peak private memory "
          f"{private / 2**20:.0f} MiB, of which {base / 2**20:.0f} before it began: "
          f"{(private - base) / 2**20:.0f} MiB")  # fmt: skip
    print(f"kernels: {native.describe()}")


def compare_transformed(plain: list[Figures], transformed: list[Figures]) -> None:
    """Prints what transforms cost in the same run, best against best."""
    work = min(run.work for run in transformed), min(run.work for run in plain)
    cpu = min(run.cpu for run in transformed), min(run.cpu for run in plain)
    private = [max(r.peak_private for r in runs) - max(r.base_private for r in runs)
               for runs in (transformed, plain)]  # fmt: skip
    print(f"{TRANSFORMED} against {PLAIN}: processor time {cpu[0]:.2f} s, {cpu[0] / cpu[1]:.2f} x; "
          f"work {work[0]:.2f} s, {work[0] / work[1]:.2f} x; private memory "
          f"{private[0] / 2**20:.0f} MiB against {private[1] / 2**20:.0f}; "
          f"{random_model.processor()}")  # fmt: skip


def peer(python: str, script: str, source: Path, output: Path) -> Figures:
    """Runs llm-compressor in its own interpreter."""
    command = [python, "-c", script, str(source), str(output), str(output.with_name("settle"))]
    figures = measure(command, {"CUDA_VISIBLE_DEVICES": ""}, quiet=True)
    shutil.rmtree(output)
    return figures


def compare(name: str, nbytes: int, ours: list[Figures], theirs: list[Figures]) -> None:
    """Prints the figures of a peer or an earlier version, and how many times our time it took."""
    times, mine = [run.work for run in theirs], [run.work for run in ours]
    best, median = min(times), statistics.median(times)
    private = max(run.peak_private for run in theirs) / 2**20
    private -= max(run.base_private for run in theirs) / 2**20
    print(f"{name:28} {best:6.2f} s  (median {median:.2f})  "
          f"{nbytes / best / 1e9:5.2f} GB/s of source  {best / min(mine):.1f} x our time (medians "
          f"{median / statistics.median(mine):.1f} x), private memory {private:.0f} MiB"
    )  # fmt: skip


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=random_model.SHAPES, default="0.6b")
    parser.add_argument("--layers", type=int, help="only so many, of a model that is larger")
    parser.add_argument("--recipe", default=PLAIN)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-memory", type=int, help="bytes")
    parser.add_argument("--workdir", help="holds the models between runs; default: below /tmp")
    parser.add_argument("--hash-source", action="store_true", help="convert with this option")
    parser.add_argument("--fallback", action="store_true", help="torch instead of the C kernels")
    parser.add_argument("--earlier", help="the src folder of another version of this project")
    parser.add_argument("--peer-python", help="an interpreter that has llmcompressor")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    given = parse()
    if given.child:
        source, output = given.child
        child(source, output, given)
    else:
        main()
