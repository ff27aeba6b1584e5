"""Generating on a CPU against llama.cpp and transformers, on the same random weights, in one run.

    python benchmarks/generate.py                                 Qwen3-0.6B shapes, batch 1
    python benchmarks/generate.py --batch 1 8 --prompt 128 2048   every pair of them
    python benchmarks/generate.py --model 8b --layers 2           two layers in the shapes of 8B

Random weights: speed only, says nothing about quality. Every engine reads --batch prompts of
--prompt tokens, which is prefill, and then takes --new steps that continue all of them, which is
decoding. The engines take turns, --repeat rounds of them, and the best of each counts, because
other work on the machine only ever adds. Tokens a second are those of the whole batch.

A step of decoding reads every weight of the linears and the norms once, the head among them, and
the keys and values of each context; of mixtures of experts it reads those that random tokens are
given to, on the average. These bytes, over the time of a step, are set against the
bandwidth with which as many threads read memory (read_bandwidth.py). A virtual machine's bandwidth
may change from one moment to the next, so that the best of it says little about any other time:
after the rounds, ours decode once more with memory read between all steps, and each step is held
against the readings before and after it. The median of these shares is the one to look at.

llama.cpp runs the same weights from a GGUF file, w8a8 against its Q8_0 and bf16 against its BF16.
It is llama-batched-bench on PATH, or else built for this processor the first time, from a source on
PyPI (peers/peers.mk). Its cache is float16, as large as ours in bfloat16.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import random_model
import torch
from peers import gguf_model, llama_cpp
from peers.gguf_model import ensure_gguf, gguf_sizes
from peers.llama_cpp import COUNTERPARTS, Times
from read_bandwidth import ReadBandwidth

from qwen3_ascend import ConvertOptions, SamplingParams, convert_checkpoint
from qwen3_ascend.checkpoint.architecture import EMBEDDING, LM_HEAD
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.engine.assembly import make_engine
from qwen3_ascend.runtime.engine.engine import Engine as TokenEngine
from qwen3_ascend.runtime.options import DeviceOptions, EngineOptions

LLAMA, TRANSFORMERS = "llama.cpp", "transformers"

EXPERTS = (".experts.", "_exps.")
"""What the names of experts' weights hold, in transformers and ours, and in GGUF."""

MOST_COMMON = 4096
"""Prompts are of the first tokens, which every vocabulary has."""


@dataclass(frozen=True)
class Work:
    """What every engine does: `batch` prompts of `prompt` tokens, then `new` steps for all."""

    batch: int
    prompt: int
    new: int

    @property
    def steps(self) -> int:
        """A bound on the steps that prompts may take of ours, while some of them are answered."""
        return 2 * -(-self.batch * self.prompt // EngineOptions.step_tokens) + 1

    @property
    def context(self) -> float:
        """Tokens of a context whose keys and values a step reads, on the average."""
        return self.prompt + (self.new + 1) / 2


Reading = Callable[[], float]
"""Measures how many bytes a second are read from memory now."""


@dataclass(frozen=True)
class StepWeights:
    """Bytes of the weights that a step of decoding reads.

    Attributes:
        always: in every step.
        experts: those of all experts.
        chosen: the share of experts that a token is given to.
    """

    always: int
    experts: int = 0
    chosen: float = 0.0

    def read(self, batch: int) -> float:
        """Of a step of so many tokens, each of which chooses experts by itself."""
        return self.always + self.experts * (1 - (1 - self.chosen) ** batch)


@dataclass(frozen=True)
class MeasuredStep:
    """Seconds of a step of decoding, and the readings before and after it."""

    seconds: float
    before: float
    after: float


@dataclass(frozen=True)
class Engine:
    """What runs the work.

    Attributes:
        name: for the table.
        run: does the work once.
        weights: that a step of decoding reads.
        counterpart: the name of llama.cpp's engine that it is held against, if there is one.
        run_between_readings: does the work once and measures what it is given before each step of
            decoding and after the last; None for an engine whose steps cannot be told apart.
    """

    name: str
    run: Callable[[Work], Times]
    weights: StepWeights
    counterpart: str | None = None
    run_between_readings: Callable[[Work, Reading], list[MeasuredStep]] | None = None


@dataclass(frozen=True)
class Speed:
    """Tokens a second, of all prompts and answers; bytes a second that decoding reads."""

    prefill: float
    decode: float
    reading: float


def step_bytes(work: Work, weights: StepWeights, token_bytes: int) -> float:
    """Bytes that a step of decoding reads on the average.

    Args:
        work: whose contexts are read.
        weights: that a step reads.
        token_bytes: keys and values of one token.
    """
    return weights.read(work.batch) + work.batch * work.context * token_bytes


def speed(work: Work, runs: Sequence[Times], weights: StepWeights, token_bytes: int) -> Speed:
    """The best of several runs.

    Args:
        work: what was run.
        runs: each once; prefill and decoding count each by itself.
        weights: that a step reads.
        token_bytes: keys and values of one token.
    """
    prefill = min(times.prefill for times in runs)
    decode = min(times.decode for times in runs)
    return Speed(
        work.batch * work.prompt / prefill,
        work.batch * work.new / decode,
        work.new * step_bytes(work, weights, token_bytes) / decode,
    )


def momentary_share(steps: Sequence[MeasuredStep], nbytes: float) -> float:
    """The share of bandwidth that steps reach in the moment they are made, at the median.

    Args:
        steps: of decoding.
        nbytes: that each of them reads.
    """
    return median(nbytes / step.seconds / ((step.before + step.after) / 2) for step in steps)


@dataclass(frozen=True)
class Ours:
    """A converted checkpoint in our engine.

    A step of the engine computes prompts and answers together, so that some answers have a few
    tokens more than others when the last prompt has been read; decoding is timed from there, over
    steps in which all of them take part.
    """

    engine: TokenEngine

    def run(self, work: Work) -> Times:
        """Does the work once."""
        with self.requests(work) as prefill:
            started = time.perf_counter()
            for _ in range(work.new):
                self.decode(work)
            return Times(prefill, time.perf_counter() - started)

    def run_between_readings(self, work: Work, read: Reading) -> list[MeasuredStep]:
        """Does the work once, and reads before each step of decoding and after the last."""
        steps: list[MeasuredStep] = []
        with self.requests(work):
            before = read()
            for _ in range(work.new):
                started = time.perf_counter()
                self.decode(work)
                seconds = time.perf_counter() - started
                steps.append(MeasuredStep(seconds, before, after := read()))
                before = after
        return steps

    @contextmanager
    def requests(self, work: Work) -> Iterator[float]:
        """Requests whose prompts have been read, and the seconds that this took."""
        params = SamplingParams(max_new_tokens=work.new + work.steps, ignore_eos=True)
        requests = [self.engine.add(prompt, params, frozenset()) for prompt in prompts(work)]
        waiting = {request.number for request in requests}
        started = time.perf_counter()
        while waiting:
            waiting -= {event.request.number for event in self.engine.step()}
        yield time.perf_counter() - started
        for request in requests:
            self.engine.abort(request)

    def decode(self, work: Work) -> None:
        """One step of every answer."""
        tokens = self.engine.step()
        assert len(tokens) == work.batch


def ours(checkpoint: Path, works: Sequence[Work]) -> Ours:
    """A converted checkpoint on the CPU backend, with room for each work."""
    reader = CheckpointReader(checkpoint)
    backend = backends.get(reader.config, DeviceOptions("cpu"))
    block = EngineOptions.block_size
    room = max(w.batch * -(-(w.prompt + w.new + w.steps) // block) * block for w in works)
    limits = EngineOptions(
        kv_cache_tokens=room, max_batch=max(work.batch for work in works), prefix_cache=False
    )
    return Ours(make_engine(reader, backend, limits, lambda *step: None))


def transformers_eager(source: Path) -> Callable[[Work], Times]:
    """The same source in transformers, bfloat16, greedy, with its own cache."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)

    @torch.inference_mode()
    def run(work: Work) -> Times:
        cache, tokens = DynamicCache(), torch.tensor(prompts(work))
        started = time.perf_counter()
        logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
        tokens = logits[:, -1:].argmax(-1)
        prefilled = time.perf_counter()
        for _ in range(work.new):
            logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
        return Times(prefilled - started, time.perf_counter() - prefilled)

    return run


def prompts(work: Work) -> list[list[int]]:
    """Token ids, the same in every round, each prompt another."""
    drawn = torch.Generator().manual_seed(0)
    shape = (work.batch, work.prompt)
    return [row.tolist() for row in torch.randint(MOST_COMMON, shape, generator=drawn)]


def read_in_a_step(
    sizes: Mapping[str, int], embedding: str, head: str, data: Mapping[str, Any]
) -> StepWeights:
    """What one step of decoding reads: all that is stored but the embedding, of which it reads a
    row for each token, unless that is the head as well.

    Args:
        sizes: bytes of each tensor; the names of those of experts hold EXPERTS.
        embedding: how its name begins.
        head: how the names of a head begin that is stored by itself.
        data: config.json of the model.
    """
    stored = any(name.startswith(head) for name in sizes)
    read = {n: b for n, b in sizes.items() if not (stored and n.startswith(embedding))}
    experts = sum(nbytes for name, nbytes in read.items() if any(e in name for e in EXPERTS))
    chosen = data.get("num_experts_per_tok", 0) / data.get("num_experts", 1)
    return StepWeights(sum(read.values()) - experts, experts, chosen)


def cached_bytes(data: dict[str, Any]) -> int:
    """Bytes of the keys and values of a token in types of 16 bits, which every cache here has."""
    heads = 2 * data["num_hidden_layers"] * data["num_key_value_heads"]
    return int(heads * data["head_dim"] * torch.bfloat16.itemsize)


def make_engines(
    source: Path, data: dict[str, Any], works: Sequence[Work], chosen: argparse.Namespace
) -> list[Engine]:
    """The chosen engines, loaded; those that need models of their own keep them by the source."""
    engines = [our_engine(source, data, recipe, works) for recipe in chosen.recipes]
    if LLAMA in chosen.peers:
        kinds = dict.fromkeys(COUNTERPARTS[r] for r in chosen.recipes if r in COUNTERPARTS)
        models = {kind: source.with_name(f"{source.name}-{kind}.gguf") for kind in kinds}
        engines += [
            llama_engine(ensure_gguf(model, data, kind), data, kind)
            for kind, model in models.items()
        ]
    if TRANSFORMERS in chosen.peers:
        sizes = {
            name: torch.Size(shape).numel() * torch.bfloat16.itemsize
            for name, shape in random_model.tensors(data).items()
        }
        weights = read_in_a_step(sizes, EMBEDDING, LM_HEAD, data)
        engines.append(Engine(TRANSFORMERS, transformers_eager(source), weights))
    return engines


def our_engine(source: Path, data: Mapping[str, Any], recipe: str, works: Sequence[Work]) -> Engine:
    """Ours with a recipe, converted anew."""
    output = source.with_name(f"{source.name}-{recipe}")
    convert_checkpoint(source, output, recipe, ConvertOptions(overwrite=True))
    stored = CheckpointReader(output).manifest.stored()
    sizes = {name: tensor.nbytes for name, tensor in stored.items()}
    weights, kind = read_in_a_step(sizes, EMBEDDING, LM_HEAD, data), COUNTERPARTS.get(recipe)
    mine, peer = ours(output, works), kind and f"{LLAMA} {kind}"
    return Engine(f"ours {recipe}", mine.run, weights, peer, mine.run_between_readings)


def llama_engine(model: Path, data: Mapping[str, Any], kind: str) -> Engine:
    """llama.cpp with a model whose matrices are of a type."""
    bench = llama_cpp.program()
    weights = read_in_a_step(gguf_sizes(model), gguf_model.EMBEDDING, gguf_model.HEAD, data)

    def run(work: Work) -> Times:
        threads = torch.get_num_threads()
        return llama_cpp.measure(bench, model, threads, work.batch, work.prompt, work.new)

    return Engine(f"{LLAMA} {kind}", run, weights)


def measure(
    engines: Sequence[Engine], work: Work, repeat: int, bandwidth: ReadBandwidth
) -> tuple[dict[str, list[Times]], float]:
    """The times of each engine by its name, and the read bandwidth; all of them in turns."""
    times: dict[str, list[Times]] = {engine.name: [] for engine in engines}
    reading = 0.0
    for _ in range(repeat):
        for engine in engines:
            times[engine.name].append(engine.run(work))
        reading = max(reading, bandwidth.measure())
    return times, reading


def momentary_shares(
    engines: Sequence[Engine], work: Work, token_bytes: int, bandwidth: ReadBandwidth
) -> dict[str, float]:
    """`momentary_share` of each engine whose steps can be told apart, by its name."""
    shares = {}
    for engine in engines:
        if engine.run_between_readings is not None:
            steps = engine.run_between_readings(work, bandwidth.sample)
            nbytes = step_bytes(work, engine.weights, token_bytes)
            shares[engine.name] = momentary_share(steps, nbytes)
    return shares


def table(
    engines: Sequence[Engine],
    speeds: Mapping[str, Speed],
    bandwidth: float,
    momentary: Mapping[str, float],
) -> Iterator[str]:
    """A table in Markdown; ratios of prefill and of decoding to the counterpart in llama.cpp and
    to transformers, where they were measured."""
    yield (
        "| engine | prefill | decode | GB/s | of best bandwidth | of bandwidth around each step "
        f"| x {LLAMA} | x {TRANSFORMERS} |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for engine in engines:
        mine = speeds[engine.name]
        peers = (speeds.get(name or "") for name in (engine.counterpart, TRANSFORMERS))
        cells = [
            engine.name,
            f"{mine.prefill:.0f}",
            f"{mine.decode:.1f}",
            f"{mine.reading / 1e9:.1f}",
            f"{100 * mine.reading / bandwidth:.0f} %",
            f"{100 * momentary[engine.name]:.0f} %" if engine.name in momentary else "",
            *(ratios(mine, peer) for peer in peers),
        ]
        yield f"| {' | '.join(cells)} |"


def ratios(mine: Speed, peer: Speed | None) -> str:
    """How many times as fast as a peer: prefill, decode."""
    if peer is None or peer is mine:
        return ""
    return f"{mine.prefill / peer.prefill:.2f}, {mine.decode / peer.decode:.2f}"


def main() -> None:
    """Measures every engine at every work, and prints a table for each work."""
    chosen = parse()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    works = [Work(b, prompt, chosen.new) for b in chosen.batch for prompt in chosen.prompt]
    data = random_model.config(chosen.model, chosen.layers)
    name = f"{chosen.model}-{data['num_hidden_layers']}"
    source = random_model.ensure(chosen.workdir / name, data)
    engines = make_engines(source, data, works, chosen)
    bandwidth = ReadBandwidth(torch.get_num_threads())
    print(f"{random_model.processor()}, {torch.get_num_threads()} threads; {name}")
    if LLAMA in chosen.peers:
        print(f"{LLAMA}: {llama_cpp.version(llama_cpp.program())}")
    for engine in engines:
        engine.run(Work(1, 16, 2))  # so that nothing is done for the first time below
    for work in works:
        times, reading = measure(engines, work, chosen.repeat, bandwidth)
        speeds = {
            engine.name: speed(work, times[engine.name], engine.weights, cached_bytes(data))
            for engine in engines
        }
        print(f"\nbatch {work.batch}, prompt {work.prompt}, {work.new} steps; tokens/s, best of "
              f"{chosen.repeat} rounds; memory is read at {reading / 1e9:.1f} GB/s\n")  # fmt: skip
        shares = momentary_shares(engines, work, cached_bytes(data), bandwidth)
        print("\n".join(table(engines, speeds, reading, shares)), flush=True)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="0.6b", choices=random_model.SHAPES)
    parser.add_argument("--layers", type=int, help="only so many")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="answers at a time")
    parser.add_argument("--prompt", type=int, nargs="+", default=[128], help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=48, help="steps of decoding")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, help="of every engine; default: torch's own choice")
    parser.add_argument("--recipes", nargs="+", default=["w8a8-head", "w8a8", "bf16"])
    peers = [LLAMA, TRANSFORMERS]
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers)
    parser.add_argument(
        "--workdir", type=Path, default=Path(tempfile.gettempdir()) / "qwen3-ascend",
        help="keeps the models between runs",
    )  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    main()
