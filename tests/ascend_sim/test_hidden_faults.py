"""What a card shows late or never: stale memory, workspaces, hidden copies, a lost device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu

import ascend_sim
from ascend_sim import trace
from ascend_sim.kernels.workspaces import SYSTEM_BYTES, attention_bytes
from ascend_sim.test_graphs import BLOCK, Decode, capture
from ascend_sim.test_refusals import dev

HALF = torch.bfloat16


# ------------------------------------------------------------------------------ stale memory
@pytest.mark.no_task_queue
def test_memory_that_is_handed_out_again_is_nan() -> None:
    """Without the poison the second tensor would hold the ones of the first."""
    first = torch.ones(4096, device="npu")
    torch.npu.synchronize()
    address = first.data_ptr()
    del first
    second = torch.empty(4096, device="npu")
    assert second.data_ptr() == address
    assert second.cpu().isnan().all()


@pytest.mark.every_mode
@pytest.mark.lazy_streams
def test_memory_that_a_late_stream_still_reads_keeps_its_values() -> None:
    source = torch.ones(4096, device="npu")
    total = source.sum()  # queued
    del source
    torch.empty(4096, device="npu")
    assert total.item() == 4096


# -------------------------------------------------------------------------------- workspaces
def test_sizes_of_workspaces_vary_and_not_steadily() -> None:
    def size(rows: int, length: int) -> int:
        return attention_bytes(rows, 2, rows * 512, [length] * rows, 4096, largest=False)

    by_length = [size(1, length) for length in (100, 1280, 1400, 2560)]
    assert by_length[0] == SYSTEM_BYTES < by_length[2] < by_length[1] == by_length[3]
    by_rows = [size(rows, 1280) for rows in (1, 2, 3, 20)]
    assert len(set(by_rows)) > 2 and by_rows[-1] == SYSTEM_BYTES < by_rows[0]
    largest = attention_bytes(1, 2, 512, [1], 4096, largest=True)
    assert largest == max(size(1, length) for length in range(1, 4097))


def out_form(decode: Decode, workspace: torch.Tensor) -> None:
    key, value = decode.cache
    torch_npu.npu_fused_infer_attention_score.out(
        decode.query, key.flatten(2), value.flatten(2), input_layout="TND", num_heads=4,
        num_key_value_heads=2, scale=0.1, block_table=decode.table, block_size=BLOCK,
        actual_seq_lengths=[1, 2], actual_seq_lengths_kv=[5, 200], workspace=workspace,
        out=[decode.out, decode.lse],
    )  # fmt: skip


@pytest.mark.every_mode
@pytest.mark.no_task_queue
def test_a_workspace_that_is_too_small_is_refused() -> None:
    """One that was made for shorter contexts, say."""
    decode = Decode("fused out")
    needed = attention_bytes(2, 2, decode.query.numel(), [5, 200], 256, largest=False)
    assert needed > SYSTEM_BYTES
    memory = torch.empty(needed, dtype=torch.uint8, device="npu")
    out_form(decode, memory)
    torch.npu.synchronize()
    with pytest.raises(RuntimeError, match=f"a workspace of {needed} bytes, not {needed - 1}"):
        out_form(decode, memory[:-1])


@pytest.mark.every_mode
@pytest.mark.parametrize("kind", ["paged", "fused out"])
def test_a_workspace_that_is_given_to_others_while_a_graph_uses_it(kind: str) -> None:
    decode = Decode(kind)
    graph, _ = capture(lambda: decode([5, 200]), automatic=True)
    torch.npu.synchronize()
    decode.workspace.fill_(1)  # what another tensor would hold in the same memory
    stream = graph.graph_dispatch_mode.update_stream
    stream.wait_stream(torch.npu.current_stream())
    graph.replay()
    decode.update(graph, [7, 31])
    torch.npu.synchronize()
    assert (decode.workspace[: SYSTEM_BYTES // 2].cpu() != 1).any()


# ----------------------------------------------------------------------------- hidden copies
@pytest.mark.every_mode
def test_replays_repeat_their_hidden_copies() -> None:
    """Key heads of q|k|v in a graph: each replay copies them first, and nobody launches it."""
    strided, gamma = dev(3, 8, 128)[:, 4:6], dev(128)
    torch.npu.synchronize()
    ascend_sim.reset_trace()
    graph, _ = capture(lambda: torch_npu.npu_rms_norm(strided, gamma, 1e-6))
    assert trace.hidden_copies() == 0  # nothing has run
    graph.replay()
    graph.replay()
    torch.npu.synchronize()
    assert [(each.launches, each.hidden_copies) for each in trace.replays()] == [(1, 1), (1, 1)]
    assert trace.hidden_copies() == 2


# --------------------------------------------------------------------------- a lost device
def hang() -> Any:
    decode = Decode("fused")
    graph, _ = capture(lambda: decode([5, 200]), automatic=True)
    torch.npu.synchronize()
    graph.replay()
    with pytest.raises(RuntimeError, match="would hang"):
        torch.npu.synchronize()
    return graph


@pytest.mark.every_mode
@pytest.mark.no_task_queue
def test_a_device_that_hung_is_lost_for_every_later_call() -> None:
    data = torch.ones(4, device="npu")
    graph = hang()
    for call in (
        torch.npu.synchronize,
        data.cpu,
        lambda: data + data,
        lambda: data.copy_(torch.zeros(4)),
        graph.replay,
    ):
        with pytest.raises(RuntimeError, match="the device is lost"):
            call()
    ascend_sim.abandon_pending()
    torch.npu.synchronize()
    assert torch.equal(data.cpu(), torch.ones(4))


# ------------------------------------------------------------------------------ static scales
@pytest.mark.parametrize("dtype", [torch.float16, HALF])
def test_a_half_precision_quant_scale_is_refused(dtype: torch.dtype) -> None:
    x, scale = dev(4, 64), dev(1, 32, dtype=torch.float32)
    torch_npu.npu_dequant_swiglu_quant(x, quant_scale=scale, quant_mode=1)
    with pytest.raises(RuntimeError, match="quant_scale must be one of float32"):
        torch_npu.npu_dequant_swiglu_quant(x, quant_scale=scale.to(dtype), quant_mode=1)
