"""Rotations, sums of squares, errors of rounding: every path gives the same, and what is said."""

from __future__ import annotations

import pytest
import torch
from support.native_cases import make_source, runnable_kernels, strided
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.convert.transforms.changes import Change, Replace, Rotate, Scale
from qwen3_ascend.convert.transforms.hadamard import Rotation, base_matrix
from qwen3_ascend.errors import RecipeError
from qwen3_ascend.native.kernels import lane_sums

SIZES = (1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 60, 128, 256, 576, 1024, 2048, 2560, 4096, 5120)
"""Those of Qwen3 among them, and the smallest ones of every kind."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_orthogonal_and_what_it_says(kernels: native.Kernels, size: int) -> None:
    rotation = Rotation(size, "name")
    base = rotation.base.double()
    assert torch.equal(base @ base.t(), len(base) * torch.eye(len(base), dtype=torch.float64))
    assert base.abs().eq(1).all() and rotation.signs.abs().eq(1).all()
    rows = weights(3, 2 * size)
    found = rows.clone()
    rotation.of_inputs(found, kernels)
    blocks = rows.double().unflatten(1, (2, size))
    if size <= 1024:  # the whole matrix is written out
        expected = torch.einsum("ij,rbj->rbi", rotation.matrix, blocks).flatten(1)
        assert (found - expected).abs().max() < 1e-5
    assert torch.allclose(found.double().norm(dim=1), rows.double().norm(dim=1), rtol=1e-6)
    columns = rows.t().contiguous()
    rotation.of_outputs(columns, kernels)
    assert torch.equal(columns, found.t())


@pytest.mark.parametrize("size", SIZES)
def test_all_paths_rotate_to_the_same_bits(size: int) -> None:
    rotation, torch_kernels = Rotation(size, "name"), native.TorchKernels()
    for rows in (1, 3, 17, 33):
        source = weights(rows, 2 * size, rows)
        expected, turned = source.clone(), source.t().contiguous()
        rotation.of_inputs(expected, torch_kernels)
        for compiled in runnable_kernels():
            found, columns = source.clone(), turned.clone()
            rotation.of_inputs(found, compiled)
            rotation.of_outputs(columns, compiled)
            assert torch.equal(found, expected) and torch.equal(columns, expected.t())


def test_signs_do_not_depend_on_anything_but_the_name() -> None:
    signs = Rotation(16, "residual").signs
    assert signs.int().tolist() == [1, -1, 1, 1, 1, -1, -1, -1, 1, 1, 1, 1, 1, 1, -1, 1]
    assert not torch.equal(Rotation(16, "other").signs, signs)


@pytest.mark.parametrize("size", [3, 6, 10, 70, 4 * 23, 2 * 12 + 1])
def test_sizes_without_a_known_matrix_are_refused(size: int) -> None:
    with pytest.raises(RecipeError, match=f"no Hadamard matrix of size {size} is known"):
        base_matrix(size)


def test_arguments_that_do_not_fit_are_refused(kernels: native.Kernels) -> None:
    rotation = Rotation(24, "name")
    signs, base = rotation.signs, rotation.base
    for matrix in (
        weights(4, 25), weights(4, 24).double(), weights(4, 24).bfloat16(), weights(4, 48)[:, ::2],
    ):  # fmt: skip
        with pytest.raises(ValueError):
            kernels.rotate_inputs(matrix, signs, base)
    for other in (signs[:23], signs[:12].repeat(3), signs.double()):
        with pytest.raises(ValueError):
            kernels.rotate_inputs(weights(4, 24 * 23 * 36), other, base)
    with pytest.raises(ValueError):
        kernels.rotate_outputs(weights(25, 4), signs, base)
    with pytest.raises(ValueError):
        kernels.square_sums(weights(3, 4), 0, torch.empty(4, dtype=torch.float64))
    with pytest.raises(ValueError):
        rounded, sums = weights(3, 4), torch.empty(3, dtype=torch.float64)
        kernels.error_bf16(weights(3, 4), rounded, sums, sums)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (33, 300), (300, 33), (1, 519)])
@pytest.mark.parametrize("flavour", ["normal", "subnormal", "zero rows"])
def test_sums_of_squares(
    kernels: native.Kernels, shape: tuple[int, int], dtype: torch.dtype, flavour: str
) -> None:
    source = strided(make_source(flavour, shape, dtype, seed=1), gap=3)
    exact = source.double().square()
    for axis in (0, 1):
        found = torch.full((shape[axis],), -7.0, dtype=torch.float64)
        kernels.square_sums(source, axis, found)
        assert torch.equal(found, lane_sums(exact if axis == 0 else exact.t().contiguous()))


@pytest.mark.parametrize("dtype", FLOATS)
def test_errors_of_rounding(kernels: native.Kernels, dtype: torch.dtype) -> None:
    source = strided(make_source("normal", (33, 519), dtype, seed=2), gap=3)
    stored = source.bfloat16().contiguous()
    found = torch.full((2, 33), -7.0, dtype=torch.float64)
    kernels.error_bf16(source, stored, found[0], found[1])
    exact = source.double()
    assert torch.equal(found[0], lane_sums(exact.square()))
    assert torch.equal(found[1], lane_sums((exact - stored.double()).square()))


def test_a_change_of_some_outputs_is_that_of_all() -> None:
    """Steps of every kind, in both orders of scaling and rotating."""
    rotation, factors = Rotation(8, "name"), weights(1, 24)[0].exp()
    steps = (
        Scale("inputs", factors), Rotate("inputs", rotation), Scale("outputs", factors),
        Rotate("outputs", rotation), Scale("outputs", factors), Scale("inputs", factors),
    )  # fmt: skip
    change, weight = Change(steps), weights(24, 24)
    assert change.block == 8 and Change(steps[:3]).block == 1
    whole = change.weight(weight)
    block = torch.block_diag(*[rotation.matrix] * 3)
    scaled = factors.double()[:, None] * ((weight.double() * factors) @ block.t())
    expected = factors.double()[:, None] * (block @ scaled) * factors
    assert (whole - expected).abs().max() < 1e-5 * expected.abs().max()
    for start, stop in ((0, 8), (8, 24), (16, 24)):
        assert torch.equal(change.weight(weight[start:stop], start), whole[start:stop])
    bias = weights(1, 24, 5)[0]
    expected_bias = factors.double() * (block @ (factors.double() * bias.double()))
    assert (change.bias(bias) - expected_bias).abs().max() < 1e-5 * expected_bias.abs().max()
    gain = Change((Replace(torch.ones(24)),)).weight(weights(1, 24))
    assert torch.equal(gain, torch.ones(1, 24))
