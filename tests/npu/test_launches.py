"""What a step launches, the copies that no launch shows included."""

from __future__ import annotations

import dataclasses

import ascend_sim
import pytest
import torch
import torch_npu

from qwen3_ascend.runtime.backends.base import StepBounds
from qwen3_ascend.runtime.backends.npu.attention import HeadCounts
from qwen3_ascend.runtime.backends.npu.backend import NpuBackend
from qwen3_ascend.runtime.backends.npu.heads import HeadDivider
from qwen3_ascend.runtime.engine.batch import Batch, Chunk, step_inputs
from qwen3_ascend.runtime.engine.request import Request, SamplingParams
from qwen3_ascend.runtime.model.loader import load_model
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG, SyntheticWeights

pytestmark = pytest.mark.opposite_modes

BLOCK = 128
QKV = "model.layers.0.self_attn.qkv_proj"


def batch(lengths: tuple[int, ...], counts: tuple[int, ...]) -> Batch:
    """Requests with so many tokens, of which so many are new."""
    chunks = []
    for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tokens = [3 + 5 * index + at for at in range(length)]
        request = Request(index, SamplingParams(), tokens, length, length + 1, frozenset())
        request.block_table, request.computed = [1 + index], length - count
        request.wants_logits = False
        chunks.append(Chunk.next_of(request, count))
    return Batch(tuple(chunks))


SMALLEST = dataclasses.replace(
    SMALL_CONFIG,
    hidden_size=256,
    intermediate_size=512,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=512,
)
"""Sizes that the kernels of every scheme take; how large they are changes no launch."""


class Layers:
    """Models of one and of two layers, to tell what one more layer costs."""

    def __init__(self, scheme: str) -> None:
        self._models = []
        for layers in (1, 2):
            config = dataclasses.replace(SMALLEST, num_layers=layers)
            backend = NpuBackend(config, DeviceOptions("npu", graph=False))
            self._models.append(load_model(SyntheticWeights(config, scheme), backend))

    def cost(self, lengths: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, int]:
        """(launches, hidden copies) of one decoder layer in one eager step."""
        found = []
        for model in self._models:
            caches = model.backend.allocate_cache(StepBounds(4, BLOCK, 6))
            inputs = step_inputs(batch(lengths, counts), BLOCK)
            with torch.inference_mode():
                model.forward(
                    model.backend.open_step(inputs), caches
                )  # tables are made by the first
                torch_npu.npu.synchronize()
                ascend_sim.reset_trace()
                model.forward(model.backend.open_step(inputs), caches)
                torch_npu.npu.synchronize()
            found.append((len(ascend_sim.trace.launches()), ascend_sim.trace.hidden_copies()))
        (one, hidden), (two, more_hidden) = found
        return two - one, more_hidden - hidden


@pytest.mark.parametrize(
    ("scheme", "newest"),
    [
        ("w8a8", 13),
        ("bf16", 12),
        ("w8a8-static", 16),
        ("w8a16", 12),
        ("w4a8", 13),
        ("w4a16", 12),
    ],
)
def test_a_layer_copies_nothing_in_hiding(scheme: str, newest: int) -> None:
    """The older forms of operations, which other releases have, are more launches."""
    layers = Layers(scheme)
    launches, hidden = layers.cost((7,), (1,))
    assert hidden == 0
    assert launches == newest if ascend_sim.cann.current().name == "9.1" else launches >= newest
    # One launch more divides q|k|v.
    assert layers.cost((7, 9, 4, 30), (1, 1, 1, 1)) == (launches + 1, 0)
    assert layers.cost((7, 9), (7, 4)) == (launches + 1, 0)
    assert layers.cost((120, 70, 90), (120, 70, 90)) == (launches + 3, 0)


@pytest.mark.parametrize(("rows", "launches"), [(1, 0), (2, 1), (17, 1), (256, 1), (257, 3)])
def test_the_parts_of_qkv(rows: int, launches: int) -> None:
    divide = HeadDivider(HeadCounts(16, 8, 128))
    qkv = torch.randn(rows, 32 * 128).bfloat16().to("npu")
    divide(qkv)  # brings the order of the heads to the device
    torch_npu.npu.synchronize()
    ascend_sim.reset_trace()
    found = divide(qkv)
    torch_npu.npu.synchronize()
    assert len(ascend_sim.trace.launches()) == launches
    assert not ascend_sim.trace.copies("host_to_device")
    expected = torch.split(qkv.cpu().view(rows, 32, 128), [16, 8, 8], dim=1)
    for part, whole in zip(found, expected, strict=True):
        assert part.is_contiguous() and torch.equal(part.cpu(), whole)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (32, 8), (40, 8)])
def test_any_counts_of_heads(heads: int, kv_heads: int) -> None:
    qkv = torch.randn(5, (heads + 2 * kv_heads) * 128).bfloat16()
    found = HeadDivider(HeadCounts(heads, kv_heads, 128))(qkv.to("npu"))
    expected = torch.split(qkv.view(5, -1, 128), [heads, kv_heads, kv_heads], dim=1)
    for part, whole in zip(found, expected, strict=True):
        assert torch.equal(part.cpu(), whole)


@pytest.mark.parametrize(("rows", "made"), [(1, 0), (256, 0), (257, 1)])
def test_the_zeros_of_the_first_norm_are_kept(rows: int, made: int) -> None:
    """And do not change, whatever is added to them."""
    backend = NpuBackend(SMALL_CONFIG, DeviceOptions("npu"))
    linear = backend.linear(SyntheticWeights(SMALL_CONFIG, "w8a8").linear(QKV))
    weight = torch.ones(1024, dtype=torch.bfloat16, device="npu")
    for seed in range(2):
        random = torch.Generator().manual_seed(seed)
        hidden = torch.randn(rows, 1024, generator=random).bfloat16()
        ascend_sim.reset_trace()
        _, total = backend.add_norm(hidden.to("npu"), None, weight, 1e-6, linear)
        torch_npu.npu.synchronize()
        assert torch.equal(total.cpu(), hidden)
    names = [entry.name for entry in ascend_sim.trace.launches()]
    assert names.count("aclnnInplaceZero") == made and len(names) <= 3
