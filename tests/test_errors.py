"""Errors: one public family, sorted by meaning; what is a defect of ours keeps its traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from support import tiny_models
from support.command_line import program, run

import qwen3_ascend
from qwen3_ascend import (
    CheckpointError,
    ConvertOptions,
    DamagedSourceError,
    OptionError,
    SourceError,
    UserError,
    convert_checkpoint,
    load,
)
from qwen3_ascend.checkpoint import describe
from qwen3_ascend.errors import os_errors

TOO_LONG = "x" * 300


def test_the_family_is_public() -> None:
    names = [name for name in qwen3_ascend.__all__ if name.endswith("Error")]
    assert len(names) == 9
    for name in names:
        assert issubclass(getattr(qwen3_ascend, name), UserError)
    assert issubclass(DamagedSourceError, SourceError)


def test_each_is_raised_by_its_meaning(tmp_path: Path) -> None:
    source, out = tiny_models.write(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(SourceError, match="neither an existing folder nor a Hub id"):
        convert_checkpoint(tmp_path / "nothing", out)
    with pytest.raises(OptionError, match="local folder"):
        convert_checkpoint(source, out, options=ConvertOptions(revision="main"))
    with pytest.raises(OptionError, match="the source itself"):
        convert_checkpoint(source, source, options=ConvertOptions(overwrite=True))
    with pytest.raises(CheckpointError, match="not empty"):
        convert_checkpoint(source, tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        load(tmp_path / "nothing")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SourceError, match="truncated"):
        convert_checkpoint(source, out)


def test_a_source_stays_one_where_finished_work_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_ascend.convert.source import Source

    source = tiny_models.write(tmp_path / "source")
    read = Source.read

    def failing(self: Source, tensor: str) -> object:
        if tensor == "model.norm.weight":
            raise SourceError("the hub is gone")
        return read(self, tensor)

    monkeypatch.setattr(Source, "read", failing)
    with pytest.raises(SourceError, match="the hub is gone; what is done is kept"):
        convert_checkpoint(source, tmp_path / "out", "bf16", ConvertOptions(threads=1))


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EBADF, "Bad file descriptor"), FileNotFoundError(errno.ENOENT, "gone", "ours"),
     OSError("without a number"), KeyError("x")],
    ids=repr,
)  # fmt: skip
def test_a_defect_of_ours_has_a_traceback(
    error: Exception, tiny_w8a8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(manifest: object) -> list[str]:
        raise error

    monkeypatch.setattr(describe, "inspect_lines", fail)
    with pytest.raises(type(error)):
        run("inspect", tiny_w8a8)


def test_what_the_system_refuses_of_a_path_is_one_line(tiny_source: Path, tmp_path: Path) -> None:
    for command in (
        ["inspect", TOO_LONG],
        ["verify", TOO_LONG],
        ["generate", TOO_LONG, "-p", "x"],
        ["convert", f"./{TOO_LONG}", tmp_path / "out"],
        ["convert", tiny_source, tmp_path / TOO_LONG],
        ["generate", tmp_path, "--prompt-file", tmp_path / TOO_LONG],
    ):
        run(*command).one_line_error(TOO_LONG)
    run("convert", tiny_source, "/proc/nothing/out").one_line_error("/proc/nothing")
    report = tmp_path / "nowhere" / "report.json"
    done = run("doctor", "--json", report)
    done.one_line_error(str(report), "No such file")


def test_only_what_the_user_can_mend_is_turned_into_one_line() -> None:
    with pytest.raises(CheckpointError, match="^out/a: No space left"), os_errors(CheckpointError):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/a")
    for error in (BrokenPipeError(errno.EPIPE, "x"), OSError(errno.EBADF, "x"), OSError("x")):
        with pytest.raises(OSError) as kept, os_errors(CheckpointError):
            raise error
        assert kept.value is error


def test_the_nearest_command_and_option_are_suggested() -> None:
    run("convrt").one_line_error("'convert'")
    run("generate", "out", "--max-bach", "2").one_line_error("'--max-batch'")
    run("verify", "out", "--treads", "2").one_line_error("'--threads'")


def test_paths_begin_with_the_home_of_the_user(
    tiny_w8a8: Path, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no shell has expanded it, as in --prompt-file=~/question."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "done").symlink_to(tiny_w8a8)
    (tmp_path / "source").symlink_to(tiny_source)
    (tmp_path / "question").write_text("What does river mean?")
    recipe = "schema: 1\nname: mine\nrules: [{match: '*', scheme: bf16}]\n"
    (tmp_path / "mine.yaml").write_text(recipe)
    assert run("inspect", "~/done").code == 0
    assert run("verify", "~/done", "--against", "~/source", "-q").code == 0
    arguments = ["~/done", "--prompt-file=~/question", "--max-new-tokens", "2"]
    assert run("generate", *arguments).code == 0
    assert run("convert", "~/source", "~/out", "--recipe", "~/mine.yaml", "-q").code == 0
    assert load("~/out").config.num_layers == 4
    run("doctor", "--json", "~/report.json")
    assert {path.name for path in tmp_path.iterdir()} == {
        "done", "source", "question", "mine.yaml", "out", "report.json"
    }  # fmt: skip
    run("inspect", "~nobody-of-this-name/x").one_line_error("~nobody-of-this-name")
    run("convert", "~nobody-of-this-name/x", "~/o").one_line_error("~nobody-of-this-name")


def test_the_package_is_a_program_too() -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "qwen3_ascend", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == program("--version").out
