"""Checkpoints of the scheme w8a8-static: ranges are measured by running a bf16 checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.architecture import model_spec
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import Input, InputRange
from qwen3_ascend.convert import Recipe, convert_checkpoint
from qwen3_ascend.runtime.backends.base import Activation, DeviceLinear, as_float
from qwen3_ascend.runtime.backends.cpu.backend import CpuBackend
from qwen3_ascend.runtime.model.loader import load_layer
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer, Mlp
from qwen3_ascend.runtime.streaming import LayerStream, one_layer
from qwen3_ascend.runtime.tokenizer import load_tokenizer

STATIC = Recipe.parse(
    """
schema: 1
name: w8a8-static
rules:
  - {match: lm_head, scheme: bf16}
  - {match: "*", scheme: w8a8-static}
""",
    "the tests' recipe",
)


class Watched:
    """A linear of floats that notes the range of what it is fed."""

    input = Input.FLOAT

    def __init__(self, linear: DeviceLinear) -> None:
        self.linear, self.weight = linear, linear.weight
        self.least, self.largest = torch.inf, -torch.inf

    def __call__(self, x: Activation) -> Tensor:
        values = as_float(x)
        self.least = min(self.least, float(values.min()))
        self.largest = max(self.largest, float(values.max()))
        return self.linear(x)


def measured_ranges(floats: Path, texts: Sequence[Sequence[int]]) -> dict[str, InputRange]:
    """The range of the inputs of every linear of a layer, by its name.

    Args:
        floats: a checkpoint of the recipe bf16.
        texts: token ids that go through it.
    """
    reader = CheckpointReader(floats)
    config, spec = reader.config, model_spec(reader.config)
    backend = CpuBackend(one_layer(config), torch.float32)
    stream = LayerStream(backend, config.rms_norm_eps, texts)
    hidden = stream.embed(backend.upload(reader.tensor(spec.embedding.name)))
    found = {}
    for layer in spec.layers:
        watched, linears = _watched(load_layer(reader, backend, layer))
        with torch.inference_mode():
            hidden = [*stream.through(watched, hidden)]
        names = (layer.qkv.name, layer.output.name, layer.mlp.gate_up.name, layer.mlp.down.name)
        for name, linear in zip(names, linears, strict=True):
            found[name] = InputRange(linear.least, linear.largest)
    return found


def _watched(layer: DecoderLayer) -> tuple[DecoderLayer, list[Watched]]:
    mlp = layer.mlp
    linears = [Watched(each) for each in (layer.qkv, layer.output, mlp.gate_up, mlp.down)]
    qkv, output, gate_up, down = linears
    return replace(layer, qkv=qkv, output=output, mlp=Mlp(gate_up, down)), linears


def write_static(source: Path, floats: Path, out: Path) -> Mapping[str, InputRange]:
    """Converts a model to w8a8-static with ranges found on its held-out text.

    Args:
        source: a folder with the model and heldout.txt.
        floats: a bf16 checkpoint of it.
        out: the checkpoint to be written.
    """
    text = (source / "heldout.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(floats).encode(text[:6000])
    ranges = measured_ranges(floats, [ids[start : start + 256] for start in range(0, 1024, 256)])
    convert_checkpoint(source, out, STATIC, ranges=ranges)
    return ranges
