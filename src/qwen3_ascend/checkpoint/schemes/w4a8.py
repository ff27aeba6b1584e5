"""w4a8: int4 weights with a scale for each 256 inputs of an output, int8 activations per token.

The arithmetic, in this order, with g counting the groups of 256 inputs:

    group scale   = bf16(max|w| / 7)                 exact in bfloat16
    weight code   = clip(round(w / scale), -7, 7)    half to even, in float32
    token scale, token code: as w8a8 has them
    token code    = 16 h + l + 8                     h and l of 4 bits, -8 to 7
    sum(c)        = sum over g of f16(float32(sum of c * weight code, exact) * scale[g]), c = h or l
    y             = (16 * sum(h) + sum(l) + shift) * token scale
    shift         = sum over g of 8 * scale[g] * sum of the weight codes of g

Sums over groups are taken one group after the other: sum(h) and sum(l) in float16, rounded after
each group, `shift` in float32. A sum within a group is at most 2^14, so float32 holds it exactly.

That is what npu_quant_matmul does (CANN's ops-nn at e5c3fa93: quant_batch_matmul_v4_msd.h): it
multiplies 4-bit numbers by 4-bit numbers, so it splits each input code (QuantBatchMatmulV4MsdPre);
each group's integers leave the matrix unit as float16, scaled, and are added to those before them
in memory (MMCompute: GetTensorC of half with atomic addition); the rest is float32
(ComputeDequant).
The 8 that it leaves out is asked for as the argument `offset`; `code_sums`, of each group, makes
that for every cut of the inputs.

On A2 and A3 it takes such weights as plain [K, N / 8] int32 with group_sizes [0, 0, 256], and
neither in FRACTAL_NZ nor transposed (quant_batch_matmul_v4_msd_tiling.cpp: AnalyzeInputs,
AnalyzeAttrs).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.layout import Cut, Layout, Place
from qwen3_ascend.checkpoint.schemes.base import Codes, Input
from qwen3_ascend.checkpoint.schemes.grid import Grid, IntegerScheme
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens
from qwen3_ascend.files.safetensors import Form

GROUP = 256
"""Inputs that share a scale: the only size that npu_quant_matmul takes beside int8 activations."""

SHIFT = 8
"""What npu_quant_matmul leaves out of every input code."""

HIGH = 16
"""What the high half of an input code counts."""

ROWS = Layout("nd", "KN", per_word=8)
"""[K, N] row by row, eight outputs to an int32."""


@dataclass(frozen=True)
class W4A8(IntegerScheme):
    """weight: int4, eight to an int32; scale: float32 [*batch, K / 256, N];
    code_sums: int16 [*batch, K / 256, N]."""

    name: ClassVar[str] = "w4a8"
    input: ClassVar[Input] = Input.INT8_PER_TOKEN

    @override
    def forms(self, shape: Sequence[int], layout: Layout) -> dict[str, Form]:
        *batch, outputs, inputs = shape
        groups = (*batch, self.grid.groups(inputs), outputs)
        return {
            "weight": Form(layout.code_type, layout.storage_shape(shape)),
            "scale": Form(torch.float32, groups),
            "code_sums": Form(torch.int16, groups),
        }

    @override
    def places(self, layout: Layout) -> dict[str, dict[Cut, Place]]:
        groups: dict[Cut, Place] = {"outputs": Place(-1, 1), "inputs": Place(-2, GROUP)}
        return {
            "weight": {"outputs": layout.place("outputs"), "inputs": layout.place("inputs")},
            "scale": groups,
            "code_sums": groups,
        }

    @property
    @override
    def grid(self) -> Grid:
        """Scales are positive: no document says that the kernel takes others."""
        return Grid(4, GROUP)

    @override
    def codes(self, integers: Tensor, scales: Tensor) -> Codes:
        sums = self.grid.grouped(integers).sum(-1, dtype=torch.int16)
        return {
            "weight": integers,
            "scale": scales.transpose(-2, -1).contiguous(),
            "code_sums": sums.transpose(-2, -1).contiguous(),
        }

    @override
    def decode(self, codes: Codes) -> Tensor:
        return self.grid.decode(codes["weight"], codes["scale"].transpose(-2, -1))

    @override
    def product(self, codes: Codes, x: Tensor) -> Tensor:
        """The contract of the module docstring, summed in int64."""
        token_codes, token_scale = quantize_tokens(x)
        halves, weight = halves_of(token_codes).long(), codes["weight"].long()
        groups = zip(halves.split(GROUP, -1), weight.split(GROUP, -1), strict=True)
        products = (x @ w.t() for x, w in groups)
        return rescale_groups(products, codes["scale"], shift_of(codes), token_scale)


def halves_of(codes: Tensor) -> Tensor:
    """The high and then the low halves of int8 codes [T, K], int8 [2 T, K] from -8 to 7."""
    return torch.cat((codes >> 4, (codes & HIGH - 1) - SHIFT))


def rescale_groups(
    products: Iterable[Tensor], scale: Tensor, shift: Tensor, token_scale: Tensor
) -> Tensor:
    """The epilogue: integer products of each group in order, to float32 [T, N].

    Args:
        products: of halves of codes, exact, [2 T, N].
        scale: float32 [K / 256, N].
        shift: float32 [N].
        token_scale: float32 [T].
    """
    groups = ((x.float() * factor).half() for x, factor in zip(products, scale, strict=True))
    high, low = _added_up(groups).float().chunk(2)
    return (HIGH * high + low + shift) * token_scale[:, None]


def shift_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """What npu_quant_matmul wants as `offset`, float32 [*batch, N]. Each summand is exact in
    float32: a scale has 8 bits, and a sum 11."""
    summands = SHIFT * tensors["scale"] * tensors["code_sums"].float()
    return _added_up(summands.unbind(-2))


def _added_up(groups: Iterable[Tensor]) -> Tensor:
    """A sum in order, each step rounded to the type of the groups."""
    return functools.reduce(torch.add, groups)
