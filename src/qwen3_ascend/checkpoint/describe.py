"""A finished checkpoint in words for the terminal."""

from __future__ import annotations

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.manifest import LinearEntry, Manifest
from qwen3_ascend.files.text import size_text, table


def inspect_lines(manifest: Manifest) -> list[str]:
    """A finished checkpoint for people."""
    model, source = manifest.model, manifest.source
    stored = manifest.stored()
    revision = f" @ {source.revision}" if source.revision else ""
    form = f", quantized already ({source.format})" if source.format else ""
    lines = [
        f"Qwen3, {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{model.num_heads} query and {model.num_kv_heads} key/value heads of {model.head_dim}, "
        f"context {model.context_length}{_experts_text(model)}",
        f"from {source.repo}{revision}{form}, recipe {manifest.recipe['name']}, "
        f"qwen3-ascend {manifest.tool_version}",
        *([f"weights changed by {', '.join(manifest.transforms)}"] if manifest.transforms else []),
        *([f"calibrated with {manifest.calibration}"] if manifest.calibration else []),
        f"{len(stored)} tensors, {size_text(sum(t.nbytes for t in stored.values()))} "
        f"in {len(manifest.weight_files)} file(s)",
        "",
    ]
    kept = "rounded" if manifest.transforms else "exact"
    rows = [_linear_row(name, entry) for name, entry in manifest.linears.items()]
    rows += [
        (name, dims(tensor.shape), "bf16", "nd", kept, size_text(tensor.nbytes))
        for name, tensor in manifest.tensors.items()
    ]
    return lines + table(rows, ("tensor", "shape", "scheme", "layout", "SQNR dB", "bytes"))


def _experts_text(model: Qwen3Config) -> str:
    if model.experts is None:
        return ""
    experts, dense = model.experts, len(model.experts.dense_layers)
    some = f", {dense} layers without" if dense else ""
    return f", {experts.per_token} of {experts.count} experts of {experts.intermediate_size}{some}"


def dims(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def layout_text(layout: Layout) -> str:
    return "nd" if layout == ND else f"{layout.format} of {layout.nz_of}"


def _linear_row(name: str, entry: LinearEntry) -> tuple[str, str, str, str, str, str]:
    error = "exact" if entry.sqnr_db is None else f"{entry.sqnr_db:.2f}"
    if entry.codes == "taken":
        error = "taken" if entry.sqnr_db is None else f"taken, {error}"
    nbytes = sum(tensor.nbytes for tensor in entry.tensors.values())
    shape, layout = dims(entry.shape), layout_text(entry.layout)
    return (name, shape, str(entry.scheme), layout, error, size_text(nbytes))
