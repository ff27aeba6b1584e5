"""From a Hugging Face model to a checkpoint for Ascend, offline, on any CPU."""

from __future__ import annotations

from qwen3_ascend.convert.conversion import convert_checkpoint, plan_conversion
from qwen3_ascend.convert.recipe import Recipe

__all__ = ["Recipe", "convert_checkpoint", "plan_conversion"]
