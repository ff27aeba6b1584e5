"""A quantized output projection: laid out like any linear, and parted from a tied embedding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from support.command_line import run
from support.equivalent import equivalent
from support.folders import contents

from qwen3_ascend import ConvertOptions, convert_checkpoint, load
from qwen3_ascend.checkpoint.architecture import EMBEDDING
from qwen3_ascend.checkpoint.linear import quantize
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import W8A8
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.checkpoint.verify import verify
from qwen3_ascend.convert.events import Events
from qwen3_ascend.files.hashing import bytes_blake3

RECIPE = "w8a8-head"
UNTIED = tiny_models.config()
TIED = tiny_models.config(tie_word_embeddings=True)


def model(folder: Path, **changes: Any) -> Path:
    return tiny_models.write(folder, tiny_models.config(**changes))


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_a_linear_like_any_other(tied: bool, tmp_path: Path) -> None:
    source = model(tmp_path / "source", tie_word_embeddings=tied)
    manifest = convert_checkpoint(source, tmp_path / "out", RECIPE)
    entry, weights = manifest.linears["lm_head"], tiny_models.tensors(TIED if tied else UNTIED)
    assert not manifest.model.tie_word_embeddings
    assert entry.layout == ASCEND_A2_A3.layouts["w8a8"] and entry.scheme == W8A8()
    assert entry.parts == ((EMBEDDING if tied else "lm_head", 320),)
    changed = equivalent(weights, manifest.model, manifest.transforms)
    reader = CheckpointReader(tmp_path / "out")
    expected = quantize(W8A8(), changed["lm_head.weight"], None, entry.layout)
    for suffix, tensor in reader.linear("lm_head").tensors.items():
        assert torch.equal(tensor, expected.tensors[suffix])
    embedding = changed[f"{EMBEDDING}.weight"].bfloat16()
    assert torch.equal(reader.tensor(f"{EMBEDDING}.weight"), embedding)
    assert verify(tmp_path / "out").ok
    assert run("verify", tmp_path / "out", "--against", source).code == 0
    assert "nothing to do" in run("convert", source, tmp_path / "out", "--recipe", RECIPE).err


def test_a_tied_head_counts_once_and_is_found_in_the_embedding(tmp_path: Path) -> None:
    source = model(tmp_path / "source", tie_word_embeddings=True)
    options = ConvertOptions(hash_source=True, threads=3)
    manifest = convert_checkpoint(source, tmp_path / "out", RECIPE, options)
    embedding = tiny_models.tensors(TIED)[f"{EMBEDDING}.weight"]
    digest = bytes_blake3(embedding.view(torch.uint8).numpy().tobytes())
    assert manifest.source.tensors[f"{EMBEDDING}.weight"] == digest
    assert "lm_head.weight" not in manifest.source.tensors
    dry = run("convert", source, tmp_path / "x", "--recipe", RECIPE, "--dry-run", "--json").out
    plain = run("convert", source, tmp_path / "x", "--dry-run", "--json").out
    parameters = [line for line in dry.splitlines() if '"parameters"' in line]
    assert parameters and parameters[0] in plain


def test_against_another_embedding(tmp_path: Path) -> None:
    source = model(tmp_path / "source", tie_word_embeddings=True)
    convert_checkpoint(source, tmp_path / "out", RECIPE)
    weights = tiny_models.tensors(TIED)
    weights[f"{EMBEDDING}.weight"][7] *= 1.5
    other = tiny_models.write(tmp_path / "other", TIED, weights)
    done = run("verify", tmp_path / "out", "--against", other)
    assert done.code == 1
    assert f"tensor {EMBEDDING}.weight differs" in done.err and "linear lm_head" in done.err


def test_a_tied_head_that_is_stored_as_well(tmp_path: Path) -> None:
    """Equal: the embedding is read. Different: transformers keeps the head, and so do we."""
    for name, factor in (("equal", 1), ("different", 2)):
        weights = tiny_models.tensors(TIED)
        weights["lm_head.weight"] = weights[f"{EMBEDDING}.weight"].clone() * factor
        source = tiny_models.write(tmp_path / name, TIED, weights)
        manifest = convert_checkpoint(source, tmp_path / f"out-{name}", RECIPE)
        made_of = EMBEDDING if name == "equal" else "lm_head"
        assert manifest.linears["lm_head"].parts == ((made_of, 320),)
        assert ("lm_head.weight" in manifest.source.ignored) == (name == "equal")
        assert run("verify", tmp_path / f"out-{name}", "--against", source).code == 0


def test_resuming_makes_the_same_bytes(tmp_path: Path) -> None:
    """The embedding is read twice, for itself, and for the head."""
    source = model(tmp_path / "source", tie_word_embeddings=True)
    whole = convert_checkpoint(source, tmp_path / "whole", RECIPE)

    class Stop(Exception):
        pass

    class Killed(Events):
        def done(self, name: str, nbytes: int) -> None:
            if name == f"{EMBEDDING}.weight":
                raise Stop

    with pytest.raises(Stop):
        convert_checkpoint(
            source, tmp_path / "out", RECIPE, ConvertOptions(threads=1), events=Killed()
        )
    assert not (tmp_path / "out" / "qwen3_ascend.json").exists()
    assert convert_checkpoint(source, tmp_path / "out", RECIPE) == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_edited_file_can_be_accepted(tmp_path: Path) -> None:
    """config.json still ties the head; whether it is tied was decided when it was converted."""
    source = model(tmp_path / "source", tie_word_embeddings=True, bos_token_id=1)
    convert_checkpoint(source, tmp_path / "out", RECIPE)
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"bos_token_id": 1', '"bos_token_id": 3'))
    assert run("verify", tmp_path / "out", "--accept").code == 0
    assert not Manifest.read(tmp_path / "out").model.tie_word_embeddings
    assert load(tmp_path / "out", device="cpu", kv_cache_tokens=1024).generate([[5, 6]])


def test_a_forged_origin_is_noticed(tmp_path: Path) -> None:
    """Only the head may be made of the embedding."""
    convert_checkpoint(model(tmp_path / "s"), tmp_path / "out", RECIPE)
    manifest = Manifest.read(tmp_path / "out")
    name = "model.layers.0.self_attn.o_proj"
    entry = manifest.linears[name]
    forged = replace(entry, parts=((EMBEDDING, entry.shape[0]),))
    text = replace(manifest, linears={**manifest.linears, name: forged}).text()
    (tmp_path / "out" / "qwen3_ascend.json").write_text(text)
    assert verify(tmp_path / "out").problems == (
        f"linear {name} does not have the shape, parts or bias of the model",
    )
