"""Reading and writing the container: what the safetensors library writes we read, and the other
way round; a header that cannot be true is refused before anything is allocated."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.safetensors import (
    DTYPES,
    Form,
    MappedFile,
    build_header,
    read_header,
    tensor_nbytes,
)

GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def container(header: Any, data: bytes = bytes(32), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def changed(name: str, **fields: Any) -> dict[str, Any]:
    header = copy.deepcopy(GOOD)
    header[name] |= fields
    return header


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    numbers = torch.randn(64)
    tensors = {
        name: numbers.to(dtype).reshape(8, 8)
        for name, dtype in DTYPES.items()
        if not name.startswith("F8")
    }
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    file = MappedFile(tmp_path / "x")
    assert set(file.header.slots) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(file.tensor(name), tensor), name
        assert len(file.raw(name)) == tensor.nbytes


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 5), "ü": torch.randint(0, 9, (7,), dtype=torch.int8)}
    header = build_header({n: Form(t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    assert len(header.raw) % 64 == 0
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    (tmp_path / "x").write_bytes(header.raw + data)
    loaded = load_file(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert read_header(tmp_path / "x") == header


def test_data_that_is_not_aligned(tmp_path: Path) -> None:
    """Old writers did not pad the header, so that a tensor may begin at any byte."""
    for padding in range(8):
        text = json.dumps(GOOD).encode() + b" " * padding
        data = (
            torch.arange(6.0).numpy().tobytes()
            + torch.ones(4).bfloat16().view(torch.int16).numpy().tobytes()
        )
        (tmp_path / "x").write_bytes(container(text, data))
        file = MappedFile(tmp_path / "x")
        assert file.tensor("a").flatten().tolist() == [0, 1, 2, 3, 4, 5]
        assert file.tensor("b").float().tolist() == [1, 1, 1, 1]


def test_a_tensor_cannot_change_the_file(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    MappedFile(tmp_path / "x").tensor("x").fill_(7)
    assert (tmp_path / "x").read_bytes() == before


LIES = {
    "empty file": b"",
    "no header": b"\x05\x00",
    "huge length": container(GOOD, length=1 << 62),
    "length beyond the file": container(GOOD, length=5000),
    "length above the limit": container(GOOD, length=100_000_001),
    "not json": container(b"{nonsense"),
    "not utf-8": container(b'{"\xff\xfe": 1}'),
    "deeply nested": container(b"[" * 100_000),
    "not an object": container([GOOD]),
    "entry is no object": container({"a": 7}),
    "unknown dtype": container(changed("a", dtype="F7")),
    "dtype is a list": container(changed("a", dtype=["F32"])),
    "no shape": container({"a": {"dtype": "F32", "data_offsets": [0, 32]}}),
    "negative dimension": container(changed("a", shape=[-2, -3])),
    "negative offset": container(changed("a", data_offsets=[-24, 0])),
    "backward offsets": container(changed("a", data_offsets=[24, 0])),
    "fractional dimension": container(changed("a", shape=[2.0, 3])),
    "boolean dimension": container(changed("a", shape=[True, 6])),
    "text dimension": container(changed("a", shape="23")),
    "three offsets": container(changed("a", data_offsets=[0, 12, 24])),
    "shape of another size": container(changed("a", shape=[2, 4])),
    "astronomic shape": container(changed("a", shape=[1 << 40, 1 << 40])),
    "overlap": container(changed("b", data_offsets=[20, 28])),
    "gap": container(changed("b", data_offsets=[28, 36]), bytes(36)),
    "same bytes twice": container(changed("b", dtype="F32", shape=[6], data_offsets=[0, 24])),
    "out of range": container(GOOD, bytes(31)),
    "trailing bytes": container(GOOD, bytes(33)),
    "duplicate name": container(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        b'"a":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}}'
    ),
    "duplicate key in an entry": container(
        b'{"a":{"dtype":"F32","dtype":"I32","shape":[8],"data_offsets":[0,32]}}'
    ),
}


@pytest.mark.parametrize("raw", LIES.values(), ids=LIES)
def test_lying_headers_are_refused(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lying.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="lying.safetensors"):
        MappedFile(path)


def test_the_honest_header_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(container(GOOD))
    assert set(read_header(tmp_path / "x").slots) == {"a", "b"}


def test_missing_file_and_missing_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        MappedFile(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        MappedFile(tmp_path)
    (tmp_path / "x").write_bytes(container(GOOD))
    with pytest.raises(CheckpointError, match="holds no tensor c"):
        MappedFile(tmp_path / "x").tensor("c")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4"]) | JUNK,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | JUNK,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JUNK,
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.sampled_from("abc"), ENTRIES | JUNK) | JUNK)
def test_any_header_is_refused_or_true(header: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(container(header, bytes(40)))
    try:
        file = MappedFile(path)
    except CheckpointError:
        return
    covered = sorted((slot.start, slot.stop) for slot in file.header.slots.values())
    assert sum(stop - start for start, stop in covered) == 40
    for name, slot in file.header.slots.items():
        assert slot.nbytes == tensor_nbytes(slot.dtype, slot.shape)
        assert tuple(file.tensor(name).shape) == slot.shape
