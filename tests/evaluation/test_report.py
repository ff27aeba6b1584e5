"""The report is one page that holds the manifest's figures, and nothing that it was told to say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.command_line import run
from support.tiny_models import DATA

from qwen3_ascend import convert_checkpoint
from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.convert.bits.sensitivities import Loss, Sensitivities
from qwen3_ascend.evaluation.chart import ticks
from qwen3_ascend.evaluation.page import page
from qwen3_ascend.evaluation.result import Comparison, Evaluation, Interval, ModelFigures, Peak

HOSTILE = "<script>alert(1)</script>&\"'"

MODEL = ModelFigures(HOSTILE, "w8a8", 1000, 1250, Interval(8.5, 8.0, 9.0))
FOUND = Evaluation(
    HOSTILE, "0" * 64, 512, 16, "cpu", "float32", MODEL, replace(MODEL, recipe=None),
    Comparison(
        perplexity_change=Interval(0.01, 0.002, 0.02),
        kl=Interval(0.0371, 0.03, 0.04),
        kl_99=0.2,
        kl_max=Peak(7.0, 0, 3, HOSTILE),
        same_top_token=Interval(0.89, 0.88, 0.9),
        right_token=Interval(-0.005, -0.006, -0.004),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return convert_checkpoint(DATA, tmp_path_factory.mktemp("converted") / "out", "w8a8")


def in_layers(manifest: Manifest) -> list[str]:
    """The linears of the layers; the head is rotated as well, and no part of the drawings."""
    return [name for name in manifest.linears if name != LM_HEAD]


class Page(HTMLParser):
    """The tags of a page, and its text outside of the style sheet."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} is closed where it is not open"

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.said += f"{data} "


def test_every_error_of_the_manifest_is_in_the_plot(manifest: Manifest) -> None:
    html = page(manifest, None)
    shown = Page(html)
    assert html.startswith("<!doctype html>")
    for name in in_layers(manifest):
        layer = name.split(".")[2]
        assert f"layer {layer}: {manifest.linears[name].sqnr_db:.2f} dB" in shown.said
    lines = [attributes for tag, attributes in shown.tags if tag == "polyline"]
    assert len(lines) == 4 and all(len((one["points"] or "").split()) == 4 for one in lines)
    worst = min(manifest.linears.values(), key=lambda entry: entry.sqnr_db or 0.0)
    named = [name for name, entry in manifest.linears.items() if entry is worst]
    assert shown.said.index(named[0]) < min(
        shown.said.index(name) for name in in_layers(manifest)[-2:] if name not in named
    )


def test_it_needs_nothing_else_and_runs_nothing(manifest: Manifest) -> None:
    html = page(manifest, FOUND)
    tags = Page(html).tags
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        assert not [name for name in attributes if name in ("src", "href") or name[:2] == "on"]
    assert "http" not in html and "url(" not in html and "@import" not in html


def test_what_others_have_named_is_escaped(manifest: Manifest) -> None:
    source = replace(manifest.source, repo=HOSTILE, revision=HOSTILE)
    recipe = {**manifest.recipe, "name": HOSTILE, "description": HOSTILE}
    html = page(replace(manifest, source=source, recipe=recipe), FOUND)
    assert "<script" not in html
    assert Page(html).said.count("<script>alert(1)</script>") >= 7


def test_figures_of_an_evaluation(manifest: Manifest) -> None:
    said = Page(page(manifest, FOUND)).said
    for figure in (
        "37.1e-3 [30e-3, 40e-3]", "+1.00 % [+0.20 %, +2.00 %]", "worse", "10.00", "89.00 %",
        "Few windows",
    ):  # fmt: skip
        assert figure in said


def test_a_lossless_checkpoint_says_so(tmp_path: Path) -> None:
    manifest = convert_checkpoint(DATA, tmp_path / "out", "bf16")
    said = Page(page(manifest, None)).said
    assert "Nothing was rounded: all 16 linears" in said


def test_sensitivities(manifest: Manifest, tmp_path: Path) -> None:
    costs = {name: 1e-4 * (number + 1) for number, name in enumerate(in_layers(manifest))}
    losses = {
        name: (Loss({"name": "w8a8"}, "nearest", 8, kl), Loss({"name": "bf16"}, "nearest", 16, 0.0))
        for name, kl in costs.items()
    }
    found = Sensitivities({"model": "tiny"}, 2048, losses)
    shown = Page(page(manifest, losses=found))
    for name, kl in costs.items():
        assert f"layer {name.split('.')[2]}: {1000 * kl:.3f} thousandths" in shown.said
    last = list(costs)[-1]
    table = shown.said[shown.said.index("most sensitive linears") :]
    assert table.index(last) < table.index(list(costs)[-2])
    convert_checkpoint(DATA, tmp_path / "out")
    found.save(tmp_path / "found.json")
    page_file = tmp_path / "page.html"
    asked = ("report", tmp_path / "out", "-o", page_file)
    assert run(*asked).code == 0 and "Sensitivity" not in page_file.read_text()
    assert run(*asked, "--sensitivities", tmp_path / "found.json").code == 0
    assert "Sensitivity of each linear" in page_file.read_text()


def test_the_command(manifest: Manifest, tmp_path: Path) -> None:
    convert_checkpoint(DATA, tmp_path / "out")
    saved = tmp_path / "eval.json"
    saved.write_text(json.dumps(FOUND.to_json()))
    done = run("report", tmp_path / "out", "--eval", saved, "-o", tmp_path / "page.html")
    assert (done.code, done.err) == (0, "")
    assert "37.1e-3" in (tmp_path / "page.html").read_text(encoding="utf-8")
    saved.write_text("[]")
    again = run("report", tmp_path / "out", "--eval", saved, "-o", tmp_path / "other.html")
    assert again.one_line_error(str(saved)) and not (tmp_path / "other.html").exists()
    missing = tmp_path / "none.json"
    again = run("report", tmp_path / "out", "--eval", missing, "-o", tmp_path / "other.html")
    assert "model folder" not in again.one_line_error(str(missing), "eval OUT --text FILE --save")
    empty = replace(FOUND, model=replace(FOUND.model, weights=0))
    saved.write_text(json.dumps(empty.to_json()))
    again = run("report", tmp_path / "out", "--eval", saved, "-o", tmp_path / "other.html")
    again.one_line_error("model.weights", "1")
    run("report", DATA, "-o", tmp_path / "other.html").one_line_error("qwen3_ascend.json")
    run("report", tmp_path / "out", "-o", tmp_path).one_line_error(str(tmp_path))


def test_drawings_are_well_formed(manifest: Manifest) -> None:
    for drawing in re.findall(r"<svg.*?</svg>", page(manifest, FOUND), re.DOTALL):
        ElementTree.fromstring(drawing)


@pytest.mark.parametrize(
    ("least", "most"), [(38.2, 42.4), (0.0, 0.0003), (-3.0, 7.0), (5.0, 5.0), (0.0, 29.0)]
)
def test_ticks_are_few_and_enclose(least: float, most: float) -> None:
    found = ticks(least, most)
    assert found[0] <= least and found[-1] >= most and 2 <= len(found) <= 12
