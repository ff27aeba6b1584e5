"""Products of int8 by every set of instructions that this processor has, against int64."""

from __future__ import annotations

import itertools
import multiprocessing
import threading

import pytest
import torch
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.checkpoint.layout import nz_pack
from qwen3_ascend.native import Epilogue, Products
from qwen3_ascend.native.products import INSTRUCTIONS

SIZES = [
    (1, 1),
    (3, 5),
    (31, 16),
    (33, 63),
    (65, 129),
    (96, 255),
    (47, 1001),
    (5, 4097),
    (9, 25601),
]
"""(outputs, inputs): less and more than a strip, a group of rows and a tile."""

ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 25, 143, 144, 145, 301)
"""Less and more than every block of rows, and than the rows whose sums are kept together."""


def runnable() -> list[str]:
    """The sets of instructions that this processor has."""
    return [name for name in INSTRUCTIONS if native.products(name)]


@pytest.fixture(params=runnable())
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Products:
    """Every set of instructions that there is here."""
    monkeypatch.delenv("QWEN3_ASCEND_CPU", raising=False)
    found = native.products(request.param)
    assert found is not None
    return found


def draw(least: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(least, 128, shape, generator=generator).to(torch.int8)


def strips_of(weight: Tensor) -> Tensor:
    return nz_pack(weight.t())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_are_exact(products: Products, size: tuple[int, int]) -> None:
    weight = draw(-128, *size)
    strips = strips_of(weight)
    for rows in ROWS if size[1] < 300 else (1, 2, 12, 13):
        codes = draw(-128, rows, size[1], seed=rows)
        expected = codes.long() @ weight.long().t()
        assert torch.equal(products.of(strips, size)(codes).long(), expected)


def test_the_largest_sums(products: Products) -> None:
    """Every combination of the extreme codes: nothing saturates in 16 bits or overflows."""
    size, signs = (33, 1003), torch.tensor([127, -128, -127], dtype=torch.int8)
    for extreme in (127, -127, -128):
        weight = torch.full(size, extreme, dtype=torch.int8)
        for rows in (1, 3):
            codes = signs[:rows, None].expand(rows, size[1]).contiguous()
            expected = codes.long() @ weight.long().t()
            assert torch.equal(products.of(strips_of(weight), size)(codes).long(), expected)


@pytest.mark.parametrize("rows", [1, 2, 200])
@pytest.mark.parametrize("place", [(0, 0), (31, 299), (40, 150), (69, 3)], ids=str)
def test_one_weight_of_the_least_value(
    products: Products, place: tuple[int, int], rows: int
) -> None:
    """Which saturates in some instructions, wherever it stands: before and behind a tile's end."""
    size = (70, 300)
    weight, codes = draw(-127, *size), draw(-128, rows, size[1], seed=rows)
    weight[place] = -128
    codes[:, place[1]] = -128
    expected = codes.long() @ weight.long().t()
    assert torch.equal(products.of(strips_of(weight), size)(codes).long(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_epilogue(products: Products, dtype: torch.dtype) -> None:
    """Bit by bit: torch's float32 steps in the stated order."""
    generator = torch.Generator().manual_seed(0)
    size, rows = (77, 50), 14
    weight, codes = draw(-128, *size), draw(-128, rows, size[1], seed=1)
    exact = codes.long() @ weight.long().t()
    row_scales, output_scales = torch.rand(rows), torch.rand(size[0]) - 0.5
    added = torch.randint(-(1 << 20), 1 << 20, (size[0],), generator=generator).int()
    bias = torch.randn(size[0], generator=generator) * 1000
    for with_row, with_added, with_bias in itertools.product((False, True), repeat=3):
        epilogue = Epilogue(
            output_scales,
            dtype,
            added if with_added else None,
            bias if with_bias else None,
        )
        y = (exact + added if with_added else exact).float()
        y = (y * row_scales[:, None] if with_row else y) * output_scales
        y = (y + bias if with_bias else y).to(dtype)
        product = products.of(strips_of(weight), size, epilogue)
        for rows in (len(codes), 1):
            assert torch.equal(
                product(codes[:rows], row_scales[:rows] if with_row else None), y[:rows]
            )


def test_rows_that_are_strided_and_strips_that_are_not_aligned(products: Products) -> None:
    size = (40, 48)
    weight, codes = draw(-128, *size), draw(-128, 6, 100)[:, 5:53]
    strips = strips_of(weight)
    shifted = torch.empty(strips.numel() + 1, dtype=torch.int8)[1:].view(strips.shape)
    shifted.copy_(strips)
    expected = codes.long() @ weight.long().t()
    for rows in (1, 6):
        found = products.of(shifted, size)(codes[:rows])
        assert torch.equal(found.long(), expected[:rows])


def test_no_rows(products: Products) -> None:
    weight = draw(-128, 8, 16)
    found = products.of(strips_of(weight), (8, 16))(torch.empty(0, 16, dtype=torch.int8))
    assert found.shape == (0, 8)


def test_the_number_of_threads_changes_nothing(products: Products) -> None:
    size = (700, 129)
    weight, codes = draw(-128, *size), draw(-128, 150, size[1])
    expected = codes.long() @ weight.long().t()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 9):
            torch.set_num_threads(threads)
            for _ in range(3):
                assert torch.equal(products.of(strips_of(weight), size)(codes).long(), expected)
    finally:
        torch.set_num_threads(before)


def test_callers_on_several_threads_get_their_own_products() -> None:
    best = native.products()
    if best is None:
        pytest.skip("not compiled")
    size = (320, 256)
    failures = []

    def work(seed: int) -> None:
        weight, codes = draw(-127, *size, seed=seed), draw(-128, 5, size[1], seed=seed)
        strips, expected = strips_of(weight), codes.long() @ weight.long().t()
        for _ in range(200):
            if not torch.equal(best.of(strips, size)(codes).long(), expected):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def _product_in_child(results: multiprocessing.Queue[bool]) -> None:
    best = native.products()
    assert best is not None
    weight, codes = draw(-127, 320, 256), draw(-128, 5, 256)
    found = best.of(strips_of(weight), (320, 256))(codes)
    results.put(torch.equal(found.long(), codes.long() @ weight.long().t()))


def test_a_forked_child_makes_its_own_threads() -> None:
    best = native.products()
    if best is None:
        pytest.skip("not compiled")
    best.of(strips_of(draw(-127, 320, 256)), (320, 256))(draw(-128, 5, 256))
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[bool] = context.Queue()
    child = context.Process(target=_product_in_child, args=(results,))
    child.start()
    assert results.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0


def test_arguments_that_do_not_fit_are_refused() -> None:
    best = native.products()
    if best is None:
        pytest.skip("not compiled")
    strips, codes = strips_of(draw(-127, 40, 48)), draw(-128, 2, 48)
    with pytest.raises(ValueError, match="codes have 48 inputs, the weight 47"):
        best.of(strips, (40, 47))(codes)
    with pytest.raises(ValueError, match="strips must be int8"):
        best.of(strips, (80, 48))
    with pytest.raises(ValueError, match="strips must be contiguous"):
        best.of(strips_of(draw(-127, 40, 96))[:, ::2], (40, 48))
    with pytest.raises(ValueError, match="output_scales must be"):
        best.of(strips, (40, 48), Epilogue(torch.ones(39), torch.float32))


def test_the_environment_names_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    best = native.products()
    if best is None:
        pytest.skip("not compiled")
    monkeypatch.setenv("QWEN3_ASCEND_CPU", "baseline")
    plain = native.products()
    assert plain is not None
    assert plain.instructions == "plain"
    monkeypatch.setenv("QWEN3_ASCEND_NATIVE", "0")
    assert native.products() is None
