"""Accuracy per bit: ours against llm-compressor, msmodelslim and auto-round, in one run.

    make quality    # all of it
    PYTHONPATH=tests .venv/bin/python benchmarks/quality.py --models tiny --peers auto-round

Each peer quantizes each model in an environment of its own, which is made if it is not there
(`make peers`, 4 GB), with the settings that its own documentation recommends and with the same
calibration windows. What its checkpoint stands for is then computed by this runtime in float32:
weights decoded, inputs of linears rounded to int8 for each token (W8A8), under the peer's own
static scales (W8A8 static), or not at all (W4A16). So rows differ by the choice of weights and
scales alone. Our rows are the real checkpoint in the real runtime, integer arithmetic included.

A row is KL(source || candidate) in thousandths of a nat a token, and the change of perplexity,
each with the interval in which the mean lies with 95 % (bootstrap of whole windows, paired). "Bits"
is what is stored for the linears of the layers, scales and offsets included.

Results are kept below --cache, for each model, peer with its versions, and method, so that a run
that was broken off goes on; `--again` measures anew what failed.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import random_model
import torch
from peers import own
from peers.checkpoints import PeerModel
from peers.environments import ROOT, environment
from peers.methods import METHODS, OURS, ROWS, Method
from peers.models import MODELS, Model
from peers.scoring import Score, score

from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.errors import UserError
from qwen3_ascend.evaluation.options import EvaluationOptions
from qwen3_ascend.evaluation.result import Interval
from qwen3_ascend.evaluation.subject import Subject, open_backend, open_subject
from qwen3_ascend.runtime.tokenizer import NoTokenizer

ON_CPU = EvaluationOptions(device="cpu")


@dataclass(frozen=True)
class Result:
    """What became of a method on a model: a score, or why there is none."""

    score: Score | None
    bits: float
    seconds: float
    failure: str


def main() -> None:
    """See the module docstring."""
    options = parse()
    chosen = [
        method
        for method in METHODS
        if method.row in options.rows
        and method.peer in options.peers
        and any(fnmatch.fnmatch(method.name, pattern) for pattern in options.methods)
    ]
    print(
        f"{random_model.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    versions = {peer: version(peer) for peer in dict.fromkeys(method.peer for method in chosen)}
    for peer, said in versions.items():
        print(f"{peer} {said}")
    columns = {}
    for name in options.models:
        model = MODELS[name](options.cache / "models", options.windows)
        methods = [method for method in chosen if method.takes(name)]
        columns[name] = measure(model, methods, options)
    print_table(columns)


def measure(
    model: Model, methods: list[Method], options: argparse.Namespace
) -> dict[Method, Result]:
    """Every method on a model; what was measured before is read."""
    folder = options.cache / model.identity
    folder.mkdir(parents=True, exist_ok=True)
    texts = folder / "calibration.json"
    said = {"tokens": model.calibration, "texts": model.calibration_texts}
    texts.write_text(json.dumps(said))
    texts.with_suffix(".txt").write_text(model.calibration_text)
    found = {}
    for method in methods:
        place = folder / f"{method.peer}-{identity(method.peer)}" / method.folder
        kept = read_result(place, model, options.again)
        if kept is None:
            print(f"{model.name}: {method.peer} {method.name}", flush=True)
            kept = run(method, model, place, texts, options)
            write_result(place, model, kept)
        found[method] = kept
    return found


def run(
    method: Method, model: Model, place: Path, texts: Path, options: argparse.Namespace
) -> Result:
    """Quantizes, unless that was done before, and scores."""
    place.mkdir(parents=True, exist_ok=True)
    output, taken = place / "checkpoint", place / "seconds"
    try:
        if not output.exists():
            taken.write_text(str(quantize(method, model, output, texts, options.minutes)))
        with open_subject(str(model.folder), ON_CPU) as source, opened(method, output) as candidate:
            found = score(source, candidate, model.scored)
        bits = bits_per_weight(method, output)
    except (Failed, UserError) as error:
        return Result(None, math.nan, math.nan, str(error))
    if method.peer == OURS:  # soon made anew, and by another version
        shutil.rmtree(output)
    return Result(found, bits, float(taken.read_text()), "")


@contextmanager
def opened(method: Method, output: Path) -> Iterator[Subject]:
    """A checkpoint, to be scored."""
    if method.peer == OURS:
        with open_subject(str(output), ON_CPU) as subject:
            decoded = own.DecodedModel(CheckpointReader(output), subject.backend)
            yield replace(subject, model=decoded) if method.decoded else subject
        return
    model = PeerModel(output, dynamic=method.row.startswith("w8a8"))
    backend = open_backend(model.config, ON_CPU)
    yield Subject(method.peer, None, 0, 0, model, backend, NoTokenizer(output), None)


def bits_per_weight(method: Method, output: Path) -> float:
    """What is stored for a weight of the linears of the layers."""
    if method.peer == OURS:
        return own.bits_per_weight(output)
    return PeerModel(output, dynamic=False).bits_per_weight()


class Failed(Exception):
    """A method that made no checkpoint; the message says why in a line."""


def quantize(method: Method, model: Model, output: Path, texts: Path, minutes: float) -> float:
    """Makes the checkpoint, which takes the returned seconds; Failed if it is not made in time."""
    unfinished = output.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    log = output.with_name("log")
    if method.peer == OURS:
        text, tokens = texts.with_suffix(".txt"), sum(map(len, model.calibration))
        command = own.command(method.name, model.folder, unfinished, text, tokens)
    else:
        command = peer_command(method, model.folder, unfinished, texts)
    print("   ", *command, flush=True)
    started = time.perf_counter()
    if run_logged(command, environment_of(method), log, 60 * minutes):
        raise Failed(reason(log.read_text(errors="replace")))
    unfinished.rename(output)
    return time.perf_counter() - started


def run_logged(command: list[str], variables: dict[str, str], log: Path, seconds: float) -> int:
    """The exit code of a command; Failed, and an end to all its processes, if it takes longer."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=variables, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"not done after {seconds / 60:g} minutes") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def environment_of(method: Method) -> dict[str, str]:
    """Variables of a process that quantizes: a peer finds nothing of ours."""
    dropped = () if method.peer == OURS else ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def peer_command(method: Method, model: Path, output: Path, texts: Path) -> list[str]:
    """The command that a peer quantizes with, in its environment."""
    script = ROOT / f"benchmarks/peers/run_{method.peer.replace('-', '_')}.py"
    python = environment(method.peer) / "bin/python"
    return [str(word) for word in (python, script, model, output, method.name, texts)]


def pins(peer: str) -> str:
    """The versions of which a peer's environment is made."""
    return (ROOT / f"benchmarks/peers/requirements/{peer}.txt").read_text()


def version(peer: str) -> str:
    """Of a peer, for people."""
    if peer == OURS:
        return identity(peer)
    found = re.search(rf"^{peer.replace('-', '[-_]?')}==(\S+)$", pins(peer), re.MULTILINE)
    assert found, f"{peer} is not in its own list of versions"
    return f"{found[1]} in {environment(peer)}"


def identity(peer: str) -> str:
    """What the results of a peer depend on, as a hash: its versions and its script, or our code."""
    digest = hashlib.sha256()
    if peer == OURS:
        for file in sorted(_own_code()):
            digest.update(file.read_bytes())
    else:
        script = ROOT / f"benchmarks/peers/run_{peer.replace('-', '_')}.py"
        digest.update(pins(peer).encode() + script.read_bytes())
    return digest.hexdigest()[:12]


def _own_code() -> Iterator[Path]:
    for folder in ("src/qwen3_ascend", "convert", "runtime", "recipes"):
        for ending in ("*.py", "*.yaml", "*.c", "*.h"):
            yield from (ROOT / folder).rglob(ending)


def reason(log: str) -> str:
    """The line of a log that says why a run failed: the last error, or the last line at all."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|ERROR", line)]
    return (errors or lines or ["no output"])[-1][:200]


def read_result(place: Path, model: Model, again: bool) -> Result | None:
    """What was measured before on as many windows, if it was."""
    file = place / "result.json"
    if not file.exists():
        return None
    data: dict[str, Any] = json.loads(file.read_text())
    if data.pop("windows") != len(model.scored) or (again and data["failure"]):
        return None
    said = data.pop("score")
    if said is None:
        return Result(None, **data)
    change = Interval(**said["perplexity_change"])
    return Result(Score(Interval(**said["divergence"]), change, said["perplexity"]), **data)


def write_result(place: Path, model: Model, result: Result) -> None:
    """Keeps what was measured."""
    said = json.dumps({**asdict(result), "windows": len(model.scored)}, indent=2)
    (place / "result.json").write_text(said)


def print_table(columns: dict[str, dict[Method, Result]]) -> None:
    """A table in Markdown for each model, and the reasons of those that failed."""
    failures = []
    for name, results in columns.items():
        scores = [result.score for result in results.values() if result.score]
        print(f"\n{name}{f', perplexity {scores[0].perplexity:.2f}' if scores else ''}\n")
        print("| row | who | settings | bits | KL, 1e-3 nats | perplexity | seconds |")
        print("|---|---|---|---|---|---|---|")
        for method in sorted(results, key=lambda method: list(ROWS).index(method.row)):
            result = results[method]
            cells = [ROWS[method.row], method.peer, method.settings, *_figures(result)]
            print(f"| {' | '.join(cells)} |")
            if result.failure:
                failures.append(f"{name}, {method.peer} {method.name}: {result.failure}")
    print("\n" + "\n".join(failures))


def _figures(result: Result) -> tuple[str, ...]:
    if result.score is None:
        return "", "-", "-", ""
    kl, change = result.score.divergence, result.score.perplexity_change
    return (
        f"{result.bits:.2f}",
        f"{1e3 * kl.value:.3g}{_ends(kl, 1e3, '.3g')}",
        f"{100 * change.value:+.2f} %{_ends(change, 100, '+.2f')}",
        f"{result.seconds:.0f}",
    )


def _ends(found: Interval, scale: float, form: str) -> str:
    if found.low is None or found.high is None:
        return ""
    return f" [{scale * found.low:{form}}, {scale * found.high:{form}}]"


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    peers = list(dict.fromkeys(method.peer for method in METHODS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--peers", nargs="+", choices=peers, default=peers)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--methods", nargs="+", default=["*"], help="patterns of their names")
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, to score")
    parser.add_argument("--minutes", type=float, default=120, help="that a method may take")
    parser.add_argument("--again", action="store_true", help="try anew what failed")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache/qwen3-ascend/quality",
        help="keeps models, checkpoints and results",
    )  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    main()
