"""Converts or exports again and again in processes that are killed, and compares what comes out.

    cd tests; python -m support.crash_driver SOURCE WORKDIR --steps 25 --instants 10 [--seed 0]
    cd tests; python -m support.crash_driver SOURCE WORKDIR --recipe FILE --calibration-tokens 1024
    cd tests; python -m support.crash_driver CHECKPOINT WORKDIR --format ascendv1 [--over EXPORT]

One process imports torch and transformers and forks the others, so that a trial takes milliseconds
and kills meet the conversion instead of imports. A step is a call
that changes the disk (write, rename, unlink, sync): a kill after each of them leaves every state
that a crash can leave; a kill at a random instant leaves whatever it meets. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qwen3_ascend.checkpoint.manifest import MANIFEST_NAME
from qwen3_ascend.convert import (
    ConvertOptions,
    WritingOptions,
    convert_checkpoint,
    export_checkpoint,
)
from qwen3_ascend.convert.export.record import RECORD_NAME
from qwen3_ascend.runtime.tokenizer import load_tokenizer
from support.folders import contents

JOURNAL = ".partial/journal.jsonl"

STEPS = ("pwrite", "write", "replace", "unlink", "fsync", "fdatasync", "rmdir", "mkdir")


class Driver:
    """Trials of one work; every one must end with the bytes of an undisturbed run."""

    def __init__(
        self, write: Callable[[Path], object], seal: str, workdir: Path, over: Path | None
    ) -> None:
        self._write, self._seal, self._over = write, seal, over
        self._out, self._good = workdir / "out", workdir / "reference"
        self._trials = self._kills = self._completed = 0
        started = time.perf_counter()
        self._begin(self._good)
        assert self._fork(self._good, lambda: None) == 0
        self._seconds = time.perf_counter() - started
        self._expected = contents(self._good)

    def steps(self, count: int, rng: random.Random) -> int:
        """Kills after `count` of all steps (0: after each); returns how many there are."""
        total = self._count_steps()
        chosen = range(1, total + 1)
        late = [*chosen[-25:]]  # publishing
        early = [*chosen[:-25]]
        picked = [*rng.sample(early, min(len(early), max(0, count - len(late)))), *late]
        for step in sorted(picked) if count else chosen:
            self._trial(partial(die_at_step, step))
        return total

    def instants(self, count: int, rng: random.Random) -> None:
        """Kills at random instants; what is continued is killed again, up to three times."""
        for _ in range(count):
            delays = [rng.uniform(0, self._seconds) for _ in range(rng.randint(1, 3))]
            self._trial(*[partial(die_in, delay) for delay in delays])

    def summary(self) -> dict[str, int]:
        """What has been tried."""
        return {"trials": self._trials, "kills": self._kills, "completed": self._completed}

    def _begin(self, output: Path) -> None:
        """Nothing is there, or what is to be replaced."""
        shutil.rmtree(output, ignore_errors=True)
        if self._over is not None:
            shutil.copytree(self._over, output)

    def _trial(self, *deaths: Callable[[], None]) -> None:
        self._begin(self._out)
        for death in deaths:
            status = self._fork(self._out, death)
            self._kills += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL), f"a run ended with {status}"
            if status == 0 or self._is_finished():
                break
        if not self._is_finished():
            assert self._fork(self._out, lambda: None) == 0, "the work was not continued"
        else:
            self._completed += 1
        found = contents(self._out)
        different = [name for name in {**found, **self._expected}
                     if found.get(name) != self._expected.get(name)]  # fmt: skip
        assert not different, f"{different} differ after a kill"
        self._trials += 1

    def _is_finished(self) -> bool:
        """A kill while it tidies up leaves a finished output, which is not to be overwritten: the
        same command would refuse; unless it overwrites."""
        is_whole = (self._out / self._seal).exists() and not (self._out / JOURNAL).exists()
        return is_whole and self._over is None

    def _count_steps(self) -> int:
        read, write = os.pipe()
        self._begin(self._out)
        assert self._fork(self._out, count_steps, lambda total: os.write(write, b"%d" % total)) == 0
        return int(os.read(read, 100))

    def _fork(
        self,
        output: Path,
        prepare: Callable[[], Any],
        report: Callable[[int], Any] = lambda total: None,
    ) -> int:
        """Works in a process of its own; its exit code, or minus the signal that ended it."""
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            counter = prepare()
            self._write(output)
            report(counter[0] if counter else 0)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)


def on_every_step(action: Callable[[int], None]) -> list[int]:
    """Calls `action` with the number of each step, after it; the list holds the last number."""
    counter, lock = [0], threading.Lock()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            with lock:
                counter[0] += 1
                action(counter[0])
            return result

        return call

    in_pathlib = getattr(
        pathlib, "_NormalAccessor", None
    )  # Python 3.10 keeps functions of os there
    for name in STEPS:
        function = counted(getattr(os, name))
        setattr(os, name, function)
        if hasattr(in_pathlib, name):
            setattr(in_pathlib, name, staticmethod(function))
    return counter


def count_steps() -> list[int]:
    """Only counts."""
    return on_every_step(lambda number: None)


def die_at_step(step: int) -> None:
    """Kills this process after a step."""
    on_every_step(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == step else None)


def die_in(seconds: float) -> None:
    """Kills this process after a time, from a process that does nothing else."""
    victim = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        if os.getppid() == victim:
            os.kill(victim, signal.SIGKILL)
        os._exit(0)


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--steps", type=int, default=0, help="0 for all")
    parser.add_argument("--instants", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipe", help="of the conversion; the default one if not given")
    parser.add_argument("--calibration-tokens", type=int, default=512, help="if it is calibrated")
    parser.add_argument("--format", help="export SOURCE, a checkpoint, instead of converting")
    parser.add_argument("--over", type=Path, help="an export that is replaced in each trial")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    load_tokenizer(options.source)  # for its imports, which every child inherits

    def write(output: Path) -> object:
        if options.format:
            overwrite = options.over is not None
            choices = WritingOptions(threads=options.threads, overwrite=overwrite)
            return export_checkpoint(options.source, output, options.format, choices)
        tokens = options.calibration_tokens
        choices = ConvertOptions(threads=options.threads, calibration_tokens=tokens)
        return convert_checkpoint(options.source, output, options.recipe, choices)

    seal = RECORD_NAME if options.format else MANIFEST_NAME
    driver = Driver(write, seal, options.workdir, options.over)
    total = driver.steps(options.steps, rng)
    driver.instants(options.instants, rng)
    print(json.dumps({"steps": total, **driver.summary()}))


if __name__ == "__main__":
    main()
