"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """A path with a leading ~ or ~name expanded; one of an unknown user is left as it is."""
    return Path(os.path.expanduser(path))
