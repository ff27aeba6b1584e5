"""What every command shares: one-line errors, notes and progress bars on standard error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click
from typing_extensions import override

from qwen3_ascend.cli.interruption import Stopped, stoppable
from qwen3_ascend.errors import UserError

LONGEST_ERROR = 2000


class Misuse(click.ClickException):
    """A command line that cannot be obeyed; exits as click's own usage errors do."""

    exit_code = click.UsageError.exit_code


class OneLineErrors(click.Group):
    """Prints what a user can mend as one line and exits with 1; anything else is a traceback."""

    @override
    def invoke(self, ctx: click.Context) -> Any:
        try:
            with stoppable(), warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except Stopped as stop:
            click.echo(f"Error: {stop}", err=True)
            sys.exit(stop.exit_code)
        except UserError as error:
            raise click.ClickException(_printable(error)) from error
        except click.UsageError as error:
            raise _one_line(error) from error
        except BrokenPipeError:  # the reader of our output is gone: | head
            sys.stderr.close()
            sys.exit(1)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """A warning without the place in our code that Python shows with it."""
    to_stderr(f"Warning: {' '.join(str(message).split())}")


def _one_line(error: click.UsageError) -> click.ClickException:
    """A usage error without the usage that click prints above it."""
    message = " ".join(error.format_message().split())
    command = error.ctx.command_path if error.ctx else "qwen3-ascend"
    return Misuse(f"{message} (see: {command} --help)")


def _printable(error: UserError) -> str:
    """One line of bounded length; names in it may come from a source that nobody vouches for."""
    line = " ".join(str(error).split())[:LONGEST_ERROR]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def silent(line: str) -> None:
    """Drops a note."""


def to_stderr(line: str) -> None:
    """Prints a note beside the answer or the bars."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # above the bars, if there are any


@contextmanager
def progress_bar(what: str, quiet: bool, total: int | None = 0) -> Iterator[Any]:
    """A progress bar in bytes on standard error, from the first bytes on."""
    from tqdm import tqdm

    with tqdm(
        desc=what, total=total, unit="B", unit_scale=True, leave=not quiet, delay=0.01,
        disable=quiet or not sys.stderr.isatty(), dynamic_ncols=True,
    ) as bar:  # fmt: skip
        yield bar


@contextmanager
def step_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar that starts anew for each kind of work: layers, then graphs."""
    from tqdm import tqdm

    bar = tqdm(disable=quiet or not sys.stderr.isatty(), leave=False, dynamic_ncols=True)

    def show(what: str, done: int, total: int) -> None:
        if done == 1:
            bar.reset(total=total)
            bar.set_description(what)
        bar.update(1)

    with bar:
        yield show
