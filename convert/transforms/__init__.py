"""Equivalent weights: the transforms of a model that a recipe may name."""

from __future__ import annotations

TRANSFORMS: tuple[str, ...] = ()
"""By the name that a recipe says."""
