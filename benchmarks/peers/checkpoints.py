"""Reads what peers have quantized: the weights that their codes stand for, and what is done to the
input of each linear.

Each format is read here anew, from its tensors alone, because these figures are to be independent
of how the converter understands them:

    compressed-tensors  int8 `weight`, or `weight_packed` of eight 4-bit codes; `weight_scale`
    AscendV1            int8 `weight` and `weight_scale`; static: `deq_scale`, `input_offset`
    GPTQ                `qweight` and `qzeros` of eight 4-bit codes, `scales`
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from qwen3_ascend.checkpoint.architecture import LM_HEAD, LinearSpec, TensorSpec, model_spec
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens
from qwen3_ascend.convert.source.config_file import read_config
from qwen3_ascend.runtime.backends.base import Activation, DeviceLinear, as_float
from qwen3_ascend.runtime.model.loader import make_layer
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer

CODES_IN_WORD = 8
"""4-bit codes in an int32, the first one in the lowest bits."""

Inputs = Callable[[Tensor], Tensor]
"""What quantization makes of the input of a linear, float32 [T, K]."""


@dataclass(frozen=True)
class Part:
    """A linear of the model as a peer has left it.

    Attributes:
        weight: float32 [N, K].
        bias: float32 [N], if there is one.
        inputs: what is done to its input.
        stored_bits: of its codes, scales and offsets, without the bias.
    """

    weight: Tensor
    bias: Tensor | None
    inputs: Inputs
    stored_bits: int


class FakeQuantizedLinear:
    """Linears that read the same input, on float32: weights and inputs are rounded, the sums are
    not, so that peers differ in their weights and scales alone."""

    input = Input.FLOAT

    def __init__(self, parts: list[Part]) -> None:
        """Args:
        parts: their outputs follow each other.
        """
        self.parts = parts
        self.weight = parts[0].weight  # for a prefetch, which a CPU has none of

    def __call__(self, x: Activation) -> Tensor:
        """The product, [T, N]."""
        given = as_float(x)
        products = [F.linear(part.inputs(given), part.weight, part.bias) for part in self.parts]
        return torch.cat(products, -1)


class PeerModel:
    """The model of a peer's checkpoint, as a LayeredModel on the CPU in float32."""

    def __init__(self, folder: Path, dynamic: bool) -> None:
        """Args:
        folder: config.json and files of safetensors.
        dynamic: whether linears without static scales round their inputs to int8 for each token.
        """
        self.config = _config(folder)
        self.spec = model_spec(self.config)
        self._inputs: Inputs = per_token if dynamic else unchanged
        self._files = _index(folder)

    def embedding(self) -> Tensor:
        """The embedding table, float32 [vocab, hidden]."""
        return self._plain(self.spec.embedding)

    def layer(self, number: int) -> DecoderLayer:
        """A decoder layer, counted from 0."""
        return make_layer(self.spec.layers[number], self._linear, self._plain)

    def final_norm(self) -> Tensor:
        """The weight [hidden] of the norm before the output projection."""
        return self._plain(self.spec.final_norm)

    def head(self) -> DeviceLinear:
        """The output projection, which no peer quantizes."""
        name = f"{LM_HEAD}.weight"
        weight = self._read(name) if name in self._files else self.embedding()
        return FakeQuantizedLinear([Part(weight.float(), None, unchanged, 0)])

    def bits_per_weight(self) -> float:
        """What the linears of the layers take, scales included."""
        bits = weights = 0
        for spec in self.spec.linears:
            for part in map(self._part, spec.sources if spec.name != LM_HEAD else ()):
                bits, weights = bits + part.stored_bits, weights + part.weight.numel()
        return bits / weights

    def _plain(self, spec: TensorSpec) -> Tensor:
        return self._read(spec.name).float()

    def _linear(self, spec: LinearSpec) -> DeviceLinear:
        return FakeQuantizedLinear([self._part(name) for name in spec.sources])

    def _part(self, name: str) -> Part:
        tensors = {
            full.removeprefix(f"{name}."): self._read(full)
            for full in self._files
            if full.startswith(f"{name}.")
        }
        bias = tensors.pop("bias", None)
        static = static_inputs(tensors)
        bits = 8 * sum(tensor.nbytes for tensor in tensors.values())
        return Part(
            decode(tensors), None if bias is None else bias.float(), static or self._inputs, bits
        )

    def _read(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found


def decode(tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight, float32 [N, K], of the tensors of a linear in any of the formats."""
    if "weight_packed" in tensors:
        codes = unpack(tensors["weight_packed"]) - 8
        return codes * spread(tensors["weight_scale"], codes)
    if "qweight" in tensors:
        codes = unpack(tensors["qweight"].t())
        zeros = unpack(tensors["qzeros"]).t() + 1
        scales = tensors["scales"].float().t()
        return (codes - spread(zeros, codes)) * spread(scales, codes)
    if "deq_scale" in tensors:
        scale = tensors["deq_scale"]
        if scale.dtype == torch.int64:  # the bits of a float32
            scale = scale.to(torch.int32).view(torch.float32)
        return tensors["weight"].float() * (scale / tensors["input_scale"])[:, None]
    if "weight_scale" in tensors:
        return tensors["weight"].float() * tensors["weight_scale"].float().view(-1, 1)
    return tensors["weight"].float()


def unpack(words: Tensor) -> Tensor:
    """int32 [N, W] of eight codes each as float32 [N, 8 W], 0 to 15."""
    shifts = torch.arange(0, 4 * CODES_IN_WORD, 4, dtype=torch.int32)
    return (words.contiguous()[..., None] >> shifts & 15).flatten(-2).float()


def spread(groups: Tensor, codes: Tensor) -> Tensor:
    """[N, G], a value for each group of inputs, as float32 [N, K]."""
    width = -(-codes.shape[1] // groups.shape[1])
    return groups.float().repeat_interleave(width, 1)[:, : codes.shape[1]]


def unchanged(x: Tensor) -> Tensor:
    """Of a linear that reads floats."""
    return x


def per_token(x: Tensor) -> Tensor:
    """int8 codes under a scale for each token, as floats again."""
    codes, scale = quantize_tokens(x)
    return codes.float() * scale[:, None]


def static_inputs(tensors: Mapping[str, Tensor]) -> Inputs | None:
    """int8 codes under the one scale and offset that a peer has stored, if it has."""
    if "input_scale" not in tensors:
        return None
    offset = tensors.get("input_offset", tensors.get("input_zero_point", torch.zeros(1))).float()
    scale = tensors["input_scale"].float()

    def rounded(x: Tensor) -> Tensor:
        codes = (torch.round(x / scale) + offset).clamp(-128, 127)
        return (codes - offset) * scale

    return rounded


def _index(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _config(folder: Path) -> Qwen3Config:
    data: dict[str, Any] = json.loads((folder / "config.json").read_text())
    data.pop("quantization_config", None)
    return read_config(data)
