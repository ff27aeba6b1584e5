"""Weights are hashed before they are handed out: in order, ahead, and each byte once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny_models
from support.folders import flip

from qwen3_ascend import ConvertOptions, convert_checkpoint
from qwen3_ascend.checkpoint import checked
from qwen3_ascend.checkpoint.checked import CheckedWeights
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.safetensors import read_header
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.model.loader import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files, of random weights; who damages it mends it."""
    root = tmp_path_factory.mktemp("checked")
    source = tiny_models.write(root / "source", tiny_models.config(attention_bias=True))
    convert_checkpoint(source, root / "out", "w8a8", ConvertOptions(max_file_bytes=50_000))
    return root / "out"


def offsets(folder: Path) -> list[tuple[str, Path, int]]:
    """Name, file, and the place of the first and last byte of every stored tensor."""
    return [
        (name, path, at)
        for path in sorted(folder.glob("ascend-*.safetensors"))
        for name, slot in read_header(path).slots.items()
        for at in (slot.start, slot.stop - 1)
    ]


@pytest.mark.parametrize("ahead", [1, 1 << 30])
def test_a_flipped_byte_of_any_tensor_is_refused(
    folder: Path, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked, "AHEAD_BYTES", ahead)

    def read() -> None:
        reader = CheckpointReader(folder)
        with CheckedWeights(reader) as weights:
            load_model(weights, backends.reference_backend(reader.config))

    for name, path, at in offsets(folder):
        flip(path, at, bit=at % 8)
        with pytest.raises(CheckpointError) as error:
            read()
        flip(path, at, bit=at % 8)
        said = f"{folder}: tensor {name} in {path.name}: its bytes differ from the manifest"
        assert str(error.value) == said
    read()


def test_what_nobody_asks_for_is_checked_at_the_end(folder: Path) -> None:
    name, path, at = offsets(folder)[-1]
    reader = CheckpointReader(folder)
    flip(path, at)
    try:
        with pytest.raises(CheckpointError, match=name), CheckedWeights(reader) as weights:
            weights.tensor("model.embed_tokens.weight")
        with pytest.raises(RuntimeError, match="another"), CheckedWeights(reader):
            raise RuntimeError("another thing fails")  # and is not hidden
    finally:
        flip(path, at)


class Counting(CheckpointReader):
    """Notes which tensors are hashed and handed out, and how many bytes lie between the two."""

    def __init__(self, folder: Path, before: Callable[[str], None] = lambda name: None) -> None:
        super().__init__(folder)
        self.hashed: list[str] = []
        self.given: list[str] = []
        self.most_ahead = 0
        self._before, self._lock = before, threading.Lock()

    def blake3(self, name: str, file: str) -> str:
        self._before(name)
        with self._lock:
            self.hashed.append(name)
            stored = self.manifest.stored()
            ahead = sum(stored[each].nbytes for each in {*self.hashed} - {*self.given})
            self.most_ahead = max(self.most_ahead, ahead)
        return super().blake3(name, file)

    def tensor(self, name: str) -> torch.Tensor:
        self._give(name)
        return super().tensor(name)

    def linear(self, name: str) -> Linear:
        for suffix in self.manifest.linears[name].tensors:
            self._give(f"{name}.{suffix}")
        return super().linear(name)

    def _give(self, name: str) -> None:
        with self._lock:
            assert name in self.hashed
            self.given.append(name)


@pytest.mark.parametrize("threads", [1, 4])
def test_each_tensor_is_hashed_once_and_not_far_ahead(
    folder: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 20_000
    monkeypatch.setattr(checked, "AHEAD_BYTES", limit)
    reader = Counting(folder)
    stored = reader.manifest.stored()
    with CheckedWeights(reader, threads) as weights:
        load_model(weights, backends.reference_backend(reader.config))
    assert sorted(reader.hashed) == sorted(reader.given) == sorted(stored)
    largest = max(tensor.nbytes for tensor in stored.values())
    # The window, one tensor that exceeds it, and what a layer asks for out of the files' order.
    layer = sum(tensor.nbytes for name, tensor in stored.items() if ".layers.0." in name)
    assert reader.most_ahead <= limit + 2 * largest + layer < sum(t.nbytes for t in stored.values())


def test_hashing_and_copying_go_on_at_the_same_time(folder: Path) -> None:
    """While one tensor is handed out, a later one is hashed."""
    began, copying = threading.Event(), threading.Event()
    later = "model.layers.1.mlp.down_proj.weight"

    def before(name: str) -> None:
        if name == later:
            began.set()
            assert copying.wait(20)  # for the copy of an earlier one, which does not wait for this

    reader = Counting(folder, before)
    with CheckedWeights(reader, 2) as weights:
        weights.tensor("model.embed_tokens.weight")
        assert began.wait(20) and later not in reader.given
        copying.set()
    assert sorted(reader.hashed) == sorted(reader.manifest.stored())


def test_a_file_that_becomes_shorter_is_one_line(folder: Path, tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "out")
    path = next((tmp_path / "out").glob("ascend-*"))
    reader = CheckpointReader(tmp_path / "out")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match="became shorter"), CheckedWeights(reader):
        pass
