"""A layer's operations beside its linears, by every processor path that runs here.

tests/runtime/test_backends.py holds them against the definition; here is what that does not reach:
extreme values, threads, batches, what lies behind the end of a context.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.native import Feed, LayerKernels
from qwen3_ascend.native.layer import PER_TOKEN, STATIC
from qwen3_ascend.native.library import PATHS

DTYPES = (torch.bfloat16, torch.float32)
BLOCK = 16
UNITS = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20}
"""Of a result relative to its size: half a unit of bfloat16, and what sums and exponentials of
float32 come to."""

TOKENS = [(1, 1), (1, 63), (1, 64), (1, 65), (3, 200), (130, 130), (70, 333), (1, 1024), (1, 1025)]
"""(New, all): around a block of keys and a split, few and many queries."""

SMALLEST = 1e-35
"""Gates below -88 come to something smaller than this, and not to 0."""


@pytest.fixture(params=[path for path in PATHS if native.load(path)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LayerKernels:
    """Every path that there is here."""
    monkeypatch.setenv("QWEN3_ASCEND_CPU", request.param)
    found = native.layer_kernels()
    assert found is not None
    return found


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer; those of no token are not numbers."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


def cache_of(keys: Tensor, values: Tensor) -> Cache:
    """A cache whose first blocks hold the keys and values [length, kv_heads, head_dim]."""
    length, *shape = keys.shape
    blocks = [torch.full((-(-length // BLOCK) * BLOCK, *shape), torch.nan) for _ in range(2)]
    for block, rows in zip(blocks, (keys, values), strict=True):
        block[:length] = rows
    return Cache(*(block.to(keys.dtype).view(-1, BLOCK, *shape) for block in blocks))


def table_of(cache: Cache) -> Tensor:
    return torch.arange(len(cache.keys), dtype=torch.int32)[None]


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def attend(kernels: LayerKernels, query: Tensor, cache: Cache, length: int) -> Tensor:
    """Of one request whose last tokens the queries are."""
    lengths, starts = int32(length), int32(0, len(query))
    return kernels.attention(query, cache, table_of(cache), lengths, starts, Feed()).values


def exact_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """float64 [T, heads * head_dim]."""
    new, length = len(query), len(keys)
    group = query.shape[1] // keys.shape[1]
    wide = [each.double().repeat_interleave(group, 1).transpose(0, 1) for each in (keys, values)]
    scores = query.double().transpose(0, 1) @ wide[0].transpose(1, 2) / query.shape[2] ** 0.5
    hidden = torch.ones(new, length).triu(length - new + 1).bool()
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    attended: Tensor = weights @ wide[1]
    return attended.transpose(0, 1).flatten(1)


def assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype, size: Tensor | float) -> None:
    error = (found.double() - exact).abs()
    assert bool((error <= UNITS[dtype] * size).all()), float((error / size).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(2, 2, 8), (5, 1, 128), (6, 2, 36), (16, 1, 64)]
)
@pytest.mark.parametrize(
    ("new", "length"), [(1, 1), (1, 63), (1, 64), (1, 65), (3, 200), (130, 130), (70, 333)]
)
def test_attention(
    kernels: LayerKernels,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    new: int,
    length: int,
) -> None:
    """What lies behind the end of a context is not a number, and is not looked at."""
    query = draw(new, heads, size, dtype=dtype)
    keys, values = (draw(length, kv_heads, size, dtype=dtype, seed=seed) for seed in (1, 2))
    found = attend(kernels, query, cache_of(keys, values), length)
    exact = exact_attention(query, keys, values)
    assert found.dtype is dtype
    assert_near(found, exact, dtype, float(values.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts_of_several_requests(kernels: LayerKernels, dtype: torch.dtype) -> None:
    """Contexts of one and of several splits beside a prompt; each is what it is alone."""
    keys, values = (draw(3000, 2, 64, dtype=dtype, seed=seed) for seed in (1, 2))
    cache, query = cache_of(keys, values), draw(33, 6, 64, dtype=dtype)
    table = table_of(cache).expand(4, -1).contiguous()
    lengths, starts = int32(3000, 700, 2500, 2048), int32(0, 1, 2, 32, 33)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = kernels.attention(query, cache, table, lengths, starts, Feed()).values
            for begin, end, length in ((0, 1, 3000), (1, 2, 700), (2, 32, 2500), (32, 33, 2048)):
                alone = attend(kernels, query[begin:end].contiguous(), cache, length)
                assert torch.equal(found[begin:end], alone)
                exact = exact_attention(query[begin:end], keys[:length], values[:length])
                assert_near(alone, exact, dtype, float(values.abs().max()))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_extreme_scores(kernels: LayerKernels, dtype: torch.dtype) -> None:
    """One key outweighs all the others; it is the last, the first, or in the middle."""
    for place in (0, 70, 149):
        for new in (1, 9):
            keys, values = (draw(150, 1, 64, dtype=dtype, seed=seed) for seed in (1, 2))
            query = draw(new, 2, 64, dtype=dtype)
            query[-1] = 30.0
            keys[place] = 30.0
            found = attend(kernels, query, cache_of(keys, values), 150)[-1]
            assert torch.equal(found.view(2, 64), values[place].expand(2, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_has_one_result_in_every_batch(kernels: LayerKernels, dtype: torch.dtype) -> None:
    """Two requests of one step, and the same alone; how many threads there are changes nothing."""
    keys, values = (draw(400, 2, 64, dtype=dtype, seed=seed) for seed in (1, 2))
    cache, query = cache_of(keys, values), draw(41, 8, 64, dtype=dtype)
    table = torch.stack([table_of(cache)[0], table_of(cache)[0].flip(0)])
    alone = attend(kernels, query[:40], cache, 400)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            both = kernels.attention(query, cache, table, int32(400, 300), int32(0, 40, 41), Feed())
            assert torch.equal(both.values[:40], alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 168, 4096])
def test_gates_over_the_whole_range(
    kernels: LayerKernels, dtype: torch.dtype, columns: int
) -> None:
    gate = torch.linspace(-120, 120, 5 * columns).view(5, columns).to(dtype)
    up = draw(5, columns, dtype=dtype)
    found = kernels.gated(torch.cat([gate, up], 1), Feed()).values
    exact = F.silu(gate.double()) * up.double()
    assert_near(found, exact, dtype, exact.abs() + SMALLEST / UNITS[dtype])


def test_what_is_not_a_number_stays_so(kernels: LayerKernels) -> None:
    gate_up = torch.ones(3, 40)
    gate_up[1, 3] = torch.nan
    gated = kernels.gated(gate_up, Feed()).values
    assert gated.isnan().nonzero().tolist() == [[1, 3]]
    normed, total = kernels.add_norm(gate_up, gate_up, torch.ones(40), 1e-6, Feed())
    assert total.isnan().nonzero().tolist() == [[1, 3]]
    assert normed.values.isnan().any(1).tolist() == [False, True, False]
    scales = kernels.gated(gate_up, Feed(PER_TOKEN)).scales
    assert scales is not None
    assert scales.isnan().tolist() == [False, True, False]
    values = torch.ones(70, 1, 8)
    values[3] = torch.nan
    attended = attend(kernels, torch.ones(1, 1, 8), cache_of(torch.ones(70, 1, 8), values), 70)
    assert bool(attended.isnan().all())


def test_codes(kernels: LayerKernels) -> None:
    """Ties go to the even code, the ends are clipped, and a row of zeros has the scale 0."""
    gate = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 127.0, -3.49, 0.0]).repeat(2, 1)
    gate[1] = 0.0
    # silu(x) is x where x is large: so the gate is, and up what makes the product these numbers.
    up, large = gate / 64.0, torch.full_like(gate, 64.0)
    fed = kernels.gated(torch.cat([large, up], 1), Feed(PER_TOKEN))
    assert fed.scales is not None
    assert fed.scales.tolist() == [1.0, 0.0]
    assert fed.values.tolist() == [[0, 2, 2, 0, -2, 127, -3, 0], [0] * 8]
    fixed = kernels.gated(torch.cat([large, up], 1), Feed(STATIC, 2.0, -3.0))
    assert fixed.values.tolist()[0] == [-2, 0, 2, -4, -6, 127, -10, -3]
    assert fixed.values.tolist()[1] == [-3] * 8


def test_no_rows(kernels: LayerKernels) -> None:
    fed, total = kernels.add_norm(torch.empty(0, 8), None, torch.ones(8), 1e-6, Feed(PER_TOKEN))
    assert fed.values.shape == (0, 8)
    assert total.shape == (0, 8)


def test_widening(kernels: LayerKernels) -> None:
    for count in (1, 33, 100_001):
        values = draw(1, count, dtype=torch.bfloat16)
        assert torch.equal(kernels.widen(values), values.float())


@pytest.mark.parametrize("columns", [1, 3, 8, 31, 64, 1001])
def test_the_largest_of_each_row(kernels: LayerKernels, columns: int) -> None:
    """As torch.argmax has it: the first of several, and of what is not a number."""
    rows = [draw(columns, seed=seed) for seed in range(5)]
    rows.append((rows[0] * 3).round())  # many are equal
    rows.append(torch.full((columns,), -torch.inf))
    rows.append(
        rows[1].clone().index_fill_(0, torch.tensor([columns // 2, columns - 1]), torch.nan)
    )
    rows.append(rows[2].clone().index_fill_(0, torch.tensor([columns - 1]), torch.inf))
    values = torch.stack(rows)
    places = kernels.largest_places(values).tolist()
    for row, place in zip(values, places, strict=True):
        unknown = row.isnan().nonzero()
        largest = unknown if len(unknown) else (row == row.max()).nonzero()
        assert place == int(largest[0])


def test_a_tensor_that_is_not_contiguous_is_refused(kernels: LayerKernels) -> None:
    with pytest.raises(AssertionError, match="contiguous"):
        kernels.gated(torch.ones(4, 8).t(), Feed())
