"""The one exception family that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: says what is wrong, in which file or tensor, and what to do.

    The command line prints the message as one line and exits with 1; nothing else is caught there,
    so that a traceback always means a defect of ours.
    """


class ConfigError(UserError):
    """A config.json that is not a Qwen3 this project supports."""


class CheckpointError(UserError):
    """A file of a checkpoint (ours or the source's) that is missing, damaged or inconsistent."""


class DamagedSourceError(CheckpointError):
    """A source whose values cannot be right: what was made of it so far is worth nothing."""


class RecipeError(UserError):
    """A recipe that is malformed or does not fit the model."""


class RequestError(UserError):
    """A generation request that cannot be served, such as a prompt longer than the context."""
