"""Whatever happens to the folder, `verify` says where, opening it refuses, and nothing crashes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny_models
from support.command_line import run

from qwen3_ascend import ConvertOptions, convert_checkpoint
from qwen3_ascend.checkpoint.checked import CheckedWeights
from qwen3_ascend.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    canonical_blake3,
    manifest_text,
)
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.verify import verify
from qwen3_ascend.errors import CheckpointError, UserError
from qwen3_ascend.files.safetensors import read_header

FUZZ = settings(
    max_examples=60, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards. Each example mends what it has damaged."""
    root = tmp_path_factory.mktemp("corruption")
    data = tiny_models.config(num_hidden_layers=2, attention_bias=True)
    source = tiny_models.write(root / "source", data)
    convert_checkpoint(source, root / "out", options=ConvertOptions(max_file_bytes=50_000))
    assert len(list((root / "out").glob("ascend-*"))) > 2
    return root / "out"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def mended(folder: Path) -> Iterator[None]:
    """Puts every file back as it was."""
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    try:
        yield
    finally:
        for name in names(folder):
            if name not in before:
                (folder / name).unlink()
        for name, data in before.items():
            if not (folder / name).is_file() or (folder / name).read_bytes() != data:
                (folder / name).write_bytes(data)


def told(folder: Path, *mentions: str) -> None:
    """`verify` fails, in lines that name one of these."""
    done = run("verify", folder)
    assert done.code == 1 and done.out == ""
    lines = done.err.splitlines()
    assert lines and all(line.startswith("Error: ") for line in lines), done.err
    pattern = "|".join(re.escape(mention) for mention in mentions)
    assert any(re.search(pattern, line) for line in lines), done.err


def refused(folder: Path) -> None:
    """Opening it fails, or at the latest hashing its tensors."""
    with pytest.raises(CheckpointError):
        check(CheckpointReader(folder))


def check(reader: CheckpointReader) -> None:
    """Hashes every tensor, though nobody asks for one."""
    with CheckedWeights(reader):
        pass


@FUZZ
@given(st.data())
def test_any_flipped_bit(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names(folder)))
    content = bytearray((folder / name).read_bytes())
    offset = data.draw(st.integers(0, len(content) - 1))
    content[offset] ^= 1 << data.draw(st.integers(0, 7))
    with mended(folder):
        (folder / name).write_bytes(content)
        told(folder, name)
        refused(folder)


@FUZZ
@given(st.data())
def test_the_tensor_is_named(folder: Path, data: st.DataObject) -> None:
    shard = data.draw(st.sampled_from([n for n in names(folder) if n.endswith(".safetensors")]))
    tensor, slot = data.draw(st.sampled_from(sorted(read_header(folder / shard).slots.items())))
    content = bytearray((folder / shard).read_bytes())
    content[data.draw(st.integers(slot.start, slot.stop - 1))] ^= 0x40
    with mended(folder):
        (folder / shard).write_bytes(content)
        told(folder, f"tensor {tensor} in {shard}: ")
        with pytest.raises(CheckpointError, match=re.escape(f"tensor {tensor} in {shard}")):
            check(CheckpointReader(folder))


@FUZZ
@given(st.data())
def test_any_other_length(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names(folder)))
    content = (folder / name).read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1) | st.just(len(content) - 1))
    more = data.draw(st.sampled_from([b"\0", b" x", content]))
    changed = data.draw(st.sampled_from([content[:cut], content + more]))
    with mended(folder):
        (folder / name).write_bytes(changed)
        told(folder, name)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            CheckpointReader(folder)


@FUZZ
@given(st.data())
def test_any_two_files_swapped(folder: Path, data: st.DataObject) -> None:
    first, second = data.draw(
        st.lists(st.sampled_from(names(folder)), min_size=2, max_size=2, unique=True)
    )
    with mended(folder):
        content = (folder / first).read_bytes()
        shutil.copyfile(folder / second, folder / first)
        (folder / second).write_bytes(content)
        told(folder, first, second)
        with pytest.raises(CheckpointError, match=f"{re.escape(first)}|{re.escape(second)}"):
            CheckpointReader(folder)


@FUZZ
@given(st.data())
def test_any_file_gone(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names(folder)))
    as_folder = data.draw(st.booleans())
    with mended(folder):
        (folder / name).unlink()
        if as_folder:
            (folder / name).mkdir()
        try:
            told(folder, name)
            with pytest.raises(CheckpointError, match=re.escape(name)):
                CheckpointReader(folder)
        finally:
            if as_folder:
                (folder / name).rmdir()


JUNK = (
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=8)
    | st.lists(st.integers(0, 3), max_size=3) | st.dictionaries(st.text(max_size=3), st.integers())
)  # fmt: skip


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document, containers included."""
    if path:
        yield path
    for key in (
        value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    ):
        yield from leaves(value[key], (*path, key))


def put(document: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = change(document[path[-1]])


def write(folder: Path, document: Any) -> None:
    text = manifest_text(document)
    (folder / MANIFEST_NAME).write_bytes(text.encode("utf-8", "replace"))


@FUZZ
@given(st.data(), JUNK)
def test_any_edited_manifest(folder: Path, data: st.DataObject, junk: Any) -> None:
    document = json.loads((folder / MANIFEST_NAME).read_text())
    path = data.draw(st.sampled_from([*leaves(document)]))
    before = json.dumps(document, sort_keys=True)
    put(document, path, lambda value: junk)
    if json.dumps(document, sort_keys=True) == before:
        return
    with mended(folder):
        write(folder, document)
        told(folder, MANIFEST_NAME)
        with pytest.raises(CheckpointError, match=MANIFEST_NAME):
            CheckpointReader(folder)


@settings(FUZZ, max_examples=300)
@given(st.data(), JUNK)
def test_any_forged_manifest(folder: Path, data: st.DataObject, junk: Any) -> None:
    """With its own hash made to fit: what can be derived is noticed, and nothing crashes."""
    document = json.loads((folder / MANIFEST_NAME).read_text())
    del document["manifest_blake3"]
    path = data.draw(st.sampled_from([*leaves(document)]))
    put(document, path, lambda value: junk)
    try:
        document["manifest_blake3"] = canonical_blake3(document)
    except ValueError:
        return
    with mended(folder):
        write(folder, document)
        try:
            reader = CheckpointReader(folder)
            check(reader)
            verdict = verify(folder)
        except UserError:
            return
        assert verdict.ok or all(isinstance(problem, str) for problem in verdict.problems)
        assert run("inspect", folder).code == 0


@pytest.mark.parametrize("section", ["linears", "tensors", "weight_files", "files"])
def test_a_forged_manifest_that_lacks_something(folder: Path, section: str) -> None:
    document = Manifest.read(folder).to_json()
    for name in [*document[section]]:
        body = {key: value for key, value in document.items() if key != "manifest_blake3"}
        body[section] = {key: value for key, value in body[section].items() if key != name}
        with mended(folder):
            write(folder, {**body, "manifest_blake3": canonical_blake3(body)})
            if section == "files" and name == "README.md":
                assert verify(folder).ok  # nobody loads it
            else:
                told(folder, name)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "..", "", "a\0b"])
@pytest.mark.parametrize("section", ["weight_files", "files"])
def test_names_cannot_leave_the_folder(folder: Path, section: str, name: str) -> None:
    document = Manifest.read(folder).to_json()
    body = {key: value for key, value in document.items() if key != "manifest_blake3"}
    body[section] = {**body[section], name: {"size": 1, "blake3": "0" * 64}}
    with mended(folder):
        write(folder, {**body, "manifest_blake3": canonical_blake3(body)})
        run("verify", folder).one_line_error("is not a plain file name")
        with pytest.raises(CheckpointError, match="plain file name"):
            CheckpointReader(folder)
