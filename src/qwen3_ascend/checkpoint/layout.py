"""FRACTAL_NZ, Ascend's private matrix layout (ACL format 29), as pure functions.

A logical matrix [*batch, rows, columns] is padded with zeros to multiples of 16 rows and C0
columns, cut into vertical strips C0 columns wide, and the strips are laid one after the other,
each row-major:

    nz[..., j // C0, i // 16, i % 16, j % C0] = nd[..., i, j]

A strip row is 32 bytes for every weight type, so C0 = 32 / element size: 32 for int8, 16 for bf16
and fp16, 8 for 4-byte words (int4 packed eight to an int32). Source: torch_npu
csrc/framework/FormatHelper.cpp (block 16, 32 bytes; batch axes copied), and the aclnnNpuFormatCast
documentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.geometry import ROW_BLOCK, STRIP_BYTES

Cut = Literal["outputs", "inputs"]
"""The axis of a linear along which it is divided: among ranks, or into pieces."""


@dataclass(frozen=True)
class Place:
    """Where an axis of a weight lies in one of the tensors that store it.

    Attributes:
        axis: of the stored tensor, counted from its end (-1 is the last).
        unit: outputs or inputs of the weight that one step along that axis holds.
    """

    axis: int
    unit: int


def nz_columns(itemsize: int) -> int:
    """C0, the strip width in elements, for elements of `itemsize` bytes (1, 2 or 4)."""
    if itemsize not in (1, 2, 4):
        raise ValueError(f"FRACTAL_NZ has no strip width for {itemsize}-byte elements")
    return STRIP_BYTES // itemsize


def nz_shape(shape: Sequence[int], c0: int) -> tuple[int, ...]:
    """Storage shape [*batch, ceil(columns / C0), ceil(rows / 16), 16, C0] of a logical shape."""
    if len(shape) < 2:
        raise ValueError(f"FRACTAL_NZ needs a matrix, not the shape {tuple(shape)}")
    *batch, rows, columns = shape
    return (*batch, -(-columns // c0), -(-rows // ROW_BLOCK), ROW_BLOCK, c0)


def nz_pack(matrix: Tensor, c0: int | None = None) -> Tensor:
    """Lays [*batch, rows, columns] out in FRACTAL_NZ.

    Args:
        matrix: any strides; elements of 1, 2 or 4 bytes.
        c0: strip width in elements; default 32 bytes' worth.

    Returns:
        Contiguous [*batch, ceil(columns / C0), ceil(rows / 16), 16, C0], padding zero.
    """
    c0 = c0 or nz_columns(matrix.element_size())
    shape = nz_shape(matrix.shape, c0)
    *batch, strips, row_blocks, _, _ = shape
    rows, columns = matrix.shape[-2:]
    padded_rows = row_blocks * ROW_BLOCK
    if matrix.stride(-2) == 1:
        return _pack_columns(matrix, (*batch, strips, padded_rows, c0)).view(shape)
    if (rows, columns) != (padded_rows, strips * c0):
        padded = matrix.new_zeros((*batch, padded_rows, strips * c0))
        padded[..., :rows, :columns] = matrix
        matrix = padded
    by_strip = matrix.reshape(*batch, padded_rows, strips, c0).transpose(-3, -2)
    return by_strip.contiguous().view(shape)


def _pack_columns(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Strips [*batch, N1, rows, C0] of a matrix whose columns are contiguous, as those of a
    transposed weight are: a column at a time, several times as fast as row by row."""
    found, c0 = matrix.new_zeros(tuple(shape)), shape[-1]
    for column in range(min(c0, matrix.shape[-1])):
        columns = matrix[..., column::c0].transpose(-2, -1)
        found[..., : columns.shape[-2], : columns.shape[-1], column] = columns
    return found


def nz_unpack(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """Reads FRACTAL_NZ [*batch, N1, M1, 16, C0] back as contiguous [*batch, rows, columns]."""
    if blocks.shape[-4:] != nz_shape((rows, columns), blocks.shape[-1])[-4:]:
        raise ValueError(f"blocks {tuple(blocks.shape)} do not hold a [{rows}, {columns}] matrix")
    matrices = blocks.new_empty((*blocks.shape[:-4], rows, columns))
    kernels = native.best()
    for strips, matrix in zip(_each(blocks, 4), _each(matrices, 2), strict=True):
        kernels.unpack_nz_rows(strips.view(torch.int8), matrix.view(torch.int8))  # as bytes
    return matrices


def _each(tensor: Tensor, dimensions: int) -> Tensor:
    """A tensor's parts of so many dimensions, one after the other."""
    return tensor.reshape(-1, *tensor.shape[-dimensions:])


WORDS = {2: torch.int8, 4: torch.int16, 8: torch.int32}
"""The type of a word by the int4 codes that it holds."""


def pack_words(codes: Tensor, per_word: int) -> Tensor:
    """Puts `per_word` int4 codes into each word, the first one in the lowest bits.

    A longer word has the bytes of as many short ones, so the bytes do not depend on its length.

    Args:
        codes: int8 [..., columns]; each from -8 to 7.
        per_word: 2, 4 or 8; see WORDS.

    Returns:
        [..., ceil(columns / per_word)] of WORDS[per_word]; missing codes are 0.
    """
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word))
    fields = padded.view(torch.uint8) & 15
    pairs: Tensor = fields[..., 0::2] | fields[..., 1::2] << 4
    # Flat, because of a tensor with an axis of one torch may keep other strides.
    return pairs.flatten().view(WORDS[per_word]).view(*pairs.shape[:-1], -1)


def unpack_words(words: Tensor, columns: int) -> Tensor:
    """The codes, int8 [..., columns], of words that `pack_words` made."""
    pairs = words.flatten().view(torch.int8).view(*words.shape[:-1], -1)
    # The signed shift down fills in the sign.
    codes = torch.stack(((pairs << 4) >> 4, pairs >> 4), dim=-1)
    return codes.flatten(-2)[..., :columns].contiguous()


@dataclass(frozen=True)
class Layout:
    """How a weight, logically [*batch, N, K] (outputs, inputs), lies in storage.

    The batch axes (such as experts) stay in front, unchanged.

    Attributes:
        format: "nz", or "nd" for plain row-major.
        nz_of: which matrix is stored: "KN" (the contiguous transpose, what npu_quant_matmul reads
            on A2/A3) or "NK" (the weight as it is, what F.linear reads).
            The hardware does not reject a wrong orientation, so every holder states it.
        c0: strip width in stored words; 0 for "nd".
        per_word: neighbouring columns of the stored matrix in one stored word: 1, or for int4 codes
            2 to an int8, 4 to an int16 or 8 to an int32.
    """

    format: Literal["nz", "nd"]
    nz_of: Literal["KN", "NK"] = "NK"
    c0: int = 0
    per_word: int = 1

    def __post_init__(self) -> None:
        if (self.format == "nz") != (self.c0 > 0):
            raise ValueError(f"{self}: a strip width belongs to nz, and only to nz")
        if self.per_word not in (1, *WORDS):
            raise ValueError(f"{self}: a word holds 1, 2, 4 or 8 codes")

    @property
    def code_type(self) -> torch.dtype:
        """The type of a stored tensor of integer codes."""
        return WORDS.get(self.per_word, torch.int8)

    def storage_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the stored tensor, in words, of a logical [*batch, N, K] weight."""
        *batch, outputs, inputs = shape
        rows, columns = (inputs, outputs) if self.nz_of == "KN" else (outputs, inputs)
        words = -(-columns // self.per_word)
        if self.format == "nd":
            return (*batch, rows, words)
        return nz_shape((*batch, rows, words), self.c0)

    def pack(self, weight: Tensor) -> Tensor:
        """Stores a logical [*batch, N, K] weight; codes narrower than a word must be int8."""
        matrix = weight.transpose(-2, -1) if self.nz_of == "KN" else weight
        if self.per_word > 1:
            matrix = pack_words(matrix, self.per_word)
        return matrix.contiguous() if self.format == "nd" else nz_pack(matrix, self.c0)

    def unpack(self, stored: Tensor, shape: Sequence[int]) -> Tensor:
        """The logical weight, contiguous, of a stored tensor; `shape` is its [*batch, N, K]."""
        *_, outputs, inputs = shape
        rows, columns = (inputs, outputs) if self.nz_of == "KN" else (outputs, inputs)
        words = -(-columns // self.per_word)
        matrix = stored if self.format == "nd" else nz_unpack(stored, rows, words)
        if self.per_word > 1:
            matrix = unpack_words(matrix, columns)
        return matrix.transpose(-2, -1).contiguous() if self.nz_of == "KN" else matrix

    def output_sums(self, stored: Tensor, shape: Sequence[int]) -> Tensor:
        """The sum of the codes of each output, int32 [*batch, N], of a stored weight [*batch, N, K]
        with one code a word: nothing is unpacked, since padding is zero."""
        if self.per_word > 1:
            raise ValueError(f"{self}: codes that share a word cannot be summed as they lie")
        inputs = self.place("inputs").axis
        if self.format == "nd":
            return stored.sum(inputs, dtype=torch.int32)
        within = -1 if inputs == -4 else -2
        return stored.sum((inputs, within), dtype=torch.int32).flatten(-2)[..., : shape[-2]]

    def place(self, cut: Cut) -> Place:
        """Where the axis that a cut divides lies in the stored tensor."""
        along_columns = (self.nz_of == "KN") == (cut == "outputs")
        if self.format == "nd":
            return Place(-1, self.per_word) if along_columns else Place(-2, 1)
        return Place(-4, self.c0 * self.per_word) if along_columns else Place(-3, ROW_BLOCK)


ND = Layout("nd")
"""Plain row-major [N, K]."""
