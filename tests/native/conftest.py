"""Every implementation of the kernels that runs here."""

from __future__ import annotations

import pytest
from support.native_cases import runnable_paths

from qwen3_ascend import native


@pytest.fixture(params=[*runnable_paths(), "torch"])
def kernels(request: pytest.FixtureRequest) -> native.Kernels:
    """Every implementation that runs here: each processor path, and torch."""
    if request.param == "torch":
        return native.TorchKernels()
    loaded = native.load(request.param)
    assert loaded is not None
    return loaded
