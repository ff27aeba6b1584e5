"""What is interrupted is kept, and the same command continues it; anything else refuses."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from support.command_line import PROGRAM, Run, obey_interrupts, run
from support.folders import contents

from qwen3_ascend import ConvertOptions, Events, convert_checkpoint
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.verify import verify
from qwen3_ascend.convert.identity import CONVERTER_VERSION
from qwen3_ascend.convert.output.journal import JOURNAL, read_journal
from qwen3_ascend.convert.plan import Plan
from qwen3_ascend.convert.work import Task
from qwen3_ascend.errors import CheckpointError, OptionError
from qwen3_ascend.files.hashing import bytes_blake3

PR_CAPBSET_DROP = 24

KEPT = "what is done is kept, the same command continues"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_models.write(tmp_path / "source")


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, calls: int, error: BaseException) -> Iterator[None]:
    """Every write after so many raises an error."""
    left, write = [calls], os.pwrite

    def pwrite(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        yield


@pytest.fixture
def interrupted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output that a full disk has left after some of the model."""
    out = tmp_path / "out"
    with failing(monkeypatch, 20, OSError(errno.ENOSPC, "No space left on device")):
        run("convert", source, out, "-q").one_line_error("No space left on device", KEPT)
    assert [path.name for path in out.iterdir()] == [".partial"]
    return out


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed conversion writes."""
    convert_checkpoint(source, tmp_path / "whole")
    return contents(tmp_path / "whole")


def done(out: Path) -> set[str]:
    record = read_journal(out / ".partial")
    assert record is not None
    return set(record.done)


def count_packed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the items that are worked on from now on."""
    names: set[str] = set()
    pack = Task.pack

    def counted(self: Task, index: int, kernels: Any) -> Any:
        names.add(self.item.name)
        return pack(self, index, kernels)

    monkeypatch.setattr(Task, "pack", counted)
    return names


def test_only_the_rest_is_done(
    source: Path, interrupted: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = done(interrupted)
    assert before
    packed = count_packed(monkeypatch)
    finished = run("convert", source, interrupted)
    assert finished.code == 0 and f"continuing: {len(before)} of " in finished.err
    assert packed and not packed & before
    assert contents(interrupted) == whole


def test_progress_counts_everything_once(source: Path, interrupted: Path) -> None:
    seen: dict[str, int] = {}
    totals: list[int] = []

    class Count(Events):
        def planned(self, plan: Plan) -> None:
            totals.append(plan.source_bytes)

        def done(self, name: str, nbytes: int) -> None:
            assert name not in seen
            seen[name] = nbytes

    convert_checkpoint(source, interrupted, events=Count())
    assert sum(seen.values()) == totals[0]


def flip(path: Path, *offsets: int) -> None:
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset] ^= 1
    path.write_bytes(data)


Damage = Callable[[Path], object]


def to_each_file(damage: Damage) -> Damage:
    """The same damage to every file of tensors in the staging folder."""

    def to_all(staging: Path) -> None:
        for path in staging.glob("*.safetensors"):
            damage(path)

    return to_all


DAMAGE: dict[str, Damage] = {
    "no journal": lambda staging: (staging / JOURNAL).unlink(),
    "empty journal": lambda staging: (staging / JOURNAL).write_bytes(b""),
    "torn journal": lambda staging: (staging / JOURNAL).write_bytes(
        (staging / JOURNAL).read_bytes()[:-9]
    ),
    "flipped journal": lambda staging: flip(staging / JOURNAL, -30),
    "journal of noise": lambda staging: (staging / JOURNAL).write_bytes(os.urandom(500)),
    "flipped tensors": to_each_file(lambda path: flip(path, *range(4000, 9000))),
    "flipped header": to_each_file(lambda path: flip(path, 20)),
    "cut shard": to_each_file(lambda path: os.truncate(path, 5000)),
    "long shard": to_each_file(lambda path: os.truncate(path, 10**7)),
    "no shard": to_each_file(Path.unlink),
    "foreign files": lambda staging: (staging / "notes").write_text("mine"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_a_crash_has_damaged_is_done_again(
    damage: Callable[[Path], object], source: Path, interrupted: Path, whole: dict[str, bytes]
) -> None:
    damage(interrupted / ".partial")
    assert run("convert", source, interrupted, "-q").code == 0
    assert contents(interrupted) == whole


def test_another_conversion_is_refused(source: Path, interrupted: Path, tmp_path: Path) -> None:
    before = contents(interrupted)
    other = run("convert", source, interrupted, "--recipe", "bf16")
    other.one_line_error("recipe: w8a8 ", "then, bf16 ", "now", "--restart", "repeat that command")
    with pytest.raises(CheckpointError, match="output files: 1 .* then"):
        convert_checkpoint(source, interrupted, options=ConvertOptions(max_file_bytes=20_000))
    os.utime(source / "model.safetensors", (1, 1))
    run("convert", source, interrupted).one_line_error(
        "source file model.safetensors", "changed at"
    )
    moved = Path(shutil.copytree(source, tmp_path / "moved"))
    run("convert", moved, interrupted).one_line_error("source: source then, moved now")
    assert contents(interrupted) == before
    assert run("convert", source, interrupted, "-q", "--recipe", "bf16", "--restart").code == 0
    assert Manifest.read(interrupted).recipe["name"] == "bf16" and verify(interrupted).ok


def test_a_changed_configuration_is_another_conversion(source: Path, interrupted: Path) -> None:
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(f"{text} ")
    run("convert", source, interrupted).one_line_error("source file tokenizer.json")
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace("10000.0", "20000.0"))
    run("convert", source, interrupted).one_line_error("source file config.json")


def test_restart_begins_anew(
    source: Path, interrupted: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = count_packed(monkeypatch)
    assert run("convert", source, interrupted, "-q", "--restart").code == 0
    assert done_before_is_done_again(packed) and contents(interrupted) == whole


def done_before_is_done_again(packed: set[str]) -> bool:
    return "model.embed_tokens.weight" in packed and "lm_head" in packed


def test_a_damaged_source_is_not_worth_keeping(source: Path, tmp_path: Path) -> None:
    weights = tiny_models.tensors(tiny_models.config())
    weights["lm_head.weight"][200, 5] = torch.inf
    bad = tiny_models.write(tmp_path / "bad", weights=weights)
    message = run("convert", bad, tmp_path / "out").one_line_error("lm_head.weight", "[200, 5]")
    assert KEPT not in message and not (tmp_path / "out").exists()


def test_an_overwrite_is_resumed_as_one(
    source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert_checkpoint(source, out, "bf16")
    old = contents(out)
    with failing(monkeypatch, 20, OSError(errno.ENOSPC, "No space left on device")):
        run("convert", source, out, "--overwrite").one_line_error("No space left", KEPT)
    assert {name: out.joinpath(name).read_bytes() for name in old} == old
    run("convert", source, out).one_line_error("not empty")
    assert run("convert", source, out, "--overwrite", "-q").code == 0
    assert contents(out) == whole


@pytest.mark.parametrize(
    "line",
    [
        b'{"done": {"name": 1, "blake3": {}, "source": {}, "sqnr_db": null}}',
        b'{"done": {"name": "x", "blake3": [], "source": {}, "sqnr_db": null}}',
        b'{"publish": {"names": null, "old": [], "seal_blake3": "x"}}',
        b'{"remark": {}}',
        b"[]",
        b"\xff",
    ],
)
def test_a_journal_ends_before_a_line_that_is_none(line: bytes, interrupted: Path) -> None:
    path, before = interrupted / ".partial" / JOURNAL, done(interrupted)
    first, *rest = path.read_bytes().splitlines(keepends=True)
    whole_line = bytes_blake3(line)[:16].encode() + b" " + line + b"\n"
    path.write_bytes(b"".join([first, *rest, whole_line, *rest]))
    assert done(interrupted) == before
    path.write_bytes(first + whole_line + b"".join(rest))
    assert done(interrupted) == set()


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_journal_of_another_version(source: Path, interrupted: Path) -> None:
    """Its items may be described in another way; what matters is that nobody continues it."""
    path = interrupted / ".partial" / JOURNAL
    lines = []
    for line in path.read_bytes().splitlines():
        [(kind, value)] = json.loads(line.partition(b" ")[2]).items()
        if kind == "identity":
            value["converter version"] = "1"
        else:
            del value["source"]
        text = json.dumps({kind: value}).encode()
        lines.append(bytes_blake3(text)[:16].encode() + b" " + text + b"\n")
    path.write_bytes(b"".join(lines))
    run("convert", source, interrupted).one_line_error(
        f"converter version: 1 then, {CONVERTER_VERSION} now"
    )


@pytest.mark.parametrize("tokenizer", [False, True])
def test_a_full_disk(tokenizer: bool, tmp_path: Path) -> None:
    """As the system reports it: a limit on the size of a file stands in for it.

    It is said of the first file that has no room, before any work is done for nothing.
    """
    source = tiny_models.write(tmp_path / "source", tokenizer=tokenizer)
    arguments: list[str | Path] = ["convert", source, tmp_path / "out", "-q"]
    name = "tokenizer.json" if tokenizer else "ascend-00001-of-00001.safetensors"
    for _ in range(2):
        end = subprocess.run(
            [*PROGRAM, *arguments], capture_output=True, text=True, preexec_fn=limit_files
        )
        Run(end.returncode, end.stdout, end.stderr).one_line_error(name, "File too large")
        assert not (tmp_path / "out").exists()
    assert run(*arguments).code == 0
    assert verify(tmp_path / "out").ok


def test_a_file_system_that_reserves_nothing(
    source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, and where the C library has no fallocate, a full disk shows later."""
    monkeypatch.setattr("qwen3_ascend.convert.output.weight_file._reserve", lambda *arguments: None)
    out = tmp_path / "out"
    with failing(monkeypatch, 20, OSError(errno.ENOSPC, "No space left on device")):
        run("convert", source, out, "-q").one_line_error("ascend-00001", "No space left", KEPT)
    assert run("convert", source, out, "-q").code == 0
    assert contents(out) == whole


def obey_permissions() -> None:
    """Takes from root what lets him write anywhere: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    for capability in (1, 2) if os.geteuid() == 0 else ():
        assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0


def test_a_read_only_output(source: Path, tmp_path: Path) -> None:
    parent = tmp_path / "sealed"
    parent.mkdir()
    (parent / "empty").mkdir()
    (parent / "empty").chmod(0o555)
    parent.chmod(0o555)
    for out in (parent / "out", parent / "empty"):
        end = subprocess.run(
            [*PROGRAM, "convert", source, out], capture_output=True, text=True,
            preexec_fn=obey_permissions,
        )  # fmt: skip
        Run(end.returncode, end.stdout, end.stderr).one_line_error("cannot write to", "sealed")
    assert [path.name for path in parent.rglob("*")] == ["empty"]
    parent.chmod(0o755)
    assert run("convert", source, parent / "out", "-q").code == 0


SLOW = """
import os, sys, time
write = os.pwrite
def pwrite(*arguments):
    time.sleep(0.05)
    return write(*arguments)
os.pwrite = pwrite
from qwen3_ascend.cli import main
main.main(sys.argv[1:], prog_name="qwen3-ascend")
"""


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_polite_end(
    number: signal.Signals, code: int, word: str, source: Path, tmp_path: Path,
    whole: dict[str, bytes],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "convert", source, out, "-q"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=obey_interrupts,
    )
    while not (out / ".partial" / JOURNAL).exists() or not done(out):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (code, f"Error: {word}; {KEPT}\n")
    assert run("convert", source, out, "-q").code == 0
    assert contents(out) == whole


def test_two_converters(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = subprocess.Popen([sys.executable, "-c", SLOW, "convert", source, out, "-q"])
    while not (out / ".partial" / JOURNAL).exists():
        assert first.poll() is None
        time.sleep(0.02)
    for options in ((), ("--restart",), ("--overwrite",)):
        run("convert", source, out, *options).one_line_error("another process")
    assert first.wait(60) == 0 and verify(out).ok


def test_budgets(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="too little"):
        convert_checkpoint(source, tmp_path / "out", options=ConvertOptions(max_memory=1 << 20))
    with pytest.raises(OptionError, match="threads"):
        convert_checkpoint(source, tmp_path / "out", options=ConvertOptions(threads=0))
    refused = run("convert", source, tmp_path / "out", "--max-memory", "much")
    refused.one_line_error("--max-memory", "512MiB")
    assert not (tmp_path / "out").exists()
    assert run("convert", source, tmp_path / "out", "--max-memory", "0.5G", "-q").code == 0
