"""More bits for the linears that gain most: what is measured, kept, and spent."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.command_line import run
from support.tiny_models import DATA
from typing_extensions import override

from qwen3_ascend import load
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.convert import convert_checkpoint
from qwen3_ascend.convert.bits.measured import measure_sensitivities
from qwen3_ascend.convert.bits.sensitivities import Sensitivities
from qwen3_ascend.convert.calibration.data import choose_windows, plan_calibration
from qwen3_ascend.convert.events import Events
from qwen3_ascend.convert.options import ConvertOptions
from qwen3_ascend.convert.source import open_source
from qwen3_ascend.errors import OptionError

OPTIONS = ConvertOptions(calibration_tokens=512)
RECIPE = "w4a16-plain"
DOWN = "model.layers.2.mlp.down_proj"

ONE_LINEAR = f"""
schema: 1
name: one
rules:
  - {{match: {DOWN}, scheme: w4a16}}
  - {{match: "*", scheme: bf16}}
"""


class Told(Events):
    """Notes which linears were measured, and may end the work."""

    def __init__(self, most: int = 1000) -> None:
        self.names: list[str] = []
        self.steps = 0
        self._most = most

    @override
    def working(self, what: str) -> None:
        self.steps += 1

    @override
    def done(self, name: str, nbytes: int) -> None:
        if len(self.names) == self._most:
            raise KeyboardInterrupt
        self.names.append(name)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a measurement that was interrupted after a layer and a half."""
    file = tmp_path_factory.mktemp("bits") / "sensitivities.json"
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivities(DATA, file, RECIPE, OPTIONS, Told(most=6))
    assert len(Sensitivities.load(file).linears) == 4
    again = Told()
    measure_sensitivities(DATA, file, RECIPE, OPTIONS, again)
    assert len(again.names) == 12 and "model.layers.0.mlp.down_proj" not in again.names
    return file


def loss_of(recipe: str, tmp_path: Path) -> float:
    """KL of a conversion, in nats a token."""
    (tmp_path / "one.yaml").write_text(recipe)
    convert_checkpoint(DATA, tmp_path / "one", str(tmp_path / "one.yaml"))
    convert_checkpoint(DATA, tmp_path / "floats", "bf16")
    source = open_source(str(DATA))
    texts = plan_calibration(OPTIONS, source.config, source.names)
    (window,) = choose_windows(texts, source.config, source.carried(), print)
    floats, one = (
        load(tmp_path / name, device="cpu", dtype="float32").logits(window).log_softmax(-1)
        for name in ("floats", "one")
    )
    return float((floats.exp() * (floats - one)).sum(-1).mean())


def test_a_loss_is_that_of_a_conversion_of_this_linear_alone(
    measured: Path, tmp_path: Path
) -> None:
    expected = loss_of(ONE_LINEAR, tmp_path)
    found = Sensitivities.load(measured).linears[DOWN][0].kl
    assert expected > 1e-4
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_loss_with_zero_points(tmp_path: Path) -> None:
    recipe = ONE_LINEAR.replace("w4a16}", "{name: w4a16, zero_points: true}}")
    expected, file = loss_of(recipe, tmp_path), tmp_path / "sensitivities.json"
    measure_sensitivities(DATA, file, str(tmp_path / "one.yaml"), OPTIONS)
    found = Sensitivities.load(file).linears[DOWN][0].kl
    assert found == pytest.approx(expected, rel=1e-3)


def test_more_bits_lose_less_and_bf16_loses_nothing(measured: Path) -> None:
    for losses in Sensitivities.load(measured).linears.values():
        assert [loss.scheme["name"] for loss in losses] == ["w4a16", "w8a16", "bf16"]
        assert losses[0].kl > losses[1].kl > losses[2].kl == 0.0
        assert losses[0].bits < losses[1].bits < losses[2].bits


def test_a_conversion_spends_the_bits_that_it_may(measured: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, target_bpw=5.0, sensitivities=str(measured))
    manifest = convert_checkpoint(DATA, tmp_path / "out", RECIPE, options)
    losses = Sensitivities.load(measured).linears
    schemes = {name: manifest.linears[name].scheme.name for name in losses}
    assert {*schemes.values()} == {"w4a16", "w8a16"}
    bits = sum(
        8 * tensor.nbytes for name in losses for tensor in manifest.linears[name].tensors.values()
    )
    weights = sum(
        manifest.linears[name].shape[0] * manifest.linears[name].shape[1] for name in losses
    )
    assert 4.7 < bits / weights <= 5.0
    assert manifest.recipe["target_bpw"] == 5.0
    assert (tmp_path / "out" / "sensitivities.json").read_bytes() == measured.read_bytes()
    again = convert_checkpoint(DATA, tmp_path / "out", RECIPE, options)
    assert again.linears == manifest.linears
    assert load(tmp_path / "out", device="cpu").logits([5, 6]).isfinite().all()


def test_every_linear_may_be_raised(measured: Path, tmp_path: Path) -> None:
    """No rule is left over that decides nothing."""
    options = replace(OPTIONS, target_bpw=16.0, sensitivities=str(measured))
    manifest = convert_checkpoint(DATA, tmp_path / "out", RECIPE, options)
    assert {entry.scheme.name for entry in manifest.linears.values()} == {"bf16"}


def test_sensitivities_of_something_else_are_refused(measured: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, target_bpw=9.0, sensitivities=str(measured))
    with pytest.raises(OptionError, match="recipe: w4a16-plain .* then, w8a8 .* now"):
        convert_checkpoint(DATA, tmp_path / "out", "w8a8", options)
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_integers_has_nothing_to_raise(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="recipe bf16 has no linear that can be raised"):
        measure_sensitivities(DATA, tmp_path / "s.json", "bf16", OPTIONS)


def test_the_command_line_says_what_is_missing(measured: Path, tmp_path: Path) -> None:
    out, given = tmp_path / "out", ("--recipe", RECIPE, "--sensitivities", measured)
    tokens = ("--calibration-tokens", "512")
    run("convert", DATA, out, *given, *tokens, "--target-bpw", "3").one_line_error("4.125 bits")
    run("convert", DATA, out, *given, *tokens, "--target-bpw", "17").one_line_error("up to 16")
    missing = run("convert", DATA, out, "--recipe", RECIPE, "--target-bpw", "5", "--dry-run")
    missing.one_line_error("qwen3-ascend sensitivity")
    assert not out.exists()


def test_an_output_without_a_name(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file lies beside the folder, wherever that is given as."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copyfile(measured, tmp_path / "here.sensitivities.json")
    asked = ("--recipe", RECIPE, "--calibration-tokens", "512", "--target-bpw", "6", "--quiet")
    done = run("convert", DATA, ".", *asked)
    assert (done.code, done.err) == (0, "")
    run("convert", DATA, "/", *asked, "--dry-run").one_line_error("--sensitivities")


def test_a_place_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    told = Told()
    with pytest.raises(OptionError, match="No such file"):
        measure_sensitivities(DATA, tmp_path / "none" / "file.json", RECIPE, OPTIONS, told)
    assert told.names == [] and told.steps == 0


def test_the_manifest_of_a_mixed_checkpoint_is_read_back(measured: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, target_bpw=6.0, sensitivities=str(measured))
    convert_checkpoint(DATA, tmp_path / "out", RECIPE, options)
    manifest = Manifest.read(tmp_path / "out")
    named = {rule["match"]: rule["scheme"]["name"] for rule in manifest.recipe["rules"]}
    assert named["*"] == "w4a16" and "w8a16" in named.values()
