"""Our own rows: what converts a model, and how its checkpoint is read a layer at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from peers.checkpoints import FakeQuantizedLinear, Part, per_token, unchanged
from torch import Tensor

from qwen3_ascend import recipes
from qwen3_ascend.checkpoint.architecture import LM_HEAD, LinearSpec, TensorSpec, model_spec
from qwen3_ascend.checkpoint.linear import BIAS
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.runtime.backends.base import DeviceLinear
from qwen3_ascend.runtime.backends.cpu.backend import CpuBackend
from qwen3_ascend.runtime.model.loader import load_layer, make_layer
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer
from qwen3_ascend.runtime.streaming import one_layer

HEAD: dict[str, Any] = {"match": "lm_head", "scheme": "bf16"}


def recipe(scheme: str | dict[str, Any], quantizer: str, *transforms: str) -> dict[str, Any]:
    """A recipe that leaves the output projection as it is."""
    rule = {"match": "*", "scheme": scheme, "quantizer": quantizer}
    return {"schema": 1, "name": "benchmark", "rules": [HEAD, rule], "transforms": list(transforms)}


RECIPES = {
    "w8a8-nearest": recipe("w8a8", "nearest"),
    "w8a8-cle": recipe("w8a8", "nearest", "cle"),
    "w8a8-cle-rotate": recipe("w8a8", "nearest", "cle", "rotate"),
    "w8a8-cle-rotate-smooth": recipe("w8a8", "nearest", "cle", "rotate", "smooth"),
    **{
        f"w4a16-g{group}-{quantizer}": recipe({"name": "w4a16", "group": group}, quantizer)
        for group in (128, 64, 32)
        for quantizer in ("nearest", "mse", "gptq")
    },
    "w4a16-g64-cle-rotate-gptq": recipe({"name": "w4a16", "group": 64}, "gptq", "cle", "rotate"),
}
"""What no recipe that ships is made of."""


def command(name: str, model: Path, output: Path, text: Path | None) -> list[str]:
    """The command that converts a model.

    Args:
        name: a recipe that ships, or one of RECIPES, which is written beside the output.
        model: the source.
        output: to be made.
        text: to calibrate with, all of it; None for a recipe that needs no data.
    """
    said = name
    if name in RECIPES and name not in recipes.names():
        file = output.with_name("recipe.yaml")
        file.write_text(yaml.safe_dump(RECIPES[name]))
        said = str(file)
    words = [sys.executable, "-m", "qwen3_ascend", "convert", str(model), str(output), "--quiet"]
    return [*words, "--recipe", said, *(["--calibration", str(text)] if text else [])]


class OwnModel:
    """The layers of a converted checkpoint in the real runtime: its own integer arithmetic."""

    def __init__(self, folder: Path) -> None:
        """Reads the manifest."""
        self._reader = CheckpointReader(folder)
        self.config = self._reader.config
        self.backend = CpuBackend(one_layer(self.config), torch.float32)
        self.spec = model_spec(self.config)

    def embedding(self) -> Tensor:
        """The embedding table, float32 [vocab, hidden]."""
        return self._plain(self.spec.embedding)

    def layer(self, number: int) -> DecoderLayer:
        """A decoder layer, counted from 0."""
        return load_layer(self._reader, self.backend, self.spec.layers[number])

    def final_norm(self) -> Tensor:
        """The weight [hidden] of the norm before the output projection."""
        return self._plain(self.spec.final_norm)

    def head(self) -> DeviceLinear:
        """The output projection."""
        if self.spec.lm_head is None:
            return self.backend.dense(self.embedding())
        return self.backend.linear(self._reader.linear(self.spec.lm_head.name))

    def bits_per_weight(self) -> float:
        """What the linears of the layers take, scales included."""
        linears = [spec for spec in self.spec.linears if spec.name != LM_HEAD]
        bits = 8 * sum(
            tensor.nbytes
            for spec in linears
            for name, tensor in self._reader.linear(spec.name).tensors.items()
            if name != BIAS
        )
        return bits / sum(spec.outputs * spec.inputs for spec in linears)

    def _plain(self, spec: TensorSpec) -> Tensor:
        return self.backend.upload(self._reader.tensor(spec.name))


class OwnDecoded(OwnModel):
    """The same through the arithmetic of the peers' rows: shows that it is a fair one."""

    def layer(self, number: int) -> DecoderLayer:
        """A decoder layer of decoded weights."""
        return make_layer(self.spec.layers[number], self._decoded, self._plain)

    def _decoded(self, spec: LinearSpec) -> DeviceLinear:
        linear = self._reader.linear(spec.name)
        inputs = per_token if linear.scheme.input is Input.INT8_PER_TOKEN else unchanged
        bias = None if linear.bias is None else linear.bias.float()
        return FakeQuantizedLinear([Part(linear.dequantize(), bias, inputs, 0)])
