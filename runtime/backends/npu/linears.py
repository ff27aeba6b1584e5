"""Linears on the device: one kernel for bf16, one for w8a8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from qwen3_ascend.checkpoint.layout import Layout
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import BF16, W8A8
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.runtime.backends.base import Activation

Upload = Callable[[Tensor, Layout, int, int], Tensor]
"""(stored weight, layout, N, K) -> device tensor; see formats.upload_packed."""


@dataclass(frozen=True)
class QuantizedActivation:
    """codes: int8 [T, K]; scale: float32 [T]."""

    codes: Tensor
    scale: Tensor


class DenseLinear:
    """bf16: F.linear reads [N, K], in FRACTAL_NZ, through its own transposed view."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    @classmethod
    def load(cls, linear: Linear, upload: Upload) -> DenseLinear:
        """Puts a stored linear on the device."""
        weight = upload(linear.weight, linear.layout, *linear.shape[-2:])
        return cls(weight, None if linear.bias is None else linear.bias.to("npu"))

    def prepare(self, x: Tensor) -> Tensor:
        """See DeviceLinear."""
        return x

    def __call__(self, x: Activation) -> Tensor:
        """See DeviceLinear."""
        return F.linear(x, self.weight, self.bias)


class Int8Linear:
    """w8a8: npu_quant_matmul reads the contiguous [K, N], in FRACTAL_NZ."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.weight, self.scale, self.bias = weight, scale, bias

    @classmethod
    def load(cls, linear: Linear, upload: Upload) -> Int8Linear:
        """Puts a stored linear on the device."""
        weight = upload(linear.weight, linear.layout, *linear.shape[-2:])
        if linear.layout.format == "nd":
            weight = weight.t()
        bias = None if linear.bias is None else linear.bias.to("npu")
        return cls(weight, linear.tensors["scale"].to("npu"), bias)

    def prepare(self, x: Tensor) -> QuantizedActivation:
        """See DeviceLinear."""
        return QuantizedActivation(*torch_npu.npu_dynamic_quant(x))

    def __call__(self, x: Activation) -> Tensor:
        """See DeviceLinear."""
        quantized = x if isinstance(x, QuantizedActivation) else self.prepare(x)
        y: Tensor = torch_npu.npu_quant_matmul(
            quantized.codes,
            self.weight,
            self.scale,
            pertoken_scale=quantized.scale,
            bias=self.bias,
            output_dtype=torch.bfloat16,
        )
        return y

    def integer_rows(self, rows: Tensor) -> Tensor:
        """Rows [R, N] of the integer weight [K, N], as the kernel itself reads them.

        A one-hot activation picks one row; with scales of 1 the bf16 result is the code itself,
        which bf16 holds exactly.
        """
        inputs, outputs = self.weight.shape
        one_hot = torch.zeros(len(rows), inputs, dtype=torch.int8)
        one_hot[torch.arange(len(rows)), rows] = 1
        ones = torch.ones(max(outputs, len(rows)))
        y: Tensor = torch_npu.npu_quant_matmul(
            one_hot.to("npu"),
            self.weight,
            ones[:outputs].to("npu"),
            pertoken_scale=ones[: len(rows)].to("npu"),
            output_dtype=torch.bfloat16,
        )
        return y.cpu().to(torch.int8)


NpuLinear = DenseLinear | Int8Linear


def load_linear(linear: Linear, upload: Upload) -> NpuLinear:
    """Puts a stored linear of any scheme on the device; CheckpointError if none has a kernel."""
    if isinstance(linear.scheme, BF16):
        return DenseLinear.load(linear, upload)
    if isinstance(linear.scheme, W8A8):
        return Int8Linear.load(linear, upload)
    raise CheckpointError(f"the npu backend has no kernel for the scheme {linear.scheme}")
