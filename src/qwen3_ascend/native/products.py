"""Exact products of int8 activations with int8 weights that stay in FRACTAL_NZ, as stored.

    products = native.products()
    y = products.multiply(weight, codes, Epilogue(...))

The kernels read the strips of a checkpoint where they lie, in a mapped file; csrc/products.h says
how. Every instruction set finds the same integers, and the same floats after them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.geometry import ROW_BLOCK, STRIP_BYTES
from qwen3_ascend.native.kernels import STATUS, check_matrix
from qwen3_ascend.native.library import Library, NativeUnavailable, open_library

INSTRUCTIONS = {"plain": 0, "avx2": 1, "avx_vnni": 2, "avx512_vnni": 3, "dotprod": 4}
"""The sets of instructions that there are kernels for, with their numbers in csrc/products.h."""

BEST = ("avx512_vnni", "avx_vnni", "dotprod", "avx2", "plain")
OF_PATH = {"baseline": ("plain",), "avx2": ("avx2",), "avx512": ("avx512_vnni", "avx2")}
"""What is tried, in order: on any processor, and where $QWEN3_ASCEND_CPU names a path."""

MOST_BLOCK_ROWS = 12
"""Of the kernels' largest block of rows, up to which packed activations may be padded."""

_INT32 = 0
_OUT = {torch.bfloat16: 1, torch.float32: 3}


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What becomes of the integer sums [T, N], each step rounded to float32, in this order.

        y = float32(sum + added) * row_scales * output_scales + bias

    Attributes:
        output_scales: float32 [N].
        dtype: of y, bfloat16 or float32.
        row_scales: float32 [T], or None for no such step, as with the others.
        added: int32 [N].
        bias: float32 [N].
    """

    output_scales: Tensor
    dtype: torch.dtype
    row_scales: Tensor | None = None
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

    def sums(self, strips: Tensor, shape: tuple[int, int], codes: Tensor) -> Tensor:
        """The integer product, int32 [T, N].

        Args:
            strips: int8 FRACTAL_NZ of [K, N], contiguous.
            shape: (N, K), without padding.
            codes: int8 [T, K].
        """
        out = torch.empty(codes.shape[0], shape[0], dtype=torch.int32)
        return self._run(strips, shape, codes, out, _INT32, (None, None, None, None))

    def multiply(
        self, strips: Tensor, shape: tuple[int, int], codes: Tensor, epilogue: Epilogue
    ) -> Tensor:
        """The product after its epilogue, [T, N] of the epilogue's dtype; see `sums`."""
        count, outputs = codes.shape[0], shape[0]
        _check("output_scales", epilogue.output_scales, torch.float32, outputs)
        _check("row_scales", epilogue.row_scales, torch.float32, count)
        _check("added", epilogue.added, torch.int32, outputs)
        _check("bias", epilogue.bias, torch.float32, outputs)
        out = torch.empty(count, outputs, dtype=epilogue.dtype)
        steps = (epilogue.added, epilogue.row_scales, epilogue.output_scales, epilogue.bias)
        return self._run(strips, shape, codes, out, _OUT[epilogue.dtype], steps)

    def _run(
        self,
        strips: Tensor,
        shape: tuple[int, int],
        codes: Tensor,
        out: Tensor,
        out_dtype: int,
        steps: tuple[Tensor | None, ...],
    ) -> Tensor:
        outputs, inputs = shape
        check_matrix(codes, (torch.int8,))
        if codes.shape[1] != inputs:
            raise ValueError(f"codes have {codes.shape[1]} inputs, the weight {inputs}")
        stored = (-(-outputs // STRIP_BYTES), -(-inputs // ROW_BLOCK), ROW_BLOCK, STRIP_BYTES)
        if tuple(strips.shape) != stored or strips.dtype is not torch.int8:
            raise ValueError(f"strips must be int8 {stored}, not {strips.dtype} {strips.shape}")
        if not strips.is_contiguous():
            raise ValueError("strips must be contiguous")
        rows = codes.shape[0]
        scratch = torch.empty(
            (rows + MOST_BLOCK_ROWS) * (stored[1] * ROW_BLOCK + 4), dtype=torch.uint8
        )
        given = (strips.data_ptr(), outputs, inputs, codes.data_ptr(), rows, codes.stride(0))
        pointers = [None if step is None else step.data_ptr() for step in steps]
        status = self.library.plain_call(
            "int8_product", INSTRUCTIONS[self.instructions], torch.get_num_threads(), *given,
            scratch.data_ptr(), *pointers, out.data_ptr(), out_dtype,
        )  # fmt: skip
        if status:
            raise RuntimeError(f"int8_product: {STATUS.get(status, f'status {status}')}")
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
    try:
        library = open_library()
    except NativeUnavailable:
        return None
    forced = os.environ.get("QWEN3_ASCEND_CPU")
    tried = (instructions,) if instructions else OF_PATH[forced] if forced else BEST
    for name in tried:
        if library.plain_call("has_instructions", INSTRUCTIONS[name]):
            return Products(library, name)
    return None
