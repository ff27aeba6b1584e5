"""What transforms make of the weights of a model that fits into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.convert.transforms import TRANSFORMS
from qwen3_ascend.convert.transforms.parts import model_parts
from qwen3_ascend.convert.transforms.whole import changed_state, state_changes


def equivalent(
    weights: Mapping[str, Tensor], config: Qwen3Config, transforms: Sequence[str]
) -> dict[str, Tensor]:
    """The weights that are quantized, by the names of the source; a head that is no longer tied to
    the embedding is one of them."""
    parts = model_parts(config)
    changes = state_changes(weights, parts, [TRANSFORMS[name] for name in transforms])
    return changed_state(weights, parts, changes)
