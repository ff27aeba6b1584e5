"""The manifest: what it records is true, and one that was changed is not believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import run
from support.equivalent import equivalent

from qwen3_ascend import convert_checkpoint
from qwen3_ascend.checkpoint.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    canonical_blake3,
    manifest_text,
)
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.hashing import bytes_blake3
from qwen3_ascend.version import __version__


def stored_json(folder: Path) -> dict[str, Any]:
    data = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


def rewrite(folder: Path, data: dict[str, Any], *, honest_hash: bool) -> None:
    if honest_hash:
        body = {key: value for key, value in data.items() if key != "manifest_blake3"}
        data = {**body, "manifest_blake3": canonical_blake3(body)}
    (folder / MANIFEST_NAME).write_text(manifest_text(data), encoding="utf-8")


def test_what_it_says(tiny_w8a8: Path, tiny_source: Path) -> None:
    data = stored_json(tiny_w8a8)
    assert (
        (data["format"], data["format_version"]) == (FORMAT, FORMAT_VERSION) == ("qwen3-ascend", 1)
    )
    assert data["tool_version"] == __version__
    assert data["recipe"]["name"] == "w8a8"
    assert data["recipe_blake3"] == canonical_blake3(data["recipe"])
    source = data["source"]
    raw = (tiny_source / "model.safetensors").read_bytes()
    assert source["files"] == {"model.safetensors": {"size": len(raw), "sha256": None}}
    assert source["tensors"] == {}
    assert source["repo"] == "tiny-qwen3" and source["revision"] is None
    assert source["ignored"] == {}
    qkv = data["linears"]["model.layers.0.self_attn.qkv_proj"]
    assert qkv["shape"] == [1024, 256]
    prefix = "model.layers.0.self_attn"
    assert qkv["parts"] == [
        [f"{prefix}.q_proj", 512],
        [f"{prefix}.k_proj", 256],
        [f"{prefix}.v_proj", 256],
    ]
    assert qkv["layout"] == {"format": "nz", "nz_of": "KN", "c0": 32, "per_word": 1}
    assert qkv["scheme"] == {"name": "w8a8"} and qkv["cut"] == "outputs"
    assert 30 < qkv["sqnr_db"] < 60
    assert data["linears"]["model.layers.0.mlp.down_proj"]["cut"] == "inputs"


def test_every_hash_is_of_the_bytes(tiny_w8a8: Path) -> None:
    manifest = Manifest.read(tiny_w8a8)
    shards = {name: load_file(tiny_w8a8 / name) for name in manifest.weight_files}
    for name, entry in manifest.stored().items():
        tensor = shards[entry.file][name]
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape)
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert bytes_blake3(data) == entry.blake3, name
    for name, file in manifest.files.items():
        data = (tiny_w8a8 / name).read_bytes()
        assert (len(data), bytes_blake3(data)) == (file.size, file.blake3), name
    on_disk = {path.name for path in tiny_w8a8.iterdir()}
    assert on_disk == {*manifest.files, *manifest.weight_files, MANIFEST_NAME}


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-plain"])
def test_error_figures_are_those_of_the_bytes(
    recipe: str, tiny_source: Path, tmp_path: Path
) -> None:
    """Against the source, after the transforms of the recipe."""
    manifest = convert_checkpoint(tiny_source, tmp_path / "out", recipe)
    source = load_file(tiny_source / "model.safetensors")
    reader = CheckpointReader(tmp_path / "out")
    weights = equivalent(source, manifest.model, manifest.transforms)
    for name, entry in manifest.linears.items():
        stacked = ["lm_head"] if name == "lm_head" else [part for part, _ in entry.parts]
        weight = torch.cat([weights[f"{part}.weight"] for part in stacked]).double()
        noise = weight - reader.linear(name).dequantize().double()
        figure = 10 * torch.log10(weight.square().sum() / noise.square().sum())
        assert entry.sqnr_db == pytest.approx(float(figure), abs=0.0051), name


def test_round_trip(tiny_w8a8: Path) -> None:
    manifest = Manifest.read(tiny_w8a8)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert json.loads(manifest.text()) == stored_json(tiny_w8a8)
    shown = run("inspect", tiny_w8a8, "--json")
    assert json.loads(shown.out) == stored_json(tiny_w8a8)


def put(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def edit(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return edit


QKV = ("linears", "model.layers.0.self_attn.qkv_proj")
NORM = ("tensors", "model.norm.weight")

EDITS = {
    "model": put(5e-6, "model", "rms_norm_eps"),
    "layout": put("NK", *QKV, "layout", "nz_of"),
    "scheme": put({"name": "bf16"}, *QKV, "scheme"),
    "sqnr": put(99.0, *QKV, "sqnr_db"),
    "hash of a tensor": put("0" * 64, *NORM, "blake3"),
    "revision": put("main", "source", "revision"),
    "a new key": put(1, "remark"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_manifest_is_refused(
    edit: Callable[[dict[str, Any]], None], w8a8_copy: Path
) -> None:
    data = stored_json(w8a8_copy)
    edit(data)
    rewrite(w8a8_copy, data, honest_hash=False)
    for command in (["inspect"], ["verify"], ["generate", "-p", "x"]):
        done = run(command[0], w8a8_copy, *command[1:])
        done.one_line_error(MANIFEST_NAME, "changed after it was written")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(version: object, w8a8_copy: Path) -> None:
    data = stored_json(w8a8_copy) | {"format_version": version}
    rewrite(w8a8_copy, data, honest_hash=True)
    run("generate", w8a8_copy, "-p", "x").one_line_error("format version", repr(version))


def test_another_format_is_refused(w8a8_copy: Path) -> None:
    rewrite(w8a8_copy, stored_json(w8a8_copy) | {"format": "gguf"}, honest_hash=True)
    run("inspect", w8a8_copy).one_line_error("'gguf'")


# With a hash that agrees: what a faulty writer, or somebody who means harm, could produce.
FORGERIES = {
    "unknown scheme": put({"name": "w2a2"}, *QKV, "scheme"),
    "unknown parameter of a scheme": put({"name": "w8a8", "group": 3}, *QKV, "scheme"),
    "another target": put("ascend-310p", "target"),
    "scheme of other tensors": put({"name": "bf16"}, *QKV, "scheme"),
    "unknown cut": put("diagonal", *QKV, "cut"),
    "unknown layout": put({"format": "zn"}, *QKV, "layout"),
    "layout of another shape": put({"format": "nd"}, *QKV, "layout"),
    "shape with one dimension": put([1024], *QKV, "shape"),
    "shape of another linear": put([1024, 512], *QKV, "shape"),
    "no tensors": put({}, *QKV, "tensors"),
    "file that is not there": put("ascend-00009-of-00009.safetensors", *NORM, "file"),
    "type of another tensor": put("F32", *NORM, "dtype"),
    "unknown type": put("F7", *NORM, "dtype"),
    "shape of another tensor": put([128], *NORM, "shape"),
    "shards are a list": put([], "weight_files"),
    "no shards": put({}, "weight_files"),
    "path out of the folder": put(
        {"size": 1, "blake3": "0" * 64}, "weight_files", "../x.safetensors"
    ),
    "shard with another size": put(7, "weight_files", "ascend-00001-of-00001.safetensors", "size"),
    "no rope": put(None, "model", "rope"),
    "unknown model key": put(1, "model", "windows"),
    "theta below zero": put(-1e4, "model", "rope", "theta"),
    "epsilon of zero": put(0.0, "model", "rms_norm_eps"),
    "hash of another recipe": put("0" * 64, "recipe_blake3"),
    "recipe without a name": put("", "recipe", "name"),
    "hash that is none": put("0", *NORM, "blake3"),
    "hub that is none": put("github", "source", "hub"),
    "version that is no number": put(True, "format_version"),
    "no source": put(None, "source"),
}


@pytest.mark.parametrize("edit", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_manifest_is_refused(
    edit: Callable[[dict[str, Any]], None], w8a8_copy: Path
) -> None:
    data = stored_json(w8a8_copy)
    edit(data)
    rewrite(w8a8_copy, data, honest_hash=True)
    with pytest.raises(CheckpointError):
        CheckpointReader(w8a8_copy)
    run("generate", w8a8_copy, "-p", "x").one_line_error()


@pytest.mark.parametrize(
    ("forgery", "place"),
    {
        "unknown scheme": "linears.model.layers.0.self_attn.qkv_proj.scheme: unknown scheme 'w2a2'",
        "unknown type": "tensors.model.norm.weight.dtype: 'F7'",
        "shape with one dimension": "linears.model.layers.0.self_attn.qkv_proj.shape: ",
        "unknown model key": "model has the key 'windows'",
        "theta below zero": "model.rope.theta: ",
    }.items(),
)
def test_a_forgery_is_named_with_its_place(forgery: str, place: str, w8a8_copy: Path) -> None:
    data = stored_json(w8a8_copy)
    FORGERIES[forgery](data)
    rewrite(w8a8_copy, data, honest_hash=True)
    run("inspect", w8a8_copy).one_line_error(MANIFEST_NAME, place)


def test_folders_without_a_manifest(tmp_path: Path, tiny_source: Path) -> None:
    for command in (["inspect"], ["verify"], ["generate", "-p", "x"]):
        run(command[0], tiny_source, *command[1:]).one_line_error(MANIFEST_NAME, "convert")
        run(command[0], tmp_path / "no", *command[1:]).one_line_error("is not a folder")
    for text in ("", "[]", '{"format": ', "[" * 100_000, "\xff"):
        (tmp_path / MANIFEST_NAME).write_text(text, encoding="latin-1")
        run("inspect", tmp_path).one_line_error(MANIFEST_NAME)
