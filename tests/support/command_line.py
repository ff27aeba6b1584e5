"""Runs the command line: in this process where that shows enough, as a program where it does not.

In this process an exception that the command line does not turn into a message comes out as
itself, so a test that would have shown a user a traceback fails with that traceback.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from qwen3_ascend.cli import main

PROGRAM = (sys.executable, "-m", "qwen3_ascend.cli")


@dataclass(frozen=True)
class Run:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    def one_line_error(self, *mentions: str) -> str:
        """Asserts that it failed with one line on standard error that holds all of `mentions`."""
        assert self.code != 0, f"it succeeded: {self.out}"
        assert self.err.startswith("Error: "), self.err
        assert self.err.endswith("\n") and self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        for mention in mentions:
            assert mention in self.err, f"{mention!r} is not in: {self.err}"
        return self.err


def obey_interrupts() -> None:
    """For a child before it begins: a shell tells what it runs in the background to ignore Ctrl-C,
    and the tests may be such."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(*arguments: str | Path) -> Run:
    """Runs a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main.main([str(argument) for argument in arguments], prog_name="qwen3-ascend")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Run(code, out.getvalue(), err.getvalue())


def program(
    *arguments: str | Path | bytes,
    environment: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    cwd: Path | None = None,
) -> Run:
    """Runs a command as a program of its own."""
    done = subprocess.run(
        [*PROGRAM, *arguments], input=stdin, capture_output=True, cwd=cwd, timeout=300,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    return Run(done.returncode, done.stdout.decode(), done.stderr.decode())
