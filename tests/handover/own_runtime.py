"""This project's own runtime in float32, as engines are compared with it: with the last bit of its
inputs moved, or with the arithmetic of several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.architecture import EMBEDDING
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens
from qwen3_ascend.checkpoint.sharding import shard
from qwen3_ascend.runtime.backends.base import (
    Activation,
    DeviceLinear,
    QuantizedActivation,
    as_float,
)
from qwen3_ascend.runtime.backends.cpu.backend import CpuBackend
from qwen3_ascend.runtime.engine.assembly import make_engine
from qwen3_ascend.runtime.engine.request import SamplingParams
from qwen3_ascend.runtime.llm import LLM
from qwen3_ascend.runtime.options import EngineOptions
from qwen3_ascend.runtime.tokenizer import load_tokenizer


class OwnRuntime:
    """Logits of our runtime on a CPU.

    Args:
        checkpoint: a finished one.
        ranks: where a linear's inputs are divided among ranks, each of them quantizes its part of
            an activation with a scale of its own.
        nudged: multiply the embedding by one plus or minus a unit in the last place of float32.
    """

    def __init__(self, checkpoint: Path, ranks: int = 1, nudged: bool = False) -> None:
        weights = _Weights(CheckpointReader(checkpoint), ranks, nudged)
        backend = _Backend(weights.config, torch.float32)
        engine = make_engine(weights, backend, EngineOptions(), lambda *_: None)
        self._llm = LLM(engine, load_tokenizer(checkpoint), frozenset(), SamplingParams())

    def logprobs(self, tokens: Sequence[int]) -> Tensor:
        """Float32 [T, vocab]; row i predicts token i + 1."""
        return self._llm.logits(tokens).log_softmax(-1)


class _Weights:
    """See runtime.model.loader.WeightSource."""

    def __init__(self, reader: CheckpointReader, ranks: int, nudged: bool) -> None:
        self._reader, self._ranks, self._nudged = reader, ranks, nudged
        self.config = reader.config

    def tensor(self, name: str) -> Tensor:
        tensor = self._reader.tensor(name)
        if not self._nudged or name != f"{EMBEDDING}.weight":
            return tensor
        signs = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(0))
        return tensor.float() * (1 + (2 * signs - 1) * torch.finfo(torch.float32).eps)

    def linear(self, name: str) -> Linear:
        linear, entry = self._reader.linear(name), self._reader.manifest.linears[name]
        if self._ranks == 1 or entry.cut == "outputs" or linear.scheme.input is Input.FLOAT:
            return linear
        return _Divided(linear.scheme, linear.shape, linear.layout, linear.tensors, self._ranks)


@dataclass(frozen=True, eq=False)
class _Divided(Linear):
    """An integer linear whose inputs so many ranks share."""

    ranks: int


class _Backend(CpuBackend):
    @override
    def linear(self, linear: Linear) -> DeviceLinear:
        if not isinstance(linear, _Divided):
            return super().linear(linear)
        outputs, ranks = linear.shape[0], linear.ranks
        shares = [shard(linear, "inputs", (outputs,), rank, ranks) for rank in range(ranks)]
        return _SumOfRanks([CpuBackend.linear(self, share) for share in shares])


class _SumOfRanks:
    """What ranks add up to."""

    input = Input.FLOAT

    def __init__(self, ranks: Sequence[DeviceLinear]) -> None:
        self._ranks, self.weight = ranks, ranks[0].weight

    def __call__(self, x: Activation) -> Tensor:
        parts = as_float(x).chunk(len(self._ranks), dim=-1)
        products = [
            rank(QuantizedActivation(*quantize_tokens(part)))
            for rank, part in zip(self._ranks, parts, strict=True)
        ]
        return torch.stack(products).sum(0)
