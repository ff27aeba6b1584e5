"""Made-up statistics of the inputs of a linear."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3_ascend.convert.statistics import InputStatistics
from qwen3_ascend.convert.triangle import Triangle


def statistics_of(hessian: Tensor) -> InputStatistics:
    """Those of inputs with this x'x / T, float32 [K, K]."""
    square = hessian.diagonal().clone()
    size, kept = square.sqrt(), Triangle.of(hessian)
    return InputStatistics(1, -size, size, size, square, kept)


def hessian_of(statistics: InputStatistics) -> Tensor:
    """The whole of it, float32 [K, K]."""
    assert statistics.hessian is not None
    return statistics.hessian.whole()


def correlated(inputs: int, seed: int = 0, tokens: int | None = None) -> InputStatistics:
    """Of inputs that follow each other and are of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 3 * inputs, inputs, generator=generator)
    x = (x + x.roll(1, 1) + 0.5 * x[:, :1]) * torch.rand(inputs, generator=generator).add(0.1)
    return statistics_of(x.t() @ x / len(x))
