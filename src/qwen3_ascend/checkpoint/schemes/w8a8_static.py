"""w8a8-static: int8 weights per output channel, int8 activations under one scale and one offset.

Both are fixed before, from the range of the linear's inputs that calibration has found. The device
multiplies by the reciprocal of the scale and reads that as bfloat16 (npu_quantize wants it in the
type of x), so the reciprocal is what counts, and the rest follows from it in this order:

    input scale   = bf16((largest - least) / 255), least <= 0 <= largest
    reciprocal    = bf16(1 / input scale)
    input offset  = clip(round(-128 - least * reciprocal), -128, 127)
    input code    = clip(round(x * reciprocal + offset), -128, 127)    half to even, in float32
    weight code, channel scale: as w8a8 has them
    deq_scale     = channel scale / reciprocal                         float32
    quant_bias    = -offset * sum of the weight codes of the output    int32
    y             = float32(sum of code products + quant_bias, exact) * deq_scale

With a bias, round(bias / deq_scale) is added to the exact sum, half to even in float32: one
npu_quant_matmul takes one bias, and that is int32. ModelSlim folds it the same way (msmodelslim
26.1.0, ascendv1.py: on_w8a8_static); here the bias stays a tensor of its own until the linear is
loaded, because of the ranks of a cut along the inputs only one adds it, while quant_bias belongs to
the codes of each.

A weight whose range is not known yet has the scale 1 and the offset 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.layout import Cut, Layout, Place
from qwen3_ascend.checkpoint.schemes.base import Codes, Input, InputRange
from qwen3_ascend.checkpoint.schemes.grid import Grid, IntegerScheme, stored_scale
from qwen3_ascend.checkpoint.schemes.pieces import Packed, Piece, Stack, Sums
from qwen3_ascend.checkpoint.schemes.w8a8 import W8A8
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.safetensors import Form
from qwen3_ascend.native import Kernels

if TYPE_CHECKING:
    from qwen3_ascend.checkpoint.linear import Linear

CODES = 255
"""Steps between the least and the largest code of an input."""

LEAST, LARGEST = -128, 127
"""Codes of an input."""

SMALLEST_SCALE = 2.0**-126
"""The reciprocal of a smaller one is beyond bfloat16."""

LARGEST_BIAS = 2.0**30
"""Magnitude of a bias in units of deq_scale: with the sum of products still below 2^31 - 1 for
every number of inputs that the kernel takes, half of that is left to it."""


@dataclass(frozen=True)
class StaticInput:
    """How the inputs of one linear are quantized.

    Attributes:
        reciprocal: of the scale, exact in bfloat16.
        offset: the code of zero, -128 to 127.
    """

    reciprocal: float
    offset: int

    @classmethod
    def of(cls, scale: float, offset: int) -> StaticInput:
        """For a scale and an offset as they are stored."""
        return cls(float(_reciprocal(torch.tensor(scale))), offset)

    def quantize(self, x: Tensor) -> Tensor:
        """int8 codes of float values of any shape."""
        codes = torch.round(x.float() * self.reciprocal + self.offset)
        return codes.clamp_(LEAST, LARGEST).to(torch.int8)


@dataclass(frozen=True)
class W8A8Static(IntegerScheme):
    """weight: int8; deq_scale: float32 [*batch, N]; quant_bias: int32 [*batch, N];
    input_scale: float32 [*batch, 1]; input_offset: int8 [*batch, 1]."""

    name: ClassVar[str] = "w8a8-static"
    input: ClassVar[Input] = Input.INT8_STATIC

    @override
    def forms(self, shape: Sequence[int], layout: Layout) -> dict[str, Form]:
        *batch, outputs, _ = shape
        return {
            "weight": Form(torch.int8, layout.storage_shape(shape)),
            "deq_scale": Form(torch.float32, (*batch, outputs)),
            "quant_bias": Form(torch.int32, (*batch, outputs)),
            "input_scale": Form(torch.float32, (*batch, 1)),
            "input_offset": Form(torch.int8, (*batch, 1)),
        }

    @override
    def places(self, layout: Layout) -> dict[str, dict[Cut, Place]]:
        return {
            "weight": {"outputs": layout.place("outputs"), "inputs": layout.place("inputs")},
            "deq_scale": {"outputs": Place(-1, 1)},
            "quant_bias": {"outputs": Place(-1, 1)},
            "input_scale": {},
            "input_offset": {},
        }

    @property
    @override
    def grid(self) -> Grid:
        return W8A8().grid

    @override
    def codes(self, integers: Tensor, scales: Tensor) -> Codes:
        return {"weight": integers, **_without_range(scales[..., 0])}

    @override
    def for_inputs(
        self,
        tensors: Mapping[str, Tensor],
        shape: Sequence[int],
        layout: Layout,
        inputs: InputRange,
    ) -> Mapping[str, Tensor]:
        scale, offset = scale_and_offset(inputs)
        scales = torch.full_like(tensors["input_scale"], scale)
        changed = {
            **tensors,
            "deq_scale": channel_scale(tensors) / _reciprocal(scales),
            "input_scale": scales,
            "input_offset": torch.full_like(tensors["input_offset"], offset),
        }
        return self.of_some_inputs(changed, shape, layout)

    @override
    def of_some_inputs(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], layout: Layout
    ) -> Mapping[str, Tensor]:
        """What the offset adds to a product depends on the codes that it meets."""
        sums = layout.output_sums(tensors["weight"], shape)
        return {**tensors, "quant_bias": -tensors["input_offset"].to(torch.int32) * sums}

    @override
    def decode(self, codes: Codes) -> Tensor:
        return codes["weight"].float() * channel_scale(codes)[..., None]

    @override
    def product(self, codes: Codes, x: Tensor) -> Tensor:
        """The contract of the module docstring, summed in int64."""
        inputs = static_input(codes).quantize(x)
        total = inputs.long() @ codes["weight"].long().t() + codes["quant_bias"]
        return total.float() * codes["deq_scale"]

    @override
    def pack_piece(self, source: Stack, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        """As w8a8 chooses and packs the weight."""
        packed = W8A8().pack_piece(source, piece, layout, kernels)
        scale = packed.tensors["scale"]
        tensors = {"weight": packed.tensors["weight"], **_without_range(scale)}
        return Packed(tensors, packed.sums)

    @override
    def errors(self, stored: Linear, source: Stack, piece: Piece, kernels: Kernels) -> Sums | None:
        return W8A8().errors(as_w8a8(stored), source, piece, kernels)

    @override
    def temporary_bytes(self, layout: Layout, source_itemsize: int) -> int:
        return W8A8().temporary_bytes(layout, source_itemsize)


def scale_and_offset(inputs: InputRange) -> tuple[float, int]:
    """What is stored for inputs of a range, which is widened to include zero."""
    least, largest = min(inputs.least, 0.0), max(inputs.largest, 0.0)
    exact = torch.tensor((largest - least) / CODES)
    scale = stored_scale(exact).clamp(min=SMALLEST_SCALE)
    offset = round(LEAST - least * float(_reciprocal(scale)))
    return float(scale), min(max(offset, LEAST), LARGEST)


def static_input(tensors: Mapping[str, Tensor]) -> StaticInput:
    """How the inputs of a linear with these tensors are quantized."""
    return StaticInput.of(float(tensors["input_scale"]), int(tensors["input_offset"]))


def channel_scale(tensors: Mapping[str, Tensor]) -> Tensor:
    """The scale of each output, float32 [*batch, N], which bfloat16 has exactly: so it comes back
    from deq_scale as it was."""
    return (tensors["deq_scale"] * _reciprocal(tensors["input_scale"])).bfloat16().float()


def folded_bias(linear: Linear) -> Tensor:
    """quant_bias with the bias of a linear [N, K] folded in, int32 [N].

    Raises:
        CheckpointError: if the bias is too large for that.
    """
    quant_bias, bias = linear.tensors["quant_bias"], linear.bias
    if bias is None:
        return quant_bias
    scale = linear.tensors["deq_scale"]
    units = torch.round(bias.float() / torch.where(scale == 0, torch.ones_like(scale), scale))
    if bool((units.abs() > LARGEST_BIAS).any()):
        raise CheckpointError(
            f"a bias of {float(bias[units.abs().argmax()]):g} cannot be added to int32 sums in "
            f"units of {float(scale[units.abs().argmax()]):g}; convert with another scheme than "
            f"{linear.scheme.name} for linears with such a bias"
        )
    return quant_bias + units.to(torch.int32)


def as_w8a8(linear: Linear) -> Linear:
    """The same weight as a linear of w8a8; nothing is copied but the scales."""
    tensors = {"weight": linear.weight, "scale": channel_scale(linear.tensors)}
    return type(linear)(W8A8(), linear.shape, linear.layout, tensors)


def _reciprocal(scale: Tensor) -> Tensor:
    return (1 / scale).bfloat16().float()


def _without_range(scale: Tensor) -> dict[str, Tensor]:
    """What is stored beside codes under a channel scale [*batch, N], for inputs that are codes."""
    *batch, _ = scale.shape
    return {
        "deq_scale": scale,
        "quant_bias": torch.zeros_like(scale, dtype=torch.int32),
        "input_scale": torch.ones(*batch, 1),
        "input_offset": torch.zeros(*batch, 1, dtype=torch.int8),
    }
