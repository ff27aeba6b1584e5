"""pyACL, which a CANN brings along and no registry has: the part that engines import."""

from . import rt

__all__ = ["rt"]
