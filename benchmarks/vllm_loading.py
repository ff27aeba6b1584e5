"""What vllm-ascend does to load a model: the checkpoint as it lies, against both exports of it.

    make handover-environments handover-plugin
    PYTHONPATH=tests .venv/bin/python benchmarks/vllm_loading.py $(make -s handover-paths)

A model in the shapes of Qwen3-0.6B, or of --model, with --layers layers is converted, exported in
each of --formats, and each of these is loaded by real vllm-ascend 0.23.0. Counts and sizes come
from the trace of the simulated device, and would be the same on a card; the seconds are those of a
device that is memory of this machine, so only their ratio may mean something, and on a card a cast
and a transpose cost something else. Real torch_npu on a simulated device.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import random_model
from handover.engines import Engines

from qwen3_ascend import convert_checkpoint
from qwen3_ascend.convert import export_checkpoint
from qwen3_ascend.files.text import table

FORMATS = ("ascendv1", "compressed-tensors")
PROMPT = [[1, 2, 3, 4]]
COPY = "aclnnInplaceCopy"
"""The kernel that transposes a weight, and copies what is strided or of another type."""

HEADER = (
    "",
    "casts",
    "copy kernels",
    "uploads",
    "bytes",
    "allocated",
    "peak / allocated",
    "seconds",
)


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-ascend", type=Path, required=True, help="its environment")
    parser.add_argument(
        "--plugin", type=Path, required=True, help="where this package is installed"
    )
    parser.add_argument("--model", choices=random_model.SHAPES, default="0.6b")
    parser.add_argument("--layers", type=int, help="of the model, default all")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=FORMATS)
    parser.add_argument("--repeat", type=int, default=1, help="runs, of which the fastest counts")
    options = parser.parse_args()
    print(f"{random_model.processor()}, simulated device")
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(name, found) for name, found in measured(Path(folder), options).items()]
    print("\n".join(table(rows, HEADER)))


def measured(folder: Path, options: argparse.Namespace) -> dict[str, Mapping[str, Any]]:
    """What loading each form of the model cost; of several runs the one that took least time."""
    found: dict[str, Mapping[str, Any]] = {}
    for run in range(options.repeat):
        place = folder / f"run-{run}"
        place.mkdir()
        places = (Path(), options.vllm_ascend, Path(), Path(), options.plugin.resolve(), place)
        engines = Engines(*places)
        for name, model in models(folder, options).items():
            report = engines.on_ascend(model, PROMPT, tokens=1, skip_tokenizer_init=True)
            (loading,) = report.loading
            if name not in found or loading["seconds"] < found[name]["seconds"]:
                found[name] = loading
    return found


def models(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The checkpoint and its exports, which are made once."""
    checkpoint = folder / "checkpoint"
    made = {"as it lies": checkpoint, **{name: folder / name for name in options.formats}}
    if not checkpoint.exists():
        config = random_model.config(options.model, options.layers)
        random_model.ensure(folder / "source", config)
        convert_checkpoint(folder / "source", checkpoint)
        for name in options.formats:
            export_checkpoint(checkpoint, folder / name, name)
    return made


def row(name: str, loading: Mapping[str, Any]) -> tuple[str, ...]:
    """One form of the model as text."""
    allocated = loading["allocated_bytes"]
    return (
        name, str(loading["format_casts"]), str(loading["launches"].get(COPY, 0)),
        str(loading["host_to_device_copies"]), f"{loading['host_to_device_bytes']:,}",
        f"{allocated:,}", f"{loading['peak_allocated_bytes'] / allocated:.4f}",
        f"{loading['seconds']:.2f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
