"""Sources that lie: about names, headers and sizes. They are refused in one line, early, and
nothing is written outside the output folder and the cache."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny_models
from support.command_line import Run, run
from support.folders import contents
from support.hub_client import REPO, talk_to
from support.hub_server import HubServer

MODEL = "model.safetensors"
FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

HOSTILE_NAMES = [
    "../evil.safetensors",
    "/absolute/evil.safetensors",
    "sub/evil.safetensors",
    "..\\evil.safetensors",
    "C:\\evil.safetensors",
    "evil\0.safetensors",
    "..",
    "",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.write(tmp_path / "inside" / "model", shards=2)


@pytest.fixture
def hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    talk_to(hub, tmp_path / "inside" / "cache", monkeypatch)
    yield hub


def convert(model: Path | str, out: Path) -> Run:
    return run("convert", model, out, "--quiet", "--retries", "0")


def with_header(header: Any, length: int | None = None, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def outside(tmp_path: Path) -> set[str]:
    """What lies beside the only folder that may be written to."""
    return {path.name for path in tmp_path.iterdir()}


# Names


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("remote", [False, True], ids=["folder", "hub"])
def test_an_index_that_names_files_elsewhere(
    hub: HubServer, folder: Path, tmp_path: Path, name: str, remote: bool
) -> None:
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shutil.copyfile(folder / "model-00001-of-00002.safetensors", tmp_path / "evil.safetensors")
    listed["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(listed))
    before = contents(tmp_path)
    if remote:
        extra = {name: b"evil"} if name and "\0" not in name else {}
        hub.add_model(REPO, folder, extra=extra)
    done = convert(REPO if remote else folder, tmp_path / "inside" / "out")
    done.one_line_error("model.norm.weight")
    assert not (tmp_path / "inside" / "out").exists()
    after = contents(tmp_path)
    assert {name for name in after if not name.startswith("inside/cache/")} == set(before)


def test_a_listing_with_names_that_lead_elsewhere(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    """Whatever else a repository lists, only plain names of its root are fetched."""
    extra = {name: b"{}" for name in HOSTILE_NAMES if name and "\0" not in name}
    extra |= {"../generation_config.json": b"{}", "sub/tokenizer.json": b"{}", "LICENSE\n": b"x"}
    hub.add_model(REPO, folder, extra=extra)
    done = convert(REPO, tmp_path / "inside" / "out")
    assert done.code == 0, done.err
    assert outside(tmp_path) == {"inside"}
    assert not (tmp_path / "inside" / "generation_config.json").exists()
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("low_disk", [(), ("--low-disk",)], ids=["cache", "low-disk"])
def test_tensor_names_are_no_paths(
    hub: HubServer, tmp_path: Path, low_disk: tuple[str, ...]
) -> None:
    data = tiny_models.config()
    weights = tiny_models.tensors(data)
    weights["../../evil"] = weights["model.norm.weight"].clone()
    model = tiny_models.write(tmp_path / "inside" / "model", data, weights)
    hub.add_model(REPO, model)
    out = tmp_path / "inside" / "out"
    for source in (str(model), REPO):
        run("convert", source, out, "--quiet", *low_disk).one_line_error("../../evil")
    assert outside(tmp_path) == {"inside"} and not out.exists()


def test_names_that_would_paint_the_terminal(tmp_path: Path) -> None:
    data = tiny_models.config()
    weights = tiny_models.tensors(data)
    weights["\x1b[2J\n" + "x" * 9000] = weights["model.norm.weight"].clone()
    model = tiny_models.write(tmp_path / "inside" / "model", data, weights)
    line = convert(model, tmp_path / "inside" / "out").one_line_error("?[2J")
    assert line.strip().isprintable() and len(line) < 3000


def test_links_in_a_folder_are_read(folder: Path, tmp_path: Path) -> None:
    """A cache of links is a normal local folder; reading through a link harms nobody."""
    links = tmp_path / "inside" / "links"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    before = contents(folder)
    done = convert(links, tmp_path / "inside" / "out")
    assert done.code == 0, done.err
    assert contents(folder) == before


def test_links_in_the_output_are_not_followed(folder: Path, tmp_path: Path) -> None:
    """A link in the place of an output file is replaced, not written through."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    out = tmp_path / "inside" / "out"
    out.mkdir()
    for name in ("ascend-00001-of-00001.safetensors", "config.json", "README.md"):
        (out / name).symlink_to(victim)
    done = run("convert", folder, out, "--overwrite", "--quiet")
    assert done.code == 0, done.err
    assert victim.read_bytes() == b"precious"
    assert not [path for path in out.iterdir() if path.is_symlink()]


# Headers

HUGE = 1 << 62
NORM = {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}
LIES: dict[str, bytes] = {
    "nothing": b"",
    "five bytes": b"\x01\0\0\0\0",
    "length beyond the file": with_header(b"{}", length=1 << 20),
    "length beyond all files": with_header(b"{}", length=(1 << 64) - 1),
    "length 99 MB": with_header(b"{}", length=99_000_000),
    "no JSON": with_header(b"}{"),
    "not UTF-8": with_header(b'{"\xff\xfe": 1}'),
    "a list": with_header([NORM]),
    "deep nesting": with_header(b"[" * 60_000),
    "deep objects": with_header(b'{"a":' * 60_000),
    "long number": with_header(b'{"a": ' + b"9" * 60_000 + b"}"),
    "huge shape": with_header({"a": {**NORM, "shape": [HUGE, HUGE]}}, data=bytes(128)),
    "huge claim": with_header({"a": {**NORM, "shape": [HUGE], "data_offsets": [0, 2 * HUGE]}}),
    "beyond the end": with_header({"a": {**NORM, "data_offsets": [128, 256]}}, data=bytes(128)),
    "negative": with_header({"a": {**NORM, "data_offsets": [-128, 0]}}, data=bytes(128)),
    "reversed": with_header({"a": {**NORM, "data_offsets": [128, 0]}}, data=bytes(128)),
    "negative shape": with_header({"a": {**NORM, "shape": [-8, -8]}}, data=bytes(128)),
    "floating": with_header({"a": {**NORM, "data_offsets": [0.0, 128.0]}}, data=bytes(128)),
    "not a number": with_header(b'{"a": {"dtype": "BF16", "shape": [NaN], "data_offsets": [0,0]}}'),
    "true": with_header({"a": {**NORM, "shape": [True, 64]}}, data=bytes(128)),
    "no type": with_header({"a": {"shape": [64], "data_offsets": [0, 128]}}, data=bytes(128)),
    "unknown type": with_header({"a": {**NORM, "dtype": "Q4_K"}}, data=bytes(128)),
    "type is a list": with_header({"a": {**NORM, "dtype": ["BF16"]}}, data=bytes(128)),
    "entry is a text": with_header({"a": "BF16"}, data=bytes(128)),
    "one offset": with_header({"a": {**NORM, "data_offsets": [0]}}, data=bytes(128)),
    "overlap": with_header(
        {"a": NORM, "b": {**NORM, "data_offsets": [64, 192]}}, data=bytes(192)
    ),
    "the same bytes": with_header({"a": NORM, "b": NORM}, data=bytes(128)),
    "a gap": with_header({"a": NORM, "b": {**NORM, "data_offsets": [256, 384]}}, data=bytes(384)),
    "a name twice": with_header(
        b'{"a": %b, "a": %b}' % ((json.dumps(NORM).encode(),) * 2), data=bytes(128)
    ),
    "bytes left over": with_header({"a": NORM}, data=bytes(4096)),
    "missing bytes": with_header({"a": NORM}, data=bytes(127)),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("remote", [False, True], ids=["folder", "hub"])
def test_lying_headers(hub: HubServer, tmp_path: Path, lie: str, remote: bool) -> None:
    model = tiny_models.write(tmp_path / "inside" / "model", tokenizer=False)
    (model / MODEL).write_bytes(LIES[lie])
    hub.add_model(REPO, model)
    out = tmp_path / "inside" / "out"
    convert(REPO if remote else model, out).one_line_error(MODEL)
    assert not out.exists() and outside(tmp_path) == {"inside"}
    if remote:  # nothing but the beginning was asked for
        assert all(request.range for request in hub.seen("/cdn/*", "GET"))


def test_a_tensor_in_two_files(folder: Path, tmp_path: Path) -> None:
    """The index decides; a second tensor of the name is no way to change a model unseen."""
    first, second = sorted(folder.glob("model-*.safetensors"))
    header, data = header_of(second)
    name = next(iter(header_of(first)[0]))
    victim = next(other for other in header if other != "__metadata__")
    header[name] = header.pop(victim)
    second.write_bytes(with_header(header, data=data))
    convert(folder, tmp_path / "inside" / "out").one_line_error()


@FEW
@given(raw=st.binary(max_size=200), length=st.none() | st.integers(0, (1 << 64) - 1))
@pytest.mark.parametrize("remote", [False, True], ids=["folder", "hub"])
def test_any_header_at_all(
    hub: HubServer, tmp_path: Path, raw: bytes, length: int | None, remote: bool
) -> None:
    model = tiny_models.write(tmp_path / "inside" / "model", tokenizer=False)
    (model / MODEL).write_bytes(with_header(raw, length))
    if remote:
        hub.add_model(REPO, model)
    convert(REPO if remote else model, tmp_path / "inside" / "out").one_line_error()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@FEW
@given(data=st.data())
def test_any_change_of_one_entry(tmp_path: Path, data: st.DataObject) -> None:
    """One value of a sound header becomes any other; the rest of the file is sound."""
    model = tiny_models.write(tmp_path / "inside" / "model", tokenizer=False)
    header, rest = header_of(model / MODEL)
    name = data.draw(st.sampled_from([key for key in header if key != "__metadata__"]))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    numbers = st.lists(st.integers(-(1 << 70), 1 << 70), max_size=4)
    value = data.draw(JSON | numbers | st.sampled_from(["F32", "I8", "U8", "BOOL"]))
    if header[name][field] == value:
        return
    header[name][field] = value
    (model / MODEL).write_bytes(with_header(header, data=rest))
    convert(model, tmp_path / "inside" / "out").one_line_error(name)


@FEW
@given(weight_map=JSON | st.dictionaries(st.text(max_size=12), st.text(max_size=12), max_size=4))
def test_any_index_at_all(tmp_path: Path, weight_map: Any) -> None:
    model = tmp_path / "inside" / "model"
    if not model.is_dir():
        tiny_models.write(model, shards=2, tokenizer=False)
    index = {"weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(model, tmp_path / "inside" / "out").one_line_error()
    assert outside(tmp_path) == {"inside"}
