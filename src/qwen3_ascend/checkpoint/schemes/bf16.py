"""bf16: the weight as it is, laid out for the device."""

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
    store_bias,
    with_bias,
)


@dataclass(frozen=True)
class BF16(Linear):
    """weight: bfloat16, FRACTAL_NZ of [N, K] (F.linear sees it through a transposed view)."""

    scheme: ClassVar[str] = "bf16"
    bits: ClassVar[int] = 16

    @classmethod
    def default_layout(cls) -> Layout:
        """NZ of [N, K] in strips of 16."""
        return Layout("nz", "NK", nz_columns(torch.bfloat16.itemsize))

    @classmethod
    def stored(cls, shape: LinearShape, layout: Layout, bias: bool) -> dict[str, StoredForm]:
        """See Linear.stored."""
        return {
            "weight": (torch.bfloat16, layout.storage_shape(*shape)),
            **bias_form(shape, bias),
        }

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None, layout: Layout) -> Self:
        """Rounds to bfloat16 (exact for a bfloat16 source) and packs."""
        outputs, inputs = weight.shape
        packed = layout.pack(weight.to(torch.bfloat16))
        return cls((outputs, inputs), layout, packed, store_bias(bias))

    @classmethod
    def from_tensors(
        cls, shape: LinearShape, layout: Layout, tensors: Mapping[str, Tensor]
    ) -> Self:
        """See Linear.from_tensors."""
        return cls(shape, layout, tensors["weight"], tensors.get("bias"))

    def tensors(self) -> dict[str, Tensor]:
        """See Linear.tensors."""
        return with_bias({"weight": self.weight}, self.bias)

    def matrix(self) -> Tensor:
        """The weight in plain order, bfloat16 [N, K]."""
        return self.layout.unpack(self.weight, *self.shape)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """See Linear.blocks."""
        matrix = self.matrix()
        for rows in row_slices(self.shape[0]):
            yield rows, matrix[rows].float()

    def reference(self, x: Tensor) -> Tensor:
        """float32 product of x and the stored weight."""
        return add_bias(x.float() @ self.dequantize().t(), self.bias)
