"""The ATB operators that engines call: what they compute, what they refuse, what strides cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu

import ascend_sim
from ascend_sim import trace
from ascend_sim.test_refusals import FP32, Cases, as_nz, dev, make, refused, strided

HALF = torch.bfloat16
WIDTH, POSITIONS = 32, 16
TURNS = torch.outer(torch.arange(POSITIONS), 1.0 / 100 ** (torch.arange(WIDTH // 2) / WIDTH))
TABLE = torch.cat((TURNS.cos(), TURNS.sin()), -1).to(HALF)
"""One for all tests: op-plugin keeps that of the first call of a process."""


def rotated(x: torch.Tensor, positions: torch.Tensor, halves: bool) -> torch.Tensor:
    """Pairs of values as complex numbers, turned: x[i], x[i + D/2], or x[2 i], x[2 i + 1]."""
    heads = x.double().view(len(x), -1, WIDTH)
    cos, sin = TABLE.double()[positions.flatten()].chunk(2, -1)
    turn = torch.complex(cos, sin)[:, None]
    if halves:
        turned = torch.complex(*heads.chunk(2, -1)) * turn
        return torch.cat((turned.real, turned.imag), -1).view(x.shape)
    turned = torch.view_as_complex(heads.view(*heads.shape[:2], -1, 2)) * turn
    return torch.view_as_real(turned).reshape(x.shape)


@pytest.mark.opposite_modes
@pytest.mark.parametrize("halves", [True, False])
def test_rotary_embedding(halves: bool) -> None:
    positions = torch.tensor([3, 0, 15])
    query, key = torch.randn(3, 4 * WIDTH).to(HALF), torch.randn(3, 2 * WIDTH).to(HALF)
    on_device = query.npu(), key.npu()
    torch_npu._npu_rotary_embedding(positions.npu(), *on_device, WIDTH, TABLE.npu(), halves)
    for actual, before in zip(on_device, (query, key), strict=True):
        expected = rotated(before, positions, halves)
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=0.01, atol=0.01)


ROTATION: Cases = {
    "another table": ("differs from that of the first call", dict(cos_sin_cache=-TABLE.npu())),
    "a longer table": ("differs from that", dict(cos_sin_cache=torch.cat((TABLE, TABLE)).npu())),
    "table width": ("cos_sin_cache .* must be", dict(cos_sin_cache=lambda: dev(POSITIONS, 64))),
    "dims": ("query must be .tokens", dict(query=lambda: dev(3, 4, WIDTH))),
    "rows": ("key .* must be .3, heads", dict(key=lambda: dev(4, 2 * WIDTH))),
    "strides": ("query must be contiguous", dict(query=lambda: strided(3, 4 * WIDTH))),
    "dtype": ("key must be one of", dict(key=lambda: dev(3, 2 * WIDTH, **FP32))),
    "positions": ("positions must be one of", dict(positions=lambda: dev(3, **FP32))),
    "nz": ("format ND", dict(query=lambda: as_nz(dev(3, 4 * WIDTH)))),
}


@pytest.mark.parametrize("case", ROTATION)
def test_rotary_embedding_refuses(case: str) -> None:
    rule, changes = ROTATION[case]
    base = dict(
        positions=torch.tensor([3, 0, 15]).npu(),
        query=dev(3, 4 * WIDTH),
        key=dev(3, 2 * WIDTH),
        head_size=WIDTH,
        cos_sin_cache=TABLE.npu(),
        is_neox_style=True,
    )
    refused(rule, torch_npu._npu_rotary_embedding, base, **make(changes))


@pytest.mark.opposite_modes
def test_matmul_add() -> None:
    x, weight, total = torch.randn(5, 3).half(), torch.randn(5, 4).half(), torch.randn(3, 4)
    on_device = total.npu()
    torch_npu._npu_matmul_add_fp32(x.npu(), weight.npu(), on_device)
    expected = total.double() + torch.einsum("ki,kj->ij", x.double(), weight.double())
    torch.testing.assert_close(on_device.cpu().double(), expected, rtol=1e-3, atol=1e-3)


ACCUMULATION: Cases = {
    "half": ("x must be one of", dict(x=lambda: dev(5, 3, **FP32))),
    "one dtype": ("one dtype", dict(weight=lambda: dev(5, 4, dtype=torch.float16))),
    "rows": ("matrices of equal rows", dict(weight=lambda: dev(6, 4))),
    "shape": ("C must have shape", dict(C=lambda: dev(4, 3, **FP32))),
    "sum dtype": ("C must be one of", dict(C=lambda: dev(3, 4))),
    "sum strides": ("C must be contiguous", dict(C=lambda: strided(3, 4, **FP32))),
}


@pytest.mark.parametrize("case", ACCUMULATION)
def test_matmul_add_refuses(case: str) -> None:
    rule, changes = ACCUMULATION[case]
    base = dict(x=dev(5, 3), weight=dev(5, 4), C=dev(3, 4, **FP32))
    refused(rule, torch_npu._npu_matmul_add_fp32, base, **make(changes))


# ------------------------------------------------------------------- strided inputs
def written(value: torch.Tensor, slots: list[int]) -> tuple[torch.Tensor, int]:
    """The value cache after a write of `value`, and the copies that it cost."""
    caches = dev(2, 16, 2, 128), dev(2, 16, 2, 128)
    places, key = torch.tensor(slots, dtype=torch.int32).npu(), dev(len(slots), 2, 128)
    torch.npu.synchronize()
    ascend_sim.reset_trace()
    torch_npu._npu_reshape_and_cache(key, value, *caches, places)
    torch.npu.synchronize()
    assert len(trace.launches()) == 1
    return caches[1].cpu().flatten(0, 1), trace.hidden_copies()


@pytest.mark.opposite_modes
def test_strided_inputs_are_copied_first() -> None:
    """The value heads of q|k|v, as vllm-ascend gives them: op-plugin makes them contiguous."""
    qkv = torch.randn(3, 8, 128).to(HALF)
    cache, copies = written(qkv.npu()[:, 6:], [5, 0, 20])
    assert copies == 1 and torch.equal(cache[[5, 0, 20]], qkv[:, 6:])
    cache, copies = written(qkv[:, 6:].contiguous().npu(), [5, 0, 20])
    assert copies == 0 and torch.equal(cache[[5, 0, 20]], qkv[:, 6:])


def test_a_transposed_view_is_copied_too() -> None:
    value = torch.randn(2, 3, 128).to(HALF)
    cache, copies = written(value.npu().transpose(0, 1), [1, 2, 3])
    assert copies == 1 and torch.equal(cache[[1, 2, 3]], value.transpose(0, 1))


def test_strided_query_of_paged_attention() -> None:
    """Attention over one cached token is its value; the query's strides cost a copy."""
    cache = torch.randn(4, 16, 2, 128).to(HALF)
    arguments: dict[str, Any] = dict(
        key_cache=cache.npu(), value_cache=cache.npu(), num_kv_heads=2, num_heads=2,
        block_table=torch.tensor([[1], [3]], dtype=torch.int32).npu(), scale_value=0.1,
        context_lens=torch.tensor([1, 1], dtype=torch.int32), out=dev(2, 2, 128),
    )  # fmt: skip
    torch.npu.synchronize()
    ascend_sim.reset_trace()
    torch_npu._npu_paged_attention(query=strided(2, 2, 128), **arguments)
    assert torch.equal(arguments["out"].cpu(), cache[[1, 3], 0])
    assert trace.hidden_copies() == 1
