"""What is in a folder, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3_ascend.checkpoint.manifest import MANIFEST_NAME, canonical_blake3, manifest_text
from qwen3_ascend.checkpoint.reader import CheckpointReader


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by its path there.

    The lock of a conversion is left out: it says who works there, not what is there.
    """
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parts[-2:] != (".partial", "lock")
    }


def finished_weights(out: Path) -> dict[str, bytes]:
    """The files of weights of a conversion, which has to be complete."""
    assert (out / "qwen3_ascend.json").is_file(), "there is no manifest"
    assert not (out / ".partial").exists(), "the conversion is not finished"
    return {name: data for name, data in contents(out).items() if name.endswith(".safetensors")}


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Changes one bit of a byte of a file; twice, and it is as it was."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def flip_a_byte(folder: Path, name: str) -> None:
    """Changes one byte in the middle of a stored tensor of a checkpoint."""
    reader = CheckpointReader(folder)
    file = folder / reader.manifest.stored()[name].file
    slot = reader._files[file.name].header.slots[name]
    flip(file, (slot.start + slot.stop) // 2)


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest of a checkpoint, and makes its own hash fit."""
    path = folder / MANIFEST_NAME
    body = json.loads(path.read_text())
    del body["manifest_blake3"]
    change(body)
    path.write_text(manifest_text({**body, "manifest_blake3": canonical_blake3(body)}))
