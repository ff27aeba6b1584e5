"""Greedy tokens are those of the CPU in every way to decode: real torch_npu on a simulated device.

Every kernel of attention, with plain steps, with graphs updated by `NPUGraph.update`, by bound
calls, and with masked graphs. A model is loaded once; each way gets an engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ascend_sim
import pytest
import torch
from torch import Tensor

from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.base import Forward
from qwen3_ascend.runtime.backends.npu import diagnose
from qwen3_ascend.runtime.backends.npu.capabilities import Capabilities
from qwen3_ascend.runtime.backends.npu.graph_updates import Support
from qwen3_ascend.runtime.backends.step import StepInputs
from qwen3_ascend.runtime.engine.assembly import assemble
from qwen3_ascend.runtime.engine.engine import Engine, TokenEvent
from qwen3_ascend.runtime.engine.request import SamplingParams
from qwen3_ascend.runtime.model.loader import load_model
from qwen3_ascend.runtime.model.qwen3 import Qwen3
from qwen3_ascend.runtime.options import DeviceOptions, EngineOptions
from qwen3_ascend.runtime.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.opposite_modes

BLOCK = 128
HELDOUT = Path(__file__).parent.parent / "data/tiny-qwen3/heldout.txt"

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Arrival:
    """A request that comes before a step, and how many tokens it asks for."""

    step: int
    prompt: Sequence[int]
    new_tokens: int


@dataclass(frozen=True)
class Way:
    """Options, and what a machine is to lack for them to come to this way."""

    options: DeviceOptions
    lengths: str | None
    lacks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.options.attention} {self.lengths or 'eager'}"

    def machine(self, capabilities: Capabilities) -> Capabilities:
        lacking: dict[str, Any] = {name: Support(name, False, "left out") for name in self.lacks}
        return dataclasses.replace(capabilities, **lacking)


def way(attention: str, lengths: str | None) -> Way:
    choice = "masked" if lengths == "masked" else "update"
    options = DeviceOptions(
        "npu", attention=attention, graph=lengths is not None, graph_lengths=choice
    )
    return Way(options, lengths, ("bound_update",) if lengths == "dispatched" else ())


FLOAT_INPUTS = ("w8a16", "w4a16-plain", "w4a16-zero-points")
UPDATES = ("bound", "dispatched")
WAYS = [
    *(way(attention, lengths) for attention in ("fused", "paged") for lengths in (None, *UPDATES)),
    way("fused", "masked"),
]
if ascend_sim.cann.current().handlers == "hard_coded_without_paged":  # CANN 8.3, if pretended
    WAYS.remove(way("paged", "dispatched"))
CASES = [
    *(("w8a8", chosen) for chosen in WAYS),
    # What attention does has nothing to do with what is multiplied.
    *((recipe, chosen) for recipe in ("bf16", *FLOAT_INPUTS) for chosen in WAYS[:2]),
]
by_recipe_and_way = pytest.mark.parametrize(
    ("recipe", "chosen"), CASES, ids=[f"{recipe}-{chosen.name}" for recipe, chosen in CASES]
)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint on the device and on the host."""

    npu: Qwen3[Any]
    cpu: Qwen3[Any]
    capabilities: Capabilities


@pytest.fixture(scope="module")
def loaded(checkpoints: dict[str, Path]) -> dict[str, Loaded]:
    models: dict[str, Loaded] = {}
    for recipe, path in checkpoints.items():
        source = CheckpointReader(path)
        npu = diagnose.open_backend(source.config, DeviceOptions("npu", graph=False))
        cpu = backends.get(source.config, DeviceOptions("cpu"))
        models[recipe] = Loaded(load_model(source, npu), load_model(source, cpu), npu.capabilities)
    return models


@pytest.fixture(scope="module")
def tokenizer(checkpoints: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(checkpoints["w8a8"])


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(HELDOUT.read_text()[:8000])


Expected = Callable[[str, tuple[Arrival, ...], EngineOptions], list[Tokens]]


@pytest.fixture(scope="module")
def expected(loaded: dict[str, Loaded]) -> Iterator[Expected]:
    """What the CPU says, computed once for each recipe and workload."""
    known: dict[tuple[str, str], list[Tokens]] = {}

    def tokens(recipe: str, arrivals: tuple[Arrival, ...], limits: EngineOptions) -> list[Tokens]:
        key = recipe, repr((arrivals, limits))
        if key not in known:
            known[key] = run(assemble(loaded[recipe].cpu, limits), arrivals)
        return known[key]

    yield tokens


def run(engine: Engine, arrivals: Sequence[Arrival]) -> list[Tokens]:
    """The answers, each request added before its step."""
    waiting = sorted(enumerate(arrivals), key=lambda pair: pair[1].step)
    answers: dict[int, list[int]] = {}
    order: dict[int, int] = {}
    step = 0
    while waiting or engine.busy:
        while waiting and (waiting[0][1].step <= step or not engine.busy):
            place, arrival = waiting.pop(0)
            params = SamplingParams(max_new_tokens=arrival.new_tokens, ignore_eos=True)
            order[engine.add(arrival.prompt, params, frozenset()).number] = place
        for event in engine.step():
            assert isinstance(event, TokenEvent)
            answers.setdefault(order[event.request.number], []).append(event.token)
        step += 1
    return [tuple(answers[place]) for place in range(len(arrivals))]


class Batches:
    """Which batch sizes were decoded, and for the longest of which contexts."""

    def __init__(self) -> None:
        self.sizes: set[int] = set()
        self.longest: set[int] = set()

    def watch(self, forward: Forward) -> Forward:
        def watched(step: StepInputs) -> Tensor:
            if step.is_decode:
                self.sizes.add(len(step.context_lens))
                self.longest.add(max(step.context_lens))
            return forward(step)

        return watched


def decode(
    model: Loaded, chosen: Way, limits: EngineOptions, arrivals: Sequence[Arrival]
) -> tuple[list[Tokens], Batches]:
    """The answers in one way, which was really taken: replays and updates are counted."""
    machine = chosen.machine(model.capabilities)
    backend = diagnose.open_backend(model.npu.config, chosen.options, machine)
    assert backend.decoding.lengths == chosen.lengths
    batches = Batches()
    engine = assemble(dataclasses.replace(model.npu, backend=backend), limits, watch=batches.watch)
    ascend_sim.reset_trace()
    tokens = run(engine, arrivals)
    replays, updates = ascend_sim.trace.replays(), ascend_sim.trace.host_updates()
    assert bool(replays) == (chosen.lengths is not None)
    updated = len(replays) if chosen.lengths in UPDATES else 0
    assert len(updates) == updated * model.npu.config.num_layers
    return tokens, batches


def first_differences(left: list[Tokens], right: list[Tokens]) -> list[int | None]:
    """Where each pair of answers differs first; None where they are equal."""
    return [
        next((at for at, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), None)
        for pair in zip(left, right, strict=True)
    ]


WORDS = (
    *("user", "ground", "plan", "think", "floor", "level", "building", "verb", "reduce"),
    *("cause", "melt", "down", "butter", "lever", "whale", "static", "measure"),
)
"""In the answers about these, no two tokens are nearly equally probable."""


@by_recipe_and_way
def test_every_batch_size_with_requests_that_join_and_finish(
    recipe: str, chosen: Way, loaded: dict[str, Loaded], expected: Expected, tokenizer: Tokenizer
) -> None:
    """Seventeen requests: five join in every second step, and then they finish one by one."""
    arrivals = tuple(
        Arrival(i // 5 * 2, tokenizer.encode(f"What does {word} mean?"), 9 + i - i // 5 * 2)
        for i, word in enumerate(WORDS)
    )
    limits = EngineOptions(kv_cache_tokens=68 * BLOCK, max_batch=17)
    tokens, batches = decode(loaded[recipe], chosen, limits, arrivals)
    assert batches.sizes == set(range(1, 18))
    assert first_differences(tokens, expected(recipe, arrivals, limits)) == [None] * 17


@by_recipe_and_way
def test_borders_of_blocks_and_captured_lengths(
    recipe: str, chosen: Way, loaded: dict[str, Loaded], expected: Expected, text: list[int]
) -> None:
    """Contexts that end before, on and behind 128, 256 and 512 tokens."""
    arrivals = tuple(Arrival(0, text[n : 2 * n], 10) for n in (123, 251, 507))
    limits = EngineOptions(kv_cache_tokens=32 * BLOCK, max_batch=3)
    tokens, batches = decode(loaded[recipe], chosen, limits, arrivals)
    assert {511, 512, 513} <= batches.longest
    assert first_differences(tokens, expected(recipe, arrivals, limits)) == [None] * 3


@by_recipe_and_way
def test_a_full_cache(
    recipe: str, chosen: Way, loaded: dict[str, Loaded], expected: Expected, text: list[int]
) -> None:
    """Three requests need a third block each when there are seven: one is put back and computed
    again. Two and three do not fit into a masked graph for 512 tokens, but one does."""
    arrivals = tuple(Arrival(0, text[n : n + 250], 12 + 4 * (n // 300)) for n in (0, 300, 600))
    limits = EngineOptions(kv_cache_tokens=7 * BLOCK, max_batch=3, prefix_cache=False)
    tokens, batches = decode(loaded[recipe], chosen, limits, arrivals)
    assert batches.sizes == {1, 2, 3}
    assert first_differences(tokens, expected(recipe, arrivals, limits)) == [None] * 3


torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for each other
