"""nearest: the widest scale of each group, and the nearest integer to each weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.schemes.grid import Grid
from qwen3_ascend.convert.quantizers.base import Choose, Chosen, Needs, Quantizer
from qwen3_ascend.convert.statistics import InputStatistics
from qwen3_ascend.native import Kernels


@dataclass(frozen=True)
class Nearest(Quantizer):
    """See the module; needs no data."""

    needs: Needs = Needs.NOTHING
    uses: Needs = Needs.NOTHING

    @override
    def prepare(self, grid: Grid, statistics: InputStatistics | None, kernels: Kernels) -> Choose:
        def choose(weight: Tensor) -> Chosen:
            scales = grid.widest_scales(weight)
            return Chosen(grid.nearest(weight, scales), scales)

        return choose

    @override
    def shared_bytes(self, inputs: int) -> int:
        return 0
