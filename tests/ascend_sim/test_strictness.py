"""What today's cards punish late or in silence, and the simulator at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu

import ascend_sim
from ascend_sim import faults, runtime, trace
from ascend_sim.test_graphs import BLOCK, KINDS, Decode, capture
from ascend_sim.test_refusals import as_nz, dev

pytestmark = pytest.mark.opposite_modes

HALF = torch.bfloat16


def attend(blocks: int, lengths: list[int], table: list[list[int]]) -> torch.Tensor:
    rows = len(lengths)
    cache = torch.randn(blocks, BLOCK, 2 * 128).to(HALF).npu()
    result: torch.Tensor = torch_npu.npu_fused_infer_attention_score(
        dev(rows, 4, 128), cache, cache, input_layout="TND", num_heads=4, num_key_value_heads=2,
        scale=0.1, block_table=torch.tensor(table, dtype=torch.int32).npu(), block_size=BLOCK,
        actual_seq_lengths=list(range(1, rows + 1)), actual_seq_lengths_kv=lengths,
    )[0]  # fmt: skip
    torch.npu.synchronize()
    return result


def test_blocks_are_summed_over_the_rows_that_share_them() -> None:
    """Two rows of one token read block 0, and a third reads two blocks: four, of which three are
    different."""
    table = [[0, 0], [0, 0], [1, 2]]
    attend(4, [1, 1, 129], table)
    with pytest.raises(RuntimeError, match=r"key\(3\) should not less than valid block num\(4\)"):
        attend(3, [1, 1, 129], table)


@pytest.mark.parametrize("shape", [(64, 1), (1, 64)])
def test_an_nz_weight_with_a_dim_of_one(shape: tuple[int, int]) -> None:
    x, scale = dev(4, shape[0], dtype=torch.int8), dev(shape[1], dtype=torch.float32)
    weight = as_nz(dev(*shape, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="NZ weight must not have a dim of 1"):
        torch_npu.npu_quant_matmul(x, weight, scale, output_dtype=HALF)


def write(kind: str, slots: list[int]) -> None:
    cache, rows = dev(2, BLOCK, 2, 128), dev(len(slots), 2, 128)
    places = torch.tensor(slots, dtype=torch.int32).npu()
    if kind == "scatter":
        torch_npu.npu_scatter_pa_kv_cache(
            rows, rows, cache, cache.clone(), places, cache_mode="Norm"
        )
    else:
        torch_npu._npu_reshape_and_cache(rows, rows, cache, cache.clone(), places)
    torch.npu.synchronize()


@pytest.mark.parametrize("kind", ["scatter", "reshape"])
def test_two_rows_for_one_slot(kind: str) -> None:
    write(kind, [5, 6, 7])
    with pytest.raises(RuntimeError, match="two rows have one slot"):
        write(kind, [5, 6, 5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("place", "clean"), [(1, True), (5, False)])
def test_nan_behind_the_last_value_of_a_block(kind: str, place: int, clean: bool) -> None:
    """Row 1 reads 3 tokens of block 2: what is in block 2 behind them counts, block 1 does not."""
    decode = Decode(kind)
    block = 2 if not clean else 1
    decode.cache[1][block, place] = float("nan")
    out = decode([5, 3]).cpu()
    assert out[0].isfinite().all() and bool(out[1].isfinite().all()) == clean


def replay_with_a_failing_update() -> Any:
    """A graph of three attention calls, of which only the first gets its new lengths."""
    decode = Decode("fused")
    graph, _ = capture(lambda: [decode([5, 200]) for _ in range(3)], automatic=True)
    torch.npu.synchronize()
    graph.replay()
    with (
        faults.failing_update(after=1),
        pytest.raises(RuntimeError, match="planted fault: this update"),
    ):
        decode.update(graph, [7, 31])
    return graph


def test_a_replay_hangs_after_a_failed_update() -> None:
    """A card would stand still until its watchdog ends the process; here, waiting is an error."""
    graph = replay_with_a_failing_update()
    with pytest.raises(RuntimeError, match="would hang"):
        torch.npu.synchronize()
    ascend_sim.abandon_pending()
    del graph


def test_captured_task_groups_take_streams() -> None:
    decode = Decode("fused")
    run = lambda: [decode([5, 200]) for _ in range(3)]  # noqa: E731
    graph, _ = capture(run, automatic=True)
    torch.npu.synchronize()
    used = runtime.library.sim_streams_used()
    with faults.stream_limit(used + 4):
        second, _ = capture(run, automatic=True)
        assert runtime.library.sim_streams_used() == used + 4  # the capture and three groups
        with pytest.raises(RuntimeError, match="no stream left"):
            capture(run)
    del graph, second


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 0), (3, 1)])
def test_strided_inputs_cost_a_copy_that_the_trace_tells(tokens: int, hidden: int) -> None:
    """The key heads of q|k|v: a norm of them copies first, unless there is but one token."""
    key, gamma = dev(tokens, 8, 128)[:, 4:6], dev(128)
    torch.npu.synchronize()
    ascend_sim.reset_trace()
    torch_npu.npu_rms_norm(key, gamma, 1e-6)
    torch.npu.synchronize()
    assert len(trace.launches()) == 1 and trace.hidden_copies() == hidden
    ascend_sim.reset_trace()
    torch_npu.npu_rms_norm(key.contiguous(), gamma, 1e-6)
    torch.npu.synchronize()
    assert len(trace.launches()) == 1 + hidden and trace.hidden_copies() == 0
