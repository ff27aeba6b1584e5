"""From a Hugging Face model to a checkpoint for Ascend, and from there to other formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_ascend.lazy import lazy_names

if TYPE_CHECKING:
    from qwen3_ascend.convert.conversion import convert_checkpoint, plan_conversion
    from qwen3_ascend.convert.events import Events
    from qwen3_ascend.convert.export.exporting import export_checkpoint
    from qwen3_ascend.convert.export.record import ExportRecord
    from qwen3_ascend.convert.options import ConvertOptions, WritingOptions
    from qwen3_ascend.convert.recipe import Recipe

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ConvertOptions": "qwen3_ascend.convert.options",
        "Events": "qwen3_ascend.convert.events",
        "ExportRecord": "qwen3_ascend.convert.export.record",
        "Recipe": "qwen3_ascend.convert.recipe",
        "WritingOptions": "qwen3_ascend.convert.options",
        "convert_checkpoint": "qwen3_ascend.convert.conversion",
        "export_checkpoint": "qwen3_ascend.convert.export.exporting",
        "plan_conversion": "qwen3_ascend.convert.conversion",
    },
)

__all__ = [
    "ConvertOptions",
    "Events",
    "ExportRecord",
    "Recipe",
    "WritingOptions",
    "convert_checkpoint",
    "export_checkpoint",
    "plan_conversion",
]
