"""Requests beside each other on a CPU, with an earlier version of this project in turn.

    python benchmarks/serving.py                             this version
    python benchmarks/serving.py --earlier other/src         and another one, interleaved

Random weights in 0.6B layer shapes, w8a8, a few layers. Four measurements:

    short    seconds to the first text of a short prompt that comes just after a long one
    running  tokens a second of 8 running answers from a long prompt's arrival to its first text,
             and the longest time between two tokens of one of them
    shared   8 requests that begin with the same 512 tokens, one after the other: seconds, and the
             prompt tokens that were computed
    tiny     the same answers under a key/value cache that holds a quarter of what they need; it
             fails unless requests were put back, and every token is the same all the same

A long prompt has 4096 tokens. The best of --repeat runs counts. What an earlier version does not
have (a prefix cache, preemption) is left out there, and said so. The engine is driven step by step
where a stream would hide what the other requests get meanwhile.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import random_model

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "tiny-qwen3"

LONG, SHORT, SYSTEM = 4096, 16, 512
ANSWERS = 8
SMALL, NEW = 40, 64
"""Tokens of a prompt and of its answer under a tiny cache: prompts that fit, answers that outgrow
it, so that requests are put back; a long prompt would only be admitted later."""


def model(workdir: Path, layers: int) -> Path:
    """The source model, written once."""
    data = random_model.config("0.6b", layers) | {"vocab_size": 32000}
    folder = random_model.ensure(workdir / f"serving-{layers}", data)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # an earlier version wants one
        shutil.copyfile(TOKENIZER / name, folder / name)
    return folder


def prompt(length: int, seed: int) -> list[int]:
    """Token ids that no other seed begins with."""
    return [(seed * 7919 + 31 * at) % 31000 + 5 for at in range(length)]


def opened(checkpoint: Path, **options: Any) -> Any:
    """A loaded checkpoint; options that this version does not have are dropped."""
    from qwen3_ascend import load

    known = inspect.signature(load).parameters
    by_name = any(one.kind is one.VAR_KEYWORD for one in known.values())
    taken = {name: value for name, value in options.items() if by_name or name in known}
    return load(checkpoint, device="cpu", verify=False, **taken)


def stream(llm: Any, tokens: list[int], new: int) -> Iterator[str]:
    """An answer of exactly `new` tokens, as it comes."""
    from qwen3_ascend import SamplingParams

    return iter(llm.stream(tokens, SamplingParams(max_new_tokens=new, ignore_eos=True)))


def noted_rows(llm: Any) -> list[int]:
    """A list that gets the rows of every step from now on: the tokens that are computed."""
    rows: list[int] = []
    forward = llm._engine._forward

    def noting(step: Any) -> Any:
        rows.append(len(step.tokens))
        return forward(step)

    llm._engine._forward = noting
    return rows


def measure(checkpoint: Path) -> dict[str, float | None]:
    """All figures of the version that is imported here."""
    from qwen3_ascend import load

    llm = opened(checkpoint, kv_cache_tokens=32768, max_batch=16)
    list(stream(llm, prompt(SHORT, 99), 2))
    found: dict[str, float | None] = dict.fromkeys(UNITS)
    found |= {"short": short_beside_long(llm), **running_beside_long(llm)}
    if "prefill_chunk" in inspect.signature(load).parameters:
        return found  # before batches were mixed
    return {**found, **shared_beginning(checkpoint), **tiny_cache(checkpoint)}


def short_beside_long(llm: Any) -> float:
    """Seconds until a short prompt has its first token, which came just after a long one."""
    engine = llm._engine
    started = time.perf_counter()
    engine.add(prompt(LONG, 1), _params(4), frozenset())
    short = engine.add(prompt(SHORT, 2), _params(4), frozenset())
    while len(short.tokens) == SHORT:
        engine.step()
    first = time.perf_counter() - started
    while engine.busy:
        engine.step()
    return first


def _params(new: int) -> Any:
    from qwen3_ascend import SamplingParams

    return SamplingParams(max_new_tokens=new, ignore_eos=True)


def running_beside_long(llm: Any) -> dict[str, float]:
    """What 8 running answers get while a long prompt is computed."""
    engine = llm._engine
    answers = [engine.add(prompt(SHORT, 10 + i), _params(400), frozenset()) for i in range(8)]
    while any(len(one.tokens) < SHORT + 4 for one in answers):
        engine.step()
    long = engine.add(prompt(LONG, 3), _params(2), frozenset())
    before = sum(len(one.tokens) for one in answers)
    started = last = time.perf_counter()
    longest, watched = 0.0, len(answers[0].tokens)
    while len(long.tokens) == LONG:
        engine.step()
        now = time.perf_counter()
        if len(answers[0].tokens) > watched:
            longest, last, watched = max(longest, now - last), now, len(answers[0].tokens)
    ended = time.perf_counter()
    tokens = sum(len(one.tokens) for one in answers) - before
    longest = max(longest, ended - last)
    end = engine.abort if hasattr(engine, "abort") else engine.retire
    for one in [*answers, long]:
        end(one)
    return {"running": tokens / (ended - started), "gap": longest, "long": ended - started}


def shared_beginning(checkpoint: Path) -> dict[str, float]:
    """Seconds and computed prompt tokens of 8 requests with the same 512 tokens in front, with the
    cache of beginnings and without."""
    found: dict[str, float] = {}
    new = 4
    for name, cached in (("shared", True), ("unshared", False)):
        llm = opened(checkpoint, kv_cache_tokens=8192, prefix_cache=cached)
        list(stream(llm, prompt(SHORT, 99), 2))
        rows = noted_rows(llm)
        started = time.perf_counter()
        for i in range(ANSWERS):
            list(stream(llm, [*prompt(SYSTEM, 4), *prompt(SHORT, 20 + i)], new))
        found[name] = time.perf_counter() - started
        # The first token of an answer comes from its prompt's last row.
        found[f"{name} rows"] = sum(rows) - ANSWERS * (new - 1)
    return found


def tiny_cache(checkpoint: Path) -> dict[str, float]:
    """Seconds of 8 answers in a cache that holds a quarter of them, and in one that holds all; how
    many are equal, and how many tokens were computed again.

    In float32, so that another batch's rounding does not choose between two tokens.
    """
    found: dict[str, float] = {}
    said, computed = [], []
    prompts = [prompt(SMALL, 40 + i) for i in range(ANSWERS)]
    needed = ANSWERS * (SMALL + NEW)
    for name, tokens in (("tiny", needed // 4), ("ample", 2 * needed)):
        llm = opened(
            checkpoint, dtype="float32", kv_cache_tokens=tokens, block_size=16, prefix_cache=False
        )
        list(stream(llm, prompt(SHORT, 99), 2))
        rows = noted_rows(llm)
        started = time.perf_counter()
        answers = llm.generate(prompts, _params(NEW), progress=False)
        found[name] = time.perf_counter() - started
        said.append([answer.token_ids for answer in answers])
        computed.append(sum(rows))
    found["equal"] = sum(a == b for a, b in zip(*said, strict=True))
    found["again"] = computed[0] - computed[1]
    return found


def converted(source: Path, folder: Path) -> Path:
    """This version's checkpoint of the model: each version has its own format."""
    from qwen3_ascend import convert_checkpoint

    if not (folder / "qwen3_ascend.json").is_file():
        convert_checkpoint(source, folder, "w8a8")
    return folder


def child(source: str, folder: str) -> None:
    """What the measured process does."""
    print(json.dumps(measure(converted(Path(source), Path(folder)))))


def run(source: Path, folder: Path, path: str | None) -> dict[str, float | None]:
    """The figures of one version, from a process of its own."""
    environment = {**os.environ, **({"PYTHONPATH": path} if path else {})}
    command = [sys.executable, __file__, "--child", str(source), str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return found


UNITS = {"short": "s to the first text", "running": "tokens/s", "gap": "s between two tokens",
         "long": "s to the long prompt's first token", "shared": "s, 8 requests",
         "shared rows": "prompt tokens computed", "unshared": "s, 8 requests",
         "unshared rows": "prompt tokens computed", "tiny": "s, 8 answers",
         "ample": "s, 8 answers", "equal": "of 8 answers have the same tokens in both caches",
         "again": "tokens computed again in the tiny cache"}  # fmt: skip


def best(name: str, runs: list[dict[str, float | None]]) -> float | None:
    """The best figure of several runs; None if the version does not have it."""
    values = [value for one in runs if (value := one[name]) is not None]
    if not values:
        return None
    return max(values) if name == "running" else min(values)  # of "equal", the worst run's


def compared(mine: float, theirs: float | None) -> str:
    """The end of a line: an earlier version's figure, and ours divided by it."""
    if theirs is None:
        return "; earlier: not there"
    return f"; earlier {theirs:.2f}" + (f", {mine / theirs:.2f}x" if theirs else "")


def check_tiny(runs: list[dict[str, float | None]]) -> None:
    """Ends with a message if a tiny cache changed an answer, or put nobody back."""
    equal, again = best("equal", runs), best("again", runs)
    if equal != ANSWERS:
        sys.exit("the tiny cache changed an answer")
    if not again:
        sys.exit("the tiny cache held all requests: nothing was put back, nothing is shown")


def main(options: argparse.Namespace) -> None:
    """Prints the table."""
    workdir = Path(options.workdir or Path(tempfile.gettempdir()) / "qwen3-ascend-benchmark")
    source = model(workdir, options.layers)
    ours: list[dict[str, float | None]] = []
    earlier: list[dict[str, float | None]] = []
    print(f"{options.layers} layers in 0.6B shapes, w8a8; {random_model.processor()}")
    for _ in range(options.repeat):
        ours.append(run(source, workdir / f"serving-{options.layers}-now", None))
        if options.earlier:
            folder = workdir / f"serving-{options.layers}-earlier"
            earlier.append(run(source, folder, options.earlier))
    for name, unit in UNITS.items():
        mine, theirs = best(name, ours), best(name, earlier) if earlier else None
        if mine is not None:
            print(f"{name:13} {mine:8.2f} {unit}" + (compared(mine, theirs) if earlier else ""))
    shared, unshared = best("shared", ours), best("unshared", ours)
    if shared and unshared:
        print(f"sharing a beginning: {unshared / shared:.1f}x as fast")
    tiny, ample = best("tiny", ours), best("ample", ours)
    if tiny and ample:
        print(f"a tiny cache: {tiny / ample:.1f}x the time")
    check_tiny(ours)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--earlier", help="the src folder of another version of this project")
    parser.add_argument(
        "--workdir",
        help="holds the models between runs",
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
    else:
        main(given)
