"""Which integers and scales stand for a weight: the quantizers that a recipe may name.

A quantizer knows the grid of a scheme and what calibration has seen of the inputs, no scheme and no
model. Codes are always chosen in float32, against scales that bfloat16 has exactly.
"""

from __future__ import annotations

from qwen3_ascend.convert.quantizers.base import Choose, Chosen, Needs, Quantizer, UselessStatistics
from qwen3_ascend.convert.quantizers.gptq import Gptq
from qwen3_ascend.convert.quantizers.mse import Mse
from qwen3_ascend.convert.quantizers.nearest import Nearest

QUANTIZERS: dict[str, Quantizer] = {
    "nearest": Nearest(),
    "mse": Mse(),
    "gptq": Gptq(),
}
"""By the name that a recipe says."""

__all__ = [
    "QUANTIZERS",
    "Choose",
    "Chosen",
    "Gptq",
    "Mse",
    "Nearest",
    "Needs",
    "Quantizer",
    "UselessStatistics",
]
