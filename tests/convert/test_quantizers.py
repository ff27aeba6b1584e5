"""The quantizers against plain definitions of them, and what has to hold whatever the weights."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import correlated, hessian_of, statistics_of
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.checkpoint.schemes.grid import Grid
from qwen3_ascend.convert import triangle
from qwen3_ascend.convert.quantizers import (
    QUANTIZERS,
    Chosen,
    Gptq,
    Mse,
    Nearest,
    UselessStatistics,
)
from qwen3_ascend.convert.quantizers.gptq import DAMPING, inverse_factor
from qwen3_ascend.convert.quantizers.mse import COARSE, FINE
from qwen3_ascend.convert.statistics import InputStatistics
from qwen3_ascend.convert.triangle import Triangle

INT4, INT8 = Grid(4, 32, signed_scale=True), Grid(8)
KERNELS = native.best()


def weights(outputs: int, inputs: int, seed: int = 1) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.02


def choose(name: str, grid: Grid, weight: Tensor, statistics: InputStatistics | None) -> Chosen:
    return QUANTIZERS[name].prepare(grid, statistics, KERNELS)(weight)


def error(weight: Tensor, found: Chosen, grid: Grid, hessian: Tensor) -> float:
    """tr(dW H dW'), the mean square error of the products."""
    off = (weight - grid.decode(found.integers, found.scales)).double()
    return float(((off @ hessian.double()) * off).sum())


def weighted_errors(weight: Tensor, found: Chosen, grid: Grid, counts: Tensor) -> Tensor:
    """Of each group, float64 [N, G]."""
    off = (weight - grid.decode(found.integers, found.scales)).double().square() * counts
    return grid.grouped(off).sum(-1)


def plain_gptq(weight: Tensor, scales: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """Equations (2) and (3) of the paper, before its Cholesky reformulation: in float64, output by
    output and weight by weight, with the inverse of what is left found by elimination."""
    inputs = len(hessian)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(inputs)
    order = sorted(range(inputs), key=lambda k: -float(hessian[k, k]))
    steps, found = grid.spread(scales, inputs).double(), torch.empty(weight.shape)
    for output, row in enumerate(weight.double()):
        left, inverse = row.clone(), damped.inverse()
        for k in order:
            scale = float(steps[output, k])
            integer = min(max(round(float(left[k]) / scale), grid.least), grid.most)
            found[output, k] = integer
            left -= (left[k] - integer * scale) / inverse[k, k] * inverse[k]
            inverse -= inverse[:, k, None] * inverse[k] / inverse[k, k]
    return found.to(torch.int8)


@pytest.mark.parametrize("grid", [Grid(4, 8, signed_scale=True), Grid(4), INT8], ids=str)
@pytest.mark.parametrize("inputs", [1, 7, 21, 300])
@pytest.mark.parametrize("rows", [512, 200])  # of a block of the factor; the kernel takes 128
def test_gptq_is_the_papers(
    grid: Grid, inputs: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triangle, "ROWS", rows)
    weight, statistics = weights(4, inputs), correlated(inputs)
    found = choose("gptq", grid, weight, statistics)
    expected = plain_gptq(weight, found.scales, grid, hessian_of(statistics))
    assert torch.equal(found.integers, expected)
    assert torch.equal(found.scales, choose("mse", grid, weight, statistics).scales)


@pytest.mark.parametrize("grid", [INT4, Grid(4, 128, signed_scale=True), Grid(4), INT8], ids=str)
@pytest.mark.parametrize("inputs", [96, 300])  # one block of columns; several, the last shorter
@pytest.mark.parametrize("seed", range(3))
def test_what_is_known_makes_errors_smaller(grid: Grid, inputs: int, seed: int) -> None:
    weight, statistics = weights(24, inputs, seed), correlated(inputs, seed + 10)
    plain, gptq = (choose(name, grid, weight, statistics) for name in ("mse", "gptq"))
    assert error(weight, gptq, grid, hessian_of(statistics)) < 0.8 * error(
        weight, plain, grid, hessian_of(statistics)
    )
    nearest = weighted_errors(weight, choose("nearest", grid, weight, None), grid, torch.ones(1))
    searched = weighted_errors(weight, choose("mse", grid, weight, None), grid, torch.ones(1))
    assert bool((searched <= nearest * (1 + 1e-6)).all())
    assert grid.bits > 4 or searched.sum() < 0.95 * nearest.sum()  # 8 bits: nothing to gain


@pytest.mark.parametrize("grid", [INT4, Grid(4), INT8], ids=str)
def test_of_scales_the_best_is_found(grid: Grid) -> None:
    """Tried one by one, with the weights of calibration; float32 may take either of two equals."""
    weight, statistics = weights(5, 70), correlated(70)
    found = weighted_errors(
        weight, choose("mse", grid, weight, statistics), grid, statistics.mean_square
    )
    groups = grid.grouped(weight)
    top = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    widest = top / grid.least if grid.signed_scale else top.abs() / grid.most
    for ratio in COARSE if grid.bits <= 4 else FINE:
        scales = (widest * ratio).bfloat16().float()
        tried = Chosen(grid.nearest(weight, scales), scales)
        errors = weighted_errors(weight, tried, grid, statistics.mean_square)
        assert bool((found <= errors * (1 + 1e-5)).all())


def test_the_ratios_are_the_measured_ones() -> None:
    assert len(COARSE) == 22 and COARSE[0] == 1.05 and COARSE[2] == 1 and COARSE[-1] == 0.5
    assert len(FINE) == 10 and FINE[0] == 1 and FINE[-1] == 0.82


@pytest.mark.parametrize("grid", [INT4, INT8], ids=str)
def test_of_independent_inputs_gptq_is_mse(grid: Grid) -> None:
    squares = torch.rand(200, generator=torch.Generator().manual_seed(2)) + 0.01
    weight, statistics = weights(9, 200), statistics_of(squares.diag())
    found, expected = (choose(name, grid, weight, statistics) for name in ("gptq", "mse"))
    assert torch.equal(found.integers, expected.integers)
    assert torch.equal(found.scales, expected.scales)


def test_the_order_of_inputs_does_not_matter() -> None:
    """Where all of an output share a scale; the diagonal has no ties."""
    weight, statistics, grid = weights(9, 200), correlated(200), Grid(4)
    moved = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    found = choose("gptq", grid, weight, statistics)
    other = choose(
        "gptq", grid, weight[:, moved], statistics_of(hessian_of(statistics)[moved][:, moved])
    )
    assert torch.equal(other.integers, found.integers[:, moved])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 150), st.sampled_from([INT4, Grid(4), INT8]),
    st.sampled_from(["nearest", "mse", "gptq"]), st.integers(0, 999),
)  # fmt: skip
def test_what_is_chosen_is_of_the_grid(
    outputs: int, inputs: int, grid: Grid, name: str, seed: int
) -> None:
    weight = weights(outputs, inputs, seed)
    weight[seed % outputs] = 0
    found = choose(name, grid, weight, correlated(inputs, seed) if name == "gptq" else None)
    assert found.integers.dtype == torch.int8 and found.integers.shape == weight.shape
    assert grid.least <= int(found.integers.min()) and int(found.integers.max()) <= grid.most
    assert found.scales.shape == (outputs, grid.groups(inputs)) and bool((found.scales != 0).all())
    assert torch.equal(found.scales, found.scales.bfloat16().float())


@pytest.mark.parametrize("name", ["nearest", "mse"])
def test_outputs_may_be_divided(name: str) -> None:
    weight = weights(40, 100)
    whole, parts = choose(name, INT4, weight, None), weight.split(7)
    assert torch.equal(
        torch.cat([choose(name, INT4, part, None).integers for part in parts]), whole.integers
    )


def test_inputs_that_were_never_there() -> None:
    """They take part in nothing and get their nearest integers; a group of them is not clipped."""
    statistics, weight = correlated(96), weights(6, 96)
    unseen = [5, 40, *range(64, 96)]
    hessian = hessian_of(statistics)
    hessian[unseen], hessian[:, unseen] = 0, 0
    found = choose("gptq", INT4, weight, statistics_of(hessian))
    nearest = INT4.nearest(weight, found.scales)
    assert torch.equal(found.integers[:, unseen], nearest[:, unseen])
    assert not torch.equal(found.integers, nearest)
    without = choose("gptq", INT4, weight, statistics_of(torch.zeros(96, 96)))
    plain = choose("mse", INT4, weight, None)
    assert torch.equal(without.integers, plain.integers)
    assert torch.equal(found.scales[:, 2], plain.scales[:, 2])


def lower(factor: Triangle) -> Tensor:
    """A triangular matrix as a whole, float64 [K, K]."""
    whole = torch.zeros(len(factor), len(factor), dtype=torch.float64)
    for rows, block in factor:
        whole[rows, : rows.stop] = block
    return whole


@pytest.mark.parametrize("inputs", [3, 512, 1100])  # blocks of 512 rows
def test_the_factor(inputs: int) -> None:
    hessian = hessian_of(correlated(inputs, tokens=inputs // 2 + 1))  # singular without damping
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(4))
    factor = lower(inverse_factor(Triangle.of(hessian), order))
    assert torch.equal(factor, factor.tril())
    damped = hessian.double()[order][:, order]
    damped += DAMPING[0] * hessian.diagonal().double().mean() * torch.eye(inputs)
    torch.testing.assert_close(
        factor.t() @ factor @ damped, torch.eye(inputs).double(), atol=1e-4, rtol=0
    )


def test_a_hessian_that_needs_more_damping() -> None:
    hessian = hessian_of(correlated(50))
    mean, least = hessian.diagonal().mean(), torch.linalg.eigvalsh(hessian)[0]
    low = hessian - (least + 0.05 * mean) * torch.eye(50)
    factor = lower(inverse_factor(Triangle.of(low), torch.arange(50)))
    found = (factor.t() @ factor).inverse() - low.double()
    share = float(found.diagonal().mean() / low.diagonal().mean())
    assert share == pytest.approx(DAMPING[1], rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_statistics_that_are_not_finite(value: float) -> None:
    hessian = torch.eye(20)
    hessian[3, 4] = hessian[4, 3] = value
    with pytest.raises(UselessStatistics, match="not finite"):
        Gptq().prepare(INT4, statistics_of(hessian), KERNELS)


WATCHED = """
import re, sys, torch
from pathlib import Path
from qwen3_ascend.convert.quantizers.gptq import Gptq, inverse_factor
from qwen3_ascend.convert.triangle import Triangle

def resident(which):
    return int(re.search(rf"{which}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

torch.set_num_threads(1)
inputs = int(sys.argv[1])
inverse_factor(Triangle.of(torch.eye(600)), torch.arange(600))  # what libraries keep is there then
hessian = Triangle.of(torch.eye(inputs) + 0.1)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
factor = inverse_factor(hessian, torch.arange(inputs))
print(resident("VmHWM") - before, Gptq().shared_bytes(inputs))
"""


def test_half_a_matrix_is_enough() -> None:
    """Of float64, in which the factor is found."""
    command = [sys.executable, "-c", WATCHED, "3000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, said = map(int, done.stdout.split())
    assert 0.5 * 8 * 3000**2 < taken < said < 1.15 * 8 * 3000**2


def test_needs_are_told() -> None:
    assert Nearest().needs == Mse().needs < Mse().uses < Gptq().needs == Gptq().uses
