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
from typing import Any, Literal

from torch import Tensor

from qwen3_ascend.errors import CheckpointError

ROW_BLOCK = 16
"""Rows of a fractal (M0), the same for every type."""

STRIP_BYTES = 32
"""Bytes of one row of a strip."""

Cut = Literal["outputs", "inputs"]
"""The axis of a linear that tensor parallelism divides among the ranks."""


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
    if (rows, columns) != (padded_rows, strips * c0):
        padded = matrix.new_zeros((*batch, padded_rows, strips * c0))
        padded[..., :rows, :columns] = matrix
        matrix = padded
    by_strip = matrix.reshape(*batch, padded_rows, strips, c0).transpose(-3, -2)
    return by_strip.contiguous().view(shape)


def nz_unpack(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """Reads FRACTAL_NZ [*batch, N1, M1, 16, C0] back as contiguous [*batch, rows, columns]."""
    if blocks.shape[-4:] != nz_shape((rows, columns), blocks.shape[-1])[-4:]:
        raise ValueError(f"blocks {tuple(blocks.shape)} do not hold a [{rows}, {columns}] matrix")
    by_row = blocks.flatten(-3, -2).transpose(-3, -2)
    return by_row.flatten(-2, -1)[..., :rows, :columns].contiguous()


@dataclass(frozen=True)
class Layout:
    """How the bytes of a linear's weight, logically [N, K] (outputs, inputs), lie in storage.

    Attributes:
        format: "nz", or "nd" for plain row-major.
        nz_of: which matrix is tiled: "KN" (the contiguous transpose, what npu_quant_matmul reads
            on A2/A3) or "NK" (the weight as it is, what F.linear reads). "NK" for "nd".
            The hardware does not reject a wrong orientation, so every holder states it.
        c0: strip width in stored elements; 0 for "nd".
    """

    format: Literal["nz", "nd"]
    nz_of: Literal["KN", "NK"] = "NK"
    c0: int = 0

    def __post_init__(self) -> None:
        if (self.format == "nz") != (self.c0 > 0):
            raise ValueError(f"{self}: a strip width belongs to nz, and only to nz")
        if self.format == "nd" and self.nz_of != "NK":
            raise ValueError(f"{self}: a plain layout is always [N, K]")

    def storage_shape(self, outputs: int, inputs: int) -> tuple[int, ...]:
        """Shape of the stored tensor of a logical [N, K] weight."""
        if self.format == "nd":
            return (outputs, inputs)
        matrix = (inputs, outputs) if self.nz_of == "KN" else (outputs, inputs)
        return nz_shape(matrix, self.c0)

    def pack(self, weight: Tensor) -> Tensor:
        """Stores a logical [N, K] weight."""
        if self.format == "nd":
            return weight.contiguous()
        return nz_pack(weight.t() if self.nz_of == "KN" else weight, self.c0)

    def unpack(self, stored: Tensor, outputs: int, inputs: int) -> Tensor:
        """The logical [N, K] weight, contiguous, of a stored tensor."""
        if self.format == "nd":
            return stored
        if self.nz_of == "KN":
            return nz_unpack(stored, inputs, outputs).t().contiguous()
        return nz_unpack(stored, outputs, inputs)

    def cut_axis(self, cut: Cut) -> tuple[int, int]:
        """The storage axis that a tensor-parallel cut divides, and its unit in logical rows.

        A shard must begin and end on a multiple of the unit, or it would need repacking.
        """
        along_strips = (self.nz_of == "KN") == (cut == "outputs")
        if self.format == "nd":
            return (0, 1) if cut == "outputs" else (1, 1)
        return (0, self.c0) if along_strips else (1, ROW_BLOCK)

    def to_json(self) -> dict[str, Any]:
        """The manifest's form."""
        if self.format == "nd":
            return {"format": "nd"}
        return {"format": "nz", "nz_of": self.nz_of, "c0": self.c0}

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """Reads the manifest's form; CheckpointError if it is not one."""
        try:
            if data["format"] == "nd":
                return cls("nd")
            if data["nz_of"] not in ("KN", "NK") or not isinstance(data["c0"], int):
                raise ValueError(data)
            return cls("nz", data["nz_of"], data["c0"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the manifest holds an unknown layout {data!r}") from error


ND = Layout("nd")
"""Plain row-major [N, K]."""
