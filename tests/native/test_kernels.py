"""Every implementation against the index-by-index reference, in all corners of the formats."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.native_cases import BITS, FLAVOURS, Codes, make_source, runnable_kernels, strided
from support.native_reference import pack, quantize, search_scales

from qwen3_ascend import native

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ODD_SHAPES = [(1, 1), (1, 40), (40, 1), (31, 15), (32, 16), (33, 17), (70, 300), (5, 519)]
sizes = st.integers(1, 70)


def bits_of(tensor: torch.Tensor) -> NDArray[Any]:
    """The stored bytes as integers, which numpy can compare (it has no bfloat16)."""
    if tensor.dtype in (torch.int8, torch.uint8):
        return tensor.contiguous().numpy()
    return tensor.contiguous().view(BITS[tensor.dtype][1]).numpy()


def run_quantize(kernels: native.Kernels, source: torch.Tensor) -> Codes:
    codes = Codes.garbage(*source.shape)
    kernels.quantize_w8a8_nz(source, codes.strips, codes.scales, codes.signal, codes.noise)
    return codes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_quantize_is_the_definition(
    kernels: native.Kernels, shape: tuple[int, int], flavour: str, dtype: torch.dtype
) -> None:
    source = strided(make_source(flavour, shape, dtype, seed=3), gap=5)
    codes = run_quantize(kernels, source)
    strips, scales, signal, noise = quantize(source.float().numpy())
    assert np.array_equal(codes.strips.flatten().numpy(), strips)
    assert codes.scales.tolist() == scales
    assert codes.signal.tolist() == signal and codes.noise.tolist() == noise


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(1, 600), st.sampled_from(FLAVOURS), st.sampled_from(FLOATS),
       st.integers(0, 2**32), st.integers(0, 3))  # fmt: skip
def test_all_paths_write_the_same_bytes(
    rows: int, columns: int, flavour: str, dtype: torch.dtype, seed: int, gap: int
) -> None:
    source = strided(make_source(flavour, (rows, columns), dtype, seed), gap)
    fallback = run_quantize(native.TorchKernels(), source)
    for compiled in runnable_kernels():
        assert run_quantize(compiled, source).equals(fallback)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_measured_error_is_the_reported_one(
    kernels: native.Kernels, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    source = make_source("bits", shape, dtype, seed=4)
    codes = run_quantize(kernels, source)
    again = Codes.garbage(*shape)
    kernels.error_w8a8_nz(source, codes.strips, codes.scales, again.signal, again.noise)
    assert torch.equal(again.signal, codes.signal) and torch.equal(again.noise, codes.noise)


def test_measured_error_of_foreign_codes_is_equal_on_every_path() -> None:
    """Codes of another algorithm make inexact terms: still one order and one rounding."""
    source = make_source("normal", (70, 519), torch.float32, seed=5)
    codes = run_quantize(native.TorchKernels(), source)
    codes.strips.random_(-128, 128, generator=torch.Generator().manual_seed(1))
    codes.scales.mul_(1.37)
    results = []
    for implementation in [*runnable_kernels(), native.TorchKernels()]:
        implementation.error_w8a8_nz(source, *vars(codes).values())
        results.append((codes.signal.clone(), codes.noise.clone()))
    for signal, noise in results:
        assert torch.equal(signal, results[0][0]) and torch.equal(noise, results[0][1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 600), st.sampled_from(FLOATS), st.booleans(),
       st.data())  # fmt: skip
def test_first_non_finite_weight_is_named(
    rows: int, columns: int, dtype: torch.dtype, negative: bool, data: st.DataObject
) -> None:
    source = make_source("normal", (rows, columns), dtype, seed=6)
    cells = st.tuples(st.integers(0, rows - 1), st.integers(0, columns - 1))
    bad = data.draw(st.lists(cells, min_size=1, max_size=4))
    for cell in bad:
        value = data.draw(st.sampled_from([float("nan"), float("inf")]))
        source[cell] = -value if negative else value
    strips = torch.empty(-(-columns // 16), -(-rows // 16), 16, 16, dtype=torch.bfloat16)
    for implementation in [*runnable_kernels(), native.TorchKernels()]:
        with pytest.raises(native.NotFinite) as caught:
            run_quantize(implementation, source)
        assert (caught.value.row, caught.value.column) == min(bad)
        with pytest.raises(native.NotFinite) as caught:
            implementation.check_finite(source)
        assert (caught.value.row, caught.value.column) == min(bad)
        with pytest.raises(native.NotFinite) as caught:
            implementation.pack_nz_rows(source, strips)
        assert (caught.value.row, caught.value.column) == min(bad)


def test_first_row_wins_over_first_tile(kernels: native.Kernels) -> None:
    """Packing walks tiles of columns, yet must name the first bad weight in row-major order."""
    source = torch.zeros(20, 2500, dtype=torch.bfloat16)
    for cell in [(18, 0), (3, 7), (2, 1500), (2, 2400)]:
        source[cell] = float("nan")
    with pytest.raises(native.NotFinite, match="row 2, column 1500"):
        kernels.pack_nz_rows(source, torch.empty(157, 2, 16, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [*FLOATS[:2], torch.int8, torch.uint8])
@pytest.mark.parametrize("shape", [*ODD_SHAPES, (16, 64), (48, 96), (17, 2070)])
def test_pack_is_the_offset_formula_and_unpack_its_inverse(
    kernels: native.Kernels, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rows, columns = shape
    if dtype in FLOATS:
        source = strided(make_source("bits", (rows, columns), dtype, seed=7), gap=3)
    else:
        wide = torch.randint(0, 127, (rows, columns + 3), dtype=dtype)
        source = wide[:, :columns]
    width = 32 // source.element_size()
    strips = torch.full((-(-columns // width), -(-rows // 16), 16, width), 77).to(dtype)
    kernels.pack_nz_rows(source, strips)
    expected = pack(bits_of(source), width)
    assert np.array_equal(bits_of(strips).ravel(), expected)
    restored = torch.zeros(rows, columns + 2, dtype=dtype)
    kernels.unpack_nz_rows(strips, restored[:, :columns])
    assert np.array_equal(bits_of(restored[:, :columns]), bits_of(source))
    assert not bits_of(restored[:, columns:]).any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_pack_converts_to_bfloat16_like_torch(
    kernels: native.Kernels, flavour: str, dtype: torch.dtype
) -> None:
    source = make_source(flavour, (33, 1300), dtype, seed=8)
    strips = torch.empty(82, 3, 16, 16, dtype=torch.bfloat16)
    kernels.pack_nz_rows(source, strips, check_finite=False)
    assert np.array_equal(bits_of(strips).ravel(), pack(bits_of(source.bfloat16()), 16))


@pytest.mark.parametrize("dtype", FLOATS)
def test_unchecked_pack_keeps_infinities_and_nans(
    kernels: native.Kernels, dtype: torch.dtype
) -> None:
    source = torch.tensor([[float("inf"), float("-inf"), float("nan"), 1.0]]).to(dtype)
    strips = torch.empty(1, 1, 16, 16, dtype=torch.bfloat16)
    kernels.pack_nz_rows(source, strips, check_finite=False)
    assert str(strips[0, 0, 0, :4].tolist()) == "[inf, -inf, nan, 1.0]"


def test_float32_that_overflows_bfloat16_is_named(kernels: native.Kernels) -> None:
    source = torch.ones(3, 20)
    source[2, 19] = torch.finfo(torch.float32).max
    with pytest.raises(native.NotFinite, match="row 2, column 19"):
        kernels.pack_nz_rows(source, torch.empty(2, 1, 16, 16, dtype=torch.bfloat16))


def test_every_half_converts_exactly(kernels: native.Kernels) -> None:
    source = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).view(256, 256)
    strips = torch.empty(16, 16, 16, 16, dtype=torch.bfloat16)
    kernels.pack_nz_rows(source, strips, check_finite=False)
    restored = torch.empty(256, 256, dtype=torch.bfloat16)
    kernels.unpack_nz_rows(strips, restored)
    finite = source.isfinite()
    assert np.array_equal(bits_of(restored[finite]), bits_of(source.bfloat16()[finite]))
    assert torch.equal(restored.isnan(), source.isnan())


def test_row_blocks_on_threads_fill_one_buffer(kernels: native.Kernels) -> None:
    source = make_source("normal", (200, 100), torch.bfloat16, seed=9)
    whole, parts = run_quantize(kernels, source), Codes.garbage(200, 100)
    strips = [torch.full((7, 13, 16, 16), 9, dtype=torch.bfloat16) for _ in range(2)]
    kernels.pack_nz_rows(source, strips[0])

    def block(start: int) -> None:
        stop = min(200, start + 64)
        rows = slice(start, stop)
        outputs = (parts.scales[rows], parts.signal[rows], parts.noise[rows])
        kernels.quantize_w8a8_nz(source[rows], parts.strips[start // 32 : -(-stop // 32)], *outputs)
        kernels.pack_nz_rows(source[rows], strips[1][:, start // 16 : -(-stop // 16)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(block, range(0, 200, 64)))
    assert parts.equals(whole)
    assert torch.equal(strips[0], strips[1])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices(kernels: native.Kernels, shape: tuple[int, int]) -> None:
    codes = run_quantize(kernels, torch.empty(shape))
    assert codes.scales.tolist() == [1.0] * shape[0]
    assert codes.signal.tolist() == codes.noise.tolist() == [0.0] * shape[0]
    strips = torch.empty(-(-shape[1] // 16), -(-shape[0] // 16), 16, 16, dtype=torch.bfloat16)
    kernels.pack_nz_rows(torch.empty(shape), strips)


def test_flushed_subnormals_do_not_change_the_compiled_bytes() -> None:
    compiled = runnable_kernels()
    source = make_source("subnormal", (40, 100), torch.bfloat16, seed=10)
    expected = run_quantize(native.TorchKernels(), source)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        results = [run_quantize(implementation, source) for implementation in compiled]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(result.strips, expected.strips) for result in results)
    assert all(torch.equal(result.scales, expected.scales) for result in results)


INTEGERS = ((-8, 7), (-7, 7), (-127, 127))
RATIOS = torch.tensor([1.05, 1.0, 0.9, 0.5])


def run_search(
    kernels: native.Kernels, source: torch.Tensor, width: int, integers: tuple[int, int]
) -> torch.Tensor:
    rows, columns = source.shape
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(columns))
    importance[::5] = 0
    scales = torch.full((rows, -(-columns // width)), -7.0)
    kernels.search_scales(source, importance, width, integers, RATIOS, scales)
    return scales


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("shape", "width"), [((3, 70), 32), ((2, 9), 9), ((2, 33), 40)])
def test_searched_scales_are_the_definition(
    kernels: native.Kernels, shape: tuple[int, int], width: int, flavour: str
) -> None:
    source = strided(make_source(flavour, shape, torch.float32, seed=11), gap=5)
    importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(shape[1]))
    importance[::5] = 0
    for integers in INTEGERS:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            expected = search_scales(
                source.numpy(), importance.numpy(), width, integers, RATIOS.tolist()
            )
        assert run_search(kernels, source, width, integers).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(1, 600), st.integers(1, 200), st.sampled_from(FLAVOURS),
       st.sampled_from(INTEGERS), st.integers(0, 2**32))  # fmt: skip
def test_all_paths_find_the_same_scales(
    rows: int, columns: int, width: int, flavour: str, integers: tuple[int, int], seed: int
) -> None:
    source = strided(make_source(flavour, (rows, columns), torch.float32, seed), gap=3)
    fallback = run_search(native.TorchKernels(), source, width, integers)
    for compiled in runnable_kernels():
        assert torch.equal(run_search(compiled, source, width, integers), fallback)


def run_block(
    kernels: native.Kernels, rows: int, columns: int, integers: tuple[int, int], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, columns + 3, generator=generator)[:, :columns]
    factor = torch.randn(columns, 2 * columns, generator=generator)[:, :columns]
    factor.diagonal().abs_().add_(1)
    scales = 0.1 + torch.rand(rows, columns, generator=generator)
    codes = torch.full((rows, columns), 77, dtype=torch.int8)
    errors = torch.full((rows, columns), -7.0)
    kept = weights.clone()
    kernels.compensate_block(weights, scales, factor, integers, codes, errors)
    assert torch.equal(weights, kept)
    return codes, errors


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 128), st.sampled_from(INTEGERS), st.integers(0, 2**32))
def test_all_paths_compensate_alike(
    rows: int, columns: int, integers: tuple[int, int], seed: int
) -> None:
    codes, errors = run_block(native.TorchKernels(), rows, columns, integers, seed)
    for compiled in runnable_kernels():
        found = run_block(compiled, rows, columns, integers, seed)
        assert torch.equal(found[0], codes) and torch.equal(found[1], errors)


def test_what_is_no_block_or_search_is_refused(kernels: native.Kernels) -> None:
    square, codes = torch.ones(4, 4), torch.empty(4, 4, dtype=torch.int8)
    block = [square, square, square, (-8, 7), codes, square.clone()]
    search = [square, torch.ones(4), 2, (-8, 7), RATIOS, torch.empty(4, 2)]
    kernels.compensate_block(*block)  # type: ignore[arg-type]
    kernels.search_scales(*search)  # type: ignore[arg-type]
    for place, bad in ((0, square.double()), (1, square[:2]), (2, square[:2]), (4, codes.t())):
        wrong = [*block[:place], bad, *block[place + 1 :]]
        with pytest.raises(ValueError):
            kernels.compensate_block(*wrong)  # type: ignore[arg-type]
    wide = torch.ones(129, 129)
    with pytest.raises(ValueError, match="129 columns"):
        kernels.compensate_block(wide, wide, wide, (-8, 7), wide.to(torch.int8), wide.clone())
    for place, other in ((0, codes), (1, torch.ones(5)), (2, 0), (5, torch.empty(4, 3))):
        wrong = [*search[:place], other, *search[place + 1 :]]
        with pytest.raises(ValueError):
            kernels.search_scales(*wrong)  # type: ignore[arg-type]


BAD_SOURCES = {
    "int8": torch.zeros(40, 20, dtype=torch.int8),
    "vector": torch.zeros(40),
    "transposed": torch.zeros(20, 40).t(),
    "overlapping rows": torch.zeros(60).as_strided((40, 20), (1, 1)),
    "another shape": torch.zeros(41, 20),
    "unaligned": torch.frombuffer(bytearray(3201), dtype=torch.float32, count=800, offset=1),
}


@pytest.mark.parametrize("source", BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_wrong_sources_are_refused(kernels: native.Kernels, source: torch.Tensor) -> None:
    matrix = source.view(40, 20) if source.numel() == 800 and source.is_contiguous() else source
    with pytest.raises(ValueError):
        kernels.quantize_w8a8_nz(matrix, *vars(Codes.garbage(40, 20)).values())


@pytest.mark.parametrize("field", ["strips", "scales", "signal", "noise"])
def test_wrong_outputs_are_refused(kernels: native.Kernels, field: str) -> None:
    codes = vars(Codes.garbage(40, 20))
    codes[field] = codes[field].repeat_interleave(2, 0)[::2]
    with pytest.raises(ValueError, match=field):
        kernels.quantize_w8a8_nz(torch.zeros(40, 20), *codes.values())


def test_wrong_strips_are_refused(kernels: native.Kernels) -> None:
    source = torch.zeros(40, 20, dtype=torch.float16)
    for strips in (
        torch.zeros(2, 3, 16, 16),  # float32 has no layout here
        torch.zeros(2, 3, 16, 32, dtype=torch.int8),
        torch.zeros(2, 2, 16, 16, dtype=torch.float16),
        torch.zeros(2, 3, 16, 32, dtype=torch.float16)[..., ::2],
    ):
        with pytest.raises(ValueError):
            kernels.pack_nz_rows(source, strips)
    with pytest.raises(ValueError, match="unpacking keeps"):
        kernels.unpack_nz_rows(torch.zeros(2, 3, 16, 16, dtype=torch.bfloat16), source)
