"""One weight of a checkpoint on its way into another format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.architecture import ROUTER, LinearSpec, Spec
from qwen3_ascend.checkpoint.layout import Layout
from qwen3_ascend.checkpoint.linear import BIAS, Linear
from qwen3_ascend.checkpoint.schemes import Scheme
from qwen3_ascend.checkpoint.schemes.base import TEMPORARY_BYTES
from qwen3_ascend.errors import OptionError
from qwen3_ascend.files.safetensors import Form
from qwen3_ascend.geometry import STRIP_BYTES

PIECE_WEIGHTS = 1 << 20
"""Weights of a piece: with what they become still within a core's share of the cache."""


class Expression(Protocol):
    """How a format states the weights of one scheme: plain tensors with the outputs in front, but
    for those that belong to all outputs together."""

    @property
    def is_quantized(self) -> bool:
        """Whether an engine multiplies with codes."""

    @property
    def undivided(self) -> tuple[str, ...]:
        """Suffixes of the tensors that belong to all outputs together."""

    @property
    def shared(self) -> Mapping[str, int]:
        """How many outputs share a row of a tensor, by suffix, where it is more than one."""

    def keeping_scales(self) -> Expression:
        """The same for scales that bfloat16 may not have."""

    def forms(self, shape: Sequence[int]) -> dict[str, Form]:
        """The tensors of a weight [N, K], by suffix."""

    def tensors(self, linear: Linear) -> dict[str, Tensor]:
        """Those tensors of a stored linear; its bias, which no format changes, is none of them.

        Raises:
            ValueError: if the format has no words for a value.
        """

    def constants(self, shape: Sequence[int]) -> dict[str, Tensor]:
        """Further tensors of a weight [N, K], which its shape alone decides."""


Parts = tuple[tuple[str, int], ...]
"""Linears of Hugging Face that are fused, each with its outputs, in their order."""


def slices(parts: Parts, start: int, stop: int) -> Iterator[tuple[str, slice]]:
    """Each part that has outputs in [start, stop), and where they lie in that range."""
    row = 0
    for source, rows in parts:
        first, last = max(start, row), min(stop, row + rows)
        if first < last:
            yield source, slice(first - start, last - start)
        row += rows


@dataclass(frozen=True)
class ExportItem:
    """A stored linear or plain tensor, and what it becomes.

    A plain tensor such as "model.norm.weight" is exported as the bfloat16 linear "model.norm", of
    one output if it is a vector; only its form stays its own.

    Attributes:
        spec: what it is in the model.
        scheme, layout: in which it is stored.
        expression: how the format states that.
        source_bytes: of its stored tensors.
    """

    spec: Spec
    scheme: Scheme
    layout: Layout
    expression: Expression
    source_bytes: int

    @property
    def name(self) -> str:
        """Name of the linear or tensor in the checkpoint."""
        return self.spec.name

    @property
    def is_linear(self) -> bool:
        """Whether engines make a linear of it."""
        return isinstance(self.spec, LinearSpec) or self.name.endswith(f".mlp.{ROUTER}")

    @property
    def experts(self) -> int:
        """How many linears are stored as one; 0 for what is stored by itself."""
        return self.spec.experts if isinstance(self.spec, LinearSpec) else 0

    @property
    def matrix(self) -> tuple[int, int]:
        """Its logical shape (N, K)."""
        rows, columns = (1, *self.spec.shape)[-2:]
        return rows, columns

    @property
    def matrices(self) -> tuple[Parts, ...]:
        """Of each of its matrices the linears of Hugging Face that it is fused of."""
        if isinstance(self.spec, LinearSpec):
            rows = self.spec.parts
            return tuple(tuple(zip(s, rows, strict=True)) for s in self.spec.matrices)
        return (((self.name.removesuffix(".weight"), self.matrix[0]),),)

    @property
    def parts(self) -> Parts:
        """Those of all matrices."""
        return tuple(part for parts in self.matrices for part in parts)

    @property
    def forms(self) -> dict[str, Form]:
        """The form of each tensor that it becomes, by full name."""
        if not isinstance(self.spec, LinearSpec):
            (form,) = self.expression.forms(self.matrix).values()
            return {self.name: replace(form, shape=self.spec.shape)}
        found: dict[str, Form] = {}
        for source, rows in self.parts:
            shape = (rows, self.spec.inputs)
            forms = self.expression.forms(shape)
            for suffix, tensor in self.expression.constants(shape).items():
                forms[suffix] = Form(tensor.dtype, tuple(tensor.shape))
            if self.spec.bias:
                forms[BIAS] = Form(torch.bfloat16, (rows,))
            found |= {f"{source}.{suffix}": form for suffix, form in forms.items()}
        return found

    def tensors(self, piece: Linear) -> dict[str, Tensor]:
        """What some outputs become, by suffix; OptionError if the format cannot state a value."""
        try:
            tensors = self.expression.tensors(piece)
        except ValueError as error:
            raise OptionError(f"{self.name} cannot be exported in this format: {error}") from error
        return tensors if piece.bias is None else {**tensors, BIAS: piece.bias}

    def rows(self, suffix: str, outputs: slice) -> slice:
        """The rows of a tensor that belong to some outputs of a part."""
        share = self.expression.shared.get(suffix, 1)
        return slice(outputs.start // share, -(-outputs.stop // share))

    @property
    def piece_outputs(self) -> int:
        """Outputs that are made at a time; no fewer than a block of any layout holds."""
        return max(STRIP_BYTES, PIECE_WEIGHTS // self.matrix[1])

    @property
    def piece_bytes(self) -> int:
        """Most memory that a piece takes while it is under way."""
        return min(self.piece_outputs, self.matrix[0]) * self.matrix[1] * TEMPORARY_BYTES
