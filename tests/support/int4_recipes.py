"""Recipes of w4a16 by the nearest codes, for sources of floats."""

from __future__ import annotations

from qwen3_ascend.convert.recipe import Recipe


def w4a16_recipe(group: int = 64, zero_points: bool = False, head: str = "bf16") -> Recipe:
    """All linears in groups of so many inputs, but for the head."""
    scheme = f"{{name: w4a16, group: {group}, zero_points: {str(zero_points).lower()}}}"
    rules = f"[{{match: lm_head, scheme: {head}}}, {{match: '*', scheme: {scheme}}}]"
    return Recipe.parse(f"{{schema: 1, name: mine, rules: {rules}}}", "here")
