"""FRACTAL_NZ (format 29) by its index formula, independent of the package under test.

The logical [*B, K, N] is stored as [*B, ceil(N/C0), ceil(K/16), 16, C0], zero padded, so that
element (i, j) lies at (j // C0, i // 16, i % 16, j % C0): vertical strips C0 wide, each row-major.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FORMAT = 29
ROWS = 16
STRIP_BYTES = 32

# A planted fault: a device whose tiles are transposed, to prove that a loader's self-check looks.
transposed_tiles = False


def strip_columns(dtype: torch.dtype) -> int:
    """C0 of torch_npu: 32 bytes wide, with elements of four bytes counted as two."""
    return STRIP_BYTES // min(dtype.itemsize, 2)


def storage_shape(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    *batch, rows, columns = shape
    width = strip_columns(dtype)
    return (*batch, -(-columns // width), -(-rows // ROWS), ROWS, width)


def pack(matrix: torch.Tensor, width: int) -> torch.Tensor:
    import torch

    *batch, rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % width, 0, -rows % ROWS))
    tiles = padded.reshape(*batch, -(-rows // ROWS), ROWS, -(-columns // width), width)
    ordered = tiles.movedim(-2, -4)
    if transposed_tiles:
        ordered = ordered.mT.reshape(ordered.shape)
    return ordered.contiguous()


def unpack(blocks: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    *batch, strips, row_blocks, _, width = blocks.shape
    if transposed_tiles:
        blocks = blocks.reshape(*blocks.shape[:-2], width, ROWS).mT
    matrix = blocks.movedim(-4, -2).reshape(*batch, row_blocks * ROWS, strips * width)
    return matrix[..., :rows, :columns].contiguous()
