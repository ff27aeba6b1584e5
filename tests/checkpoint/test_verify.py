"""verify notices every changed byte, and says where."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.command_line import run
from support.folders import flip

from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.verify import changed_tensors, total_bytes, verify
from qwen3_ascend.files.safetensors import read_header


def test_a_sound_checkpoint(tiny_w8a8: Path) -> None:
    counted: list[int] = []
    verdict = verify(tiny_w8a8, counted.append)
    assert verdict.ok and verdict.problems == ()
    manifest = Manifest.read(tiny_w8a8)
    assert verdict.tensors == len(manifest.stored())
    assert sum(counted) == verdict.nbytes == total_bytes(manifest)
    done = run("verify", tiny_w8a8)
    assert (done.code, done.err) == (0, "") and "all as the manifest says" in done.out
    assert run("verify", tiny_w8a8, "--quiet").out == ""


def test_one_changed_bit_of_any_tensor(w8a8_copy: Path) -> None:
    """The first, the last and a random byte of every tensor."""
    shard = next(w8a8_copy.glob("ascend-*.safetensors"))
    for name, slot in read_header(shard).slots.items():
        for offset in {
            slot.start,
            slot.stop - 1,
            random.Random(name).randrange(slot.start, slot.stop),
        }:
            flip(shard, offset, bit=offset % 8)
            [problem] = changed_tensors(CheckpointReader(w8a8_copy), lambda nbytes: None, None)
            assert problem.startswith(f"tensor {name} in ")
            flip(shard, offset, bit=offset % 8)
    assert verify(w8a8_copy).ok


def test_the_command_names_the_tensor(w8a8_copy: Path) -> None:
    shard = next(w8a8_copy.glob("ascend-*.safetensors"))
    slots = read_header(shard).slots
    for name in random.Random(0).sample(sorted(slots), 3):
        flip(shard, slots[name].start + 1)
        for options in ([], ["--quiet"]):
            done = run("verify", w8a8_copy, *options)
            assert (done.code, done.out) == (1, "")
            done.one_line_error(f"tensor {name} in {shard.name}")
        flip(shard, slots[name].start + 1)
    first, last = min(slots), max(slots)
    flip(shard, slots[first].start)
    flip(shard, slots[last].start)
    done = run("verify", w8a8_copy)
    assert done.code == 1 and done.err.count("Error: tensor ") == 2
    assert first in done.err and last in done.err


def test_every_byte_of_a_shards_header_counts(w8a8_copy: Path) -> None:
    shard = next(w8a8_copy.glob("ascend-*.safetensors"))
    length = len(read_header(shard).raw)
    for offset in (0, 7, 8, 100, length // 2, length - 1):
        flip(shard, offset)
        run("verify", w8a8_copy).one_line_error(shard.name)
        flip(shard, offset)
    assert run("verify", w8a8_copy).code == 0


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
     "chat_template.jinja", "README.md"],
)  # fmt: skip
def test_files_beside_the_shards(name: str, w8a8_copy: Path) -> None:
    flip(w8a8_copy / name, (w8a8_copy / name).stat().st_size // 2)
    run("verify", w8a8_copy).one_line_error(f"file {name}", "differ")
    flip(w8a8_copy / name, (w8a8_copy / name).stat().st_size // 2)
    with (w8a8_copy / name).open("ab") as file:
        file.write(b"\n")
    run("verify", w8a8_copy).one_line_error(f"file {name}", "differ")
    (w8a8_copy / name).unlink()
    run("verify", w8a8_copy).one_line_error(f"file {name}", "missing")


def test_a_shard_that_is_short_long_or_gone(w8a8_copy: Path) -> None:
    shard = next(w8a8_copy.glob("ascend-*.safetensors"))
    data = shard.read_bytes()
    for broken in (data[:-1], data + b"\0", data[:100], b""):
        shard.write_bytes(broken)
        run("verify", w8a8_copy).one_line_error(shard.name)
        run("generate", w8a8_copy, "-p", "x").one_line_error(shard.name)
    shard.unlink()
    run("verify", w8a8_copy).one_line_error(shard.name, "missing")


def test_a_foreign_file_is_nobodys_business(w8a8_copy: Path) -> None:
    (w8a8_copy / "notes.txt").write_text("mine")
    assert run("verify", w8a8_copy).code == 0
