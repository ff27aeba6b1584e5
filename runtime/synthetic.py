"""A random Qwen3 in memory, quantized like a converted one: for checks that need no download."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.architecture import LM_HEAD, TensorSpec, model_spec
from qwen3_ascend.checkpoint.config import Qwen3Config, RopeConfig
from qwen3_ascend.checkpoint.linear import Linear, quantize
from qwen3_ascend.checkpoint.schemes import SCHEMES
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3

SMALL_CONFIG = Qwen3Config(
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=4096,
    max_position=4096,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    attention_bias=False,
    rope=RopeConfig("default", 1_000_000.0),
)
"""Two layers in the shapes of Qwen3-0.6B, with a small vocabulary."""


@dataclass(frozen=True)
class SyntheticWeights:
    """A WeightSource: every tensor follows from its name, the same on each machine."""

    config: Qwen3Config
    scheme: str

    def tensor(self, name: str) -> Tensor:
        """See WeightSource. Norms lie around 1."""
        spec = next(spec for spec in model_spec(self.config) if spec.name == name)
        assert isinstance(spec, TensorSpec)
        shape = spec.shape
        values = torch.randn(shape, generator=_generator(name))
        return (values if len(shape) > 1 else 1 + 0.1 * values).bfloat16()

    def linear(self, name: str) -> Linear:
        """See WeightSource."""
        spec = next(spec for spec in model_spec(self.config).linears if spec.name == name)
        weight = torch.randn(spec.shape, generator=_generator(name))
        weight = (weight / math.sqrt(spec.inputs)).bfloat16()
        scheme = SCHEMES["bf16" if name == LM_HEAD else self.scheme]()
        return quantize(scheme, weight, None, ASCEND_A2_A3.layout(scheme, name, weight.shape))


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))
