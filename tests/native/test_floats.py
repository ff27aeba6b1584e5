"""Products of floats by every set of instructions that this processor has, against float64."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.checkpoint.layout import nz_pack
from qwen3_ascend.checkpoint.schemes import W4A16, W8A16, Codes, w4a16, w8a16
from qwen3_ascend.checkpoint.schemes.w4a8 import GROUP, halves_of, rescale_groups
from qwen3_ascend.native import FloatProducts, StoredWeight, stored_codes, stored_runs
from qwen3_ascend.native.floats import FLOAT_PATHS

SIZES = [(1, 1), (3, 5), (31, 16), (33, 17), (64, 144), (96, 255), (47, 1009), (8, 4112)]
"""(outputs, inputs): less and more than a unit of outputs, a run, a group and a tile."""

ROWS = (*range(1, 14), 25, 143, 144, 145, 301)
"""Less and more than few rows, every block of rows, and the rows whose sums are kept together."""

UNIT = 2.0**-24
"""Relative error of rounding to float32, at most; of bfloat16 it is 2^-8."""

DTYPES = (torch.bfloat16, torch.float32)


def runnable() -> list[str]:
    """The sets of instructions that this processor has."""
    return [name for name in FLOAT_PATHS if native.float_products(name)]


@pytest.fixture(params=runnable())
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FloatProducts:
    """Every set of instructions that there is here."""
    monkeypatch.delenv("QWEN3_ASCEND_CPU", raising=False)
    found = native.float_products(request.param)
    assert found is not None
    return found


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(weight: StoredWeight | None) -> StoredWeight:
    assert weight is not None, "no kernel reads it as it lies"
    return weight


def strips(weight: Tensor) -> StoredWeight:
    return stored(stored_runs(nz_pack(weight), (weight.shape[0], weight.shape[1])))


def int8(weight: Tensor) -> tuple[StoredWeight, Tensor]:
    """As w8a16 stores it, and what it stands for."""
    scheme = W8A16()
    codes = scheme.choose(weight)
    tensors = scheme.pack(codes, w8a16.NZ)
    shape = weight.shape[0], weight.shape[1]
    found = stored_codes(tensors["weight"], shape, tensors["scale"][None])
    return stored(found), scheme.decode(codes)


def int4(
    weight: Tensor, group: int, zero_points: bool, rows: bool = False
) -> tuple[StoredWeight, Tensor]:
    """As w4a16 stores it, and what it stands for."""
    scheme = W4A16(group, zero_points)
    codes: Codes = scheme.choose(weight)
    tensors = scheme.pack(codes, w4a16.ROWS if rows else w4a16.NZ)
    shared = tensors["scale"], tensors.get("offset")
    shape = weight.shape[0], weight.shape[1]
    return stored(stored_codes(tensors["weight"], shape, *shared, group)), scheme.decode(codes)


def assert_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Within the bound of K products and K additions in any order, and of what is rounded last.

    Each of K + 1 summands has gone through at most K + 2 roundings (Higham, Accuracy and Stability
    of Numerical Algorithms, section 3.1).
    """
    exact, size = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    steps = (x.shape[1] + 2) * UNIT
    bound = steps / (1 - steps) * size
    if y.dtype is torch.bfloat16:
        bound = bound + (exact.abs() + bound) * 2.0**-8
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bfloat16_weights(
    products: FloatProducts, size: tuple[int, int], dtype: torch.dtype
) -> None:
    outputs, inputs = size
    weight = draw(outputs, inputs).bfloat16()
    forms = [strips(weight)]
    if inputs % 16 == 0:
        forms.append(stored(stored_runs(weight, size)))
    bias = draw(outputs, seed=1)
    for rows in ROWS if inputs < 300 else (1, 4, 5, 13):
        x = draw(rows, inputs, seed=rows).to(dtype)
        for form in forms:
            assert_close(products.of(form, torch.float32)(x), x, weight)
            assert_close(products.of(form, torch.bfloat16, bias)(x), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_codes(products: FloatProducts, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Beside bfloat16 activations what codes stand for is rounded to bfloat16 too."""
    outputs, inputs = size
    weight, bias = draw(outputs, inputs), draw(outputs, seed=1)
    forms = [
        int8(weight),
        *(int4(weight, group, zeros) for group in (32, 128) for zeros in (False, True)),
    ]
    if outputs % 32 == 0:
        forms.append(int4(weight, 64, True, rows=True))
    for rows in ROWS if inputs < 200 else (1, 2, 3, 5, 13):
        x = draw(rows, inputs, seed=rows).to(dtype)
        for form, decoded in forms:
            wanted = decoded.to(dtype)
            assert_close(products.of(form, torch.float32)(x), x, wanted)
            assert_close(products.of(form, torch.bfloat16, bias)(x), x, wanted, bias)


def test_integers_of_a_group_are_exact(products: FloatProducts) -> None:
    """Without scales: of the largest sums too."""
    integers = torch.randint(-8, 8, (96, 256), generator=torch.Generator().manual_seed(0))
    integers[:32] = -8
    weight = stored(stored_codes(w4a16.ROWS.pack(integers.to(torch.int8)), (96, 256)))
    for rows in (1, 2, 5, 26):
        x = torch.randint(-8, 8, (rows, 256), generator=torch.Generator().manual_seed(rows))
        x[0] = -8
        expected = (x @ integers.t()).float()
        for dtype in DTYPES:
            assert torch.equal(products.of(weight, torch.float32)(x.to(dtype)), expected)


@pytest.mark.parametrize("scales", ["usual", "any"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_beside_codes(products: FloatProducts, dtype: torch.dtype, scales: str) -> None:
    """Bit by bit what torch computes in the order of the definition, with scales that float16
    rounds to its smallest numbers, or that make it overflow, among them."""
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = 160, 700
    integers = torch.randint(-8, 8, (outputs, inputs), generator=generator)
    weight = stored(stored_codes(w4a16.ROWS.pack(integers.to(torch.int8)), (outputs, inputs)))
    shape = 3, outputs
    exponents = torch.randint(-40, 10, shape, generator=generator).float()
    scale = torch.rand(shape, generator=generator) * (exponents.exp2() if scales == "any" else 0.01)
    shift, bias = draw(outputs, seed=1), draw(outputs, seed=2)
    for rows in (1, 2, 7, 30, 150):
        codes = torch.randint(-128, 128, (rows, inputs), generator=generator).to(torch.int8)
        row_scales = draw(rows, seed=rows).abs()
        halves = halves_of(codes).long().split(GROUP, 1)
        sums = (x @ part.t() for x, part in zip(halves, integers.split(GROUP, 1), strict=True))
        expected = rescale_groups(sums, scale, shift, row_scales)
        for added in (None, bias):
            y = products.of_groups(weight, scale, shift, dtype, added)(codes, row_scales)
            wanted = expected if added is None else expected + added
            torch.testing.assert_close(y, wanted.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert bool(expected.isfinite().all()) is (scales == "usual")


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 14])
@pytest.mark.parametrize("kind", ["strips", "rows"])
def test_what_is_not_finite_is_carried_through(
    products: FloatProducts, kind: str, rows: int
) -> None:
    """And reaches no output that has nothing to do with it."""
    weight, x = draw(40, 48).bfloat16(), draw(rows, 48, seed=1).abs().bfloat16() + 0.5
    weight[3, 7], weight[20, 40], weight[39, 47] = math.nan, math.inf, -math.inf
    form = strips(weight) if kind == "strips" else stored(stored_runs(weight, (40, 48)))
    y = products.of(form, torch.float32)(x)
    assert bool(y[:, 3].isnan().all())
    assert bool((y[:, 20] == math.inf).all()) and bool((y[:, 39] == -math.inf).all())
    others = [output for output in range(40) if output not in (3, 20, 39)]
    assert_close(y[:, others], x, weight[others])
    x[0, 5] = math.inf
    y = products.of(form, torch.bfloat16)(x)
    assert not bool(y[0].isfinite().any())
    assert_close(y[1:][:, others], x[1:], weight[others])


def test_an_infinite_scale_is_carried_through(products: FloatProducts) -> None:
    weight = torch.ones(64, 64, dtype=torch.int8)
    scales = torch.ones(1, 64).bfloat16()
    scales[0, 9] = math.inf
    form = stored(stored_codes(w8a16.NZ.pack(weight), (64, 64), scales))
    for rows in (1, 5):
        y = products.of(form, torch.float32)(torch.ones(rows, 64).bfloat16())
        assert bool((y[:, 9] == math.inf).all())
        assert bool((y[:, [*range(9), *range(10, 64)]] == 64).all())


def test_rows_that_are_apart_and_weights_that_are_not_aligned(products: FloatProducts) -> None:
    weight, wide = draw(40, 48).bfloat16(), draw(6, 100, seed=1).bfloat16()
    packed = nz_pack(weight)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.bfloat16)[1:].view(packed.shape)
    shifted.copy_(packed)
    x = wide[:, 5:53]
    for rows in (1, 6):
        y = products.of(stored(stored_runs(shifted, (40, 48))), torch.float32)(x[:rows])
        assert_close(y, x[:rows], weight)


def test_some_outputs_of_strips(products: FloatProducts) -> None:
    """A shard's strips lie apart."""
    weight, x = draw(96, 48).bfloat16(), draw(5, 48, seed=1)
    part = nz_pack(weight)[:, 2:5]
    assert not part.is_contiguous()
    assert_close(
        products.of(stored(stored_runs(part, (48, 48))), torch.float32)(x), x, weight[32:80]
    )


def test_no_rows(products: FloatProducts) -> None:
    for form in (strips(draw(40, 48).bfloat16()), int8(draw(40, 48))[0]):
        assert products.of(form, torch.bfloat16)(torch.empty(0, 48)).shape == (0, 40)


def test_the_number_of_threads_changes_nothing(products: FloatProducts) -> None:
    weight, x = draw(700, 144).bfloat16(), draw(150, 144, seed=1).bfloat16()
    forms = [strips(weight), int8(weight)[0], int4(weight, 64, True)[0]]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = [products.of(form, torch.float32)(x) for form in forms]
        for threads in (2, 3, 9):
            torch.set_num_threads(threads)
            for form, alone in zip(forms, expected, strict=True):
                assert torch.equal(products.of(form, torch.float32)(x), alone)
    finally:
        torch.set_num_threads(before)


def test_callers_on_several_threads_get_their_own_products() -> None:
    best = native.float_products()
    if best is None:
        pytest.skip("not compiled")
    failures = []

    def work(seed: int) -> None:
        x = draw(5, 256, seed=seed)
        form = strips(draw(320, 256, seed=seed).bfloat16())
        first = best.of(form, torch.float32)(x)
        for _ in range(100):
            if not torch.equal(best.of(form, torch.float32)(x), first):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_what_no_kernel_reads_as_it_lies() -> None:
    weight = torch.zeros(40, 48).bfloat16()
    assert stored_runs(weight.float(), (40, 48)) is None
    assert stored_runs(weight[:, :47], (40, 47)) is None
    assert stored_runs(weight.t(), (48, 40)) is None
    assert stored_runs(nz_pack(weight)[:, :, ::2], (40, 48)) is None
    assert stored_runs(nz_pack(weight), (80, 48)) is None
    codes = torch.zeros(40, 48, dtype=torch.int8)
    assert stored_codes(codes, (40, 48)) is None
    assert stored_codes(w8a16.NZ.pack(codes), (80, 48)) is None
    assert stored_codes(w4a16.ROWS.pack(codes), (40, 48)) is None
    assert stored_codes(w4a16.ROWS.pack(codes[:32]), (32, 48)) is not None


def test_arguments_that_do_not_fit_are_refused() -> None:
    best = native.float_products()
    if best is None:
        pytest.skip("not compiled")
    weight = strips(torch.zeros(40, 48).bfloat16())
    product = best.of(weight, torch.float32)
    with pytest.raises(ValueError, match="the input has 47 features, the weight 48"):
        product(torch.ones(1, 47))
    with pytest.raises(ValueError, match="need a CPU matrix"):
        product(torch.ones(1, 48).half())
    with pytest.raises(ValueError, match="bias must be"):
        best.of(weight, torch.float32, torch.ones(39))
    with pytest.raises(ValueError, match="scales and offsets must be"):
        codes = w8a16.NZ.pack(torch.zeros(40, 48, dtype=torch.int8))
        stored_codes(codes, (40, 48), torch.ones(1, 40))


def test_the_environment_names_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.float_products() is None:
        pytest.skip("not compiled")
    for path in native.library.PATHS:
        monkeypatch.setenv("QWEN3_ASCEND_CPU", path)
        found = native.float_products()
        assert found is None or found.path.startswith(path)
    monkeypatch.setenv("QWEN3_ASCEND_CPU", "baseline")
    assert native.float_products() is not None
    monkeypatch.setenv("QWEN3_ASCEND_NATIVE", "0")
    assert native.float_products() is None
