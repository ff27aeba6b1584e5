"""A linear whose inputs are shown to somebody before it multiplies them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.runtime.backends.base import Activation, DeviceLinear, as_float

See = Callable[[Tensor], None]
"""Is shown inputs [T, K] on the device where they are."""


class WatchedLinear:
    """A linear of floats whose inputs are shown."""

    input = Input.FLOAT

    def __init__(self, linear: DeviceLinear, see: See) -> None:
        assert linear.input is Input.FLOAT, "the linears of a model of floats want floats"
        self.weight, self._linear, self._see = linear.weight, linear, see

    def __call__(self, x: Activation) -> Tensor:
        """The product, [T, N]."""
        self._see(as_float(x))
        return self._linear(x)
