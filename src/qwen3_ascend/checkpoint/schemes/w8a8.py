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
so the code is the nearest one to what the device will multiply. Codes that were taken from a source
which was quantized already may be -128, and their scales any finite float32; y is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.layout import Cut, Layout, Place, nz_columns
from qwen3_ascend.checkpoint.schemes.base import TEMPORARY_BYTES, Codes, Input
from qwen3_ascend.checkpoint.schemes.grid import Grid, IntegerScheme
from qwen3_ascend.checkpoint.schemes.pieces import Packed, Piece, Stack, Sums
from qwen3_ascend.files.safetensors import Form
from qwen3_ascend.native import Kernels

if TYPE_CHECKING:
    from qwen3_ascend.checkpoint.linear import Linear

CODE_MAX = 127
"""The largest magnitude a scale maps onto: symmetric, so -128 is never chosen."""

NZ = Layout("nz", "KN", nz_columns(torch.int8.itemsize))
"""FRACTAL_NZ of [K, N] in strips of 32 outputs: what npu_quant_matmul reads on A2/A3."""


@dataclass(frozen=True)
class W8A8(IntegerScheme):
    """weight: int8; scale: float32 [*batch, N]."""

    name: ClassVar[str] = "w8a8"
    input: ClassVar[Input] = Input.INT8_PER_TOKEN

    @override
    def forms(self, shape: Sequence[int], layout: Layout) -> dict[str, Form]:
        return {
            "weight": Form(torch.int8, layout.storage_shape(shape)),
            "scale": Form(torch.float32, tuple(shape[:-1])),
        }

    @override
    def places(self, layout: Layout) -> dict[str, dict[Cut, Place]]:
        return {
            "weight": {"outputs": layout.place("outputs"), "inputs": layout.place("inputs")},
            "scale": {"outputs": Place(-1, 1)},
        }

    @property
    @override
    def grid(self) -> Grid:
        return Grid(8)

    @override
    def codes(self, integers: Tensor, scales: Tensor) -> Codes:
        return {"weight": integers, "scale": scales[..., 0]}

    @override
    def decode(self, codes: Codes) -> Tensor:
        return codes["weight"].float() * codes["scale"][..., None]

    @override
    def product(self, codes: Codes, x: Tensor) -> Tensor:
        """The contract of the module docstring, summed in int64."""
        token_codes, token_scale = quantize_tokens(x)
        product = token_codes.long() @ codes["weight"].long().t()
        return rescale(product, token_scale, codes["scale"])

    @override
    def pack_piece(self, source: Stack, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        if layout != NZ:
            return super().pack_piece(source, piece, layout, kernels)
        count = piece.stop - piece.start
        forms = self.forms((count, source.shape[1]), layout)
        tensors = {suffix: torch.empty(f.shape, dtype=f.dtype) for suffix, f in forms.items()}
        sums = Sums(*torch.empty(2, count, dtype=torch.float64))
        row = 0
        for found in source.outputs(piece, NZ.c0):
            rows = slice(row, row + len(found))
            strips = tensors["weight"][row // NZ.c0 : -(-rows.stop // NZ.c0)]
            outputs = (strips, tensors["scale"][rows], sums.signal[rows], sums.noise[rows])
            kernels.quantize_w8a8_nz(found.source, *outputs, steps=found.steps)
            row = rows.stop
        return Packed(tensors, sums)

    @override
    def errors(self, stored: Linear, source: Stack, piece: Piece, kernels: Kernels) -> Sums | None:
        if stored.layout != NZ:
            return super().errors(stored, source, piece, kernels)
        rows, tensors = source.piece(piece), stored.tensors
        sums = Sums(*torch.empty(2, rows.shape[0], dtype=torch.float64))
        kernels.error_w8a8_nz(rows, tensors["weight"], tensors["scale"], sums.signal, sums.noise)
        return sums

    @override
    def temporary_bytes(self, layout: Layout, source_itemsize: int) -> int:
        fused = layout == NZ and source_itemsize == torch.bfloat16.itemsize
        return 2 * torch.bfloat16.itemsize if fused else TEMPORARY_BYTES


def round_to_codes(values: Tensor, scale: Tensor) -> Tensor:
    """int8 codes [..., K] of float32 values [..., K] under a scale for each row, float32 [...]."""
    return torch.round(values / scale[..., None]).clamp_(-128, CODE_MAX).to(torch.int8)


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
