"""Quantizes a model with llm-compressor; runs in llm-compressor's own environment.

    python run_llm_compressor.py MODEL OUT METHOD TEXTS

TEXTS is a JSON file of the calibration windows: {"tokens": [[...]], "texts": [...]}. Settings are
those of the tool's own examples for each scheme, unless a method's comment says otherwise. AWQ is
not among the methods: it asks for an accelerator ("Cannot access accelerator device").
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from transformers import AutoModelForCausalLM

Settings = dict[str, Any]

LAYERS: Settings = {"targets": "Linear", "ignore": ["lm_head"]}
WINDOWS_AT_ONCE = 8


def scheme(weights: Settings, activations: Settings | None) -> Settings:
    """A scheme that has no name of its own."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def int4(group: int) -> Settings:
    """Symmetric int4 weights with a scale for each group of inputs."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    return scheme({**weights, "group_size": group}, None)


def static() -> Settings:
    """W8A8 with one scale and zero point for all inputs of a linear."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    activations = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor"}
    return scheme(weights, {**activations, "dynamic": False, "observer": "minmax"})


METHODS: dict[str, Callable[[], list[Any]]] = {
    "rtn-w8a8": lambda: [QuantizationModifier(scheme="W8A8", **LAYERS)],
    "spinquant-w8a8": lambda: [
        SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard"),
        QuantizationModifier(scheme="W8A8", **LAYERS),
    ],
    "smoothquant-gptq-w8a8": lambda: [
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(scheme="W8A8", **LAYERS),
    ],
    "smoothquant-w8a8": lambda: [
        SmoothQuantModifier(smoothing_strength=0.5),
        QuantizationModifier(scheme="W8A8", **LAYERS),
    ],
    "smoothquant-gptq-static": lambda: [
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(**static()),
    ],
    "rtn-g128": lambda: [QuantizationModifier(**int4(128))],
    "gptq-g128": lambda: [GPTQModifier(**int4(128))],
    "gptq-g64": lambda: [GPTQModifier(**int4(64))],
    "gptq-g32": lambda: [GPTQModifier(**int4(32))],
}

DATA_FREE = ("rtn-w8a8", "spinquant-w8a8", "rtn-g128")


def main() -> None:
    """See the module docstring."""
    source, output, method, texts = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    data: Settings = {}
    if method not in DATA_FREE:
        windows = json.loads(Path(texts).read_text())["tokens"]
        masks = [[1] * len(window) for window in windows]
        dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": masks})
        data = {"dataset": dataset, "num_calibration_samples": len(windows)}
        data |= {"batch_size": WINDOWS_AT_ONCE, "max_seq_length": max(map(len, windows))}
    oneshot(model=model, recipe=METHODS[method](), **data)
    model.save_pretrained(output, save_compressed=True)


if __name__ == "__main__":
    main()
