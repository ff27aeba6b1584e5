"""Index by index, one number at a time: what the kernels are defined to compute."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LANES = 8


def to_bfloat16(value: np.float32) -> np.float32:
    """Round to nearest even, kept as float32."""
    bits = int(np.float32(value).view(np.uint32))
    kept, dropped = bits >> 16, bits & 0xFFFF
    kept += dropped > 0x8000 or (dropped == 0x8000 and kept & 1 == 1)
    return np.uint32(kept << 16).view(np.float32)


def channel_scale(row: NDArray[np.float32]) -> np.float32:
    scale = to_bfloat16(np.float32(np.abs(row).max(initial=0)) / np.float32(127))
    return np.float32(1) if scale == 0 else scale


def code(weight: np.float32, scale: np.float32) -> int:
    return int(min(127, max(-128, np.rint(np.float32(weight / scale)))))


def lane_sum(terms: list[float]) -> float:
    lanes = [0.0] * LANES
    for column, term in enumerate(terms):
        lanes[column % LANES] += term
    for half in (4, 2, 1):
        for lane in range(half):
            lanes[lane] += lanes[lane + half]
    return lanes[0]


def quantize(
    source: NDArray[np.float32],
) -> tuple[NDArray[np.int8], list[float], list[float], list[float]]:
    """strips as flat bytes, scales, signal, noise."""
    rows, columns = source.shape
    padded = -(-columns // 16) * 16
    strips = np.zeros(-(-rows // 32) * padded * 32, np.int8)
    scales, signal, noise = [], [], []
    for n in range(rows):
        scale = channel_scale(source[n])
        codes = [code(weight, scale) for weight in source[n]]
        for k in range(columns):
            strips[(n // 32) * padded * 32 + k * 32 + n % 32] = codes[k]
        weights = [float(weight) for weight in source[n]]
        errors = [w - c * float(scale) for w, c in zip(weights, codes, strict=True)]
        scales.append(float(scale))
        signal.append(lane_sum([w * w for w in weights]))
        noise.append(lane_sum([e * e for e in errors]))
    return strips, scales, signal, noise


def widest(group: list[np.float32], least: int, most: int) -> np.float32:
    """The scale under which nothing is clipped, before it is rounded."""
    largest = max(group, key=abs, default=np.float32(0))  # the first of several
    return np.float32(
        abs(largest) / np.float32(most) if -least <= most else largest / np.float32(least)
    )


def search_error(
    group: list[np.float32], importance: list[np.float32], scale: np.float32, least: int, most: int
) -> float:
    """What a scale leaves: each step in float32, the sum in float64."""
    inverse, terms = np.float32(1) / scale, []
    for weight, counts in zip(group, importance, strict=True):
        code = np.float32(np.rint(min(max(weight * inverse, np.float32(least)), np.float32(most))))
        error = code * scale - weight
        terms.append(float(error * error * counts))
    return lane_sum(terms)


def search_scales(
    source: NDArray[np.float32],
    importance: NDArray[np.float32],
    width: int,
    integers: tuple[int, int],
    ratios: list[float],
) -> list[list[float]]:
    """The scale of each group of each row."""
    found: list[list[float]] = []
    for row in source:
        found.append([])
        for start in range(0, len(row), width):
            group, counts = [*row[start : start + width]], [*importance[start : start + width]]
            base = widest(group, *integers)
            best, least = to_bfloat16(base) or np.float32(1), float("inf")
            for ratio in ratios if abs(base) >= 2.0**-100 else []:
                scale = to_bfloat16(base * np.float32(ratio)) or np.float32(1)
                error = search_error(group, counts, scale, *integers)
                if error < least:
                    best, least = scale, error
            found[-1].append(float(best))
    return found


def pack(matrix: NDArray[np.generic], width: int) -> NDArray[np.generic]:
    """The offset formula of FRACTAL_NZ; `width` is C0."""
    rows, columns = matrix.shape
    padded = -(-rows // 16) * 16
    strips = np.zeros(-(-columns // width) * padded * width, matrix.dtype)
    for i in range(rows):
        for j in range(columns):
            strips[(j // width) * padded * width + i * width + j % width] = matrix[i, j]
    return strips
