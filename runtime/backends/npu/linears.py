"""Linears on the device: one kernel for bf16, one for w8a8, one for w8a16 and w4a16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import (
    BF16,
    W4A8,
    W4A16,
    W8A8,
    W8A16,
    Input,
    Scheme,
    W8A8Static,
)
from qwen3_ascend.checkpoint.schemes.w4a8 import GROUP, SHIFT, shift_of
from qwen3_ascend.checkpoint.schemes.w8a8_static import StaticInput, folded_bias, static_input
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.runtime.backends.base import (
    Activation,
    DeviceLinear,
    as_codes,
    as_float,
    as_static,
)
from qwen3_ascend.runtime.backends.npu.operators import StaticVectors

Upload = Callable[[Tensor, Layout, int, int], Tensor]
"""(stored weight, layout, N, K) -> device tensor; see formats.upload_packed."""


class NpuLinear(DeviceLinear, Protocol):
    """A linear whose weight can be asked for through its own kernel."""

    def probe(self, rows: Tensor) -> Tensor:
        """The weights [R, N] of some inputs [R], as the kernel itself reads them: the codes of an
        integer weight, int8, or a float weight, bfloat16. On the CPU."""


Load = Callable[[Linear, Upload], NpuLinear]
"""Puts a stored linear on the device."""


class DenseLinear:
    """bf16: F.linear reads [N, K], in FRACTAL_NZ, through its own transposed view."""

    input = Input.FLOAT

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    @classmethod
    def load(cls, linear: Linear, upload: Upload) -> DenseLinear:
        """Puts a stored linear on the device."""
        weight = upload(linear.weight, linear.layout, *linear.shape[-2:])
        return cls(weight, None if linear.bias is None else linear.bias.to("npu"))

    def __call__(self, x: Activation) -> Tensor:
        """The product, bfloat16 [T, N]."""
        return F.linear(as_float(x), self.weight, self.bias)

    def probe(self, rows: Tensor) -> Tensor:
        """See NpuLinear; a one-hot activation picks one input."""
        one_hot = _one_hot(rows, self.weight.shape[1], torch.bfloat16)
        return F.linear(one_hot.to("npu"), self.weight).cpu()


class Int8Linear:
    """w8a8: npu_quant_matmul reads the contiguous [K, N], in FRACTAL_NZ."""

    input = Input.INT8_PER_TOKEN

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.weight, self.scale, self.bias = weight, scale, bias

    @classmethod
    def load(cls, linear: Linear, upload: Upload) -> Int8Linear:
        """Puts a stored linear on the device."""
        weight = upload(linear.weight, linear.layout, *linear.shape[-2:])
        if linear.layout == ND:
            weight = weight.t()
        bias = None if linear.bias is None else linear.bias.to("npu")
        return cls(weight, linear.tensors["scale"].to("npu"), bias)

    def __call__(self, x: Activation) -> Tensor:
        """The product, bfloat16 [T, N]."""
        quantized = as_codes(x)
        y: Tensor = torch_npu.npu_quant_matmul(
            quantized.codes,
            self.weight,
            self.scale,
            pertoken_scale=quantized.scale,
            bias=self.bias,
            output_dtype=torch.bfloat16,
        )
        return y

    def probe(self, rows: Tensor) -> Tensor:
        """See NpuLinear. A one-hot activation picks one input; with scales of 1 the bf16 result is
        the code itself, which bf16 holds exactly."""
        inputs, outputs = self.weight.shape
        ones = torch.ones(max(outputs, len(rows)))
        y: Tensor = torch_npu.npu_quant_matmul(
            _one_hot(rows, inputs, torch.int8).to("npu"),
            self.weight,
            ones[:outputs].to("npu"),
            pertoken_scale=ones[: len(rows)].to("npu"),
            output_dtype=torch.bfloat16,
        )
        return y.cpu().to(torch.int8)


class StaticInt8Linear:
    """w8a8-static: npu_quant_matmul adds quant_bias to the integers, and multiplies once.

    Attributes:
        vectors: for who feeds it.
    """

    input = Input.INT8_STATIC

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        static_input: StaticInput,
        vectors: StaticVectors,
    ) -> None:
        self.weight, self.scale, self.bias = weight, scale, bias
        self.static_input, self.vectors = static_input, vectors

    @classmethod
    def load(cls, linear: Linear, upload: Upload) -> StaticInt8Linear:
        """Puts a stored linear on the device."""
        outputs, inputs = linear.shape[-2:]
        weight = upload(linear.weight, linear.layout, outputs, inputs)
        made = static_input(linear.tensors)
        scale, bias = linear.tensors["deq_scale"].to("npu"), folded_bias(linear).to("npu")
        return cls(weight, scale, bias, made, StaticVectors.upload(made))

    def __call__(self, x: Activation) -> Tensor:
        """The product, bfloat16 [T, N]."""
        y: Tensor = torch_npu.npu_quant_matmul(
            as_static(x), self.weight, self.scale, bias=self.bias, output_dtype=torch.bfloat16
        )
        return y

    def probe(self, rows: Tensor) -> Tensor:
        """See NpuLinear; as of w8a8, whose weight it has."""
        return Int8Linear(self.weight, self.scale, None).probe(rows)


class GroupInt4Linear:
    """w4a8: npu_quant_matmul reads plain [K, N / 8] words of eight codes.

    Attributes:
        scale: int64 [K / 256, N], with float32 in the low half.
        offset: float32 [N], what the kernel leaves out of its products.
        bias: added by a launch of its own, since this kernel takes none.
    """

    input = Input.INT8_PER_TOKEN

    def __init__(self, weight: Tensor, scale: Tensor, offset: Tensor, bias: Tensor | None) -> None:
        self.weight, self.scale, self.offset, self.bias = weight, scale, offset, bias

    @classmethod
    def load(cls, linear: Linear, upload: Upload) -> GroupInt4Linear:
        """Puts a stored linear on the device.

        Raises:
            CheckpointError: if the kernel does not take it, as it may be for a rank's part of one
                that it takes.
        """
        if refusal := ASCEND_A2_A3.refusal(linear.scheme, linear.shape):
            raise CheckpointError(f"a linear cannot be loaded: {refusal}")
        weight = upload(linear.weight, linear.layout, *linear.shape[-2:])
        scale = linear.tensors["scale"].view(torch.int32).long()
        bias = None if linear.bias is None else linear.bias.to("npu")
        return cls(weight, scale.to("npu"), shift_of(linear.tensors).to("npu"), bias)

    def __call__(self, x: Activation) -> Tensor:
        """The product, bfloat16 [T, N]."""
        quantized = as_codes(x)
        y = self._product(quantized.codes, self.scale, self.offset, quantized.scale)
        return y if self.bias is None else y + self.bias

    def _product(self, codes: Tensor, scale: Tensor, offset: Tensor, token: Tensor) -> Tensor:
        y: Tensor = torch_npu.npu_quant_matmul(
            codes,
            self.weight,
            scale,
            offset=offset,
            pertoken_scale=token.unsqueeze(-1),
            group_sizes=[0, 0, GROUP],
            output_dtype=torch.bfloat16,
        )
        return y

    def probe(self, rows: Tensor) -> Tensor:
        """See NpuLinear. An input code of 8 leaves nothing in the kernel's products, one of 9 the
        weight's code itself: with scales of 1 and no offset that is the result."""
        codes = SHIFT + _one_hot(rows, self.weight.shape[0], torch.int8)
        ones = torch.ones_like(self.scale, device="cpu", dtype=torch.float32)
        scale = ones.view(torch.int32).long().to("npu")
        token = torch.ones(len(rows)).to("npu")
        y = self._product(codes.to("npu"), scale, torch.zeros_like(self.offset), token)
        return y.cpu().to(torch.int8)


def multiply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    group: int,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Floats times int8 or int4 weights, which the kernel decodes on the way.

    The operator is left at its precise mode. The other one, which it offers for few tokens and int4
    in FRACTAL_NZ, is faster and loses accuracy, and nobody has measured how much of either.

    Args:
        x: bfloat16 [T, K].
        weight: int8 [K, N], or int32 [K, N / 8].
        scale: bfloat16 [N], or [K / group, N].
        group: inputs that share a scale; 0 if all do.
        bias: float32 [N].
        offset: what is added to codes before they are scaled, as scale.
    """
    y: Tensor = torch_npu.npu_weight_quant_batchmatmul(
        x, weight, scale, offset, bias=bias, antiquant_group_size=group
    )
    return y


class WeightOnlyLinear:
    """w8a16 and w4a16: npu_weight_quant_batchmatmul reads [K, N]."""

    input = Input.FLOAT

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        group: int,
        bias: Tensor | None,
        offset: Tensor | None = None,
    ) -> None:
        """As `multiply` takes them."""
        self.weight, self.scale, self.group, self.bias = weight, scale, group, bias
        self.offset = offset

    @classmethod
    def load(cls, linear: Linear, upload: Upload) -> WeightOnlyLinear:
        """Puts a stored linear on the device; CheckpointError if the kernel does not take it, as
        it may be for a rank's part of one that it takes."""
        if refusal := ASCEND_A2_A3.refusal(linear.scheme, linear.shape):
            raise CheckpointError(f"a linear cannot be loaded: {refusal}")
        weight = upload(linear.weight, linear.layout, *linear.shape[-2:])
        if linear.layout == ND:
            weight = weight.t()
        group = linear.scheme.group if isinstance(linear.scheme, W4A16) else 0
        bias = None if linear.bias is None else linear.bias.float().to("npu")
        offset = linear.tensors["offset"].to("npu") if "offset" in linear.tensors else None
        return cls(weight, linear.tensors["scale"].to("npu"), group, bias, offset)

    def __call__(self, x: Activation) -> Tensor:
        """The product, bfloat16 [T, N]."""
        return multiply(as_float(x), self.weight, self.scale, self.group, self.bias, self.offset)

    def probe(self, rows: Tensor) -> Tensor:
        """See NpuLinear. A one-hot activation picks one input; with scales of 1 and no offsets the
        bf16 result is the code itself, which bf16 holds exactly."""
        one_hot = _one_hot(rows, self.weight.shape[0], torch.bfloat16).to("npu")
        codes = multiply(one_hot, self.weight, torch.ones_like(self.scale), self.group)
        return codes.cpu().to(torch.int8)


class DividedLinear:
    """A linear with more outputs than a kernel takes: parts of them, one after the other. Each is
    a range of the stored bytes, and a weight of its own on the device.

    Attributes:
        parts: in the order of their outputs.
        weight: of the first part, with which the product begins.
    """

    def __init__(self, parts: tuple[NpuLinear, ...]) -> None:
        self.parts, self.input, self.weight = parts, parts[0].input, parts[0].weight

    def __call__(self, x: Activation) -> Tensor:
        """The product, bfloat16 [T, N]: a launch for each part, and one that joins them."""
        return torch.cat([part(x) for part in self.parts], dim=-1)

    def probe(self, rows: Tensor) -> Tensor:
        """See NpuLinear."""
        return torch.cat([part.probe(rows) for part in self.parts], dim=-1)


class DividedStaticLinear(DividedLinear):
    """The same of linears with a static input, which all parts share."""

    def __init__(self, parts: tuple[NpuLinear, ...]) -> None:
        super().__init__(parts)
        first = parts[0]
        assert isinstance(first, StaticInt8Linear), "parts of another scheme"
        self.static_input, self.vectors = first.static_input, first.vectors


def static_vectors(consumer: DeviceLinear) -> StaticVectors:
    """How a linear with a static input wants to be fed."""
    assert isinstance(consumer, StaticInt8Linear | DividedStaticLinear), "it has no static input"
    return consumer.vectors


Join = Callable[[tuple[NpuLinear, ...]], NpuLinear]
"""Makes one linear of parts."""


def in_parts(load: Load, join: Join = DividedLinear) -> Load:
    """Puts a linear on the device, in parts if its kernel does not take it as one."""

    def divided(linear: Linear, upload: Upload) -> NpuLinear:
        most = ASCEND_A2_A3.largest_dimension
        if linear.shape[-2] <= most:
            return load(linear, upload)
        return join(tuple(load(part, upload) for part in linear.divide_outputs(most)))

    return divided


LINEARS: dict[type[Scheme], Load] = {
    BF16: DenseLinear.load,
    W8A8: in_parts(Int8Linear.load),
    W8A8Static: in_parts(StaticInt8Linear.load, DividedStaticLinear),
    W8A16: in_parts(WeightOnlyLinear.load),
    W4A16: in_parts(WeightOnlyLinear.load),
    W4A8: GroupInt4Linear.load,
}


def load_linear(linear: Linear, upload: Upload) -> NpuLinear:
    """Puts a stored linear of any scheme on the device; CheckpointError if none has a kernel."""
    load = LINEARS.get(type(linear.scheme))
    if load is None:
        raise CheckpointError(f"the npu backend has no kernel for the scheme {linear.scheme}")
    return load(linear, upload)


def _one_hot(rows: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    one_hot = torch.zeros(len(rows), inputs, dtype=dtype)
    one_hot[torch.arange(len(rows)), rows] = 1
    return one_hot
