"""An export appears whole or not at all, continues after any end, and replaces only exports."""

from __future__ import annotations

import errno
import json
import os
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
from support import tiny_models
from support.command_line import obey_interrupts, run
from support.folders import contents, flip, flip_a_byte

from qwen3_ascend import convert_checkpoint
from qwen3_ascend.checkpoint.manifest import Manifest, canonical_blake3, manifest_text
from qwen3_ascend.convert import Events, WritingOptions, export_checkpoint
from qwen3_ascend.convert.export import item as export_item
from qwen3_ascend.convert.export.record import RECORD_NAME, ExportRecord, verify_export
from qwen3_ascend.convert.output.journal import JOURNAL, read_journal
from qwen3_ascend.errors import CheckpointError, OptionError

TESTS = Path(__file__).parents[1]

KEPT = "what is done is kept, the same command continues"

AV1 = ("--format", "ascendv1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint")
    source = tiny_models.write(folder / "source")
    convert_checkpoint(source, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed export; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "av1"
    export_checkpoint(checkpoint, out, "ascendv1")
    return out


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, writes: int) -> Iterator[None]:
    """Every write after so many finds no space."""
    left, write = [writes], os.pwrite

    def pwrite(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        yield


@pytest.fixture
def interrupted(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output that a full disk has left after some of the model."""
    out = tmp_path / "out"
    with full_disk(monkeypatch, 20):
        stopped = run("export", checkpoint, out, *AV1, "-q")
        stopped.one_line_error("No space left on device", KEPT)
    assert [path.name for path in out.iterdir()] == [".partial"]
    return out


def done(out: Path) -> set[str]:
    record = read_journal(out / ".partial")
    assert record is not None
    return set(record.done)


# Interrupted.


def test_only_the_rest_is_done(
    checkpoint: Path, interrupted: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, made = done(interrupted), set()
    tensors = export_item.ExportItem.tensors

    def counted(self: export_item.ExportItem, piece: Any) -> Any:
        made.add(self.name)
        return tensors(self, piece)

    monkeypatch.setattr(export_item.ExportItem, "tensors", counted)
    finished = run("export", checkpoint, interrupted, *AV1)
    assert finished.code == 0 and f"continuing: {len(before)} of " in finished.err
    assert before and made and not made & before
    assert contents(interrupted) == contents(whole)


def test_progress_counts_everything_once(checkpoint: Path, interrupted: Path) -> None:
    seen: dict[str, int] = {}
    totals: list[int] = []

    class Count(Events):
        def begun(self, nbytes: int) -> None:
            totals.append(nbytes)

        def done(self, name: str, nbytes: int) -> None:
            assert name not in seen
            seen[name] = nbytes

    export_checkpoint(checkpoint, interrupted, "ascendv1", events=Count())
    assert [sum(seen.values())] == totals
    stored = Manifest.read(checkpoint).stored().values()
    assert totals == [sum(tensor.nbytes for tensor in stored)]


def test_what_a_crash_has_damaged_is_done_again(
    checkpoint: Path, interrupted: Path, whole: Path
) -> None:
    for path in (interrupted / ".partial").glob("*.safetensors"):
        for offset in range(9000, 20000, 100):
            flip(path, offset)
    assert run("export", checkpoint, interrupted, *AV1, "-q").code == 0
    assert contents(interrupted) == contents(whole)


def test_another_export_is_refused(checkpoint: Path, interrupted: Path, whole: Path) -> None:
    before = contents(interrupted)
    other = run("export", checkpoint, interrupted, "--format", "huggingface")
    other.one_line_error(
        "interrupted export", "format: ascendv1 then, huggingface now", "--restart"
    )
    with pytest.raises(CheckpointError, match="output files: 1 .* then"):
        options = WritingOptions(max_file_bytes=20_000)
        export_checkpoint(checkpoint, interrupted, "ascendv1", options)
    assert contents(interrupted) == before
    assert run("export", checkpoint, interrupted, *AV1, "-q", "--restart").code == 0
    assert contents(interrupted) == contents(whole)


def test_a_conversion_does_not_continue_an_export(checkpoint: Path, interrupted: Path) -> None:
    source = checkpoint.parent / "source"
    run("convert", source, interrupted).one_line_error("of something else", "format: ascendv1 then")


@pytest.mark.parametrize("over", [False, True], ids=["into nothing", "over an export"])
def test_after_each_step(over: bool, tmp_path: Path) -> None:
    """SIGKILL after every call that changes the disk, and the same command again."""
    source = tiny_models.write(tmp_path / "source", tiny_models.config(num_hidden_layers=1))
    convert_checkpoint(source, tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "old", "huggingface")
    (tmp_path / "old" / "notes.txt").write_text("mine")
    (tmp_path / "work").mkdir()
    driver = (sys.executable, "-m", "support.crash_driver", tmp_path / "out", tmp_path / "work")
    options = ("--steps", "0", "--threads", "1", "--format", "ascendv1")
    replaced = ("--over", tmp_path / "old") if over else ()
    ended = subprocess.run(
        [*driver, *options, *replaced], capture_output=True, text=True, timeout=550, cwd=TESTS
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["kills"] == found["trials"] == found["steps"] > 35
    assert found["completed"] == 0 if over else 0 < found["completed"] < 15  # tidied up only


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
    number: signal.Signals, code: int, word: str, checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "export", checkpoint, out, *AV1, "-q"],
        stderr=subprocess.PIPE, text=True, preexec_fn=obey_interrupts,
    )  # fmt: skip
    while not (out / ".partial" / JOURNAL).exists() or not done(out):
        assert process.poll() is None
        time.sleep(0.02)
    run("export", checkpoint, out, *AV1).one_line_error("another process")
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (code, f"Error: {word}; {KEPT}\n")
    assert run("export", checkpoint, out, *AV1, "-q").code == 0
    assert contents(out) == contents(whole)


# The output.


def test_a_second_run_changes_nothing(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    again = run("export", checkpoint, out, *AV1)
    assert again.code == 0 and "holds this export already: nothing to do" in again.err
    assert contents(out) == contents(whole)
    (out / "tokenizer.json").write_text("{}")
    run("export", checkpoint, out, *AV1).one_line_error("file tokenizer.json", "--overwrite")


def test_overwriting(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    """Another export takes the place of one; what is not of it stays."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    (out / "notes.txt").write_text("mine")
    other = run("export", checkpoint, out, "--format", "huggingface")
    other.one_line_error("another export", "format", "--overwrite")
    assert run("export", checkpoint, out, "--format", "huggingface", "--overwrite", "-q").code == 0
    export_checkpoint(checkpoint, tmp_path / "fresh", "huggingface")
    assert contents(out) == contents(tmp_path / "fresh") | {"notes.txt": b"mine"}


def test_an_overwrite_is_resumed_as_one(
    checkpoint: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_checkpoint(checkpoint, out, "huggingface")
    old = contents(out)
    with full_disk(monkeypatch, 20):
        run("export", checkpoint, out, *AV1, "--overwrite").one_line_error("No space left", KEPT)
    assert {name: out.joinpath(name).read_bytes() for name in old} == old
    assert run("export", checkpoint, out, *AV1, "--overwrite", "-q").code == 0
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors"])
def test_what_the_user_has_is_never_replaced(
    name: str, checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    """Nor stays a file of weights beside the new ones, which engines would load together."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    run("export", checkpoint, out, *AV1).one_line_error("is not empty")
    refused = run("export", checkpoint, out, *AV1, "--overwrite")
    refused.one_line_error(f"{out / name} is no part of an export", "another output folder")
    assert contents(out) == {name: b"mine"}


def test_a_checkpoint_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    before = contents(out)
    for options in ((), ("--overwrite",)):
        run("export", checkpoint, out, *AV1, *options).one_line_error(str(out))
        run("export", out, out, *AV1, *options).one_line_error("is the checkpoint itself")
    (tmp_path / "link").symlink_to(out)
    run("export", out, tmp_path / "link", *AV1).one_line_error("is the checkpoint itself")
    run("export", out, out / "config.json", *AV1).one_line_error("is a file, not a folder")
    assert contents(out) == before


# The checkpoint.


def test_what_is_no_finished_checkpoint(
    checkpoint: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run("export", tmp_path / "none", out, *AV1).one_line_error("none is not a folder")
    source = checkpoint.parent / "source"
    run("export", source, out, *AV1).one_line_error("source", "not a finished checkpoint")
    run("export", whole, out, *AV1).one_line_error("not a finished checkpoint")
    with full_disk(monkeypatch, 20):
        run("convert", source, tmp_path / "half", "-q").one_line_error(KEPT)
    run("export", tmp_path / "half", out, *AV1).one_line_error("half", "not a finished checkpoint")
    assert not out.exists()


def test_a_foreign_target(checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    data = json.loads((other / "qwen3_ascend.json").read_text())
    body = {**data, "target": "ascend-a9"}
    del body["manifest_blake3"]
    sealed = {**body, "manifest_blake3": canonical_blake3(body)}
    (other / "qwen3_ascend.json").write_text(manifest_text(sealed))
    run("export", other, tmp_path / "out", *AV1).one_line_error("laid out for 'ascend-a9'")


Damage = Callable[[Path], object]

DAMAGE: dict[str, tuple[Damage, str]] = {
    "edited file": (lambda folder: (folder / "config.json").write_text("{}"), "config.json"),
    "no file": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "cut weights": (lambda folder: os.truncate(weights(folder), 9000), "truncated"),
    "no weights": (lambda folder: weights(folder).unlink(), "is missing"),
    "edited manifest": (lambda folder: flip(folder / "qwen3_ascend.json", 300), "_ascend.json"),
    "damaged codes": (
        lambda folder: flip_a_byte(folder, "model.layers.1.mlp.down_proj.weight"),
        "tensor model.layers.1.mlp.down_proj.weight",
    ),
    "damaged norm": (lambda folder: flip_a_byte(folder, "model.norm.weight"), "model.norm.weight"),
    "damaged embedding": (
        lambda folder: flip_a_byte(folder, "model.embed_tokens.weight"),
        "tensor model.embed_tokens.weight",
    ),
}  # fmt: skip


def weights(folder: Path) -> Path:
    return folder / "ascend-00001-of-00001.safetensors"


@pytest.mark.parametrize(("damage", "word"), DAMAGE.values(), ids=DAMAGE)
def test_no_damaged_byte_is_exported(
    damage: Damage, word: str, checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    """Nor is one staged: with the checkpoint mended, the same command ends with the right bytes."""
    folder, out = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint")), tmp_path / "out"
    damage(folder)
    run("export", folder, out, *AV1, "-q").one_line_error(word)
    assert not (out / RECORD_NAME).exists() and not [*out.glob("*.safetensors")]
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    assert run("export", folder, out, *AV1, "-q").code == 0
    assert contents(out) == contents(whole)


def test_budgets(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(OptionError, match="too little"):
        export_checkpoint(checkpoint, out, "ascendv1", WritingOptions(max_memory=1 << 20))
    with pytest.raises(OptionError, match="threads"):
        WritingOptions(threads=0)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    few = run("export", checkpoint, out, *AV1)
    few.one_line_error("not enough disk space", "of export in", "1.0 kB")
    assert not out.exists()


# The record.


def test_verify_finds_every_change(whole: Path, tmp_path: Path) -> None:
    assert run("verify", whole, "-q").code == 0
    for name in contents(whole):
        folder = Path(shutil.copytree(whole, tmp_path / name))
        size = (folder / name).stat().st_size
        for offset in (size // 3, size - 2):
            flip(folder / name, offset)
            found = run("verify", folder, "-q")
            assert found.code == 1 and found.err.startswith("Error: "), (name, offset)
            flip(folder / name, offset)
        assert verify_export(folder).ok
        (folder / name).unlink()
        assert run("verify", folder, "-q").code == 1, name


def test_verify_names_what_engines_would_load(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    shutil.copy(next(folder.glob("*.safetensors")), folder / "more.safetensors")
    (folder / "added_tokens.json").write_text("{}")
    found = run("verify", folder)
    assert found.code == 1
    assert "file more.safetensors is not in the record, and engines would load it" in found.err
    assert "file added_tokens.json is not in the manifest" in found.err
    run("verify", folder, "--accept").one_line_error("is an export")
    run("verify", folder, "--against", "x").one_line_error("is an export")


CHANGES: list[dict[str, Any]] = [
    {"version": 2},
    {"kind": "x"},
    {"format": ""},
    {"more": 1},
    {"files": {"a": {}}},
]


def test_the_record_says_where_it_comes_from(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    record, manifest = ExportRecord.read(whole), Manifest.read(checkpoint)
    said = json.loads((checkpoint / "qwen3_ascend.json").read_text())
    assert record.checkpoint == manifest.blake3 == said["manifest_blake3"]
    assert (record.repo, record.recipe, record.format) == ("source", "w8a8", "ascendv1")
    assert {*record.files, *record.weight_files, RECORD_NAME} == set(contents(whole))
    for change in CHANGES:
        data = json.loads((whole / RECORD_NAME).read_text()) | change
        del data["record_blake3"]
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        sealed = {**data, "record_blake3": canonical_blake3(data)}
        (folder / RECORD_NAME).write_text(manifest_text(sealed))
        with pytest.raises(CheckpointError, match="export again"):
            ExportRecord.read(folder)
