"""Sources that reach the corners of the number formats, and outputs filled with garbage."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.native.library import LIBRARY, PATHS

BITS = {
    torch.bfloat16: (np.uint16, torch.int16, 0x7F80),
    torch.float16: (np.uint16, torch.int16, 0x7C00),
    torch.float32: (np.uint32, torch.int32, 0x7F800000),
}
FLAVOURS = ("normal", "bits", "subnormal", "zero rows", "largest", "ties", "tiny rows")


@dataclass
class Codes:
    """The outputs of quantize_w8a8_nz."""

    strips: Tensor
    scales: Tensor
    signal: Tensor
    noise: Tensor

    @classmethod
    def garbage(cls, rows: int, columns: int) -> Codes:
        shape = (-(-rows // 32), -(-columns // 16), 16, 32)
        doubles = [torch.full((rows,), -7.0, dtype=torch.float64) for _ in range(2)]
        return cls(torch.full(shape, 77, dtype=torch.int8), torch.full((rows,), -7.0), *doubles)

    def equals(self, other: Codes) -> bool:
        return all(torch.equal(a, b) for a, b in zip(astuple(self), astuple(other), strict=True))


def make_source(flavour: str, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """A finite [rows, columns] source; each flavour reaches another corner."""
    rows, columns = shape
    generator = np.random.default_rng(seed)
    if flavour in ("bits", "subnormal", "largest"):
        return _random_bits(flavour, rows, columns, dtype, generator)
    weights = torch.from_numpy(generator.standard_normal((rows, columns)).astype(np.float32)) * 0.02
    if flavour == "zero rows":
        weights[torch.from_numpy(generator.random(rows) < 0.5)] = 0
    if flavour == "ties":  # scale is 1 or 2: quotients end in .0 and .5
        weights = torch.from_numpy(generator.integers(-254, 255, (rows, columns)) / 2).float()
        weights[:, 0] = 127.0 * torch.from_numpy(generator.integers(1, 3, rows)).float()
    if flavour == "tiny rows":  # scales around the smallest bfloat16: zero, subnormal, clipping
        exponents = torch.from_numpy(generator.integers(-134, -120, (rows, 1))).double()
        weights = (weights.double() / 0.02 * 2.0**exponents).float()
    return weights.to(dtype)


def _random_bits(
    flavour: str, rows: int, columns: int, dtype: torch.dtype, generator: np.random.Generator
) -> Tensor:
    unsigned, signed, infinity = BITS[dtype]
    smallest_normal = infinity & -infinity
    ranges = {
        "bits": (0, infinity),
        "subnormal": (0, smallest_normal),
        "largest": (infinity - 3, infinity),
    }
    magnitudes = generator.integers(*ranges[flavour], (rows, columns)).astype(unsigned)
    signs = generator.integers(0, 2, (rows, columns)).astype(unsigned)
    bits = magnitudes | signs << unsigned(8 * magnitudes.itemsize - 1)
    return torch.from_numpy(bits).view(signed).view(dtype)


def strided(source: Tensor, gap: int) -> Tensor:
    """The same values with `gap` garbage elements after every row."""
    wide = torch.full((source.shape[0], source.shape[1] + gap), float("nan")).to(source.dtype)
    wide[:, : source.shape[1]] = source
    return wide[:, : source.shape[1]]


def runnable_paths() -> list[str]:
    """The processor paths of the compiled library that this processor can run."""
    return [name for name in PATHS if LIBRARY.exists() and native.load(name) is not None]


def runnable_kernels() -> list[native.Kernels]:
    """The compiled kernels of each of those paths."""
    loaded = (native.load(name) for name in runnable_paths())
    return [kernels for kernels in loaded if kernels is not None]
