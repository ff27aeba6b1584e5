"""Converts or exports again and again in processes that are killed, and compares what comes out.

    cd tests; python -m support.crash_driver SOURCE WORKDIR --steps 25 --instants 10 [--seed 0]
    cd tests; python -m support.crash_driver SOURCE WORKDIR --recipe FILE --calibration-tokens 1024
    cd tests; python -m support.crash_driver CHECKPOINT WORKDIR --format ascendv1 [--over EXPORT]

One process does the work once and forks the others, so that a trial takes milliseconds
and kills meet the conversion instead of imports. A step is a call (write, rename, unlink, sync)
after which the output is not what it was: a kill after each of them leaves every state that a crash
can leave; a kill at a random instant leaves whatever it meets. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
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
from support.folders import contents

JOURNAL = ".partial/journal.jsonl"

CALLS = ("pwrite", "write", "replace", "unlink", "fsync", "fdatasync", "rmdir", "mkdir")


class Driver:
    """Trials of one work; every one must end with the bytes of an undisturbed run."""

    def __init__(
        self, write: Callable[[Path], object], seal: str, workdir: Path, over: Path | None
    ) -> None:
        self._write, self._seal, self._over = write, seal, over
        self._out, self._good = workdir / "out", workdir / "reference"
        self._trials = self._kills = self._completed = 0
        self._begin(self._good)
        self._write(self._good)  # in this process: children inherit what a first run imports
        self._expected = contents(self._good)
        self._begin(self._out)
        started = time.perf_counter()
        assert self._fork(self._out, lambda: None) == 0
        self._seconds = time.perf_counter() - started

    def steps(self, count: int, rng: random.Random) -> int:
        """Kills after `count` of all steps (0: after each); returns how many there are."""
        found = self._find_steps()
        late = found[-25:]  # publishing
        early = found[:-25]
        picked = [*rng.sample(early, min(len(early), max(0, count - len(late)))), *late]
        for call in sorted(picked) if count else found:
            self._trial(partial(die_after, call))
        return len(found)

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

    def _find_steps(self) -> list[int]:
        read, write = os.pipe()
        self._begin(self._out)
        status = self._fork(
            self._out, partial(note_steps, self._out),
            lambda steps: os.write(write, json.dumps(steps).encode()),
        )  # fmt: skip
        assert status == 0
        return list(json.loads(os.read(read, 1 << 16)))

    def _fork(
        self,
        output: Path,
        prepare: Callable[[], Any],
        report: Callable[[Any], object] = lambda prepared: None,
    ) -> int:
        """Works in a process of its own; its exit code, or minus the signal that ended it."""
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            prepared = prepare()
            self._write(output)
            report(prepared)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)


def state(output: Path) -> dict[Path, bytes | None]:
    """What a crash at this instant would leave: folders, files and their bytes."""
    found: dict[Path, bytes | None] = {}
    for path in [output, *output.rglob("*")] if output.exists() else []:
        with contextlib.suppress(FileNotFoundError):  # another thread has just taken it away
            found[path] = path.read_bytes() if path.is_file() else None
    return found


def on_every_call(action: Callable[[int], None]) -> None:
    """Calls `action` with the number of each call that may change the disk, after it."""
    numbers, lock = itertools.count(1), threading.Lock()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            with lock:
                action(next(numbers))
            return result

        return call

    in_pathlib = getattr(
        pathlib, "_NormalAccessor", None
    )  # Python 3.10 keeps functions of os there
    for name in CALLS:
        function = counted(getattr(os, name))
        setattr(os, name, function)
        if hasattr(in_pathlib, name):
            setattr(in_pathlib, name, staticmethod(function))


def note_steps(output: Path) -> list[int]:
    """The numbers of the calls that were steps; they come as the work goes on."""
    steps, last = list[int](), state(output)

    def look(number: int) -> None:
        nonlocal last
        before, last = last, state(output)
        if last != before:
            steps.append(number)

    on_every_call(look)
    return steps


def die_after(call: int) -> None:
    """Kills this process after a call."""
    on_every_call(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == call else None)


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
