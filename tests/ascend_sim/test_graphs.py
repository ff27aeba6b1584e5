"""Capture, replay, host updates, and the mistakes that a card answers with an error or a hang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu

import ascend_sim
from ascend_sim import trace

pytestmark = pytest.mark.every_mode

Wait = Callable[[torch.Tensor], object]

HALF = torch.bfloat16
HEADS, KV_HEADS, WIDTH, BLOCK = 4, 2, 128, 128


def capture(
    run: Callable[[], Any], pool: object = None, automatic: bool = False
) -> tuple[Any, Any]:
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, pool=pool, auto_dispatch_capture=automatic):
        result = run()
    return graph, result


def layer(x: torch.Tensor, weight: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    normed, _ = torch_npu.npu_rms_norm(x @ weight, gamma, 1e-6)
    return torch.nn.functional.silu(normed) + x


def layer_inputs() -> tuple[torch.Tensor, ...]:
    return torch.zeros(4, 16).npu(), torch.randn(16, 16).npu(), torch.ones(16).npu()


def on_cpu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    normed = torch.nn.functional.rms_norm(x @ weight.cpu(), (16,), None, 1e-6)
    return torch.nn.functional.silu(normed) + x


def test_replay_reads_the_memory_of_the_moment() -> None:
    x, weight, gamma = layer_inputs()
    side = torch.npu.Stream()
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):  # the usual warm-ups
        for _ in range(2):
            layer(x, weight, gamma)
    torch.npu.current_stream().wait_stream(side)
    torch.npu.synchronize()
    ascend_sim.reset_trace()
    graph, out = capture(lambda: layer(x, weight, gamma))
    assert all(entry.captured for entry in trace.launches())
    count = len(trace.launches())
    for _ in range(2):
        values = torch.randn(4, 16)
        x.copy_(values)
        graph.replay()
        torch.testing.assert_close(out.cpu(), on_cpu(values, weight), atol=1e-5, rtol=1e-5)
    assert count == 4 and [replay.launches for replay in trace.replays()] == [count, count]
    assert len({replay.graph for replay in trace.replays()}) == 1


def test_nothing_runs_during_capture() -> None:
    counter = torch.zeros(1).npu()
    torch.npu.synchronize()
    graph, _ = capture(lambda: counter.add_(1))
    torch.npu.synchronize()
    assert counter.item() == 0
    graph.replay()
    graph.replay()
    assert counter.item() == 2


def test_two_graphs_share_a_pool() -> None:
    x, weight, gamma = layer_inputs()
    torch.npu.synchronize()
    first, one = capture(lambda: layer(x, weight, gamma))
    second, two = capture(lambda: layer(x[:2], weight, gamma), pool=first.pool())
    values = torch.randn(4, 16)
    x.copy_(values)
    second.replay()
    torch.testing.assert_close(two.cpu(), on_cpu(values[:2], weight), atol=1e-5, rtol=1e-5)
    first.replay()
    torch.testing.assert_close(one.cpu(), on_cpu(values, weight), atol=1e-5, rtol=1e-5)


def test_a_joined_side_stream_is_part_of_the_graph() -> None:
    side, weight = torch.npu.Stream(), torch.ones(4, 64).npu()
    a = torch.ones(4).npu()
    torch.npu.synchronize()
    ascend_sim.reset_trace()

    def run() -> torch.Tensor:
        b = a + 1
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            torch_npu.npu_prefetch(weight, b, 128)
        result = b * 2
        torch.npu.current_stream().wait_stream(side)
        return result

    graph, out = capture(run)
    graph.replay()
    assert out.cpu().tolist() == [4.0] * 4
    hint = trace.prefetches()[0]
    assert hint.captured and hint.bytes == 128 and hint.stream != trace.launches()[0].stream


def test_an_unjoined_side_stream_is_refused() -> None:
    side, a = torch.npu.Stream(), torch.ones(4).npu()

    def run() -> None:
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            a + 1

    with pytest.raises(RuntimeError, match="(?s)107025.*not joined back"):
        capture(run)


@pytest.mark.no_task_queue
def test_a_wait_for_work_outside_the_capture_is_refused() -> None:
    a, event = torch.ones(4).npu(), torch.npu.Event()
    event.record()

    def run() -> None:
        torch.npu.current_stream().wait_event(event)
        a + 1

    with pytest.raises(RuntimeError, match="outside the capture"):
        capture(run)


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: torch.npu.synchronize(), lambda x: x.cpu()]
)
def test_waiting_for_the_device_in_a_capture_is_refused(
    wait: Callable[[torch.Tensor], object],
) -> None:
    x = torch.ones(2).npu()
    torch.npu.synchronize()
    with pytest.raises(RuntimeError, match="1070(27|30)"):
        capture(lambda: wait(x))


def test_a_pageable_upload_in_a_capture_is_refused() -> None:
    x, host = torch.ones(2).npu(), torch.zeros(2)
    torch.npu.synchronize()
    with pytest.raises(RuntimeError, match="1070(27|30)"):
        capture(lambda: x.copy_(host))


# ---------------------------------------------------------------------------- host updates
class Decode:
    """One attention call whose lengths are host arguments, in the two forms we use."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.key_name = "context_lens" if kind == "paged" else "actual_seq_lengths_kv"
        self.cache = torch.randn(2, 6, BLOCK, KV_HEADS, WIDTH).to(HALF).npu()
        self.query = torch.randn(2, HEADS, WIDTH).to(HALF).npu()
        self.table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32).npu()
        self.out = torch.zeros(2, HEADS, WIDTH, dtype=HALF, device="npu")
        self.workspace = torch.empty(1 << 18, dtype=torch.uint8, device="npu")
        self.lse = torch.empty(1, device="npu")
        torch.npu.synchronize()

    def packed(self, lengths: list[int]) -> torch.Tensor | list[int]:
        return torch.tensor(lengths, dtype=torch.int32) if self.kind == "paged" else lengths

    def __call__(self, lengths: list[int]) -> torch.Tensor:
        key, value = self.cache
        if self.kind == "paged":
            torch_npu._npu_paged_attention(
                self.query,
                key,
                value,
                KV_HEADS,
                HEADS,
                0.1,
                self.table,
                self.packed(lengths),
                self.out,
                workspace=self.workspace,
            )
            return self.out
        named = dict(
            input_layout="TND",
            num_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            scale=0.1,
            block_table=self.table,
            block_size=BLOCK,
            actual_seq_lengths=[1, 2],
            actual_seq_lengths_kv=lengths,
        )
        if self.kind == "fused":
            return torch_npu.npu_fused_infer_attention_score(
                self.query, key.flatten(2), value.flatten(2), **named
            )[0]
        torch_npu.npu_fused_infer_attention_score.out(
            self.query,
            key.flatten(2),
            value.flatten(2),
            **named,
            workspace=self.workspace,
            out=[self.out, self.lse],
        )
        return self.out

    def update(self, graph: Any, lengths: list[int]) -> None:
        graph.update(cpu_update_input=[{self.key_name: self.packed(lengths)}])


KINDS = ["paged", "fused", "fused out"]


@pytest.mark.parametrize("kind", KINDS)
def test_update_changes_the_lengths_of_a_replay(kind: str) -> None:
    decode = Decode(kind)
    graph, out = capture(lambda: decode([5, 200]), automatic=True)
    torch.npu.synchronize()
    ascend_sim.reset_trace()
    for lengths in ([7, 31], [256, 1]):
        graph.replay()
        decode.update(graph, lengths)
        torch.npu.synchronize()
        got = out.cpu().clone()
        assert torch.equal(got, decode(lengths).cpu())
    assert len(trace.host_updates()) == 2 and len(trace.replays()) == 2
    assert sum(entry.is_update for entry in trace.launches()) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_update_before_replay_on_an_idle_device(kind: str) -> None:
    decode = Decode(kind)
    graph, out = capture(lambda: decode([5, 200]), automatic=True)
    decode.update(graph, [9, 3])
    torch.npu.synchronize()
    graph.replay()
    torch.npu.synchronize()
    got = out.cpu().clone()
    assert torch.equal(got, decode([9, 3]).cpu())


def test_a_forgotten_update_is_detected() -> None:
    decode = Decode("fused")
    graph, _ = capture(lambda: decode([5, 200]), automatic=True)
    graph.replay()
    with pytest.raises(RuntimeError, match="would hang"):
        torch.npu.synchronize()


def run_ahead(decode: Decode, ordered: bool) -> torch.Tensor:
    """Two steps with no synchronization of the host in between."""
    graph, out = capture(lambda: decode([5, 200]), automatic=True)
    torch.npu.synchronize()
    from torch_npu.npu.graphs import _GraphDispatchMode

    update_stream = _GraphDispatchMode.update_stream
    for lengths in ([7, 31], [9, 3]):
        if ordered:
            update_stream.wait_stream(torch.npu.current_stream())
        graph.replay()
        decode.update(graph, lengths)
    torch.npu.synchronize()
    return out.cpu().clone()


def test_updates_behind_the_compute_stream_keep_their_order() -> None:
    decode = Decode("fused out")
    assert torch.equal(run_ahead(decode, ordered=True), decode([9, 3]).cpu())


@pytest.mark.lazy_streams
def test_unordered_updates_are_detected() -> None:
    """Eager streams run in the lucky order."""
    with pytest.raises(RuntimeError, match="would hang"):
        run_ahead(Decode("fused out"), ordered=False)


def test_an_update_must_issue_the_captured_kernels() -> None:
    x = torch.ones(4).npu()
    torch.npu.synchronize()
    stream = torch.npu.Stream()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        current = torch.npu.current_stream()
        torch.npu.graph_task_group_begin(current)
        x.add_(1)
        handle = torch.npu.graph_task_group_end(current)
    torch.npu.synchronize()
    with torch.npu.stream(stream):
        torch.npu.graph_task_update_begin(stream, handle)
        x.add_(10)
        torch.npu.graph_task_update_end(stream)
    torch.npu.synchronize()
    graph.replay()
    assert x.cpu()[0] == 11
    with pytest.raises(RuntimeError, match="107033"), torch.npu.stream(stream):
        torch.npu.graph_task_update_begin(stream, handle)
        x.add_(10)
        x.add_(10)
        torch.npu.graph_task_update_end(stream)
