"""Linears that a source holds as float8 codes: decoded, since no kernel of A2 and A3 reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from qwen3_ascend.checkpoint.layout import Layout
from qwen3_ascend.checkpoint.schemes import Scheme
from qwen3_ascend.checkpoint.schemes.pieces import Stack
from qwen3_ascend.convert import exchange
from qwen3_ascend.convert.decoded import DECODED, ScaledBlocks
from qwen3_ascend.convert.encodings import FLOATS, Encoding, Read, check_coded, require_scales
from qwen3_ascend.convert.weights import ChosenWeights, Weights
from qwen3_ascend.files.safetensors import TensorSlot

LARGEST_CODE = torch.finfo(exchange.FP8_TYPE).max

DECODING_BYTES = 10
"""Memory for each weight of a piece that is decoded: its scale and its code in float32, and what
comes of them in bfloat16."""


@dataclass(frozen=True)
class Fp8Encoding(Encoding):
    """weight: float8_e4m3fn [N, K]; scales: a float for each block of it.

    Attributes:
        said: the place of the source that says so, for errors.
        scale: suffix of the scales, [ceil(N / rows), ceil(K / columns)].
        rows, columns: of a block, None if it is as long as the weight; one at the edge may be
            smaller.
    """

    said: str
    scale: str
    rows: int | None
    columns: int | None
    scheme: None = None

    @property
    @override
    def kind(self) -> str:
        return f"fp8 with a scale for {self.shared}"

    @property
    def shared(self) -> str:
        """What has a scale of its own."""
        if self.rows is None:
            return "the whole"
        if self.columns is None:
            return "each output"
        return f"each block of {self.rows} x {self.columns}"

    @property
    @override
    def known(self) -> tuple[str, ...]:
        return (exchange.WEIGHT, self.scale)

    @override
    def suffixes(
        self, linear: str, shape: tuple[int, int], slots: Mapping[str, TensorSlot]
    ) -> tuple[str, ...]:
        said = f"{self.said} says {self.kind}"
        check_coded(f"{linear}.{exchange.WEIGHT}", [exchange.FP8_TYPE], [shape], slots, said)
        rows, columns = self._block(shape)
        grid = (-(-shape[0] // rows), -(-shape[1] // columns))
        shapes = [grid, *(grid[:axes] for axes in range(2) if grid[axes:] == (1,) * (2 - axes))]
        check_coded(f"{linear}.{self.scale}", FLOATS, shapes, slots, said)
        return self.known

    @override
    def weights(self, parts: Mapping[str, Read]) -> Weights:
        return ChosenWeights(Stack(tuple(self._matrix(part, read) for part, read in parts.items())))

    @override
    def temporary_bytes(self, scheme: Scheme, layout: Layout, itemsize: int) -> int:
        return DECODING_BYTES + scheme.temporary_bytes(layout, DECODED.itemsize)

    def _matrix(self, linear: str, read: Read) -> ScaledBlocks:
        codes, scales = read[exchange.WEIGHT], read[self.scale]
        require_scales(f"{linear}.{self.scale}", scales, LARGEST_CODE)
        rows, columns = self._block((codes.shape[0], codes.shape[1]))
        grid = scales.float().view(-(-codes.shape[0] // rows), -1)
        return ScaledBlocks(codes, grid, (rows, columns))

    def _block(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self.rows or shape[0], self.columns or shape[1]
