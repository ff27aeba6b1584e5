"""What the kernels do to tensors: one protocol, its checks, and the compiled implementation.

Sources are [rows, columns] CPU tensors in bfloat16, float16 or float32 whose columns are
contiguous; rows may be strided. Outputs are written in place, so that threads can fill disjoint
parts of one buffer.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwen3_ascend.geometry import ROW_BLOCK, STRIP_BYTES
from qwen3_ascend.native.library import STATUS, Library, Step
from qwen3_ascend.native.rows import Steps, check_factors, check_rotation, check_steps

LANES = 8

ROTATED_COLUMNS = (32, 128)
"""The fewest and the most columns that the compiled kernel rotates together in a scratch: a line of
a cache, and as many as a page is worth looking up for."""

ROTATED_WEIGHTS = 1 << 17
"""What the scratch may hold if it is to stay in a core's cache."""

ROUNDED_ROWS = 4
"""Rows that it rounds together, in a scratch."""

BLOCK_COLUMNS = 128
"""Columns whose codes are chosen together when errors are made up for."""

LEAST_SEARCHED = 2.0**-100
"""The widest scale of a group that is searched: below, reciprocals overflow."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_DTYPE_CODES = {torch.int8: 0, torch.uint8: 0, **{dtype: i + 1 for i, dtype in enumerate(FLOATS)}}
_CHECK_FINITE, _TO_BF16 = 1, 2


class NotFinite(ValueError):
    """A weight is NaN or Inf, or becomes Inf in bfloat16; the first one in row-major order."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__(f"weight at row {row}, column {column} is not finite")
        self.row = row
        self.column = column


class Kernels(Protocol):
    """The converter's inner loops; NativeKernels and TorchKernels write the same bytes."""

    def check_finite(self, source: Tensor) -> None:
        """Raise NotFinite if the float matrix source [N, K] holds a NaN or Inf."""

    def quantize_w8a8_nz(
        self,
        source: Tensor,
        strips: Tensor,
        scales: Tensor,
        signal: Tensor,
        noise: Tensor,
        steps: Steps = (),
    ) -> None:
        """Quantize rows to int8 per row, laid out as FRACTAL_NZ of the transposed matrix.

        source [N, K], of which the weights w are made by some steps (see change_rows); strips int8
        [ceil(N/32), ceil(K/16), 16, 32], contiguous, zero padded; scales float32 [N], bfloat16
        values; signal and noise float64 [N]: sums of w^2 and of (w - code * scale)^2. Raises
        NotFinite, after which the outputs hold nothing of use.
        """

    def error_w8a8_nz(
        self, source: Tensor, strips: Tensor, scales: Tensor, signal: Tensor, noise: Tensor
    ) -> None:
        """Write the signal and noise of stored strips and scales; shapes as in quantizing."""

    def pack_nz_rows(self, source: Tensor, strips: Tensor, check_finite: bool = True) -> None:
        """Lay rows out as FRACTAL_NZ of the matrix as it is, zero padded.

        source [M, N]; strips [ceil(N/C0), ceil(M/16), 16, C0], C0 = 32 bytes' worth; it may be a
        narrow of a larger buffer along axis 1. Same dtype, or bfloat16 strips for any float
        source. Raises NotFinite when a stored value is, unless check_finite is False.
        """

    def unpack_nz_rows(self, strips: Tensor, destination: Tensor) -> None:
        """The inverse: strips [N1, M1, 16, C0] into destination [M, N] of the same dtype."""

    def search_scales(
        self,
        source: Tensor,
        importance: Tensor,
        width: int,
        integers: tuple[int, int],
        ratios: Tensor,
        scales: Tensor,
    ) -> None:
        """Find the scale of each group that leaves the least error; the first, if several do.

        source float32 [N, K], finite; importance float32 [K], of the square of each input's error;
        width: inputs of a group, the last may be shorter; integers: the least and the largest;
        ratios float32 [R]: of the scale under which no weight is clipped, to be tried; scales
        float32 [N, ceil(K/width)], bfloat16 values. That widest scale is max|w| / largest, or, if
        there is one integer more below, w / least for the w of largest magnitude. A group whose
        widest scale is below LEAST_SEARCHED, or that has no finite error, keeps it.

        With q(s) = clip(round(w * (1 / s)), least, largest) the error of s is the sum of
        (q(s) * s - w)^2 * importance, each step in float32, added up in float64 in the order of
        `lane_sums`.
        """

    def compensate_block(
        self,
        weights: Tensor,
        scales: Tensor,
        factor: Tensor,
        integers: tuple[int, int],
        codes: Tensor,
        errors: Tensor,
    ) -> None:
        """Choose codes column by column; later columns make up for the errors of earlier ones.

        weights float32 [N, B], B at most BLOCK_COLUMNS, rows may be strided; scales float32
        [N, B]; factor float32 [B, B], of which the upper triangle is read, rows may be strided;
        codes int8 [N, B]; errors float32 [N, B]. For each column j in turn, in float32:

            code = clip(round(w_j / s_j), least, largest)
            error_j = (w_j - code * s_j) / factor_jj
            w_k = w_k - error_j * factor_jk        for all k > j
        """

    def change_rows(self, source: Tensor, steps: Steps, out: Tensor) -> None:
        """Write what rows become by some steps, one after the other.

        source [N, K]; out float32 [N, K], contiguous, which may be the source. In each step, in
        float32, x is multiplied by the factor of its row, then by those of its columns; then each
        block of S neighbours is rotated, x becomes H x / sqrt(S): base float32 [M, M] of 1 and -1,
        S = M * 2^k, H = base (x) Sylvester's matrix of order 2^k. Additions in this order: pairs
        1 apart, 2 apart, ..., 2^(k-1) apart, each a + b and a - b; then rows of the base from its
        first column to its last; then one product with float32(1 / sqrt(S)).
        """

    def rotate_outputs(self, source: Tensor, signs: Tensor, base: Tensor, out: Tensor) -> None:
        """Rotate each block of S neighbours in every column, once its signs are in it.

        source [N, K], N a multiple of S; signs float32 [S], or other factors; base and the order of
        additions as in change_rows; out float32 [N, K], contiguous, which may be the source.
        """

    def square_sums(self, source: Tensor, axis: int, sums: Tensor) -> None:
        """Write the sums of w^2 of every row (axis 0) or column (axis 1) of source [N, K].

        sums float64 [N] or [K]; in the order of `lane_sums` along the other axis.
        """

    def error_bf16(self, source: Tensor, stored: Tensor, signal: Tensor, noise: Tensor) -> None:
        """Write sums of w^2 and of (w - w')^2 of every row of source [N, K], float64 [N].

        stored bfloat16 [N, K], contiguous: w'. In the order of `lane_sums`.
        """

    def round_rows(
        self, source: Tensor, stored: Tensor, signal: Tensor, noise: Tensor, steps: Steps = ()
    ) -> None:
        """Round the rows that some steps make of source [N, K] to bfloat16, half to even.

        stored bfloat16 [N, K], contiguous; signal and noise as error_bf16 finds them. Raises
        NotFinite when a stored value is, after which the outputs hold nothing of use.
        """


def check_codes(
    source: Tensor,
    strips: Tensor,
    scales: Tensor,
    signal: Tensor,
    noise: Tensor,
    steps: Steps = (),
) -> None:
    """Raise ValueError unless the arguments fit quantize_w8a8_nz and error_w8a8_nz."""
    check_matrix(source, FLOATS)
    check_steps(source.shape, steps)
    rows, columns = source.shape
    shape = (-(-rows // STRIP_BYTES), -(-columns // ROW_BLOCK), ROW_BLOCK, STRIP_BYTES)
    _check_plain("strips", strips, torch.int8, shape)
    _check_plain("scales", scales, torch.float32, (rows,))
    _check_plain("signal", signal, torch.float64, (rows,))
    _check_plain("noise", noise, torch.float64, (rows,))


def check_change(source: Tensor, steps: Steps, out: Tensor) -> None:
    """Raise ValueError unless the arguments fit change_rows."""
    check_matrix(source, FLOATS)
    check_steps(source.shape, steps)
    check_factors("out", out, tuple(source.shape))


def check_outputs(source: Tensor, signs: Tensor, base: Tensor, out: Tensor) -> None:
    """Raise ValueError unless the arguments fit rotate_outputs."""
    check_matrix(source, FLOATS)
    check_rotation(source.shape[0], signs.numel(), base)
    check_factors("signs", signs, (signs.numel(),))
    check_factors("out", out, tuple(source.shape))


def check_square_sums(source: Tensor, axis: int, sums: Tensor) -> None:
    """Raise ValueError unless the arguments fit square_sums."""
    check_matrix(source, FLOATS)
    _check_plain("sums", sums, torch.float64, (source.shape[axis],))


def check_rounded(
    source: Tensor, stored: Tensor, signal: Tensor, noise: Tensor, steps: Steps = ()
) -> None:
    """Raise ValueError unless the arguments fit error_bf16 and round_rows."""
    check_matrix(source, FLOATS)
    check_steps(source.shape, steps)
    _check_plain("stored", stored, torch.bfloat16, tuple(source.shape))
    for name, sums in (("signal", signal), ("noise", noise)):
        _check_plain(name, sums, torch.float64, (source.shape[0],))


def check_pack(matrix: Tensor, strips: Tensor) -> None:
    """Raise ValueError unless strips can hold the rows of matrix; dtypes may still differ."""
    check_matrix(matrix, tuple(_DTYPE_CODES))
    rows, columns = matrix.shape
    if strips.dtype not in _DTYPE_CODES or strips.dtype is torch.float32:
        raise ValueError(f"strips cannot be {strips.dtype}")
    width = STRIP_BYTES // strips.element_size()
    shape = (-(-columns // width), -(-rows // ROW_BLOCK), ROW_BLOCK, width)
    if tuple(strips.shape) != shape or strips.device.type != "cpu":
        raise ValueError(f"strips must be {shape} on the CPU, not {tuple(strips.shape)}")
    if strips.numel() and strips[0].stride() != (ROW_BLOCK * width, width, 1):
        raise ValueError("each strip must be contiguous")
    if strips.dtype != matrix.dtype and not (
        strips.dtype is torch.bfloat16 and matrix.dtype in FLOATS
    ):
        raise ValueError(f"no conversion from {matrix.dtype} to {strips.dtype}")


def check_search(
    source: Tensor, importance: Tensor, width: int, ratios: Tensor, scales: Tensor
) -> None:
    """Raise ValueError unless the arguments fit search_scales."""
    check_matrix(source, (torch.float32,))
    rows, columns = source.shape
    if width < 1:
        raise ValueError(f"a group has at least one input, not {width}")
    _check_plain("importance", importance, torch.float32, (columns,))
    _check_plain("ratios", ratios, torch.float32, (len(ratios),))
    _check_plain("scales", scales, torch.float32, (rows, -(-columns // width)))


def check_block(
    weights: Tensor, scales: Tensor, factor: Tensor, codes: Tensor, errors: Tensor
) -> None:
    """Raise ValueError unless the arguments fit compensate_block."""
    check_matrix(weights, (torch.float32,))
    check_matrix(factor, (torch.float32,))
    rows, columns = weights.shape
    if columns > BLOCK_COLUMNS or tuple(factor.shape) != (columns, columns):
        raise ValueError(f"no factor {tuple(factor.shape)} for {columns} columns")
    _check_plain("scales", scales, torch.float32, (rows, columns))
    _check_plain("codes", codes, torch.int8, (rows, columns))
    _check_plain("errors", errors, torch.float32, (rows, columns))


@dataclass(frozen=True)
class NativeKernels:
    """The compiled kernels. Stateless: one object serves every thread."""

    library: Library

    def check_finite(self, source: Tensor) -> None:
        """See Kernels."""
        check_matrix(source, FLOATS)
        self._run("find_not_finite", *_matrix(source), position=True)

    def quantize_w8a8_nz(
        self,
        source: Tensor,
        strips: Tensor,
        scales: Tensor,
        signal: Tensor,
        noise: Tensor,
        steps: Steps = (),
    ) -> None:
        check_codes(source, strips, scales, signal, noise, steps)
        scratch = torch.empty(STRIP_BYTES * source.shape[1] if steps else 0)
        outputs = (strips.data_ptr(), scales.data_ptr(), signal.data_ptr(), noise.data_ptr())
        changed = (*_matrix(source), *_steps(steps, scratch))
        self._run("quantize_w8a8_nz", *changed, *outputs, position=True)

    def error_w8a8_nz(
        self, source: Tensor, strips: Tensor, scales: Tensor, signal: Tensor, noise: Tensor
    ) -> None:
        check_codes(source, strips, scales, signal, noise)
        outputs = (strips.data_ptr(), scales.data_ptr(), signal.data_ptr(), noise.data_ptr())
        self._run("error_w8a8_nz", *_matrix(source), *outputs)

    def pack_nz_rows(self, source: Tensor, strips: Tensor, check_finite: bool = True) -> None:
        check_pack(source, strips)
        flags = _CHECK_FINITE if check_finite and source.dtype in FLOATS else 0
        flags |= _TO_BF16 if source.dtype != strips.dtype else 0
        dtype, *matrix = _matrix(source)
        rows = strips.shape[1] * ROW_BLOCK
        target = (strips.data_ptr(), _strip_stride(strips), rows)
        self._run("pack_nz_rows", dtype, flags, *matrix, *target, position=True)

    def unpack_nz_rows(self, strips: Tensor, destination: Tensor) -> None:
        check_pack(destination, strips)
        if strips.dtype != destination.dtype:
            raise ValueError(f"unpacking keeps {strips.dtype}, not {destination.dtype}")
        size = destination.element_size()
        rows, columns = destination.shape
        target = (rows, columns * size, destination.data_ptr(), destination.stride(0) * size)
        self._run("unpack_nz_rows", strips.data_ptr(), _strip_stride(strips), *target)

    def search_scales(
        self,
        source: Tensor,
        importance: Tensor,
        width: int,
        integers: tuple[int, int],
        ratios: Tensor,
        scales: Tensor,
    ) -> None:
        check_search(source, importance, width, ratios, scales)
        tried = (ratios.data_ptr(), len(ratios), scales.data_ptr())
        matrix = _matrix(source)[1:]
        self._run("search_scales", *matrix, importance.data_ptr(), width, *integers, *tried)

    def compensate_block(
        self,
        weights: Tensor,
        scales: Tensor,
        factor: Tensor,
        integers: tuple[int, int],
        codes: Tensor,
        errors: Tensor,
    ) -> None:
        check_block(weights, scales, factor, codes, errors)
        given = (scales.data_ptr(), factor.data_ptr(), factor.stride(0))
        found = (codes.data_ptr(), errors.data_ptr())
        self._run("compensate_block", *_matrix(weights)[1:], *given, *integers, *found)

    def change_rows(self, source: Tensor, steps: Steps, out: Tensor) -> None:
        check_change(source, steps, out)
        self._run("change_rows", *_matrix(source), *_steps(steps, out))

    def rotate_outputs(self, source: Tensor, signs: Tensor, base: Tensor, out: Tensor) -> None:
        check_outputs(source, signs, base, out)
        rotation = (signs.data_ptr(), base.data_ptr(), len(signs), len(base), _factor(len(signs)))
        fewest, most = ROTATED_COLUMNS
        lanes = min(max(ROTATED_WEIGHTS // len(signs) // fewest * fewest, fewest), most)
        scratch = torch.empty(len(signs) * lanes)
        outputs = (lanes, scratch.data_ptr(), out.data_ptr())
        self._run("rotate_outputs", *_matrix(source), *rotation, *outputs)

    def square_sums(self, source: Tensor, axis: int, sums: Tensor) -> None:
        check_square_sums(source, axis, sums)
        self._run("square_sums", *_matrix(source), axis, sums.data_ptr())

    def error_bf16(self, source: Tensor, stored: Tensor, signal: Tensor, noise: Tensor) -> None:
        check_rounded(source, stored, signal, noise)
        sums = (signal.data_ptr(), noise.data_ptr())
        self._run("error_bf16", *_matrix(source), stored.data_ptr(), *sums)

    def round_rows(
        self, source: Tensor, stored: Tensor, signal: Tensor, noise: Tensor, steps: Steps = ()
    ) -> None:
        check_rounded(source, stored, signal, noise, steps)
        scratch = torch.empty(ROUNDED_ROWS * source.shape[1])
        outputs = (stored.data_ptr(), signal.data_ptr(), noise.data_ptr())
        changed = (*_matrix(source), *_steps(steps, scratch))
        self._run("round_rows", *changed, *outputs, position=True)

    def _run(self, name: str, *arguments: object, position: bool = False) -> None:
        """Call a kernel; with `position` it reports a non-finite weight as its last argument."""
        place = (ctypes.c_int64 * 2)()
        status = self.library.call(name, *arguments, *([place] if position else []))
        if status == 1:
            raise NotFinite(place[0], place[1])
        if status:
            raise RuntimeError(f"{name}: {STATUS.get(status, f'status {status}')}")


def _matrix(source: Tensor) -> tuple[int, int, int, int, int]:
    rows, columns = source.shape
    return _DTYPE_CODES[source.dtype], source.data_ptr(), rows, columns, source.stride(0)


def _steps(steps: Steps, scratch: Tensor) -> tuple[ctypes.Array[Step], int, int]:
    """Steps as the library takes them, with the memory that it makes their rows in."""
    found = (Step * len(steps))()
    for place, step in zip(found, steps, strict=True):
        place.outputs = None if step.outputs is None else step.outputs.data_ptr()
        place.inputs = None if step.inputs is None else step.inputs.data_ptr()
        place.base = None if step.base is None else step.base.data_ptr()
        place.size = step.size
        place.order = 1 if step.base is None else len(step.base)
        place.factor = _factor(step.size)
    return found, len(steps), scratch.data_ptr()


def _factor(size: int) -> float:
    return 1.0 / math.sqrt(size)


def _strip_stride(strips: Tensor) -> int:
    return strips.stride(0) * strips.element_size()


def check_matrix(matrix: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless it is a CPU matrix whose columns are contiguous."""
    if matrix.dtype not in dtypes or matrix.dim() != 2 or matrix.device.type != "cpu":
        raise ValueError(f"need a CPU matrix of {dtypes}, not {matrix.dtype} {matrix.shape}")
    rows, columns = matrix.shape
    if (columns > 1 and matrix.stride(1) != 1) or (rows > 1 and matrix.stride(0) < columns):
        raise ValueError(f"columns must be contiguous and rows apart, not {matrix.stride()}")
    if matrix.data_ptr() % matrix.element_size():
        raise ValueError(f"data is not aligned to {matrix.element_size()} bytes")


def _check_plain(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype is not dtype or tuple(tensor.shape) != shape or tensor.device.type != "cpu":
        raise ValueError(f"{name} must be {dtype} {shape}, not {tensor.dtype} {tensor.shape}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def lane_sums(terms: Tensor) -> Tensor:
    """Sums float64 [R, K] along K in the order of the compiled kernels, to the last bit.

    Lane = column mod 8; each lane adds in ascending order (a cumulative sum cannot do otherwise),
    then lanes are added 4 apart, 2 apart, 1 apart.
    """
    rows, columns = terms.shape
    if columns == 0:
        return terms.new_zeros(rows)
    padded = torch.nn.functional.pad(terms, (0, -columns % LANES))
    lanes = padded.view(rows, -1, LANES).cumsum(1)[:, -1]
    half = LANES // 2
    while half:
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
        half //= 2
    return lanes[:, 0]
