"""What a conversion did: the error of every linear, sizes, and the words for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qwen3_ascend.checkpoint.architecture import EMBEDDING, LM_HEAD
from qwen3_ascend.checkpoint.describe import dims, layout_text
from qwen3_ascend.checkpoint.manifest import LinearEntry, Manifest
from qwen3_ascend.checkpoint.schemes import BF16
from qwen3_ascend.convert.budget import Budget
from qwen3_ascend.convert.plan import Item, Plan
from qwen3_ascend.convert.recipe import NEAREST
from qwen3_ascend.files.json_file import plain
from qwen3_ascend.files.text import size_text

WORST_SHOWN = 3

MODEL_CARD_NAME = "README.md"

MODEL_CARD = """---
library_name: qwen3-ascend
base_model: {repo}
tags: [qwen3, ascend, fractal_nz, {recipe}]
---

# {repo}, {recipe}, for Ascend NPUs

Written by qwen3-ascend {version} from `{repo}`{revision} with the recipe `{recipe}`: the linear
weights lie in FRACTAL_NZ and load without a format cast. `qwen3_ascend.json` tells what was done to
every tensor and holds a BLAKE3 hash of every byte.{taken}{changed}{calibrated}

    qwen3-ascend verify .
    qwen3-ascend generate . --prompt "Hello"
"""


def mean_sqnr(entries: Mapping[str, LinearEntry]) -> float | None:
    """Mean in decibels over the linears that lost anything; None if none did."""
    figures = [entry.sqnr_db for entry in entries.values() if entry.sqnr_db is not None]
    return sum(figures) / len(figures) if figures else None


def describe_errors(manifest: Manifest) -> list[str]:
    """A few lines on the errors of a conversion."""
    chosen = {n: e for n, e in manifest.linears.items() if e.codes == "chosen"}
    taken = {n: e for n, e in manifest.linears.items() if e.codes == "taken"}
    lossy = {n: e for n, e in chosen.items() if e.sqnr_db is not None}
    rounded = {n: e for n, e in lossy.items() if e.scheme == BF16()}
    quantized = {n: e for n, e in lossy.items() if n not in rounded}
    exact, linears = len(chosen) - len(lossy), f"of {len(manifest.linears)} linears"
    lines = []
    if taken:
        lines.append(f"{len(taken)} {linears} keep the codes of the source, code for code")
    if (scales := mean_sqnr(taken)) is not None:
        lines.append(f"their scales are rounded to bfloat16: mean SQNR {scales:.1f} dB")
    if exact:
        lines.append(f"{exact} {linears} equal their source exactly")
    if rounded:
        figure = f"mean SQNR {mean_sqnr(rounded):.1f} dB"
        lines.append(f"{len(rounded)} {linears} are rounded to bfloat16: {figure}")
    if quantized:
        figure = f"mean SQNR {mean_sqnr(quantized):.1f} dB"
        lines.append(f"{len(quantized)} {linears} are quantized: {figure}; lowest:")
        worst = sorted(quantized, key=lambda name: quantized[name].sqnr_db or 0.0)[:WORST_SHOWN]
        lines += [f"  {quantized[name].sqnr_db:6.2f} dB  {name}" for name in worst]
    return [*lines, *_describe_experts(quantized), *_describe_unreached(quantized)]


def _describe_experts(entries: Mapping[str, LinearEntry]) -> list[str]:
    """The worst and the median expert of all layers."""
    figures = sorted(
        (figure, number, name)
        for name, entry in entries.items()
        for number, figure in enumerate(entry.experts_sqnr_db)
        if figure is not None
    )
    if not figures:
        return []
    (worst, number, name), (middle, *_) = figures[0], figures[len(figures) // 2]
    return [
        f"of the experts the worst has {worst:.2f} dB (number {number} of {name}), the median "
        f"{middle:.2f} dB"
    ]


def _describe_unreached(entries: Mapping[str, LinearEntry]) -> list[str]:
    """The experts that calibration never reached; of the layers the first few."""
    unreached = {
        name.rpartition(".")[0]: entry.unreached
        for name, entry in entries.items()
        if entry.unreached
    }
    if not unreached:
        return []
    count, layers = sum(map(len, unreached.values())), len(unreached)
    lines = [
        f"calibration never reached {count} experts in {layers} layers, whose codes need no data "
        f"(the scales of least error); more text may reach them:"
    ]
    for name, numbers in [*unreached.items()][:WORST_SHOWN]:
        lines.append(f"  {name}: {', '.join(map(str, numbers))}")
    return lines + ["  ..., all of them in the manifest"] * (layers > WORST_SHOWN)


def describe_head(manifest: Manifest) -> list[str]:
    """A line on a head that is apart from the embedding, though the source ties it."""
    head = manifest.linears.get(LM_HEAD)
    if head is None or head.parts[0][0] != EMBEDDING:
        return []
    return [_head_text(sum(tensor.nbytes for tensor in head.tensors.values()))]


def _head_text(nbytes: int) -> str:
    return (
        f"the output projection, which the source ties to the embedding, is a weight of its own: "
        f"{size_text(nbytes)}"
    )


def plan_rows(plan: Plan) -> list[tuple[str, ...]]:
    """The plan as a table: name, shape, scheme, layout, output bytes; equal layers are merged."""
    merged: dict[tuple[str, ...], list[int]] = {}
    for item in plan.items:
        key = _row_key(item)
        merged.setdefault(key, []).append(item.nbytes)
    return [
        (
            key[0] if len(sizes) == 1 else f"{key[0]} (x{len(sizes)})",
            *key[1:],
            size_text(sum(sizes)),
        )
        for key, sizes in merged.items()
    ]


def plan_totals(plan: Plan, budget: Budget) -> list[str]:
    """What the plan comes to."""
    lines = [
        f"{plan.parameters:,} weights, {plan.bits_per_weight:.2f} bits each",
        f"reads {size_text(plan.source_bytes)}, writes {size_text(plan.output_bytes)} "
        f"in {len(plan.weight_files)} file(s)",
        f"peak memory about {size_text(budget.working_bytes)} beyond Python with torch loaded",
        f"held by {' or '.join(_cards_text(plan))}, with a fifth left for the cache",
    ]
    if plan.calibration is not None:
        lines.append(f"calibrated with {plan.calibration.record}")
    heads = (item for item in plan.items if item.name == LM_HEAD and item.parts == (EMBEDDING,))
    lines += [_head_text(head.nbytes) for head in heads]
    return lines + [f"leaves out {name}: {reason}" for name, reason in plan.ignored.items()]


def _cards_text(plan: Plan) -> Iterator[str]:
    for memory, count in plan.target.cards(plan.output_bytes).items():
        yield f"{count} card{'s' if count > 1 else ''} of {memory >> 30} GB"


def plan_json(plan: Plan, budget: Budget) -> dict[str, Any]:
    """The plan for machines."""
    return {
        "recipe": plan.recipe.name,
        "items": [_item_json(item) for item in plan.items],
        "files": [file.file for file in plan.weight_files],
        "calibration": None if plan.calibration is None else plain(plan.calibration.record),
        "ignored": dict(plan.ignored),
        "parameters": plan.parameters,
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 3),
        "threads": budget.threads,
        "working_bytes": budget.working_bytes,
        "cards": {
            f"{memory >> 30} GB": count
            for memory, count in plan.target.cards(plan.output_bytes).items()
        },
    }


def model_card(manifest: Manifest) -> bytes:
    """README.md of a converted folder."""
    source = manifest.source
    revision = f" at commit {source.revision}" if source.revision else ""
    text = MODEL_CARD.format(
        repo=source.repo,
        recipe=manifest.recipe["name"],
        version=manifest.tool_version,
        revision=revision,
        taken=_taken_text(manifest),
        changed=_changed_text(manifest),
        calibrated=_calibrated_text(manifest),
    )
    return text.encode()


def _taken_text(manifest: Manifest) -> str:
    """What the model card says of codes that were not chosen here."""
    count = sum(entry.codes == "taken" for entry in manifest.linears.values())
    if not count:
        return ""
    return (
        f" The source was quantized already ({manifest.source.format}): the codes of "
        f"{count} linears are its own."
    )


def _calibrated_text(manifest: Manifest) -> str:
    """What the model card says of calibration."""
    return f" Calibrated with {manifest.calibration}." if manifest.calibration else ""


def _changed_text(manifest: Manifest) -> str:
    """What the model card says of transforms."""
    if not manifest.transforms:
        return ""
    return (
        f" The weights are those of an equivalent model ({', '.join(manifest.transforms)}), not "
        f"those of the source."
    )


def _row_key(item: Item) -> tuple[str, str, str, str]:
    name = ".".join("*" if part.isdigit() else part for part in item.name.split("."))
    scheme = f"{item.scheme}, taken" if item.encoding.codes == "taken" else str(item.scheme)
    if item.quantizer != NEAREST:
        scheme = f"{item.scheme}, {item.quantizer}"
    return (name, dims(item.spec.shape), scheme, layout_text(item.layout))


def _item_json(item: Item) -> dict[str, Any]:
    return {
        "name": item.name,
        "reads": list(item.reads),
        "bytes": item.nbytes,
        "shape": list(item.spec.shape),
        "scheme": item.scheme.to_json(),
        "codes": item.encoding.codes,
        "quantizer": item.quantizer,
        "layout": plain(item.layout),
    }
