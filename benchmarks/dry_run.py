"""How long `convert --dry-run` takes of a whole model, of its config.json and headers.

    .venv/bin/python benchmarks/dry_run.py                       # 30b-a3b and 235b-a22b
    .venv/bin/python benchmarks/dry_run.py --models 235b-a22b --recipes moe-w4a16 --repeat 5

The weight files are holes of the right size behind their headers, so that they take no disk. A row
is the best of some runs of a process of its own, from its start to its end, beside the best time of
one that imports torch and does nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import random_model

TORCH = [sys.executable, "-c", "import torch"]


def main() -> None:
    """See the module docstring."""
    options = parse()
    print(f"{random_model.processor()}; seconds, the best of {options.repeat}")
    print(f"import torch: {best(TORCH, options.repeat):.2f}\n")
    print("| model | recipe | tensors | seconds | against import torch |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        for model in options.models:
            source = Path(root) / model
            tensors = write_headers(source, random_model.config(model))
            for recipe in options.recipes:
                command = [sys.executable, "-m", "qwen3_ascend", "convert", str(source),
                           str(source / "out"), "--recipe", recipe, "--dry-run"]  # fmt: skip
                command += ["--max-memory", "64GB"]
                seconds, floor = best(command, options.repeat), best(TORCH, options.repeat)
                ratio = f"{seconds / floor:.2f}x"
                print(f"| {model} | {recipe} | {tensors} | {seconds:.2f} | {ratio} |", flush=True)


def best(command: list[str], repeat: int) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        times.append(time.perf_counter() - started)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return min(times)


def write_headers(folder: Path, data: dict[str, Any]) -> int:
    """A model whose files are holes behind their headers; how many tensors it has."""
    from qwen3_ascend.files.safetensors import Form, build_header

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(data))
    shapes = random_model.tensors(data)
    files, weight_map = random_model.files(shapes), dict[str, str]()
    for number, names in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header = build_header({key: Form(random_model.DTYPE, shapes[key]) for key in names})
        with (folder / name).open("wb") as file:
            file.write(header.raw)
            file.truncate(len(header.raw) + sum(random_model.nbytes(shapes[key]) for key in names))
        weight_map |= dict.fromkeys(names, name)
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return len(shapes)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = [name for name in random_model.SHAPES if "num_experts" in random_model.SHAPES[name]]
    parser.add_argument("--models", nargs="+", choices=random_model.SHAPES, default=models)
    parser.add_argument("--recipes", nargs="+", default=["moe-w8a8"])
    parser.add_argument("--repeat", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
