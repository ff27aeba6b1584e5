"""The writer: OUT holds the old checkpoint, or none, or the new one, and never half of one."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest
import torch
from support import tiny_models
from support.command_line import run
from support.folders import contents

from qwen3_ascend import ConvertOptions, convert_checkpoint
from qwen3_ascend.checkpoint.manifest import MANIFEST_NAME, Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.verify import verify


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_models.write(tmp_path / "source")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A model that is refused when nearly everything else is converted."""
    weights = tiny_models.tensors(tiny_models.config())
    weights["lm_head.weight"][-1, -1] = torch.nan
    return tiny_models.write(tmp_path / "damaged", weights=weights)


def test_nothing_is_left_over(source: Path, tmp_path: Path) -> None:
    manifest = convert_checkpoint(source, tmp_path / "out")
    assert manifest == Manifest.read(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {MANIFEST_NAME, *manifest.weight_files, *manifest.files}


def test_a_failure_leaves_no_folder(damaged: Path, tmp_path: Path) -> None:
    run("convert", damaged, tmp_path / "out").one_line_error("lm_head.weight")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    run("convert", damaged, tmp_path / "empty").one_line_error("lm_head.weight")
    left = tmp_path / "empty"
    assert not left.exists() or not any(left.iterdir())


def test_a_full_folder_is_refused_and_untouched(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    run("convert", source, out).one_line_error("not empty", "--overwrite")
    assert contents(out) == {"notes.txt": b"mine"}


def test_overwrite_replaces_ours_and_keeps_the_rest(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_checkpoint(source, out, "bf16", options=ConvertOptions(max_file_bytes=20_000))
    assert len(list(out.glob("ascend-*.safetensors"))) > 3
    (out / "notes.txt").write_text("mine")
    (out / "folder").mkdir()
    (out / "folder" / "x").write_text("also mine")
    done = run("convert", source, out, "--overwrite", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    manifest = Manifest.read(out)
    assert manifest.recipe["name"] == "w8a8"
    expected = {MANIFEST_NAME, *manifest.weight_files, *manifest.files, "notes.txt", "folder"}
    assert {path.name for path in out.iterdir()} == expected
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "folder" / "x").read_text() == "also mine"
    assert verify(out).ok


def test_overwrite_does_not_mix_two_models(source: Path, tmp_path: Path) -> None:
    """A chat template of the old model would be taken for the new one's."""
    out = tmp_path / "out"
    convert_checkpoint(source, out)
    assert (out / "chat_template.jinja").exists()
    (source / "chat_template.jinja").unlink()
    convert_checkpoint(source, out, options=ConvertOptions(overwrite=True))
    assert not (out / "chat_template.jinja").exists()
    assert "chat_template.jinja" not in Manifest.read(out).files


@pytest.mark.parametrize("ruin", ["edited", "not json", "another version"])
def test_overwrite_replaces_a_ruined_checkpoint(ruin: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_checkpoint(source, out)
    text = (out / MANIFEST_NAME).read_text()
    spoilt = {
        "edited": text.replace('"main"', '"x"').replace("tool_version", "tool"),
        "not json": text[:100],
        "another version": text.replace('"format_version": 1', '"format_version": 7'),
    }
    (out / MANIFEST_NAME).write_text(spoilt[ruin])
    convert_checkpoint(source, out, options=ConvertOptions(overwrite=True))
    assert verify(out).ok


def test_an_old_checkpoint_survives_a_failed_overwrite(
    source: Path, damaged: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert_checkpoint(source, out)
    before = contents(out)
    run("convert", damaged, out, "--overwrite").one_line_error("lm_head.weight")
    assert contents(out) == before
    run("convert", source, out, "--overwrite", "--recipe", "nope").one_line_error("nope")
    assert contents(out) == before


def test_a_stale_staging_folder_is_no_obstacle(source: Path, tmp_path: Path) -> None:
    staging = tmp_path / "out" / ".partial"
    staging.mkdir(parents=True)
    (staging / "ascend-00001-of-00009.safetensors").write_bytes(b"half")
    convert_checkpoint(source, tmp_path / "out")
    assert verify(tmp_path / "out").ok
    assert not staging.exists()


def test_two_at_once(source: Path, tmp_path: Path) -> None:
    staging = tmp_path / "out" / ".partial"
    staging.mkdir(parents=True)
    with (staging / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("convert", source, tmp_path / "out").one_line_error("another process")
    assert run("convert", source, tmp_path / "out", "-q").code == 0


def test_outputs_that_cannot_be_folders(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    run("convert", source, tmp_path / "file").one_line_error("is a file")
    run("convert", source, tmp_path / "file", "--overwrite").one_line_error("is a file")
    run("convert", source, tmp_path / "file" / "out").one_line_error("cannot write")
    assert (tmp_path / "file").read_text() == "mine"
    run("convert", source, "/proc/out").one_line_error("/proc/out")


def test_the_source_is_not_its_own_output(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    (tmp_path / "link").symlink_to(source)
    for output in (source, tmp_path / "link", source / ".." / "source"):
        run("convert", source, output, "--overwrite").one_line_error("is the source itself")
        run("convert", source, output).one_line_error()
    assert contents(source) == before


def test_the_source_is_not_changed(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    convert_checkpoint(source, tmp_path / "out")
    assert contents(source) == before


def test_reading_needs_no_writing(tiny_w8a8: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_w8a8, tmp_path / "copy"))
    for path in copy.iterdir():
        path.chmod(0o444)
    copy.chmod(0o555)
    try:
        reader = CheckpointReader(copy)
        assert reader.linear("model.layers.0.mlp.down_proj").shape == (256, 768)
    finally:
        copy.chmod(0o755)
