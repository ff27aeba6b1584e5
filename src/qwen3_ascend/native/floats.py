"""Products of float activations with weights as they are stored: bfloat16, int8 or int4 codes.

    products = native.float_products()
    weight = native.stored_runs(tensor, (outputs, inputs))
    multiply = products.of(weight, torch.bfloat16, bias)
    y = multiply(x)

The kernels read a checkpoint where it lies, in a mapped file; csrc/floats.h says how. What codes
under scales stand for is exact beside float32 activations, and rounded to bfloat16 beside those.
Sums are in float32, and rounded once to the type of the result. Many rows of bfloat16 are
multiplied in pairs where a processor can: there numbers below 2^-126 are zero.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.geometry import ROW_BLOCK, STRIP_BYTES
from qwen3_ascend.native import tape
from qwen3_ascend.native.kernels import check_matrix
from qwen3_ascend.native.library import (
    Grouped,
    InstructionSets,
    Library,
    StoredCodes,
)
from qwen3_ascend.native.tape import empty
from qwen3_ascend.native.threads import kernel_threads

FLOAT_PATHS = {"baseline": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3}
"""The sets of instructions that there are kernels for, with their numbers in csrc/floats.h."""

BEST = tuple(reversed(FLOAT_PATHS))
OF_PATH = {"baseline": ("baseline",), "avx2": ("avx2",), "avx512": ("avx512_bf16", "avx512")}
"""What is tried, in order: on any processor, and where $QWEN3_ASCEND_CPU names a path."""

SETS = InstructionSets("has_float_path", FLOAT_PATHS, BEST, OF_PATH)

RUN_INPUTS = 16
"""Inputs that lie side by side, and to which inputs are padded."""

MOST_BLOCK_ROWS = 12
"""Of the kernels' largest block of rows, up to which packed activations may be padded."""

GROUP_INPUTS = 256
"""Inputs that share a scale beside activations of int8."""

READ_OUTPUTS = 32
"""Codes are read so many outputs at a time."""

_DTYPES = {torch.bfloat16: 1, torch.float32: 3}


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight [N, K] where it lies.

    Attributes:
        shape: (N, K), without padding.
        kernel: that reads it.
        place: what the kernel is told of it.
        tensors: whose memory that is, kept for as long as this.
    """

    shape: tuple[int, int]
    kernel: str
    place: tuple[object, ...]
    tensors: tuple[Tensor, ...]


def stored_runs(weight: Tensor, shape: tuple[int, int]) -> StoredWeight | None:
    """A bfloat16 weight; None if it lies otherwise than the kernels read it.

    Args:
        weight: FRACTAL_NZ of [N, K], or [N, K] itself with K a multiple of 16. Strips, or rows, may
            be apart.
        shape: (N, K), without padding.
    """
    outputs, inputs = shape
    strips = (-(-inputs // RUN_INPUTS), -(-outputs // ROW_BLOCK), ROW_BLOCK, RUN_INPUTS)
    if weight.dtype is not torch.bfloat16 or weight.device.type != "cpu":
        return None
    if weight.shape == strips and weight[0].is_contiguous():
        strides = RUN_INPUTS, weight.stride(0)
    elif weight.shape == shape and weight.stride(1) == 1 and inputs % RUN_INPUTS == 0:
        strides = weight.stride(0), RUN_INPUTS
    else:
        return None
    place = (weight.data_ptr(), outputs, inputs, *strides)
    return StoredWeight(shape, "float_product", place, (weight,))


def stored_codes(
    weight: Tensor,
    shape: tuple[int, int],
    scales: Tensor | None = None,
    offsets: Tensor | None = None,
    group: int | None = None,
) -> StoredWeight | None:
    """A weight of codes c, each of which stands for (c + offset) * scale; None if it lies otherwise
    than the kernels read it.

    Args:
        weight: int8, as FRACTAL_NZ of [K, N] or as that itself; or int4, eight outputs to an int32
            and the first in the lowest bits, of [K, N / 8]. N is a multiple of 32 if it is no
            FRACTAL_NZ. Contiguous.
        shape: (N, K), without padding.
        scales, offsets: bfloat16 [G, N], or None for 1 and for 0.
        group: inputs that share them; the last group may be shorter. Default: all.
    """
    outputs, inputs = shape
    bits, words = {torch.int8: (8, 1), torch.int32: (4, 8)}.get(weight.dtype, (0, 0))
    if not bits or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    if weight.dim() == 4:
        strip_outputs = STRIP_BYTES * 8 // bits
        strips = -(-outputs // strip_outputs)
        padded = -(-inputs // ROW_BLOCK) * ROW_BLOCK
        if weight.nbytes != strips * padded * STRIP_BYTES:
            return None
        lies = strips * strip_outputs, strip_outputs, padded * STRIP_BYTES, STRIP_BYTES
    elif outputs % READ_OUTPUTS == 0 and weight.shape == (inputs, outputs // words):
        lies = outputs, outputs, 0, outputs * bits // 8
    else:
        return None
    group = group or inputs
    groups = -(-inputs // group), outputs
    shared = tuple(each for each in (scales, offsets) if each is not None)
    for each in shared:
        _check("scales and offsets", each, torch.bfloat16, groups)
    pointers = (None if each is None else each.data_ptr() for each in (scales, offsets))
    codes = StoredCodes(weight.data_ptr(), bits, *lies, *pointers, group, 0)
    place = (ctypes.byref(codes), outputs, inputs)
    return StoredWeight(shape, "code_product", place, (weight, *shared))


@dataclass(frozen=True)
class FloatProducts:
    """The products by one set of instructions. Stateless: one object serves every thread.

    Attributes:
        library: with the compiled kernels.
        path: the name of the instructions, of FLOAT_PATHS.
    """

    library: Library
    path: str

    def of(
        self, weight: StoredWeight, dtype: torch.dtype, bias: Tensor | None = None
    ) -> FloatProduct:
        """The product with one weight.

        Args:
            weight: [N, K].
            dtype: of the result, bfloat16 or float32.
            bias: float32 [N], added before the result is rounded.

        Raises:
            ValueError: if the bias does not have this shape.
        """
        _check("bias", bias, torch.float32, weight.shape[:1])
        return FloatProduct(self, weight, dtype, bias)

    def of_groups(
        self,
        weight: StoredWeight,
        scales: Tensor,
        shift: Tensor,
        dtype: torch.dtype,
        bias: Tensor | None = None,
    ) -> GroupProduct:
        """The product of int8 codes with one weight of int4 codes, as w4a8 defines it.

        Each step of the definition is taken in its order, so every set of instructions finds the
        same result to the last bit.

        Args:
            weight: [N, K], int4 without scales.
            scales: float32 [ceil(K / 256), N].
            shift: float32 [N].
            dtype: of the result, bfloat16 or float32.
            bias: float32 [N], added before the result is rounded.

        Raises:
            ValueError: if they do not have these shapes.
        """
        outputs, inputs = weight.shape
        _check("scales", scales, torch.float32, (-(-inputs // GROUP_INPUTS), outputs))
        _check("shift", shift, torch.float32, (outputs,))
        _check("bias", bias, torch.float32, (outputs,))
        return GroupProduct(self, weight, (scales, shift), dtype, bias)


class FloatProduct:
    """The product with one weight: what does not change is checked and looked up once."""

    def __init__(
        self,
        products: FloatProducts,
        weight: StoredWeight,
        dtype: torch.dtype,
        bias: Tensor | None,
    ) -> None:
        """See `FloatProducts.of`, which checks."""
        self._path, self._library = FLOAT_PATHS[products.path], products.library
        self._weight, self._dtype, self._bias = weight, dtype, bias
        self._outputs, self._inputs = weight.shape
        self._padded = -(-self._inputs // RUN_INPUTS) * RUN_INPUTS
        self._added, self._out = None if bias is None else bias.data_ptr(), _DTYPES[dtype]

    def __call__(self, x: Tensor) -> Tensor:
        """x times the transposed weight, plus the bias: [T, N].

        Args:
            x: bfloat16 or float32 [T, K]; rows may be apart.

        Raises:
            ValueError: if x does not fit the weight.
        """
        check_matrix(x, tuple(_DTYPES))
        count, inputs = x.shape
        if inputs != self._inputs:
            raise ValueError(f"the input has {inputs} features, the weight {self._inputs}")
        out = empty(count, self._outputs, dtype=self._dtype)
        scratch = tape.scratch(4 * (count + MOST_BLOCK_ROWS) * self._padded)
        self._library.run(
            self._weight.kernel, self._path, kernel_threads(), *self._weight.place,
            _DTYPES[x.dtype], x.data_ptr(), count, x.stride(0), scratch.data_ptr(), self._added,
            out.data_ptr(), self._out,
        )  # fmt: skip
        return out


class GroupProduct:
    """The product of codes with one weight of groups; see FloatProduct."""

    def __init__(
        self,
        products: FloatProducts,
        weight: StoredWeight,
        shared: tuple[Tensor, Tensor],
        dtype: torch.dtype,
        bias: Tensor | None,
    ) -> None:
        """See `FloatProducts.of_groups`, which checks; `shared` are scales and shift."""
        self._path, self._library = FLOAT_PATHS[products.path], products.library
        self._weight, self._shared, self._dtype, self._bias = weight, shared, dtype, bias
        self._pointers = [each.data_ptr() for each in shared]

    def __call__(self, codes: Tensor, row_scales: Tensor) -> Tensor:
        """The product, [T, N].

        Args:
            codes: int8 [T, K]; rows may be apart.
            row_scales: float32 [T].

        Raises:
            ValueError: if they do not fit the weight.
        """
        check_matrix(codes, (torch.int8,))
        (count, features), (outputs, inputs) = codes.shape, self._weight.shape
        if features != inputs:
            raise ValueError(f"the input has {features} features, the weight {inputs}")
        _check("row_scales", row_scales, torch.float32, (count,))
        out = empty(count, outputs, dtype=self._dtype)
        padded = -(-inputs // RUN_INPUTS) * RUN_INPUTS
        scratch = tape.scratch(4 * (2 * count + MOST_BLOCK_ROWS) * padded)
        grouped = Grouped(*self._pointers, row_scales.data_ptr())
        self._library.run(
            "group_product", self._path, kernel_threads(), *self._weight.place,
            ctypes.byref(grouped), codes.data_ptr(), count, codes.stride(0), scratch.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(), out.data_ptr(),
            _DTYPES[self._dtype],
        )  # fmt: skip
        return out


def _check(name: str, values: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if values is None:
        return
    if values.dtype is not dtype or tuple(values.shape) != shape or not values.is_contiguous():
        raise ValueError(f"{name} must be {dtype} {shape}, not {values.dtype} {values.shape}")


def float_products(path: str | None = None) -> FloatProducts | None:
    """The fastest products that run here; None without compiled kernels.

    Args:
        path: the only set of instructions to take, of FLOAT_PATHS. Default: the best one, among
            those of the path that $QWEN3_ASCEND_CPU names if it does.

    Raises:
        ValueError: if the environment names a path that does not exist.
    """
    found = SETS.choose(path)
    return FloatProducts(*found) if found else None
