"""Rotations, sums of squares, errors of rounding: every path gives the same, and what is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.native_cases import Codes, make_source, runnable_kernels, strided
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.convert.transforms.changes import Change, Replace, Rotate, Scale
from qwen3_ascend.convert.transforms.hadamard import Rotation, base_matrix
from qwen3_ascend.errors import RecipeError
from qwen3_ascend.native import RowStep
from qwen3_ascend.native.butterflies import changed
from qwen3_ascend.native.kernels import lane_sums

SIZES = (1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 60, 128, 256, 576, 1024, 2048, 2560, 4096, 5120)
"""Those of Qwen3 among them, and the smallest ones of every kind."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rotated(rotation: Rotation, rows: Tensor, kernels: native.Kernels) -> Tensor:
    """Each row rotated."""
    found = torch.full(rows.shape, -7.0)
    kernels.change_rows(rows, [rotation.of_inputs(rows.shape[1])], found)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_orthogonal_and_what_it_says(kernels: native.Kernels, size: int) -> None:
    rotation = Rotation(size, "name")
    base = rotation.base.double()
    assert torch.equal(base @ base.t(), len(base) * torch.eye(len(base), dtype=torch.float64))
    assert base.abs().eq(1).all() and rotation.signs.abs().eq(1).all()
    rows = weights(3, 2 * size)
    found = rotated(rotation, rows, kernels)
    blocks = rows.double().unflatten(1, (2, size))
    if size <= 1024:  # the whole matrix is written out
        expected = torch.einsum("ij,rbj->rbi", rotation.matrix, blocks).flatten(1)
        assert (found - expected).abs().max() < 1e-5
    assert torch.allclose(found.double().norm(dim=1), rows.double().norm(dim=1), rtol=1e-6)
    columns = rows.t().contiguous()
    rotation.of_outputs(columns, kernels, columns)
    assert torch.equal(columns, found.t())


@pytest.mark.parametrize("size", SIZES)
def test_all_paths_rotate_to_the_same_bits(size: int) -> None:
    rotation, torch_kernels = Rotation(size, "name"), native.TorchKernels()
    for rows, dtype in zip((1, 3, 17, 33), (*FLOATS, torch.float32), strict=True):
        source = weights(rows, 2 * size, rows).to(dtype)
        turned = strided(source.t().contiguous(), gap=3)
        expected = rotated(rotation, source, torch_kernels)
        for compiled in runnable_kernels():
            columns = torch.full(turned.shape, -7.0)
            rotation.of_outputs(turned, compiled, columns)
            assert torch.equal(rotated(rotation, source, compiled), expected)
            assert torch.equal(columns, expected.t())


def some_steps(rows: int, columns: int, size: int) -> list[RowStep]:
    """Steps of every kind: none of the factors is a power of two."""
    outputs, inputs = weights(1, rows, 3)[0].exp(), weights(1, columns, 4)[0].exp()
    return [
        replace(Rotation(size, "name").of_inputs(columns, inputs), outputs=outputs),
        RowStep(outputs=outputs),
        RowStep(inputs=inputs),
        Rotation(size, "other").of_inputs(columns),
    ]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("flavour", ["normal", "subnormal", "zero rows"])
@pytest.mark.parametrize("size", [1, 4, 20, 32, 64, 128, 1024])
def test_rows_are_changed_before_anything_else(
    kernels: native.Kernels, size: int, flavour: str, dtype: torch.dtype
) -> None:
    """As torch changes them first, whatever is done with them then."""
    rows, columns = 67, 3 * size
    source = strided(make_source(flavour, (rows, columns), dtype, seed=2), gap=3)
    steps = some_steps(rows, columns, size)
    expected = source.float()
    for step in steps:
        expected = changed(expected, [step])
    found = torch.full((rows, columns), -7.0)
    kernels.change_rows(source, steps, found)
    assert torch.equal(found, expected)
    plain, fused = Codes.garbage(rows, columns), Codes.garbage(rows, columns)
    kernels.quantize_w8a8_nz(expected, *vars(plain).values())
    kernels.quantize_w8a8_nz(source, **vars(fused), steps=steps)
    assert fused.equals(plain)
    stored, sums = expected.bfloat16(), torch.full((4, rows), -7.0, dtype=torch.float64)
    kernels.error_bf16(expected, stored, sums[0], sums[1])
    rounded = torch.full((rows, columns), -7.0, dtype=torch.bfloat16)
    kernels.round_rows(source, rounded, sums[2], sums[3], steps)
    assert torch.equal(rounded, stored) and torch.equal(sums[:2], sums[2:])


def test_rows_that_become_infinite_are_found(kernels: native.Kernels) -> None:
    """In bfloat16 a little earlier than in float32."""
    source, outputs = torch.ones(40, 70), torch.ones(40)
    source[35, 7], outputs[35] = 2.0, 3.0e38
    steps = [RowStep(outputs=outputs)]
    stored, sums = torch.empty(40, 70, dtype=torch.bfloat16), torch.empty(2, 40).double()
    with pytest.raises(native.NotFinite) as error:
        kernels.quantize_w8a8_nz(source, **vars(Codes.garbage(40, 70)), steps=steps)
    assert (error.value.row, error.value.column) == (35, 7)
    source[35, 7], outputs[33] = 1.0, 3.4e38
    with pytest.raises(native.NotFinite) as error:
        kernels.round_rows(source, stored, sums[0], sums[1], steps)
    assert (error.value.row, error.value.column) == (33, 0)


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
    step, out = rotation.of_inputs(24), torch.empty(4, 24)
    for matrix in (weights(4, 25), weights(4, 24).double(), weights(4, 48)[:, ::2]):
        with pytest.raises(ValueError):
            kernels.change_rows(matrix, [step], out)
    for other in (
        replace(step, inputs=signs[:23]), replace(step, inputs=None), replace(step, size=48),
        replace(step, inputs=signs.double()), replace(step, outputs=signs), replace(step, size=16),
        replace(step, base=base[:4]),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            kernels.change_rows(weights(4, 24), [other], out)
    for wrong in (torch.empty(4, 25), torch.empty(24, 4).t(), out.bfloat16()):
        with pytest.raises(ValueError):
            kernels.change_rows(weights(4, 24), [step], wrong)
    with pytest.raises(ValueError):
        kernels.rotate_outputs(weights(25, 4), signs, base, torch.empty(25, 4))
    with pytest.raises(ValueError):
        kernels.rotate_outputs(weights(24, 4), signs[:12].repeat(3), base, torch.empty(24, 4))
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
