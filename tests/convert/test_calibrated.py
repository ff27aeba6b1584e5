"""Calibrated conversions: what linears are fed, what comes of it, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support import tiny_models
from support.command_line import run
from support.folders import contents, finished_weights, flip
from support.hub_client import REPO, big_model, downloads
from support.hub_server import HubServer
from support.inputs import hessian_of
from support.tiny_models import DATA
from torch import Tensor
from transformers import AutoModelForCausalLM

from qwen3_ascend import ConvertOptions, Events, convert_checkpoint
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes.grid import Grid
from qwen3_ascend.convert import quantizers
from qwen3_ascend.convert.calibration.data import choose_windows, plan_calibration
from qwen3_ascend.convert.calibration.factors import FACTORS_NAME
from qwen3_ascend.convert.pipeline import Conversion
from qwen3_ascend.convert.plan import Item
from qwen3_ascend.convert.quantizers import Mse, Needs
from qwen3_ascend.convert.quantizers.base import Choose
from qwen3_ascend.convert.recipe import Recipe
from qwen3_ascend.convert.statistics import InputStatistics, Seen
from qwen3_ascend.errors import CheckpointError, RecipeError
from qwen3_ascend.native import Kernels

TOKENS = ConvertOptions(calibration_tokens=1024, threads=2)

READERS = {
    "self_attn.qkv_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
"""A linear of transformers that is fed what one of ours is fed."""


def recipe(scheme: str, quantizer: str = "nearest", *transforms: str) -> Recipe:
    return Recipe.parse(recipe_text(scheme, quantizer, *transforms), "test.yaml")


def recipe_text(scheme: str, quantizer: str = "nearest", *transforms: str) -> str:
    rules = '{match: lm_head, scheme: bf16}, {match: "*", scheme: %s, quantizer: %s}'
    named = ", ".join(transforms)
    said = f"transforms: [{named}]\n" if transforms else ""
    return f"schema: 1\nname: test\n{said}rules: [{rules % (scheme, quantizer)}]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three files, without a tokenizer."""
    made = big_model(tmp_path_factory.mktemp("source") / "model")
    for name in tiny_models.TOKENIZER_FILES:
        (made / name).unlink()
    return made


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, InputStatistics]:
    """The statistics with which each linear is made."""
    found: dict[str, InputStatistics] = {}
    make = Conversion.make_stage

    def make_stage(self: Conversion, items: Sequence[Item], statistics: dict[str, Seen]) -> None:
        found.update({name: one for name, (one,) in statistics.items() if one is not None})
        make(self, items, statistics)

    monkeypatch.setattr(Conversion, "make_stage", make_stage)
    return found


def test_linears_are_fed_what_transformers_feeds_them(
    tmp_path: Path, seen: dict[str, InputStatistics]
) -> None:
    """Each layer of floats after the quantized layers below it: transformers is given the written
    weights layer by layer, and its inputs are recorded before."""
    manifest = convert_checkpoint(DATA, tmp_path / "out", recipe("w4a16", "gptq"), TOKENS)
    reader = CheckpointReader(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(DATA, dtype=torch.float32)
    planned = plan_calibration(TOKENS, manifest.model, ["tokenizer.json"])
    files = {name: (DATA / name).read_bytes() for name in tiny_models.TOKENIZER_FILES}
    windows = torch.tensor(choose_windows(planned, manifest.model, files, print))
    fed: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            keep = lambda _, inputs, name=name: fed.update({name: inputs[0].flatten(0, 1)})  # noqa: E731
            module.register_forward_pre_hook(keep)
    for number in range(manifest.model.num_layers):
        with torch.inference_mode():
            model(windows)
        for ours, theirs in READERS.items():
            found, x = seen[f"model.layers.{number}.{ours}"], fed[f"model.layers.{number}.{theirs}"]
            near = 2e-4 * float(x.abs().max())
            torch.testing.assert_close(found.largest, x.amax(0), rtol=2e-3, atol=near)
            means = x.abs().mean(0)
            torch.testing.assert_close(found.mean_magnitude, means, rtol=2e-3, atol=near)
            expected = (x.double().t() @ x.double() / len(x)).float()
            scale = float(expected.diagonal().max())
            torch.testing.assert_close(hessian_of(found), expected, rtol=2e-3, atol=2e-4 * scale)
        _put_written_layer(model, reader, number)


def _put_written_layer(model: torch.nn.Module, reader: CheckpointReader, number: int) -> None:
    """Gives transformers the weights that were written for a layer."""
    modules = dict(model.named_modules())
    for name, entry in reader.manifest.linears.items():
        if name.startswith(f"model.layers.{number}."):
            weights = reader.linear(name).dequantize().split([rows for _, rows in entry.parts])
            for (part, _), weight in zip(entry.parts, weights, strict=True):
                modules[part].weight.data = weight


def test_statistics_follow_what_is_folded_into_a_layer(
    tmp_path: Path, seen: dict[str, InputStatistics]
) -> None:
    """Smoothed inputs have the ranges of the inputs divided by the factors: those of the weights
    and those of the inputs have come nearer to each other."""
    convert_checkpoint(DATA, tmp_path / "plain", recipe("w8a8", "gptq"), TOKENS)
    plain = dict(seen)
    convert_checkpoint(DATA, tmp_path / "smooth", recipe("w8a8", "gptq", "smooth"), TOKENS)
    for name, before in plain.items():
        if name.startswith("model.layers.0."):
            after = seen[name]
            factors = before.largest / after.largest
            expected = hessian_of(before) / factors / factors[:, None]
            torch.testing.assert_close(hessian_of(after), expected, rtol=1e-3, atol=1e-4)
            spread = [float(s.magnitude.max() / s.magnitude.median()) for s in (before, after)]
            assert spread[1] < spread[0], name


class Deaf(Mse):
    """Asks for data and does not look at it."""

    def prepare(self, grid: Grid, statistics: InputStatistics | None, kernels: Kernels) -> Choose:
        assert statistics is not None and statistics.hessian is not None
        return super().prepare(grid, None, kernels)


def test_a_quantizer_that_ignores_data_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_checkpoint(DATA, tmp_path / "plain", recipe("w8a8", "mse"))
    monkeypatch.setitem(quantizers.QUANTIZERS, "mse", Deaf(Needs.HESSIAN))
    convert_checkpoint(DATA, tmp_path / "calibrated", recipe("w8a8", "mse"), TOKENS)
    assert finished_weights(tmp_path / "plain") == finished_weights(tmp_path / "calibrated")


def test_what_is_said_of_it(tmp_path: Path) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(recipe_text("w8a8", "nearest", "smooth"))
    command = ("convert", DATA, out, "--recipe", file, "--calibration-tokens", "1024")
    said = "the shipped texts, 2 windows of 512 tokens, on the cpu"
    assert f"calibrated with {said}" in run(*command, "--dry-run").out
    planned = json.loads(run(*command, "--dry-run", "--json").out)
    assert planned["calibration"]["tokens"] == 1024 and planned["disk"]["hidden states"] > 0
    assert run(*command).code == 0
    manifest = Manifest.read(out)
    assert manifest.calibration is not None and str(manifest.calibration) == said
    assert f"calibrated with {said}" in run("inspect", out).out
    assert f"Calibrated with {said}." in (out / "README.md").read_text()
    assert run(*command).err.endswith("holds this conversion already: nothing to do\n")
    other = run(*command[:-1], "2048")
    other.one_line_error("another conversion", "calibration")


def test_factors_are_kept_for_verify(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_checkpoint(DATA, out, recipe("w8a8", "nearest", "cle", "rotate", "smooth"), TOKENS)
    assert run("verify", out, "--against", DATA).code == 0
    flip(out / FACTORS_NAME, (out / FACTORS_NAME).stat().st_size - 1, 6)
    done = run("verify", out, "--against", DATA)
    assert done.code == 1 and f"file {FACTORS_NAME}: its bytes differ" in done.err + done.out


def test_factors_that_are_lost(tmp_path: Path) -> None:
    """The checkpoint computes without them, and can be accepted so; but not be compared."""
    source = tiny_models.write(tmp_path / "source", tokenizer=False)
    convert_checkpoint(source, tmp_path / "out", recipe("w8a8", "nearest", "smooth"), TOKENS)
    (tmp_path / "out" / FACTORS_NAME).unlink()
    assert run("verify", tmp_path / "out", "--accept").code == 0
    assert run("verify", tmp_path / "out").code == 0
    done = run("verify", tmp_path / "out", "--against", source)
    done.one_line_error(f"has lost {FACTORS_NAME}")


def test_transforms_that_need_data_are_last(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="smooth needs data and cle does not: name cle before it"):
        convert_checkpoint(DATA, tmp_path / "out", recipe("w8a8", "nearest", "smooth", "cle"))


def test_data_that_nobody_needs_is_left_aside(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("few")
    done = run("convert", DATA, tmp_path / "out", "--calibration", texts)
    assert done.code == 0 and f"needs no calibration: {texts} is not read" in done.err
    assert Manifest.read(tmp_path / "out").calibration is None
    mse = tmp_path / "mse.yaml"
    mse.write_text(recipe_text("w4a16", "mse"))
    options = ("--recipe", mse, "--calibration", texts)
    run("convert", DATA, tmp_path / "mse", *options).one_line_error("texts.txt", "give more text")


def test_other_data_begins_anew(tmp_path: Path) -> None:
    """What an interrupted run has left was calibrated with other texts."""

    class Stop(Events):
        def done(self, name: str, nbytes: int) -> None:
            if ".layers.1." in name:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(DATA, tmp_path / "out", recipe("w8a8", "gptq"), TOKENS, Stop())
    more = dataclasses.replace(TOKENS, calibration_tokens=1536)
    with pytest.raises(CheckpointError, match="calibration: .*2 windows.* then, .*3 windows.* now"):
        convert_checkpoint(DATA, tmp_path / "out", recipe("w8a8", "gptq"), more)
    restart = dataclasses.replace(TOKENS, restart=True)
    convert_checkpoint(DATA, tmp_path / "out", recipe("w8a8", "gptq"), restart)


def test_files_of_a_hub_come_in_the_order_of_the_layers(
    published: HubServer, folder: Path, tmp_path: Path
) -> None:
    """Each once, and each gone when its layers are written; the bytes are those of the folder."""
    options = dataclasses.replace(TOKENS, low_disk=True)
    local = convert_checkpoint(folder, tmp_path / "local", recipe("w8a8", "gptq"), TOKENS)
    convert_checkpoint(REPO, tmp_path / "out", recipe("w8a8", "gptq"), options)
    assert finished_weights(tmp_path / "out") == finished_weights(tmp_path / "local")
    fetched = downloads(published)
    assert fetched == sorted(fetched) and len(fetched) == len(local.source.files)
    assert not [name for name in contents(tmp_path / "out") if "model-" in name]
