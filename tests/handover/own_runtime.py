"""This project's own runtime on a CPU, as engines are compared with it: with the last bit of what
goes into its linears moved, or with the arithmetic of several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.checkpoint.sharding import shard
from qwen3_ascend.runtime.backends.base import (
    Activation,
    DeviceLinear,
    as_float,
)
from qwen3_ascend.runtime.backends.cpu.by_torch import TorchCpuBackend
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
        dtype: that it computes in.
        nudged: multiply what goes into each linear by one plus or minus a unit in the last place of
            float32, before it is quantized.
    """

    def __init__(
        self,
        checkpoint: Path,
        ranks: int = 1,
        dtype: torch.dtype = torch.float32,
        nudged: bool = False,
    ) -> None:
        weights = _Weights(CheckpointReader(checkpoint), ranks)
        backend = (_NudgedBackend if nudged else _Backend)(weights.config, dtype)
        engine = make_engine(weights, backend, EngineOptions(), lambda *_: None)
        self._llm = LLM(engine, load_tokenizer(checkpoint), frozenset(), SamplingParams())

    def logprobs(self, tokens: Sequence[int]) -> Tensor:
        """Float32 [T, vocab]; row i predicts token i + 1."""
        return self._llm.logits(tokens).log_softmax(-1)


class _Weights:
    """See runtime.model.loader.WeightSource."""

    def __init__(self, reader: CheckpointReader, ranks: int) -> None:
        self._reader, self._ranks = reader, ranks
        self.config = reader.config

    def tensor(self, name: str) -> Tensor:
        return self._reader.tensor(name)

    def linear(self, name: str) -> Linear:
        linear, entry = self._reader.linear(name), self._reader.manifest.linears[name]
        if self._ranks == 1 or entry.cut == "outputs" or linear.scheme.input is Input.FLOAT:
            return linear
        return _Divided(linear.scheme, linear.shape, linear.layout, linear.tensors, self._ranks)


@dataclass(frozen=True, eq=False)
class _Divided(Linear):
    """An integer linear whose inputs so many ranks share."""

    ranks: int


class _Backend(TorchCpuBackend):
    @override
    def linear(self, linear: Linear) -> DeviceLinear:
        if not isinstance(linear, _Divided):
            return super().linear(linear)
        outputs, ranks = linear.shape[0], linear.ranks
        shares = [shard(linear, "inputs", (outputs,), rank, ranks) for rank in range(ranks)]
        return _SumOfRanks(self, [TorchCpuBackend.linear(self, share) for share in shares])


class _NudgedBackend(_Backend):
    @override
    def feed(self, x: Tensor, consumer: DeviceLinear) -> Activation:
        signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0))
        return super().feed(x * (1 + (2 * signs - 1) * torch.finfo(torch.float32).eps), consumer)


class _SumOfRanks:
    """What ranks add up to, each of which quantizes its own inputs."""

    input = Input.FLOAT

    def __init__(self, backend: TorchCpuBackend, ranks: Sequence[DeviceLinear]) -> None:
        self._backend, self._ranks, self.weight = backend, ranks, ranks[0].weight

    def __call__(self, x: Activation) -> Tensor:
        parts = as_float(x).chunk(len(self._ranks), dim=-1)
        products = [
            rank(self._backend.feed(part, rank))
            for rank, part in zip(self._ranks, parts, strict=True)
        ]
        return torch.stack(products).sum(0)
