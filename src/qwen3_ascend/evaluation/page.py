"""`qwen3-ascend report`: one HTML page about a checkpoint, without scripts or a network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from xml.etree.ElementTree import Element

import yaml

from qwen3_ascend.checkpoint.describe import dims
from qwen3_ascend.checkpoint.manifest import LinearEntry, Manifest
from qwen3_ascend.convert.bits.sensitivities import SENSITIVITIES, Sensitivities
from qwen3_ascend.errors import CheckpointError, os_errors
from qwen3_ascend.evaluation import chart, words
from qwen3_ascend.evaluation.markup import Node, document, element, table
from qwen3_ascend.evaluation.result import Comparison, Evaluation, Interval, ModelFigures
from qwen3_ascend.evaluation.subject import count_weights, stored_bytes
from qwen3_ascend.files.text import size_text

WORST = 12
"""Linears in the table of the worst."""

KINDS = {
    "qkv_proj": "q, k, v", "o_proj": "attention output", "gate_up_proj": "gate, up",
    "down_proj": "down",
}  # fmt: skip
"""Linears of a layer, by the end of their name."""


@os_errors(CheckpointError)
def write_report(
    checkpoint: str | Path,
    output: str | Path,
    *,
    evaluated: str | Path | None = None,
    sensitivities: str | Path | None = None,
) -> None:
    """Writes a page about a checkpoint.

    Args:
        checkpoint: a converted folder; its manifest is read, and no weights.
        output: the file.
        evaluated: what `eval --save` has written.
        sensitivities: what `sensitivity` has written; by default what lies in the checkpoint.

    Raises:
        CheckpointError: if a file cannot be read or written, or is not what it should be.
    """
    manifest = Manifest.read(Path(checkpoint))
    found = None if evaluated is None else Evaluation.read(Path(evaluated))
    within = Path(checkpoint) / SENSITIVITIES
    measured = Path(sensitivities) if sensitivities is not None else within
    losses = Sensitivities.load(measured) if sensitivities or within.is_file() else None
    Path(output).write_text(page(manifest, found, losses), encoding="utf-8")


def page(
    manifest: Manifest, found: Evaluation | None = None, losses: Sensitivities | None = None
) -> str:
    """The page's HTML."""
    title = f"{manifest.source.repo}, {manifest.recipe['name']}"
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return document(
        title,
        style,
        element("h1", title),
        element("p", f"converted by qwen3-ascend {manifest.tool_version}", class_="quiet"),
        _tiles(manifest, found),
        *(_quality(found) if found is not None else ()),
        *_errors(manifest),
        *(_losses(losses) if losses is not None else ()),
        *_about(manifest),
    )


def _tiles(manifest: Manifest, found: Evaluation | None) -> Element:
    """The figures to see first."""
    nbytes = stored_bytes(manifest)
    shown = [
        ("bits per weight", f"{8 * nbytes / count_weights(manifest):.2f}"),
        ("size", size_text(nbytes)),
    ]
    said = found.comparison if found else None
    if found is not None and said is None:
        shown.append(("perplexity", f"{found.model.perplexity.value:.3f}"))
    if said is not None:
        shown.append(("KL divergence, nats", words.thousandths(said.kl.value)))
        shown.append(("perplexity", words.change(said.perplexity_change.value)))
        shown.append(("same top token", words.percent(said.same_top_token.value)))
    tiles = [
        element("div", element("strong", figure), element("span", name), class_="tile")
        for name, figure in shown
    ]
    return element("div", *tiles, class_="tiles")


def _quality(found: Evaluation) -> Iterator[Node | None]:
    """What was measured on a text."""
    yield element("h2", "Quality")
    noted = words.caution(found)
    yield element(
        "p", f"{found.text}: {found.windows} windows of {found.window} tokens, {found.tokens:,} "
        f"tokens scored on {found.device} in {found.dtype}. Brackets hold 95 % of the resamples of "
        f"whole windows. " + (f"{noted[0].upper()}{noted[1:]}." if noted else ""), class_="quiet",
    )  # fmt: skip
    if found.reference is None:
        shown = words.with_interval(found.model.perplexity, "{:.4f}".format)
        yield table(("", found.model.name), [("perplexity", shown)], 1)
        return
    columns = [(found.model, found.comparison), (found.other, found.other_comparison)]
    sides = [(model, said) for model, said in columns if model is not None and said is not None]
    header = ("", found.reference.name, *(model.name for model, _ in sides))
    yield table(header, list(_quality_rows(found.reference, sides)), len(header) - 1)
    yield _reaches([said for _, said in sides], [model.name for model, _ in sides])
    if found.kl_difference is not None:
        difference = words.with_interval(found.kl_difference, words.thousandths)
        yield element("p", f"KL of the second minus that of the first: {difference}.")


def _quality_rows(
    reference: ModelFigures, sides: list[tuple[ModelFigures, Comparison]]
) -> Iterator[tuple[Node, ...]]:
    def figure(said: Interval) -> str:
        return words.with_interval(said, "{:.3f}".format)

    models, comparisons = [model for model, _ in sides], [said for _, said in sides]
    yield ("recipe", reference.recipe or "source", *(model.recipe or "source" for model in models))
    everyone = [reference, *models]
    yield ("bits per weight", *(f"{model.bits_per_weight:.2f}" for model in everyone))
    yield ("size", *(size_text(model.nbytes) for model in everyone))
    yield ("perplexity", *(figure(model.perplexity) for model in everyone))
    yield (
        "change", "",
        *(words.with_interval(said.perplexity_change, words.change) for said in comparisons),
    )  # fmt: skip
    yield ("verdict on perplexity", "", *(_verdict(said) for said in comparisons))
    yield (
        "KL divergence, nats", "",
        *(words.with_interval(said.kl, words.thousandths) for said in comparisons),
    )  # fmt: skip
    yield ("99 % of tokens below", "", *(words.thousandths(said.kl_99) for said in comparisons))
    yield ("largest", "", *(_peak(said) for said in comparisons))
    yield (
        "same top token", "100.00 %",
        *(words.with_interval(said.same_top_token, words.percent) for said in comparisons),
    )  # fmt: skip


def _peak(said: Comparison) -> str:
    return f"{said.kl_max.value:.3g} after {said.kl_max.text!r}"


def _verdict(said: Comparison) -> Element:
    return element("span", words.verdict_text(said), class_=said.verdict.replace(" ", "-"))


def _reaches(comparisons: list[Comparison], names: list[str]) -> Element | None:
    """Intervals of the change of perplexity beside zero, on one scale."""
    changes = [said.perplexity_change for said in comparisons]
    ends = [abs(end) for said in changes for end in (said.low, said.high) if end is not None]
    if not ends:
        return None
    reach = max(*ends, 1e-6) * 1.05
    rows: list[tuple[Node, ...]] = [
        (name, chart.whisker(said.value, said.low or 0.0, said.high or 0.0, reach))
        for name, said in zip(names, changes, strict=True)
    ]
    return table(("change of perplexity", f"from {-reach:.2%} to {reach:+.2%}"), rows)


def _errors(manifest: Manifest) -> Iterator[Node]:
    """Errors of weights, from the manifest."""
    yield element("h2", "Error of the weights, layer by layer")
    measured = {
        name: entry.sqnr_db for name, entry in manifest.linears.items() if entry.sqnr_db is not None
    }
    exact = len(manifest.linears) - len(measured)
    if not measured:
        yield element("p", f"Nothing was rounded: all {exact} linears equal their source.")
        return
    yield element(
        "p", "Signal to quantization noise of each stored linear against the weight it was made "
        "of; higher is nearer. It says where to look, and not how good the model is: a quantizer "
        "that knows the inputs makes weights that are farther away and answers that are nearer.",
        class_="quiet",
    )  # fmt: skip
    series = list(_series(measured, "{:.2f} dB"))
    if series:
        yield chart.lines(series, "layer", "SQNR, dB")
    if exact:
        yield element("p", f"{exact} further linears equal their source.", class_="quiet")
    yield element("h2", "Worst linears")
    worst = sorted(measured.items(), key=lambda item: item[1])[:WORST]
    rows = [_worst_row(name, manifest.linears[name], error) for name, error in worst]
    yield table(("linear", "scheme", "shape", "SQNR, dB"), rows, 2)


def _series(measured: Mapping[str, float], unit: str) -> Iterator[chart.Series]:
    """A line for each kind of linear in the layers; `unit` formats a figure."""
    for kind, title in KINDS.items():
        points = []
        for name, error in measured.items():
            place = re.fullmatch(r"model\.layers\.(\d+)\..*", name)
            if place and name.rpartition(".")[2] == kind:
                points.append((int(place[1]), error, f"layer {place[1]}: {unit.format(error)}"))
        if points:
            yield chart.Series(title, points)


def _losses(losses: Sensitivities) -> Iterator[Node]:
    """What each linear alone costs, as it was measured."""
    yield element("h2", "Sensitivity of each linear")
    yield element(
        "p", f"KL divergence, in thousandths of a nat, of the model in which one linear alone is "
        f"quantized with the fewest bits, on {losses.tokens:,} tokens.", class_="quiet",
    )  # fmt: skip
    cost = {name: 1000 * said[0].kl for name, said in losses.linears.items() if said}
    series = list(_series(cost, "{:.3f} thousandths"))
    if series:
        yield chart.lines(series, "layer", "KL, thousandths of a nat")
    worst = sorted(cost.items(), key=lambda item: -item[1])[:WORST]
    rows: list[tuple[Node, ...]] = [
        (element("code", name), f"{losses.linears[name][0].scheme.get('name')}", f"{kl:.3f}")
        for name, kl in worst
    ]
    yield table(("most sensitive linears", "scheme", "KL, thousandths"), rows, 1)


def _worst_row(name: str, entry: LinearEntry, error: float) -> tuple[Node, ...]:
    return (element("code", name), str(entry.scheme), dims(entry.shape), f"{error:.2f}")


def _about(manifest: Manifest) -> Iterator[Node]:
    """What the checkpoint is."""
    model, source = manifest.model, manifest.source
    schemes = Counter(str(entry.scheme) for entry in manifest.linears.values())
    rows: list[tuple[Node, ...]] = [
        ("source", source.repo + (f" @ {source.revision}" if source.revision else "")),
        ("hub", source.hub or "a folder"),
        ("weights of the source", source.format or "floats"),
        (
            "model",
            f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} query and "
            f"{model.num_kv_heads} key/value heads of {model.head_dim}, vocabulary "
            f"{model.vocab_size:,}, head {'tied' if model.tie_word_embeddings else 'of its own'}",
        ),
        ("weights", f"{count_weights(manifest):,}"),
        ("transforms", ", ".join(manifest.transforms) or "none"),
        ("calibration", str(manifest.calibration or "none")),
        ("schemes", ", ".join(f"{count} linears {name}" for name, count in schemes.items())),
        ("target", manifest.target),
        ("manifest", element("code", manifest.blake3)),
    ]
    yield element("h2", "What it is")
    yield table(("", ""), rows)
    recipe = yaml.safe_dump(dict(manifest.recipe), sort_keys=False, allow_unicode=True)
    yield element(
        "details", element("summary", f"recipe {manifest.recipe['name']}"), element("pre", recipe),
        open="open",
    )  # fmt: skip
