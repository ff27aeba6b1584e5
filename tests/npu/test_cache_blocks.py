"""Blocks of the cache as the kernel of attention counts them, here as on a card: ceil(length /
block size) of each row, shared ones and padding too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ascend_sim
import pytest
import torch

from qwen3_ascend import SamplingParams, load
from qwen3_ascend.errors import OptionError
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.base import StepBounds
from qwen3_ascend.runtime.backends.npu.attention import split_step
from qwen3_ascend.runtime.backends.npu.graph import decode_buckets, largest_padding
from qwen3_ascend.runtime.backends.step import StepInputs
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG

BLOCK = 128


def chat(path: Path, device: str, prompts: list[list[int]], **options: Any) -> list[Any]:
    llm = load(path, device=device, **options)
    return [
        answer.token_ids
        for answer in llm.generate(prompts, SamplingParams(max_new_tokens=20, ignore_eos=True))
    ]


def shared_prompts(path: Path, count: int) -> list[list[int]]:
    """Prompts that begin with the same 256 tokens."""
    tokenizer = load(path, device="cpu").tokenizer
    assert tokenizer is not None
    text = (Path(__file__).parent.parent / "data/tiny-qwen3/heldout.txt").read_text()
    ids = tokenizer.encode(text[:4000])
    return [ids[:256] + ids[260 + 7 * i : 270 + 7 * i] for i in range(count)]


@pytest.mark.every_mode
@pytest.mark.parametrize("graph", [False, True])
def test_prompts_that_share_more_blocks_than_there_are(
    checkpoints: dict[str, Path], graph: bool
) -> None:
    """Six times three blocks, two of them shared, in a cache of ten: computed in parts."""
    prompts = shared_prompts(checkpoints["w8a8"], 6)
    sizes: dict[str, Any] = {"kv_cache_tokens": 9 * BLOCK, "max_batch": 6}
    expected = chat(checkpoints["w8a8"], "cpu", prompts, **sizes)
    assert len({tuple(tokens) for tokens in expected}) > 1
    ascend_sim.reset_trace()
    sizes |= {"attention": "fused", "graph": graph, "buckets": [6]}
    assert chat(checkpoints["w8a8"], "npu", prompts, **sizes) == expected
    assert ascend_sim.trace.replays() == []  # six rows of three blocks never fit into one call


@pytest.mark.every_mode
def test_a_bucket_of_more_rows_than_the_cache_was_asked_to_have_blocks(
    checkpoints: dict[str, Path],
) -> None:
    """Three requests in a full cache of four blocks, padded to sixteen rows."""
    ids = shared_prompts(checkpoints["w8a8"], 1)[0]
    prompts = [ids[start : start + 90] for start in (0, 50, 100)]
    sizes = {"kv_cache_tokens": 3 * BLOCK, "max_batch": 16}
    expected = chat(checkpoints["w8a8"], "cpu", prompts, **sizes)
    ascend_sim.reset_trace()
    assert chat(checkpoints["w8a8"], "npu", prompts, buckets=[16], **sizes) == expected
    assert len(ascend_sim.trace.replays()) == 19


@pytest.mark.parametrize(
    ("buckets", "needed", "blocks"),
    [
        ((1, 2, 4), 9, 10),  # one row of padding, for a batch of three
        ((1, 2, 4, 8, 16), 9, 17),  # the capture of sixteen rows
        ((1, 2, 4, 8, 16), 40, 47),  # seven rows of padding
        ((4,), 9, 12),
    ],
)
def test_spare_blocks(buckets: tuple[int, ...], needed: int, blocks: int) -> None:
    backend = backends.get(SMALL_CONFIG, DeviceOptions("npu", buckets=buckets))
    cache = backend.allocate_cache(StepBounds(max(buckets), BLOCK, needed))
    assert [len(layer.keys) for layer in cache] == [blocks] * SMALL_CONFIG.num_layers
    eager = backends.get(SMALL_CONFIG, DeviceOptions("npu", graph=False))
    assert len(eager.allocate_cache(StepBounds(16, BLOCK, needed))[0].keys) == needed


def test_the_cache_is_zeroed() -> None:
    """In memory that held not-a-number before."""
    backend = backends.get(SMALL_CONFIG, DeviceOptions("npu", graph=False))
    bounds = StepBounds(1, BLOCK, 5)
    for layer in backend.allocate_cache(bounds):
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    del layer
    for layer in backend.allocate_cache(bounds):
        assert not layer.keys.cpu().any() and not layer.values.cpu().any()


def step(lengths: tuple[int, ...], counts: tuple[int, ...]) -> StepInputs:
    starts = (0, *torch.tensor(counts).cumsum(0).tolist())
    tokens = torch.arange(starts[-1], dtype=torch.int32)
    table = torch.arange(len(lengths)).view(-1, 1).int()
    return StepInputs(tokens, tokens, tokens, table, lengths, starts, logit_rows=None)


def test_parts_of_a_step() -> None:
    whole = step((128, 129, 300, 1), counts=(2, 1, 3, 1))
    parts = list(split_step(whole, num_blocks=4, block_size=BLOCK))
    assert [(part.rows.start, part.rows.stop) for part in parts] == [(0, 3), (3, 7)]
    assert [part.step.context_lens for part in parts] == [(128, 129), (300, 1)]
    assert [part.step.query_starts for part in parts] == [(0, 2, 3), (0, 3, 4)]
    assert [part.step.block_table.flatten().tolist() for part in parts] == [[0, 1], [2, 3]]
    (only,) = split_step(whole, num_blocks=7, block_size=BLOCK)
    assert only.step is whole and only.rows == range(7)


def test_graphs_hold_no_more_streams_than_a_card_has() -> None:
    assert decode_buckets(64, most=48) == (1, 2, 4, *range(8, 72, 8))
    many = decode_buckets(1024, most=27)
    assert len(many) <= 27 and many[:4] == (1, 2, 4, 8) and many[-1] == 1024
    assert largest_padding(many) < 64
    assert decode_buckets(256, most=2) == (1, 2, 4, 8, 256)
    with pytest.raises(OptionError, match="buckets: 3 graphs .* choose 2 at most"):
        decode_buckets(8, [1, 2, 3], most=2)


def test_padding() -> None:
    assert largest_padding((1, 2, 4, 8, 16)) == 7
    assert largest_padding((3,)) == 2
    assert largest_padding((1,)) == 0
