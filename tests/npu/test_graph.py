"""Captured decode steps: what a replay costs, and that every planted mistake is noticed."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ascend_sim
import pytest
import torch
import torch_npu
from support import tiny_models

from qwen3_ascend import SamplingParams, convert_checkpoint, load
from qwen3_ascend.errors import DeviceError, DeviceStuckError, OptionError
from qwen3_ascend.runtime import LLM
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.npu import capabilities, graph
from qwen3_ascend.runtime.backends.npu.attention import (
    AttentionStrategy,
    FusedAttention,
    HeadCounts,
    PagedAttention,
    Workspaces,
)
from qwen3_ascend.runtime.backends.npu.graph import GraphRunner, decode_buckets
from qwen3_ascend.runtime.backends.npu.graph_calls import (
    BoundCalls,
    CapturedCalls,
    CapturedGraph,
    DispatchedCalls,
)
from qwen3_ascend.runtime.backends.npu.graph_lengths import hidden_places, masked_lengths
from qwen3_ascend.runtime.backends.npu.graph_updates import (
    FUSED_LENGTHS,
    PAGED_LENGTHS,
    Support,
    UpdatedArgument,
    update_support,
)
from qwen3_ascend.runtime.backends.npu.operators import scatter
from qwen3_ascend.runtime.backends.npu.prefetch import Prefetcher, prefetch_budget
from qwen3_ascend.runtime.backends.step import StepInputs
from qwen3_ascend.runtime.options import DeviceOptions

pytestmark = pytest.mark.every_mode

COUNTS = HeadCounts(heads=4, kv_heads=2, head_dim=128)


@pytest.fixture
def inference_mode() -> Iterator[None]:
    """As steps run: 2.8.0.post2 keeps the random state of its first capture, and refuses captures
    and replays outside that mode once that was an inference tensor."""
    with torch.inference_mode():
        yield


def open_npu(path: Path, **options: Any) -> LLM:
    return load(path, device="npu", kv_cache_tokens=2048, max_batch=4, **options)


Strategy = Callable[[CapturedCalls], AttentionStrategy]


def fused(calls: CapturedCalls) -> FusedAttention:
    return FusedAttention(COUNTS, scatter, calls)


def paged(calls: CapturedCalls) -> PagedAttention:
    return PagedAttention(COUNTS, calls)


def bound(lengths: UpdatedArgument) -> CapturedCalls:
    return BoundCalls(lengths)


def dispatched(lengths: UpdatedArgument) -> CapturedCalls:
    return DispatchedCalls()


WAYS = [bound, dispatched]
Way = Callable[[UpdatedArgument], CapturedCalls]


def cache() -> LayerKV:
    blocks = torch.randn(4, 128, 2, 128, generator=torch.Generator().manual_seed(0))
    return LayerKV(blocks.bfloat16().to("npu"), (-blocks).bfloat16().to("npu"))


def decode_step(lengths: tuple[int, ...]) -> StepInputs:
    rows = len(lengths)
    table = torch.arange(1, rows + 1, dtype=torch.int32).view(rows, 1).to("npu")
    zeros = torch.zeros(rows, dtype=torch.int32).to("npu")
    return StepInputs(zeros, zeros, zeros, table, lengths, tuple(range(rows + 1)), logit_rows=None)


@dataclass(frozen=True)
class CapturedAttention:
    """A graph of one attention call, and what it computes."""

    strategy: AttentionStrategy
    graph: CapturedGraph
    output: torch.Tensor
    query: torch.Tensor
    layer: LayerKV
    step: StepInputs


def capture_attention(
    strategy: Strategy, way: Way, lengths: tuple[int, ...], argument: UpdatedArgument
) -> CapturedAttention:
    calls = way(argument)
    chosen = strategy(calls)
    query = torch.randn(len(lengths), 4, 128, generator=torch.Generator().manual_seed(1))
    query = query.bfloat16().to("npu")
    layer, step = cache(), decode_step(lengths)
    chosen.decode(query, layer, step)
    torch_npu.npu.synchronize()
    with calls.capture(torch_npu.npu.graph_pool_handle()) as graph:
        output = chosen.decode(query, layer, step)
    return CapturedAttention(chosen, graph, output, query, layer, step)


@pytest.mark.usefixtures("inference_mode")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("strategy", "argument"), [(fused, FUSED_LENGTHS), (paged, PAGED_LENGTHS)])
def test_an_updated_replay_attends_over_the_new_lengths(
    strategy: Strategy, argument: UpdatedArgument, way: Way
) -> None:
    captured = capture_attention(strategy, way, (1, 1), argument)
    for lengths in ((5, 90), (6, 91), (128, 2)):
        step = decode_step(lengths)
        expected = captured.strategy.decode(captured.query, captured.layer, step).cpu()
        captured.graph.launch()
        captured.graph.update(captured.strategy.update(lengths))
        torch_npu.npu.synchronize()
        # A wheel that does not record the operator attends over the lengths of the capture.
        usable = way is bound or update_support(argument).usable
        assert torch.equal(captured.output.cpu(), expected) == usable


@pytest.mark.usefixtures("inference_mode")
@pytest.mark.parametrize("way", WAYS)
def test_replays_in_flight_keep_their_lengths(way: Way) -> None:
    """Two steps with nothing of the host waiting in between, as the engine issues them."""
    captured = capture_attention(fused, way, (1, 1), FUSED_LENGTHS)
    results = []
    for lengths in ((5, 90), (128, 2)):
        captured.graph.launch()
        captured.graph.update(captured.strategy.update(lengths))
        results.append(captured.output.clone())
    torch_npu.npu.synchronize()
    for lengths, result in zip(((5, 90), (128, 2)), results, strict=True):
        step = decode_step(lengths)
        expected = captured.strategy.decode(captured.query, captured.layer, step)
        assert torch.equal(result.cpu(), expected.cpu())


@pytest.mark.usefixtures("inference_mode")
@pytest.mark.parametrize("way", WAYS)
def test_steps_may_be_issued_on_any_stream(way: Way) -> None:
    """torch_npu gives out 32 streams in turn: one of these is that of the updates."""
    captured = capture_attention(fused, way, (1,), FUSED_LENGTHS)
    for _ in range(33):
        with torch_npu.npu.stream(torch_npu.npu.Stream()):
            captured.graph.launch()
            captured.graph.update(captured.strategy.update((5,)))
            torch_npu.npu.synchronize()


@pytest.mark.usefixtures("inference_mode")
def test_what_is_bound_keeps_no_memory() -> None:
    """Queries and outputs of as many layers as there are lie at one address each."""
    calls = BoundCalls(FUSED_LENGTHS)
    strategy, layer, step = fused(calls), cache(), decode_step((1, 1))
    query = torch.randn(2, 4, 128).bfloat16().to("npu")
    torch_npu.npu.synchronize()
    addresses = []
    with calls.capture(torch_npu.npu.graph_pool_handle()):
        strategy.decode(query + 1, layer, step)
        for _ in range(4):
            made = query + 1
            attended = strategy.decode(made, layer, step)
            addresses.append((made.data_ptr(), attended.data_ptr()))
            del made, attended
    assert len(set(addresses)) < len(addresses)


@pytest.mark.usefixtures("inference_mode")
@pytest.mark.parametrize("way", WAYS)
def test_a_forgotten_update_is_detected_instead_of_hanging(way: Way) -> None:
    captured = capture_attention(fused, way, (1,), FUSED_LENGTHS)
    captured.graph.launch()
    with pytest.raises(RuntimeError, match="ascend_sim|wait"):
        torch_npu.npu.synchronize()


def test_a_mask_made_of_positions_attends_as_lengths_do() -> None:
    """Over the places of a captured length; the ends lie on, before and behind a block border."""
    strategy, layer = fused(DispatchedCalls()), cache()
    query = torch.randn(3, 4, 128, generator=torch.Generator().manual_seed(1)).bfloat16().to("npu")
    lengths = (128, 129, 127)
    table = torch.tensor([[1, 2], [3, 1], [2, 0]], dtype=torch.int32).to("npu")
    step = dataclasses.replace(decode_step(lengths), block_table=table)
    expected = strategy.decode(query, layer, step).cpu()
    positions = torch.tensor(lengths, dtype=torch.int32).to("npu") - 1
    places = torch.arange(256, dtype=torch.int32).to("npu")
    hidden = hidden_places(places, positions)
    assert hidden.shape == (3, 1, 256)
    assert hidden.cpu().logical_not().sum(-1).flatten().tolist() == [*lengths]
    blocks = LayerKV(*(torch.cat((each, each)) for each in (layer.keys, layer.values)))
    actual = strategy.decode_masked(query, blocks, step, hidden).cpu()
    torch.testing.assert_close(actual, expected, atol=0.01, rtol=0.01)


def test_a_synchronization_inside_a_capture_is_refused() -> None:
    ones = torch.ones(4, device="npu", dtype=torch.bfloat16)
    torch_npu.npu.synchronize()
    captured = torch_npu.npu.NPUGraph()
    with (
        pytest.raises(RuntimeError, match="107027|captur"),
        torch_npu.npu.graph(captured),
    ):
        (ones + ones).sum().item()


def test_a_prefetch_stream_that_is_not_joined_breaks_the_capture() -> None:
    """Also if the next stream to be given out is that of the capture, as in one of 32 cases."""
    weight = torch.zeros(1 << 20, dtype=torch.int8).to("npu")
    after = torch.zeros(2, 8, dtype=torch.bfloat16).to("npu")
    capture = torch_npu.npu.graph(torch_npu.npu.NPUGraph())
    while torch_npu.npu.Stream() != capture.capture_stream:
        pass
    for _ in range(31):
        torch_npu.npu.Stream()
    prefetcher = Prefetcher(budget=1 << 20)
    torch_npu.npu.synchronize()
    with pytest.raises(RuntimeError, match="107025|join"), capture:
        prefetcher.fork((weight,), after)
    ascend_sim.abandon_pending()


@pytest.mark.usefixtures("inference_mode")
def test_a_joined_prefetch_is_captured_within_its_budget() -> None:
    weights = tuple(torch.zeros(n, dtype=torch.int8).to("npu") for n in (1 << 20, 1 << 19))
    after = torch.zeros(2, 8, dtype=torch.bfloat16).to("npu")
    prefetcher = Prefetcher(budget=(1 << 20) + (1 << 18))
    torch_npu.npu.synchronize()
    ascend_sim.reset_trace()
    captured = torch_npu.npu.NPUGraph()
    with torch_npu.npu.graph(captured):
        prefetcher.fork(weights, after)
        prefetcher.join()
    sizes = [entry.bytes for entry in ascend_sim.trace.prefetches()]
    assert sizes == [1 << 20, 1 << 18]
    assert all(entry.captured for entry in ascend_sim.trace.prefetches())
    captured.replay()
    torch_npu.npu.synchronize()


def test_long_steps_and_a_zero_budget_prefetch_nothing() -> None:
    weight = torch.zeros(1 << 20, dtype=torch.int8).to("npu")
    for budget, rows in ((0, 1), (1 << 20, 501)):
        prefetcher = Prefetcher(budget)
        prefetcher.fork((weight,), torch.zeros(rows, 8, dtype=torch.bfloat16).to("npu"))
        prefetcher.join()
    assert ascend_sim.trace.prefetches() == []


def test_prefetch_settings() -> None:
    assert prefetch_budget("off", 1 << 20) == 0
    assert prefetch_budget("auto", 1 << 20) == 1 << 19
    assert prefetch_budget("auto", 0) == 96 << 20
    assert prefetch_budget("64M", 0) == 64 << 20
    assert prefetch_budget(5000, 0) == 5000
    assert prefetch_budget("64MiB", 0) == 64 << 20
    with pytest.raises(OptionError, match="off, auto or a size"):
        DeviceOptions(prefetch="much")


def test_the_default_cache_mode_would_be_refused_for_a_plain_cache() -> None:
    """Why `write` says Norm: npu_scatter_pa_kv_cache's own default is PA_NZ. Older wheels do not
    know the argument."""
    key = torch.randn(1, 2, 128).bfloat16().to("npu")
    slots = torch.tensor([130], dtype=torch.int32).to("npu")
    layer = cache()
    if ascend_sim.cann.current().cache_mode:
        fused(DispatchedCalls()).write(key, key, layer, slots)
        assert torch.equal(layer.keys.cpu().flatten(0, 1)[130], key.cpu()[0])
    else:
        with pytest.raises(RuntimeError, match="cache_mode"):
            fused(DispatchedCalls()).write(key, key, layer, slots)
    with pytest.raises(RuntimeError, match="(?i)pa_nz"):
        torch_npu.npu_scatter_pa_kv_cache(key, key, layer.keys, layer.values, slots)


def test_a_replayed_step_costs_one_copy_and_one_update_a_layer(
    checkpoints: dict[str, Path],
) -> None:
    llm = open_npu(checkpoints["w8a8"], buckets=(1,))
    params = SamplingParams(max_new_tokens=11, ignore_eos=True)
    ascend_sim.reset_trace()
    llm.generate(["What does river mean?"], params)
    trace = ascend_sim.trace
    assert len(trace.replays()) == 10  # the first token comes from the prefill
    assert len(trace.host_updates()) == 10 * llm.config.num_layers
    replayed = {entry.launches for entry in trace.replays()}
    assert len(replayed) == 1 and replayed.pop() > 10 * llm.config.num_layers


def test_buckets() -> None:
    assert decode_buckets(1) == (1,)
    assert decode_buckets(3) == (1, 2, 3)
    assert decode_buckets(16) == (1, 2, 4, 8, 16)
    assert decode_buckets(20) == (1, 2, 4, 8, 16, 20)
    assert decode_buckets(20, [4, 1, 4]) == (1, 4)


def test_lengths_of_masked_steps() -> None:
    assert masked_lengths(320, 128) == (512, 1024, 2048, 4096, 8192, 16384, 32768, 40960)
    assert masked_lengths(3, 128) == (384,)
    assert masked_lengths(4, 128) == (512,)
    assert masked_lengths(5, 128) == (512, 640)
    assert masked_lengths(3, 1024) == (1024, 2048, 3072)


def test_the_model_path_needs_no_operator_without_a_stand_in(checkpoints: dict[str, Path]) -> None:
    """The simulator is strict: an operator that nobody wrote a stand-in for would have raised."""
    llm = open_npu(checkpoints["w8a8"])
    llm.generate(["What does river mean?"], SamplingParams(max_new_tokens=3, temperature=0.7))
    assert ascend_sim.trace.fallbacks() == []


@pytest.mark.parametrize("attention", ["fused", "paged"])
def test_a_small_batch_that_needs_more_scratch_leaves_larger_graphs_alone(
    tmp_path: Path, attention: str
) -> None:
    """A long context of one request is divided among cores, which takes more scratch than eight
    requests do. It lies where the larger graph, captured before, keeps its activations."""
    source = tiny_models.write(tmp_path / "source", tiny_models.config(head_dim=128))
    convert_checkpoint(source, tmp_path / "out", "w8a8-plain")
    prompts = [[7 + number] * (5 + 7 * number) for number in range(8)]
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)

    def tokens(**options: Any) -> list[tuple[int, ...]]:
        llm = load(tmp_path / "out", kv_cache_tokens=8192, max_batch=8, **options)
        return [answer.token_ids for answer in llm.generate(prompts, params)]

    found = tokens(device="npu", buckets=(1, 8), attention=attention)
    assert found == tokens(device="cpu")


def test_graphs_share_scratch_that_is_no_later_graphs() -> None:
    workspaces, first, more = Workspaces(), torch.empty(100), torch.empty(200)
    assert workspaces.enough(8, first) is first
    assert workspaces.enough(4, torch.empty(50)) is first  # and none of its own
    assert workspaces.enough(1, more) is more
    assert [workspaces.of(rows) for rows in (8, 4, 1)] == [first, first, more]
    again = torch.empty(150)
    assert workspaces.enough(8, again) is again  # not that of the later graph, which is larger


@pytest.mark.parametrize("binds", [True, False])
def test_a_failing_update_ends_the_request_and_every_later_one(
    binds: bool, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device waits for ever then: nothing may wait for the device."""
    support = Support("bound updates", binds, "")
    monkeypatch.setattr(capabilities, "bound_support", lambda: support)
    leaving: list[bool] = []
    monkeypatch.setattr(graph, "leave_without_waiting", lambda: leaving.append(True))
    llm = open_npu(checkpoints["w8a8"], buckets=(1,))
    message = "did not get its context lengths .*graph=off"
    with ascend_sim.faults.failing_update(after=2):  # of four layers
        for _ in range(2):
            with pytest.raises(DeviceStuckError, match=message):
                llm.generate(["What does river mean?"], SamplingParams(max_new_tokens=3))
    assert len(ascend_sim.trace.replays()) <= 1  # nothing was launched after it
    assert leaving == [True]
    ascend_sim.abandon_pending()


def long_prompt(llm: LLM, tokens: int) -> list[int]:
    text = (Path(__file__).parent.parent / "data/tiny-qwen3/heldout.txt").read_text()
    return llm.tokenizer.encode(text[:4000])[:tokens]


def open_masked(path: Path) -> LLM:
    return load(
        path, device="npu", kv_cache_tokens=4096, max_batch=1, buckets=(1,), graph_lengths="masked"
    )


def test_masked_graphs_are_captured_when_a_context_first_needs_them(
    checkpoints: dict[str, Path],
) -> None:
    llm = open_masked(checkpoints["w8a8"])
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    ascend_sim.reset_trace()
    for _ in range(2):
        llm.generate([long_prompt(llm, 508)], params)
    replays = ascend_sim.trace.replays()
    assert len(replays) == 14 and len({each.graph for each in replays}) == 2  # 512 and 1024
    captured = [each for each in ascend_sim.trace.launches() if each.captured]
    assert len(captured) == replays[-1].launches  # one of them, and once


def test_a_masked_graph_that_finds_no_room_is_one_warning_and_eager_steps(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_masked(checkpoints["w8a8"])
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    expected = [answer.token_ids for answer in llm.generate([long_prompt(llm, 508)], params)]
    llm = open_masked(checkpoints["w8a8"])

    def refusing(self: object, size: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(GraphRunner, "_capture", refusing)
    with pytest.warns(
        UserWarning, match="up to 1024 tokens are not captured .out of memory"
    ) as seen:
        for _ in range(2):
            (answer,) = llm.generate([long_prompt(llm, 508)], params)
            assert answer.token_ids == expected[0]
    assert sum("not captured" in str(each.message) for each in seen) == 1


FAIL_AN_UPDATE = """
import sys, ascend_sim
ascend_sim.install()
from qwen3_ascend.cli import main
with ascend_sim.faults.failing_update(after=2):
    main(["generate", sys.argv[1], "--device", "npu", "--kv-cache-tokens", "1024",
          "--max-batch", "1", "-p", "What does river mean?"])
"""


def test_a_failing_update_ends_the_process_with_a_message(checkpoints: dict[str, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAIL_AN_UPDATE, str(checkpoints["w8a8"])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Error: a captured step did not get its context lengths" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_machine_that_does_not_capture_is_one_line(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("error code is 207000\nEZ9999: feature not supported by the driver")

    monkeypatch.setattr(torch_npu.npu, "graph", refusing)
    message = "a step of 2 rows cannot be captured .error code is 207000.; use graph=off$"
    with pytest.raises(DeviceError, match=message):
        open_npu(checkpoints["w8a8"], buckets=(1, 2))
