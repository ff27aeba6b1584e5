"""Exact products of int8 activations with int8 weights that stay in FRACTAL_NZ, as stored.

    product = native.products().of(weight, shape, Epilogue(...))
    y = product(codes, row_scales)

The kernels read the strips of a checkpoint where they lie, in a mapped file; csrc/products.h says
how. Every instruction set finds the same integers, and the same floats after them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.geometry import ROW_BLOCK, STRIP_BYTES
from qwen3_ascend.native import tape
from qwen3_ascend.native.kernels import check_matrix
from qwen3_ascend.native.library import InstructionSets, Library
from qwen3_ascend.native.tape import empty
from qwen3_ascend.native.threads import kernel_threads

INSTRUCTIONS = {"plain": 0, "avx2": 1, "avx_vnni": 2, "avx512_vnni": 3, "dotprod": 4}
"""The sets of instructions that there are kernels for, with their numbers in csrc/products.h."""

BEST = ("avx512_vnni", "avx_vnni", "dotprod", "avx2", "plain")
OF_PATH = {"baseline": ("plain",), "avx2": ("avx2",), "avx512": ("avx512_vnni", "avx2")}
"""What is tried, in order: on any processor, and where $QWEN3_ASCEND_CPU names a path."""

SETS = InstructionSets("has_instructions", INSTRUCTIONS, BEST, OF_PATH)

MOST_BLOCK_ROWS = 12
"""Of the kernels' largest block of rows, up to which packed activations may be padded."""

_OUT = {torch.int32: 0, torch.bfloat16: 1, torch.float32: 3}


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What becomes of the integer sums [T, N], each step rounded to float32, in this order.

        y = float32(sum + added) * row_scales * output_scales + bias

    The scales of rows belong to the codes and come with them.

    Attributes:
        output_scales: float32 [N].
        dtype: of y, bfloat16 or float32.
        added: int32 [N], or None for no such step, as with the other.
        bias: float32 [N].
    """

    output_scales: Tensor
    dtype: torch.dtype
    added: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Products:
    """The products by one set of instructions. Stateless: one object serves every thread.

    Attributes:
        library: with the compiled kernels.
        instructions: their name.
    """

    library: Library
    instructions: str

    def of(
        self, strips: Tensor, shape: tuple[int, int], epilogue: Epilogue | None = None
    ) -> Product:
        """The product with one weight.

        Args:
            strips: int8 FRACTAL_NZ of [K, N], contiguous; read where they lie.
            shape: (N, K), without padding.
            epilogue: what becomes of the sums; None gives them as they are, int32.

        Raises:
            ValueError: if the strips or the epilogue are not of this shape.
        """
        outputs, inputs = shape
        stored = (-(-outputs // STRIP_BYTES), -(-inputs // ROW_BLOCK), ROW_BLOCK, STRIP_BYTES)
        if tuple(strips.shape) != stored or strips.dtype is not torch.int8:
            raise ValueError(f"strips must be int8 {stored}, not {strips.dtype} {strips.shape}")
        if not strips.is_contiguous():
            raise ValueError("strips must be contiguous")
        if epilogue is not None:
            _check("output_scales", epilogue.output_scales, torch.float32, outputs)
            _check("added", epilogue.added, torch.int32, outputs)
            _check("bias", epilogue.bias, torch.float32, outputs)
        return Product(self, strips, shape, epilogue)


class Product:
    """The product with one weight: what does not change is checked and looked up once."""

    def __init__(
        self, products: Products, strips: Tensor, shape: tuple[int, int], epilogue: Epilogue | None
    ) -> None:
        """See `Products.of`, which checks."""
        self._instructions = INSTRUCTIONS[products.instructions]
        self._library = products.library
        self._strips, self._epilogue = strips, epilogue  # kept, for their memory is pointed to
        self._outputs, self._inputs = shape
        self._scratch = -(-shape[1] // ROW_BLOCK) * ROW_BLOCK + 4
        self._dtype = torch.int32 if epilogue is None else epilogue.dtype
        self._out = _OUT[self._dtype]
        steps: tuple[Tensor | None, ...] = (None, None, None)
        if epilogue is not None:
            steps = (epilogue.added, epilogue.output_scales, epilogue.bias)
        self._weights = strips.data_ptr()
        self._added, self._scales, self._bias = (
            None if each is None else each.data_ptr() for each in steps
        )

    def __call__(self, codes: Tensor, row_scales: Tensor | None = None) -> Tensor:
        """The product after its epilogue, [T, N].

        Args:
            codes: int8 [T, K], whose columns are contiguous.
            row_scales: float32 [T], if the epilogue is to multiply by them.

        Raises:
            ValueError: if they do not have the shape of the weight.
        """
        check_matrix(codes, (torch.int8,))
        rows, inputs = codes.shape
        if inputs != self._inputs:
            raise ValueError(f"codes have {inputs} inputs, the weight {self._inputs}")
        _check("row_scales", row_scales, torch.float32, rows)
        out = empty(rows, self._outputs, dtype=self._dtype)
        scratch = tape.scratch((rows + MOST_BLOCK_ROWS) * self._scratch)
        self._library.run(
            "int8_product", self._instructions, kernel_threads(),
            self._weights, self._outputs, inputs, codes.data_ptr(), rows, codes.stride(0),
            scratch.data_ptr(), self._added, None if row_scales is None else row_scales.data_ptr(),
            self._scales, self._bias, out.data_ptr(), self._out,
        )  # fmt: skip
        return out


def _check(name: str, values: Tensor | None, dtype: torch.dtype, length: int) -> None:
    if values is None:
        return
    if values.dtype is not dtype or tuple(values.shape) != (length,) or not values.is_contiguous():
        raise ValueError(f"{name} must be {dtype} [{length}], not {values.dtype} {values.shape}")


def products(instructions: str | None = None) -> Products | None:
    """The fastest products that run here; None without compiled kernels.

    Args:
        instructions: the only set to take, of INSTRUCTIONS. Default: the best one, among those of
            the path that $QWEN3_ASCEND_CPU names if it does.

    Raises:
        ValueError: if the environment names a path that does not exist.
    """
    found = SETS.choose(instructions)
    return Products(*found) if found else None
