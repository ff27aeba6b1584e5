"""Checkpoints of the scheme w8a8-static, calibrated with a few tokens."""

from __future__ import annotations

from pathlib import Path

from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.convert import ConvertOptions, Recipe, convert_checkpoint

STATIC = Recipe.parse(
    """
schema: 1
name: plain-static
rules:
  - {match: lm_head, scheme: bf16}
  - {match: "*", scheme: w8a8-static}
""",
    "the tests' recipe",
)

FEW_TOKENS = 1024


def write_static(source: Path, out: Path, tokens: int = FEW_TOKENS) -> Manifest:
    """Converts a model to w8a8-static; the ranges of inputs are those of the shipped texts."""
    return convert_checkpoint(source, out, STATIC, ConvertOptions(calibration_tokens=tokens))
