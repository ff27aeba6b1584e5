"""Our own rows: what converts a model, and how its checkpoint is read a layer at a time."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import yaml
from peers.checkpoints import FakeQuantizedLinear, Part, per_token, unchanged
from torch import Tensor

from qwen3_ascend import recipes
from qwen3_ascend.checkpoint.architecture import LM_HEAD, LinearSpec, TensorSpec, model_spec
from qwen3_ascend.checkpoint.linear import BIAS
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.runtime.backends.base import Backend, DeviceLinear
from qwen3_ascend.runtime.model.loader import make_layer
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer
from qwen3_ascend.runtime.streaming import StoredModel

HEAD: dict[str, Any] = {"match": "lm_head", "scheme": "bf16"}


def recipe(scheme: str | dict[str, Any], quantizer: str, *transforms: str) -> dict[str, Any]:
    """A recipe that leaves the output projection as it is."""
    rule = {"match": "*", "scheme": scheme, "quantizer": quantizer}
    return {"schema": 1, "name": "benchmark", "rules": [HEAD, rule], "transforms": list(transforms)}


def regrouped(name: str, group: int) -> dict[str, Any]:
    """A recipe of w4a16 that ships, in groups of another size."""
    said: dict[str, Any] = yaml.safe_load(recipes.text(name))
    said["rules"][-1]["scheme"]["group"] = group
    return said


RECIPES = {
    "w8a8-cle": recipe("w8a8", "nearest", "cle"),
    **{
        f"{name}-g{group}": regrouped(name, group)
        for name in ("w4a16", "w4a16-plain")
        for group in (64, 32)
    },
    **{
        f"w4a16-mse-g{group}": recipe({"name": "w4a16", "group": group}, "mse")
        for group in (128, 64, 32)
    },
}
"""By name, what does not ship."""


def command(name: str, model: Path, output: Path, text: Path, tokens: int) -> list[str]:
    """The command that converts a model.

    Args:
        name: a recipe that ships, or one of RECIPES, which is written beside the output.
        model: the source.
        output: to be made.
        text: to calibrate with, where the recipe does.
        tokens: that the text has.
    """
    said = name
    if name in RECIPES:
        file = output.with_name("recipe.yaml")
        file.write_text(yaml.safe_dump(RECIPES[name]))
        said = str(file)
    words = [sys.executable, "-m", "qwen3_ascend", "convert", str(model), str(output), "--quiet"]
    calibration = ["--calibration", str(text), "--calibration-tokens", str(tokens)]
    return [*words, "--recipe", said, *calibration]


class DecodedModel(StoredModel):
    """A converted checkpoint in the arithmetic of the peers' rows: shows that it is a fair one."""

    def __init__(self, weights: CheckpointReader, backend: Backend[Any]) -> None:
        """Args:
        weights: the checkpoint.
        backend: computes in float32.
        """
        super().__init__(weights, backend)
        self._reader, self._spec = weights, model_spec(weights.config)

    def layer(self, number: int) -> DecoderLayer:
        """See LayeredModel."""
        return make_layer(self._spec.layers[number], self._decoded, self._plain)

    def _decoded(self, spec: LinearSpec) -> DeviceLinear:
        linear = self._reader.linear(spec.name)
        inputs = per_token if linear.scheme.input is Input.INT8_PER_TOKEN else unchanged
        bias = None if linear.bias is None else linear.bias.float()
        return FakeQuantizedLinear([Part(linear.dequantize(), bias, inputs, 0)])

    def _plain(self, spec: TensorSpec) -> Tensor:
        return self._reader.tensor(spec.name).float()


def bits_per_weight(folder: Path) -> float:
    """What the linears of the layers of a checkpoint take, scales included."""
    reader = CheckpointReader(folder)
    linears = [spec for spec in model_spec(reader.config).linears if spec.name != LM_HEAD]
    bits = 8 * sum(
        tensor.nbytes
        for spec in linears
        for name, tensor in reader.linear(spec.name).tensors.items()
        if name != BIAS
    )
    return bits / sum(math.prod(spec.shape) for spec in linears)
