"""w8a8: int8 weights per output channel, int8 activations per token, both symmetric.

The arithmetic, in this order, is the numerics contract of the converter's report, the CPU backend
and the simulated device:

    channel scale = bf16(max|w| / 127)             one per row of W, exactly representable in bf16
    weight code   = clip(round(w / scale), -128, 127)    round half to even, in float32
    token scale   = max|x| / 127                   one per row of x, float32
    token code    = clip(round(x / token scale), -128, 127)
    y             = float32(sum of code products, exact) * token scale * channel scale

A row of zeros (or one so small that its scale vanishes) gets the scale 1 and codes 0.

The scale is made bf16 before the codes are chosen, because Ascend's stacks read scales as bf16:
so the code is the nearest one to what the device will multiply.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from qwen3_ascend.checkpoint.layout import Layout, nz_columns
from qwen3_ascend.checkpoint.schemes.base import (
    Linear,
    LinearShape,
    StoredForm,
    add_bias,
    bias_form,
    row_slices,
    with_bias,
)
from qwen3_ascend.checkpoint.schemes.pieces import (
    Packed,
    Piece,
    Stack,
    Sums,
    cut,
)
from qwen3_ascend.native import Kernels

CODE_MAX = 127
"""The largest magnitude a scale maps onto: symmetric, so -128 is never chosen."""

STRIP = nz_columns(torch.int8.itemsize)
"""Output channels of a strip of the default layout."""


@dataclass(frozen=True)
class W8A8(Linear):
    """weight: int8, FRACTAL_NZ of the contiguous [K, N]; scale: float32 [N]."""

    scheme: ClassVar[str] = "w8a8"
    bits: ClassVar[int] = 8

    scale: Tensor

    @classmethod
    def default_layout(cls) -> Layout:
        """NZ of [K, N] in strips of 32: what npu_quant_matmul reads on A2/A3."""
        return Layout("nz", "KN", nz_columns(torch.int8.itemsize))

    @classmethod
    def stored(cls, shape: LinearShape, layout: Layout, bias: bool) -> dict[str, StoredForm]:
        """See Linear.stored."""
        return {
            "weight": (torch.int8, layout.storage_shape(*shape)),
            "scale": (torch.float32, (shape[0],)),
            **bias_form(shape, bias),
        }

    @classmethod
    def pieces(cls, shape: LinearShape, layout: Layout) -> tuple[Piece, ...]:
        """See Linear.pieces: whole strips of rows."""
        outputs, inputs = shape
        if layout.format == "nd" or layout == cls.default_layout():
            return cut("rows", outputs, STRIP, STRIP * inputs)
        return (Piece("rows", 0, outputs),)

    @classmethod
    def pack(cls, source: Stack, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        """See Linear.pack: one bf16-representable scale per output channel, nearest codes."""
        count, inputs = piece.stop - piece.start, source.shape[1]
        default = cls.default_layout()
        strips = torch.empty(default.storage_shape(count, inputs), dtype=torch.int8)
        scale = torch.empty(count, dtype=torch.float32)
        sums = Sums(*torch.empty(2, count, dtype=torch.float64))
        row = 0
        for matrix in source.rows(piece, STRIP):
            stop = row + matrix.shape[0]
            kernels.quantize_w8a8_nz(
                matrix, strips[row // STRIP : -(-stop // STRIP)], scale[row:stop],
                sums.signal[row:stop], sums.noise[row:stop],
            )  # fmt: skip
            row = stop
        start = piece.start // STRIP * strips[0].nbytes
        weight = strips
        if layout != default:
            weight = layout.pack(default.unpack(strips, count, inputs))
            start = piece.start * inputs
        tensors = {"weight": (start, weight), "scale": (piece.start * scale.itemsize, scale)}
        return Packed(tensors, sums)

    def errors(self, source: Stack, piece: Piece, kernels: Kernels) -> Sums | None:
        """See Linear.errors."""
        rows = source.cut(piece)
        default = self.default_layout()
        if self.layout == default:
            strips = self.weight[piece.start // STRIP : -(-piece.stop // STRIP)]
        else:
            strips = default.pack(self.codes()[piece.start : piece.stop])
        count = rows.shape[0]
        sums = Sums(*torch.empty(2, count, dtype=torch.float64))
        scale = self.scale[piece.start : piece.stop]
        kernels.error_w8a8_nz(rows, strips, scale, sums.signal, sums.noise)
        return sums

    @classmethod
    def from_tensors(
        cls, shape: LinearShape, layout: Layout, tensors: Mapping[str, Tensor]
    ) -> Self:
        """See Linear.from_tensors."""
        return cls(shape, layout, tensors["weight"], tensors.get("bias"), tensors["scale"])

    def tensors(self) -> dict[str, Tensor]:
        """See Linear.tensors."""
        return with_bias({"weight": self.weight, "scale": self.scale}, self.bias)

    def codes(self) -> Tensor:
        """The weight codes in plain order, int8 [N, K]."""
        return self.layout.unpack(self.weight, *self.shape)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """See Linear.blocks."""
        codes = self.codes()
        for rows in row_slices(self.shape[0]):
            yield rows, codes[rows].float() * self.scale[rows, None]

    def reference(self, x: Tensor) -> Tensor:
        """The contract of the module docstring, summed in int64."""
        token_codes, token_scale = quantize_tokens(x)
        product = token_codes.long() @ self.codes().long().t()
        return add_bias(rescale(product, token_scale, self.scale), self.bias)


def round_to_codes(values: Tensor, scale: Tensor) -> Tensor:
    """int8 codes [R, K] of float32 values [R, K] under a scale for each row, float32 [R]."""
    return torch.round(values / scale[:, None]).clamp_(-128, CODE_MAX).to(torch.int8)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic activation quantization: float x [T, K] to int8 codes [T, K], float32 scale [T].

    A row of zeros has the scale 0 and the codes 0.
    """
    values = x.float()
    scale = values.abs().amax(dim=-1) / CODE_MAX
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    return round_to_codes(values, divisor), scale


def rescale(product: Tensor, token_scale: Tensor, channel_scale: Tensor) -> Tensor:
    """The epilogue: integer product [T, N] to float32, times the token's, then the channel's."""
    return product.float() * token_scale[:, None] * channel_scale
