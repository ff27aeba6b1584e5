"""The arithmetic of benchmarks/generate.py, and that engines do the work that is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generate
import pytest
import read_bandwidth
import torch
from generate import Engine, MeasuredStep, Speed, StepWeights, Work
from peers.llama_cpp import Times
from read_bandwidth import ReadBandwidth
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3ForCausalLM

from qwen3_ascend.checkpoint.architecture import EMBEDDING, LM_HEAD
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.runtime.backends.reference import ReferenceBackend
from qwen3_ascend.runtime.backends.step import DeviceStep, StepInputs


def test_speed_counts_every_prompt_and_answer_and_the_best_of_each_phase() -> None:
    runs = [Times(2.0, 4.0), Times(1.0, 8.0)]
    found = generate.speed(Work(8, 100, 16), runs, StepWeights(10_000), token_bytes=10)
    assert found.prefill == 8 * 100 / 1.0
    assert found.decode == 8 * 16 / 4.0
    contexts = sum(8 * (100 + step) * 10 for step in range(1, 17))
    assert found.reading == pytest.approx((16 * 10_000 + contexts) / 4.0)


def test_an_embedding_is_read_in_a_step_only_if_it_is_the_head() -> None:
    sizes = {"model.embed_tokens.weight": 100, "model.norm.weight": 1}
    embedding, head = "model.embed_tokens", "lm_head"
    assert generate.read_in_a_step(sizes, embedding, head, {}) == StepWeights(101)
    with_head = {**sizes, "lm_head.weight": 50, "lm_head.scale": 2}
    assert generate.read_in_a_step(with_head, embedding, head, {}) == StepWeights(53)


def test_of_experts_those_are_read_that_a_token_is_given_to() -> None:
    sizes = {"model.norm.weight": 1, "model.layers.0.mlp.experts.down_proj.weight": 800}
    data = {"num_experts": 8, "num_experts_per_tok": 2}
    found = generate.read_in_a_step(sizes, "model.embed_tokens", "lm_head", data)
    assert found == StepWeights(1, 800, 0.25)
    assert found.read(1) == 1 + 200
    assert found.read(2) == pytest.approx(1 + 800 * (1 - 0.75 * 0.75))


def test_a_bf16_checkpoint_of_ours_reads_what_its_parameters_take(
    tiny_bf16: Path, tiny_source: Path
) -> None:
    stored = CheckpointReader(tiny_bf16).manifest.stored()
    sizes = {name: tensor.nbytes for name, tensor in stored.items()}
    model = AutoModelForCausalLM.from_pretrained(tiny_source, dtype=torch.bfloat16)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert generate.read_in_a_step(sizes, EMBEDDING, LM_HEAD, {}) == StepWeights(parameters)


def test_cached_bytes_are_what_transformers_keeps_of_a_token(tiny_source: Path) -> None:
    data = json.loads((tiny_source / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tiny_source, dtype=torch.bfloat16)
    cache = DynamicCache()
    model(torch.arange(5)[None], past_key_values=cache)
    layers: Any = cache.layers
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert generate.cached_bytes(data) == kept / 5


def test_ours_computes_every_prompt_and_then_steps_of_all_answers(
    tiny_w8a8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    open_step = ReferenceBackend.open_step

    def watched(backend: ReferenceBackend, step: StepInputs) -> DeviceStep:
        rows.append(len(step.tokens))
        return open_step(backend, step)

    monkeypatch.setattr(ReferenceBackend, "open_step", watched)
    work = Work(8, 300, 3)
    ours = generate.ours(tiny_w8a8, [Work(1, 5, 1), work])
    for _ in range(2):  # nothing of the first run may help the second
        rows.clear()
        times = ours.run(work)
        assert rows == [2048, 6 + 8 * 300 - 2048, 8, 8, 8]
        assert times.prefill > 0 and times.decode > 0


def test_memory_is_read_before_each_step_of_ours_and_after_the_last(tiny_w8a8: Path) -> None:
    work, readings = Work(2, 20, 3), iter((1.0, 2.0, 3.0, 4.0))
    steps = generate.ours(tiny_w8a8, [work]).run_between_readings(work, lambda: next(readings))
    assert [(step.before, step.after) for step in steps] == [(1, 2), (2, 3), (3, 4)]
    assert all(step.seconds > 0 for step in steps)


def test_a_step_is_held_against_the_readings_around_it() -> None:
    steps = [MeasuredStep(1, 100, 300), MeasuredStep(2, 60, 40), MeasuredStep(4, 100, 100)]
    assert generate.momentary_share(steps, 80) == pytest.approx(0.4)  # of 0.4, 0.8 and 0.2


def test_transformers_computes_prompts_and_then_steps(
    tiny_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    forward = Qwen3ForCausalLM.forward

    def watched(model: Any, tokens: Tensor, **named: Any) -> Any:
        calls.append((*tokens.shape, named["past_key_values"].get_seq_length()))
        return forward(model, tokens, **named)

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", watched)
    generate.transformers_eager(tiny_source)(Work(3, 20, 2))
    assert calls == [(3, 20, 0), (3, 1, 20), (3, 1, 21)]


def test_engines_take_turns() -> None:
    turns: list[str] = []

    class Bandwidth(ReadBandwidth):
        def __init__(self) -> None:
            self.said = iter((5.0, 7.0, 6.0))

        def measure(self, repeat: int = 1) -> float:
            turns.append("bandwidth")
            return next(self.said)

    def engine(name: str, seconds: float) -> Engine:
        def run(work: Work) -> Times:
            turns.append(name)
            return Times(seconds, 2 * seconds)

        return Engine(name, run, StepWeights(1))

    engines = [engine("a", 1.0), engine("b", 2.0)]
    times, bandwidth = generate.measure(engines, Work(1, 2, 3), 3, Bandwidth())
    assert turns == ["a", "b", "bandwidth"] * 3
    assert times == {"a": [Times(1, 2)] * 3, "b": [Times(2, 4)] * 3}
    assert bandwidth == 7.0


def test_the_table_has_the_ratios_of_prefill_and_decoding_to_both_peers() -> None:
    def run(work: Work) -> Times:
        raise AssertionError

    one = StepWeights(1)
    engines = [
        Engine("ours x", run, one, "llama.cpp Q8_0"), Engine("ours y", run, one),
        Engine("llama.cpp Q8_0", run, one), Engine("transformers", run, one),
    ]  # fmt: skip
    speeds = {
        "ours x": Speed(100, 20, 30e9), "ours y": Speed(50, 10, 15e9),
        "llama.cpp Q8_0": Speed(200, 10, 12e9), "transformers": Speed(25, 5, 6e9),
    }  # fmt: skip
    _, _, *rows = generate.table(engines, speeds, 60e9, {"ours x": 0.75})
    assert rows == [
        "| ours x | 100 | 20.0 | 30.0 | 50 % | 75 % | 0.50, 2.00 | 4.00, 4.00 |",
        "| ours y | 50 | 10.0 | 15.0 | 25 % |  |  | 2.00, 2.00 |",
        "| llama.cpp Q8_0 | 200 | 10.0 | 12.0 | 20 % |  |  | 8.00, 2.00 |",
        "| transformers | 25 | 5.0 | 6.0 | 10 % |  |  |  |",
    ]


def test_the_loop_reads_every_word() -> None:
    words = torch.randint(-(2**62), 2**62, (4096,))
    found = read_bandwidth.compiled()(words.data_ptr(), len(words))
    assert found == int(words.sum()) % 2**64


def test_threads_read_parts_of_their_own_of_either_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_bandwidth, "BUFFER", 1 << 21)
    read: list[tuple[int, int]] = []
    bandwidth = ReadBandwidth(3)
    monkeypatch.setattr(bandwidth, "_read", lambda start, words: read.append((start, words)))
    assert bandwidth.measure(1) > 0
    part = (1 << 21) // 3 // read_bandwidth.UNIT * read_bandwidth.UNIT
    assert [words for _, words in read] == [part // 8] * 6
    assert bandwidth.sample() > 0
    quarter = (1 << 21) // 4 // 3 // read_bandwidth.UNIT * read_bandwidth.UNIT
    assert [words for _, words in read[6:]] == [quarter // 8] * 3
    starts = sorted(start for start, _ in read[:6])
    assert [later - first for first, later in zip(starts[::3], starts[2::3], strict=True)] == [
        2 * part
    ] * 2
