"""Quantizes a model with msmodelslim; runs in msmodelslim's own environment.

    python run_msmodelslim.py MODEL OUT METHOD TEXTS

TEXTS is a JSON file of the calibration windows: {"tokens": [[...]], "texts": [...]}. Settings are
those of its lab_practice for Qwen3, without the list of linears that it leaves as they are in the
32B: bits per weight would not be equal.

msmodelslim reads a copy in float32, because its smoothing stops at a bfloat16 model on a CPU
("expected m1 and m2 to have the same dtype"), with a tokenizer and a config.json that transformers
4.51 understands. Int4 weights beside float activations are no scheme of its current interface.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

Settings = dict[str, Any]

MODEL_TYPE = "Qwen3-32B"
"""Chooses the adapter of the dense Qwen3."""

WEIGHTS = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
PER_TOKEN = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
STATIC = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}

SMOOTH = {
    "type": "iter_smooth", "alpha": 0.5, "scale_min": 1e-5, "include": ["*"],
    "enable_subgraph_type": ["norm-linear", "linear-linear", "ov", "up-down"],
}  # fmt: skip


def linears(weights: Settings, activations: Settings) -> Settings:
    """The step that quantizes every linear of the layers."""
    qconfig = {"weight": weights, "act": activations}
    return {"type": "linear_quant", "qconfig": qconfig, "include": ["*"]}


METHODS: dict[str, list[Settings]] = {
    "minmax-w8a8": [linears(WEIGHTS, PER_TOKEN)],
    "smooth-w8a8": [SMOOTH, linears(WEIGHTS, PER_TOKEN)],
    "smooth-static": [SMOOTH, linears(WEIGHTS, STATIC)],
}


def practice(process: list[Settings], texts: Path) -> Settings:
    """A configuration of msmodelslim that quantizes so."""
    label = {"w_bit": 8, "a_bit": 8, "is_sparse": False, "kv_cache": False}
    metadata = {"config_id": "benchmark", "score": 90, "verified_model_types": [MODEL_TYPE]}
    return {
        "apiversion": "modelslim_v1",
        "metadata": {**metadata, "label": label},
        "spec": {
            "process": process,
            "save": [{"type": "ascendv1_saver", "part_file_size": 4}],
            "dataset": str(texts),
        },
    }


def copy_in_float32(source: Path, folder: Path) -> None:
    """The model as msmodelslim can read it."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "heldout*"))
    for file in source.glob("*.safetensors"):
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
        save_file(tensors, folder / file.name, {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    # transformers 4.51 does not read rope_parameters, and would compute with another theta.
    theta = config["rope_parameters"]["rope_theta"]
    change(folder / "config.json", torch_dtype="float32", rope_theta=theta)
    said = json.loads((source / "tokenizer_config.json").read_text())
    padding = said.get("pad_token", said["eos_token"])  # it asks for one, and pads nothing
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": padding}
    change(folder / "tokenizer_config.json", **fast)


def change(file: Path, **entries: Any) -> None:
    """Sets entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def main() -> None:
    """See the module docstring."""
    source, output, method, texts = sys.argv[1:]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        copy_in_float32(Path(source), folder / "model")
        lines = [json.dumps({"inputs_pretokenized": text}) for text in read_texts(Path(texts))]
        (folder / "texts.jsonl").write_text("\n".join(lines))
        config = folder / "practice.yaml"
        config.write_text(yaml.safe_dump(practice(METHODS[method], folder / "texts.jsonl")))
        program = str(Path(sys.executable).with_name("msmodelslim"))
        command = [program, "quant", "--device", "cpu", "--config_path", str(config)]
        command += ["--model_type", MODEL_TYPE, "--model_path", str(folder / "model")]
        command += ["--save_path", output, "--trust_remote_code", "False"]
        code = subprocess.run(command, check=False).returncode
    sys.exit(code)  # without a traceback: the tool's own error is the last that is said


def read_texts(file: Path) -> list[str]:
    """The calibration windows as text."""
    found: list[str] = json.loads(file.read_text())["texts"]
    return found


if __name__ == "__main__":
    main()
