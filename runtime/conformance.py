"""Does a backend compute what the CPU backend defines? One comparison for each operation.

Both are given the same bfloat16 inputs. An operation may round its float32 result to bf16 at most
one unit differently from the definition, and a quantized activation may differ by one code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.linear import Linear, quantize
from qwen3_ascend.checkpoint.schemes import SCHEMES
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.runtime.backends.base import Activation, Backend
from qwen3_ascend.runtime.backends.cache import PagedKVCache
from qwen3_ascend.runtime.engine.batch import Batch, Chunk, step_inputs
from qwen3_ascend.runtime.engine.request import Request, SamplingParams

BF16_UNIT = 2.0**-8
"""Relative distance of neighbouring bf16 numbers, at its largest 2^-7, at its smallest 2^-8."""

ROWS = (1, 3, 17)
"""Tokens of a step: one, a few, and more than a block row of FRACTAL_NZ."""

LENGTHS = (5, 128, 300)
"""Context lengths before a decode step: within a block, at its border, over several."""


Operation = Callable[[Backend], Activation]


@dataclass(frozen=True)
class Comparison:
    """One operation on two backends.

    Attributes:
        name: of the operation and its case.
        error: largest difference, in the unit of the bound.
        bound: what is allowed.
    """

    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound (not-a-number is not)."""
        return self.error <= self.bound


def compare_backends(
    definition: Backend, device: Backend, config: Qwen3Config
) -> Iterator[Comparison]:
    """Compares every operation of two backends in the shapes of a model."""
    pair = _Pair(definition, device, config)
    for scheme in SCHEMES:
        yield from pair.linears(scheme)
    yield from pair.attention()


class _Pair:
    """Two backends that are given the same inputs."""

    def __init__(self, definition: Backend, device: Backend, config: Qwen3Config) -> None:
        self.backends, self.config = (definition, device), config
        self._random = torch.Generator().manual_seed(0)

    def linears(self, scheme: str) -> Iterator[Comparison]:
        """The linear itself, and what is fused into its input."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        wide, narrow = (
            self._quantized(scheme, inner, hidden),
            self._quantized(scheme, hidden, inner),
        )
        weight = self._normal(hidden)
        for rows in ROWS:
            x, delta = self._normal(rows, hidden), self._normal(rows, hidden)
            gate_up = self._normal(rows, 2 * inner)
            case = f"{scheme}, {rows} tokens"
            yield self._compare(f"linear ({case})", _linear(wide, x))
            yield self._compare(f"norm ({case})", _norm(wide, weight, x, None))
            yield self._compare(f"add_norm ({case})", _norm(wide, weight, x, delta))
            yield self._compare(f"gated ({case})", _gated(narrow, gate_up))

    def attention(self) -> Iterator[Comparison]:
        """Prefill, chunked prefill and decode over one cache, written by the backend itself."""
        sides = [_AttentionSide(backend, self.config) for backend in self.backends]
        for index, length in enumerate(LENGTHS):
            chunk = self._qkv(length)
            first = length // 2 + 1
            for name, start, stop in (("prefill", 0, first), ("chunk", first, length)):
                piece = chunk[start:stop]
                outputs = [side.prefill(index, piece) for side in sides]
                yield from self._both(f"{name} to {stop} tokens", outputs)
        outputs = [side.decode(self._qkv(len(LENGTHS), seed=1)) for side in sides]
        yield from self._both(f"decode after {LENGTHS} tokens", outputs)

    def _both(self, name: str, sides: list[tuple[Tensor, Tensor]]) -> Iterator[Comparison]:
        (query, output), (device_query, device_output) = sides
        yield _difference(f"norm_rope_write ({name})", query, device_query, 2 * BF16_UNIT)
        yield _difference(f"attention ({name})", output, device_output, 4 * BF16_UNIT)

    def _compare(self, name: str, operation: Operation) -> Comparison:
        with torch.inference_mode():
            expected, actual = (operation(backend) for backend in self.backends)
        if hasattr(expected, "codes"):
            return _code_difference(name, expected, actual)
        return _difference(name, expected, actual, 2 * BF16_UNIT)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random).bfloat16()

    def _qkv(self, rows: int, seed: int = 0) -> Tensor:
        heads = self.config.num_heads + 2 * self.config.num_kv_heads
        random = torch.Generator().manual_seed(rows + 1000 * seed)
        return torch.randn(rows, heads * self.config.head_dim, generator=random).bfloat16()

    def _quantized(self, scheme: str, outputs: int, inputs: int) -> Linear:
        weight = self._normal(outputs, inputs) / inputs**0.5
        return quantize(SCHEMES[scheme](), weight, None, ASCEND_A2_A3.layouts[scheme])


class _AttentionSide:
    """One backend's cache, and sequences whose keys it holds."""

    def __init__(self, backend: Backend, config: Qwen3Config) -> None:
        self.backend, self.config = backend, config
        per_sequence = -(-(max(LENGTHS) + 1) // ASCEND_A2_A3.block_size)
        blocks = 1 + per_sequence * len(LENGTHS)
        one_layer = dataclasses.replace(config, num_layers=1)
        cache = PagedKVCache.allocate(
            one_layer, blocks, ASCEND_A2_A3.block_size, backend.device, backend.dtype
        )
        self.cache = cache.layers[0]
        # Blocks in reverse, so that no sequence lies in neighbouring ones.
        self.tables = [
            [blocks - 1 - index - len(LENGTHS) * row for row in range(per_sequence)]
            for index in range(len(LENGTHS))
        ]
        self.computed = [0] * len(LENGTHS)

    def prefill(self, index: int, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Continues one sequence: (queries, attention output), on the CPU."""
        done = self.computed[index]
        sequence = self._sequence(index, done + len(qkv))
        sequence.computed = done
        self.computed[index] = done + len(qkv)
        return self._run(qkv, Batch((Chunk(sequence, len(qkv)),)))

    def decode(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """One token more for every sequence."""
        sequences = [self._sequence(i, done + 1) for i, done in enumerate(self.computed)]
        return self._run(qkv, Batch(tuple(Chunk(sequence, 1) for sequence in sequences)))

    def _sequence(self, index: int, length: int) -> Request:
        table = list(self.tables[index])
        return Request(
            index, SamplingParams(), [0] * length, length, length, frozenset(), block_table=table
        )

    def _run(self, qkv: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        backend, head_dim = self.backend, self.config.head_dim
        ones = backend.upload(torch.ones(head_dim))
        with torch.inference_mode():
            step = backend.to_device(step_inputs(batch, ASCEND_A2_A3.block_size))
            rotary = backend.rotary(self.config, step)
            query = backend.norm_rope_write(
                backend.upload(qkv), ones, ones, 1e-6, rotary, self.cache, step
            )
            return query.cpu(), backend.attention(query, self.cache, step).cpu()


def _linear(linear: Linear, x: Tensor) -> Operation:
    return lambda backend: backend.linear(linear)(backend.upload(x))


def _norm(linear: Linear, weight: Tensor, x: Tensor, delta: Tensor | None) -> Operation:
    def operation(backend: Backend) -> Activation:
        added = None if delta is None else backend.upload(delta)
        consumer = backend.linear(linear)
        return backend.add_norm(backend.upload(x), added, backend.upload(weight), 1e-6, consumer)[0]

    return operation


def _gated(linear: Linear, gate_up: Tensor) -> Operation:
    return lambda backend: backend.gated(backend.upload(gate_up), backend.linear(linear))


def _difference(name: str, expected: Tensor, actual: Tensor, bound: float) -> Comparison:
    """Largest difference relative to the size of the values around it."""
    left, right = expected.float().cpu(), actual.float().cpu()
    scale = left.abs().clamp(min=float(left.abs().mean()))
    return Comparison(name, float(((left - right).abs() / scale).max()), bound)


def _code_difference(name: str, expected: Any, actual: Any) -> Comparison:
    """Codes may differ by one where the quotient lies between two; scales hardly at all."""
    codes = (expected.codes.int() - actual.codes.cpu().int()).abs().max()
    scales = _difference(name, expected.scale, actual.scale, 0).error
    return Comparison(name, float(codes) if scales < 1e-4 else float("inf"), 1.0)
