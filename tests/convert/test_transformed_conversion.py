"""Conversions whose recipe names transforms: the stored weights, and everything around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from support.command_line import run
from support.equivalent import equivalent
from support.folders import contents, finished_weights
from support.hub_client import REPO, big_model, downloads
from support.hub_server import HubServer
from support.native_cases import runnable_paths
from support.quantized_sources import int8_weights, write_ascendv1
from torch import Tensor
from transformers import Qwen3ForCausalLM

from qwen3_ascend import ConvertOptions, Events, convert_checkpoint, load
from qwen3_ascend.checkpoint.linear import quantize
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import pieces
from qwen3_ascend.checkpoint.verify import verify
from qwen3_ascend.convert.recipe import Recipe
from qwen3_ascend.convert.source.config_file import read_config
from qwen3_ascend.convert.transforms import stack

ROTATED = "w8a8"
ODD = {
    "hidden_size": 72, "intermediate_size": 52, "num_attention_heads": 3, "num_key_value_heads": 1,
    "head_dim": 20, "attention_bias": True,
}  # fmt: skip
"""Sizes of no power of two; parts end within strips."""

FORMS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "odd sizes, biases": ODD,
    "odd sizes, tied": {**ODD, "tie_word_embeddings": True},
}


def recipe(text: str, *transforms: str) -> Recipe:
    """A recipe of one scheme, or the text of its rules, after transforms."""
    rules = text if "match" in text else f'[{{match: "*", scheme: {text}}}]'
    named = f"schema: 1\nname: mine\ntransforms: [{', '.join(transforms)}]\nrules: {rules}\n"
    return Recipe.parse(named, "mine")


RECIPES = {
    ROTATED: Recipe.load(ROTATED),
    "cle": recipe("w8a8", "cle"),
    "bf16": recipe("bf16", "cle", "rotate"),
    "rotate only": recipe(
        "[{match: '*o_proj', scheme: bf16}, {match: '*', scheme: w8a8}]", "rotate"
    ),
}


def uneven(data: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a random model whose rows are of all sizes, which cle makes alike."""
    weights = tiny_models.tensors(data)
    for name in weights:
        if name.endswith(("up_proj.weight", "v_proj.weight")):
            rows = torch.arange(len(weights[name]))[:, None] * 7 % 5
            weights[name] *= 2.0**rows
    return weights


def changed(data: Mapping[str, Any], transforms: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights of such a model as they should be stored, float32."""
    return equivalent(uneven(data), read_config(dict(data)), transforms)


@pytest.mark.parametrize("chosen", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_is_stored(form: dict[str, Any], chosen: Recipe, tmp_path: Path) -> None:
    """Every byte is that of quantizing the changed weights as a whole, and all is verified."""
    data = tiny_models.config(**form)
    source = tiny_models.write(tmp_path / "source", data, uneven(data), shards=2)
    options = ConvertOptions(hash_source=True)
    manifest = convert_checkpoint(source, tmp_path / "out", chosen, options)
    expected, reader = changed(data, chosen.transforms), CheckpointReader(tmp_path / "out")
    for name in manifest.tensors:
        assert torch.equal(reader.tensor(name), expected[name].bfloat16()), name
    for name, entry in manifest.linears.items():
        parts = ["lm_head"] if name == "lm_head" else [part for part, _ in entry.parts]
        weight = torch.cat([expected.get(f"{part}.weight", expected["model.embed_tokens.weight"])
                            for part in parts])  # fmt: skip
        biases = [expected[f"{part}.bias"] for part in parts if f"{part}.bias" in expected]
        made = quantize(entry.scheme, weight, torch.cat(biases) if biases else None, entry.layout)
        for suffix, tensor in reader.linear(name).tensors.items():
            assert torch.equal(tensor, made.tensors[suffix]), (name, suffix)
    unties = "rotate" in chosen.transforms or chosen.rule_for("lm_head").scheme.name == "w8a8"
    tied = bool(data["tie_word_embeddings"])
    assert manifest.model.tie_word_embeddings == (tied and not unties)
    assert verify(tmp_path / "out").ok
    assert run("verify", tmp_path / "out", "--against", source, "--quiet").err == ""
    again = convert_checkpoint(source, tmp_path / "out", chosen, options)
    assert again == manifest == Manifest.read(tmp_path / "out")


@pytest.mark.parametrize("name", [
    "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight",
    "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.bias",
    "model.layers.0.self_attn.v_proj.bias",
])  # fmt: skip
def test_another_source_is_noticed(name: str, tmp_path: Path) -> None:
    """Through what was made of it: a norm's gain shows in the linears that read the norm."""
    data = tiny_models.config(attention_bias=True)
    convert_checkpoint(tiny_models.write(tmp_path / "source", data), tmp_path / "out", ROTATED)
    weights = tiny_models.tensors(data)
    weights[name][0] *= 3
    other = tiny_models.write(tmp_path / "other", data, weights)
    assert run("verify", tmp_path / "out", "--against", other).code == 1


WAYS: dict[str, dict[str, str]] = {
    "torch": {"QWEN3_ASCEND_NATIVE": "0"},
    **{path: {"QWEN3_ASCEND_CPU": path} for path in runnable_paths()},
}


@pytest.mark.parametrize("environment", WAYS.values(), ids=WAYS)
def test_the_same_bytes_everywhere(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the kernels, the threads, and how weights are divided."""
    data = tiny_models.config(**ODD)
    source = tiny_models.write(tmp_path / "source", data, uneven(data), shards=3)
    for name in (ROTATED, "bf16"):
        first = tmp_path / f"{name}-first"
        convert_checkpoint(source, first, RECIPES[name], ConvertOptions(threads=1))
        with monkeypatch.context() as patch:
            patch.setattr(pieces, "PIECE_BYTES", 2000)
            patch.setattr(stack, "CHUNK_WEIGHTS", 1000)
            for variable, value in environment.items():
                patch.setenv(variable, value)
            for threads in (1, 3):
                out = tmp_path / f"{name}-{threads}"
                convert_checkpoint(source, out, RECIPES[name], ConvertOptions(threads=threads))
                assert contents(out) == contents(first)


def test_resuming_makes_the_same_bytes(tmp_path: Path) -> None:
    """Killed after each item in turn: the factors are found again of the source."""
    source = tiny_models.write(tmp_path / "source", shards=3)
    convert_checkpoint(source, tmp_path / "whole", ROTATED)

    class Stop(Exception):
        pass

    class Killed(Events):
        def __init__(self, left: int) -> None:
            self.left = left

        def done(self, name: str, nbytes: int) -> None:
            self.left -= 1
            if not self.left:
                raise Stop

    for items in (1, 3, 4, 6):
        with pytest.raises(Stop):
            options = ConvertOptions(threads=1)
            convert_checkpoint(source, tmp_path / "out", ROTATED, options, Killed(items))
    convert_checkpoint(source, tmp_path / "out", ROTATED)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In seven files: what a layer's factors are found of lies in several."""
    return big_model(tmp_path_factory.mktemp("source") / "model", 7)


def test_files_stay_while_their_factors_are_needed(
    published: HubServer, folder: Path, tmp_path: Path
) -> None:
    convert_checkpoint(folder, tmp_path / "local", ROTATED)
    for threads in (1, 3):
        published.forget()
        out = tmp_path / f"out{threads}"
        options = ConvertOptions(low_disk=True, threads=threads)
        convert_checkpoint(REPO, out, ROTATED, options)
        assert finished_weights(out) == finished_weights(tmp_path / "local")
        fetched = downloads(published)
        assert len(fetched) == len(set(fetched)) == 7


def test_a_tied_head_that_is_stored_as_well(
    hub: HubServer, tmp_path: Path, published: HubServer
) -> None:
    """On a hub it is compared in the end, with what was read and not with what is stored."""
    data = tiny_models.config(tie_word_embeddings=True)
    weights = tiny_models.tensors(data)
    for name, row in (("equal", 0.0), ("different", 1.0)):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["lm_head.weight"][200] += row  # between the samples
        repo = f"Qwen/Qwen3-{name}"
        hub.add_model(repo, tiny_models.write(tmp_path / name, data, weights))
        done = run("convert", repo, tmp_path / f"out-{name}", "--recipe", ROTATED, "--low-disk")
        assert ("a weight of its own" in done.out) == (name == "equal")
        manifest = Manifest.read(tmp_path / f"out-{name}")
        assert not manifest.model.tie_word_embeddings
        assert ("lm_head.weight" in manifest.source.ignored) == (name == "equal")


def test_what_people_read(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source", tiny_models.config(tie_word_embeddings=True))
    for options in ((), ("--dry-run",), ("--recipe", "w8a8-plain")):
        done = run("convert", source, tmp_path / "_".join(("out", *options)), *options)
        is_apart = "is a weight of its own: 41.0 kB" in done.out
        assert (is_apart, done.err) == ("w8a8-plain" not in options, ""), done.out
    assert "weights changed by cle, rotate" in run("inspect", tmp_path / "out").out
    assert "equivalent model (cle, rotate)" in (tmp_path / "out" / "README.md").read_text()
    plain = tmp_path / "out_--recipe_w8a8-plain"
    assert "weights changed" not in run("inspect", plain).out
    assert "equivalent" not in (plain / "README.md").read_text()


def test_refusals(tmp_path: Path) -> None:
    """One line each, before anything is written."""
    data = tiny_models.config()
    int8 = write_ascendv1(tmp_path / "int8", data, int8_weights(tiny_models.tensors(data)))
    odd = tiny_models.write(tmp_path / "odd", tiny_models.config(hidden_size=70))
    damaged = tiny_models.tensors(data)
    damaged["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    broken = tiny_models.write(tmp_path / "damaged", data, damaged)
    said = {
        int8: "the weights of model.layers.0.self_attn.q_proj, which the source holds as w8a8",
        odd: "no Hadamard matrix of size 70 is known: choose a recipe without the transform rotate",
        broken: "tensor model.layers.1.mlp.down_proj.weight holds nan at [3, 5]",
    }
    for source, words in said.items():
        done = run("convert", source, tmp_path / "out", "--recipe", ROTATED, "--quiet")
        assert done.code == 1 and words in done.err and done.err.count("\n") == 1, done.err
        assert not (tmp_path / "out" / "qwen3_ascend.json").exists()


@pytest.mark.parametrize("form", ["untied", "tied"])
def test_an_export_is_the_same_function(form: str, tmp_path: Path) -> None:
    """Every format says that the head is its own; transformers reads it and agrees."""
    data = tiny_models.config(**FORMS[form])
    source = tiny_models.write(tmp_path / "source", data)
    convert_checkpoint(source, tmp_path / "out", RECIPES["bf16"])
    tokens = torch.arange(60)[None] * 37 % 320
    to = tmp_path / "huggingface"
    assert run("export", tmp_path / "out", to, "--format", "huggingface", "--quiet").code == 0
    logits = []
    for folder in (source, to):
        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert not model.config.tie_word_embeddings
    error = (logits[1] - logits[0]).square().mean() / logits[0].square().mean()
    assert 0 < error < 1e-3  # each weight was rounded to bfloat16 once more
    ours = load(tmp_path / "out", dtype="float32").logits(tokens[0].tolist())
    assert (ours - logits[1][0]).abs().max() < 1e-3 * logits[1].abs().max()


def test_a_manifest_that_names_what_is_no_transform(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    manifest = convert_checkpoint(source, tmp_path / "out", ROTATED)
    path = tmp_path / "out" / "qwen3_ascend.json"
    for transforms, words in (
        (["turn"], "changed by turn, which this version does not know"),
        ([1], "recipe.transforms"),
    ):
        forged = replace(manifest, recipe={**manifest.recipe, "transforms": transforms})
        path.write_text(forged.text())
        done = run("verify", tmp_path / "out", "--against", source, "--quiet")
        assert done.code == 1 and words in done.err, done.err
