"""The version of this package: of the installed distribution, or of the checkout."""

from __future__ import annotations

__version__ = "0.1.0"
