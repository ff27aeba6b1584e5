"""The kernels in torch: the readable definition of every byte, and what runs without a compiler.

Works through blocks of at most a quarter of a million weights, so that the temporaries (float64 for
the error sums) stay near ten megabytes whatever the matrix. Expects torch's default float mode:
with torch.set_flush_denormal(True) subnormal weights differ from the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.geometry import ROW_BLOCK, STRIP_BYTES
from qwen3_ascend.native.butterflies import changed, rotate_outputs
from qwen3_ascend.native.kernels import (
    FLOATS,
    LEAST_SEARCHED,
    NotFinite,
    check_block,
    check_change,
    check_codes,
    check_matrix,
    check_outputs,
    check_pack,
    check_rounded,
    check_search,
    check_square_sums,
    lane_sums,
)
from qwen3_ascend.native.rows import Rows, Steps

BLOCK_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class TorchKernels:
    """Implements `Kernels`."""

    def check_finite(self, source: Tensor) -> None:
        """See Kernels."""
        check_matrix(source, FLOATS)
        for start, stop in _blocks(source, 1):
            _check_finite(source[start:stop], start)

    def quantize_w8a8_nz(
        self,
        source: Tensor,
        strips: Tensor,
        scales: Tensor,
        signal: Tensor,
        noise: Tensor,
        steps: Steps = (),
    ) -> None:
        check_codes(source, strips, scales, signal, noise, steps)
        for start, stop in _blocks(source, STRIP_BYTES):
            weights = _changed(source, steps, start, stop)
            _check_finite(weights, start)
            scales[start:stop] = _channel_scales(weights)
            codes = (weights / scales[start:stop, None]).round_().clamp_(-128, 127)
            _store_codes(codes.to(torch.int8), _strips_of(strips, start, stop))
            _store_sums(weights, codes, scales[start:stop], signal[start:stop], noise[start:stop])

    def error_w8a8_nz(
        self, source: Tensor, strips: Tensor, scales: Tensor, signal: Tensor, noise: Tensor
    ) -> None:
        check_codes(source, strips, scales, signal, noise)
        for start, stop in _blocks(source, STRIP_BYTES):
            weights = source[start:stop].float()
            codes = _strips_of(strips, start, stop).flatten(1, 2).transpose(1, 2).flatten(0, 1)
            codes = codes[: stop - start, : source.shape[1]]
            _store_sums(weights, codes, scales[start:stop], signal[start:stop], noise[start:stop])

    def pack_nz_rows(self, source: Tensor, strips: Tensor, check_finite: bool = True) -> None:
        check_pack(source, strips)
        for start, stop in _blocks(source, ROW_BLOCK):
            rows = source[start:stop].to(strips.dtype)
            if check_finite and rows.dtype.is_floating_point:
                _check_finite(rows, start)
            groups = strips[:, start // ROW_BLOCK : -(-stop // ROW_BLOCK)]
            width = groups.shape[3]
            padded = rows.new_zeros(groups.shape[1] * ROW_BLOCK, groups.shape[0] * width)
            padded[: rows.shape[0], : rows.shape[1]] = rows
            runs = padded.view(groups.shape[1], ROW_BLOCK, groups.shape[0], width)
            groups.copy_(runs.permute(2, 0, 1, 3))

    def unpack_nz_rows(self, strips: Tensor, destination: Tensor) -> None:
        check_pack(destination, strips)
        if strips.dtype != destination.dtype:
            raise ValueError(f"unpacking keeps {strips.dtype}, not {destination.dtype}")
        for start, stop in _blocks(destination, ROW_BLOCK):
            groups = strips[:, start // ROW_BLOCK : -(-stop // ROW_BLOCK)]
            rows = groups.permute(1, 2, 0, 3).flatten(2, 3).flatten(0, 1)
            destination[start:stop] = rows[: stop - start, : destination.shape[1]]

    def search_scales(
        self,
        source: Tensor,
        importance: Tensor,
        width: int,
        integers: tuple[int, int],
        ratios: Tensor,
        scales: Tensor,
    ) -> None:
        check_search(source, importance, width, ratios, scales)
        padding = (0, -source.shape[1] % width)
        counts = torch.nn.functional.pad(importance, padding).view(-1, width)
        for start, stop in _blocks(source, 1):
            rows = torch.nn.functional.pad(source[start:stop], padding)
            groups = rows.view(stop - start, -1, width)
            scales[start:stop] = _search(groups, counts, integers, ratios)

    def compensate_block(
        self,
        weights: Tensor,
        scales: Tensor,
        factor: Tensor,
        integers: tuple[int, int],
        codes: Tensor,
        errors: Tensor,
    ) -> None:
        check_block(weights, scales, factor, codes, errors)
        errors.copy_(weights)
        for column, step in enumerate(scales.unbind(1)):
            weight = errors[:, column]
            code = (weight / step).clamp_(*integers).round_()
            codes[:, column] = code
            weight.sub_(code * step).div_(factor[column, column])
            errors[:, column + 1 :] -= weight[:, None] * factor[column, column + 1 :]

    def change_rows(self, source: Tensor, steps: Steps, out: Tensor) -> None:
        check_change(source, steps, out)
        for start, stop in _blocks(source, 1):
            out[start:stop] = _changed(source, steps, start, stop)

    def rotate_outputs(self, source: Tensor, signs: Tensor, base: Tensor, out: Tensor) -> None:
        check_outputs(source, signs, base, out)
        rotate_outputs(source, signs, base, out)

    def square_sums(self, source: Tensor, axis: int, sums: Tensor) -> None:
        check_square_sums(source, axis, sums)
        lines = source if axis == 0 else source.t()
        step = max(1, BLOCK_WEIGHTS // max(1, lines.shape[1]))
        for start in range(0, len(lines), step):
            squares = lines[start : start + step].double().square_()
            sums[start : start + step] = lane_sums(squares.contiguous())

    def error_bf16(self, source: Tensor, stored: Tensor, signal: Tensor, noise: Tensor) -> None:
        check_rounded(source, stored, signal, noise)
        for start, stop in _blocks(source, 1):
            exact = source[start:stop].double()
            signal[start:stop] = lane_sums(exact.square())
            noise[start:stop] = lane_sums(exact.sub_(stored[start:stop].double()).square_())

    def round_rows(
        self, source: Tensor, stored: Tensor, signal: Tensor, noise: Tensor, steps: Steps = ()
    ) -> None:
        check_rounded(source, stored, signal, noise, steps)
        for start, stop in _blocks(source, 1):
            rows, place = _changed(source, steps, start, stop), slice(start, stop)
            stored[place] = rows
            _check_finite(stored[place], start)
            self.error_bf16(rows, stored[place], signal[place], noise[place])


def _changed(source: Tensor, steps: Steps, start: int, stop: int) -> Tensor:
    """Some rows after their steps, float32."""
    part = Rows(source, tuple(steps)).part(start, stop)
    return changed(part.source, part.steps)


def _blocks(matrix: Tensor, unit: int) -> Iterator[tuple[int, int]]:
    """Row ranges that start at multiples of `unit` and hold about BLOCK_WEIGHTS weights."""
    rows, columns = matrix.shape
    step = max(1, BLOCK_WEIGHTS // max(1, columns * unit)) * unit
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _check_finite(rows: Tensor, first_row: int) -> None:
    if rows.numel() == 0 or all(bound.isfinite() for bound in rows.aminmax()):
        return  # the bounds of anything with a NaN are NaN; ten times as fast as isfinite(rows)
    bad = torch.isfinite(rows).logical_not_().flatten()
    row, column = divmod(int(bad.int().argmax()), rows.shape[1])
    raise NotFinite(first_row + row, column)


def _channel_scales(weights: Tensor) -> Tensor:
    """absmax / 127 as a bfloat16 value per row; 1 where that is zero."""
    if weights.shape[1] == 0:
        return weights.new_ones(weights.shape[0])
    return _stored(weights.abs().amax(1) / 127.0)


def _search(
    groups: Tensor, importance: Tensor, integers: tuple[int, int], ratios: Tensor
) -> Tensor:
    """The scales [N, G] of groups [N, G, width]; see Kernels.search_scales."""
    widest = _widest_scales(groups, integers)
    best = _stored(widest)
    least = torch.full(best.shape, torch.inf, dtype=torch.float64)
    for ratio in ratios:
        scales = _stored(widest * ratio)[..., None]
        codes = (groups * (torch.ones_like(scales) / scales)).clamp_(*integers).round_()
        terms = codes.mul_(scales).sub_(groups).square_().mul_(importance)
        errors = lane_sums(terms.double().flatten(0, 1)).view_as(least)
        better = errors < least
        least, best = least.where(~better, errors), best.where(~better, scales[..., 0])
    return best.where(widest.abs() >= LEAST_SEARCHED, _stored(widest))


def _widest_scales(groups: Tensor, integers: tuple[int, int]) -> Tensor:
    """The scales [...] under which nothing is clipped in groups [..., width], not yet rounded."""
    least, most = integers
    if -least <= most:
        return groups.abs().amax(-1) / most
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0] / least


def _stored(scales: Tensor) -> Tensor:
    """Scales as bfloat16 values; 1 where that is zero."""
    rounded = scales.bfloat16().float()
    return torch.where(rounded == 0, 1.0, rounded)


def _strips_of(strips: Tensor, start: int, stop: int) -> Tensor:
    return strips[start // STRIP_BYTES : -(-stop // STRIP_BYTES)]


def _store_codes(codes: Tensor, strips: Tensor) -> None:
    """codes [N, K] into strips [N1, K1, 16, 32]."""
    count, groups = strips.shape[:2]
    padded = codes.new_zeros(count * STRIP_BYTES, groups * ROW_BLOCK)
    padded[: codes.shape[0], : codes.shape[1]] = codes
    by_strip = padded.view(count, STRIP_BYTES, groups * ROW_BLOCK).transpose(1, 2)
    strips.view(count, groups * ROW_BLOCK, STRIP_BYTES).copy_(by_strip)


def _store_sums(
    weights: Tensor, codes: Tensor, scales: Tensor, signal: Tensor, noise: Tensor
) -> None:
    exact = weights.double()
    signal.copy_(lane_sums(exact.square()))
    noise.copy_(lane_sums(exact.sub_(codes.double().mul_(scales.double()[:, None])).square_()))
