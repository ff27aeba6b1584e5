"""From a Hugging Face model to a checkpoint for Ascend, offline, on any CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_ascend.lazy import lazy_names

if TYPE_CHECKING:
    from qwen3_ascend.convert.conversion import convert_checkpoint, plan_conversion
    from qwen3_ascend.convert.events import Events
    from qwen3_ascend.convert.options import ConvertOptions
    from qwen3_ascend.convert.recipe import Recipe

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ConvertOptions": "qwen3_ascend.convert.options",
        "Events": "qwen3_ascend.convert.events",
        "Recipe": "qwen3_ascend.convert.recipe",
        "convert_checkpoint": "qwen3_ascend.convert.conversion",
        "plan_conversion": "qwen3_ascend.convert.conversion",
    },
)

__all__ = ["ConvertOptions", "Events", "Recipe", "convert_checkpoint", "plan_conversion"]
