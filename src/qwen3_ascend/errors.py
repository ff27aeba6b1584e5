"""The one exception family that a user is meant to read."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend: says what is wrong, in which file or tensor, and what to do.

    The command line prints the message as one line and exits with 1. It does so with nothing else
    but misspelt commands and a closed pipe, so a traceback always means a defect of ours.
    """


class OptionError(UserError):
    """An option or argument that does not exist, is out of range, or does not fit the others."""


class ConfigError(UserError):
    """A config.json, or a file like it, that is not that of a Qwen3 this project supports."""


class SourceError(UserError):
    """A model to be converted that cannot be found, fetched or read, or is not whole."""


class DamagedSourceError(SourceError):
    """A source whose values cannot be right: what was made of it so far is worth nothing."""


class CheckpointError(UserError):
    """A checkpoint of ours that is missing, damaged or inconsistent, or cannot be written."""


class RecipeError(UserError):
    """A recipe that is malformed or does not fit the model."""


class RequestError(UserError):
    """A generation request that cannot be served, such as a prompt longer than the context."""


class DeviceError(UserError):
    """Something that this machine lacks to run on an NPU; says what, and what to run."""


class DeviceStuckError(DeviceError):
    """A device that waits for ever: whoever waits for it does too, so the process has to end."""


MENDABLE = frozenset({
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC,
    errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
})  # fmt: skip
"""What a system says of paths, disks and limits, which are the user's; the rest is ours."""


def is_mendable(error: BaseException | None) -> bool:
    """Whether an error is the user's to mend, and no defect of ours."""
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in MENDABLE)


@contextmanager
def os_errors(kind: type[UserError]) -> Iterator[None]:
    """Turns what the system refuses within the block into an error that the user can mend.

    Only for blocks that work on a path which the user has given: elsewhere an OSError is a defect
    of ours, and keeps its traceback. Serves as a decorator too.
    """
    try:
        yield
    except OSError as error:
        if not is_mendable(error):
            raise
        place = f"{error.filename}: " if error.filename else ""
        raise kind(f"{place}{error.strerror}") from error
