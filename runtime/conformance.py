"""Does a backend compute what the reference defines? One comparison for each operation.

Both are given the same bfloat16 inputs. An operation may round its float32 result to bf16 at most
one unit differently from the definition, and a quantized activation may differ by one code.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.architecture import model_spec
from qwen3_ascend.checkpoint.config import ExpertsConfig, Qwen3Config
from qwen3_ascend.checkpoint.linear import Linear, quantize
from qwen3_ascend.checkpoint.schemes import BF16, EXAMPLES, W8A16, Input, InputRange, Scheme
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.runtime.backends.base import (
    Activation,
    Backend,
    DeviceLinear,
    Mixture,
    QuantizedActivation,
    StaticActivation,
    StepBounds,
    as_codes,
    as_float,
    as_static,
)
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.engine.batch import Batch, Chunk, step_inputs
from qwen3_ascend.runtime.engine.request import Request, SamplingParams

BF16_UNIT = 2.0**-8
"""Relative distance of neighbouring bf16 numbers, at its largest 2^-7, at its smallest 2^-8."""

CODES_OFF = 2.0**-3
"""Relative difference of a mixture of int8 experts, whose kernel between two products may choose
any code one off: 1/127 of a row's largest value, which is up to 16 times the usual one, against a
sum of as many usual ones. Weights of another expert, or of another order, differ by far more."""

WEIGHTS_KEPT = 2.0**-5
"""Relative difference of a mixture of w8a16, whose kernel multiplies decoded weights that are not
rounded to bfloat16, where it splits its rows instead: each of some thousand is then half a unit of
bfloat16 off at most, in two products one after the other."""

COMPARED_EXPERTS = 16
"""Of a mixture that is compared: so many have the kernels of more, and take less time."""

ROWS = (1, 3, 17)
"""Tokens of a step: one, a few, and more than a block row of FRACTAL_NZ."""

LENGTHS = (5, 128, 300)
"""Context lengths before a decode step: within a block, at its border, over several."""


MORE = 40
"""Tokens at most that a step adds to a context after that."""


EPSILON = 1e-6

INPUTS = InputRange(-2.5, 4.5)
"""Of linears with a static input: random inputs go beyond, so that codes are clipped."""

CONSUMER_OUTPUTS = 64
"""Of a linear that is there to be fed, and never multiplies."""

DIVIDED = (ASCEND_A2_A3.largest_dimension + 33, 128)
"""(outputs, inputs) of a linear that integer kernels take in parts only, as a quantized output
projection; its second part ends within a strip of FRACTAL_NZ."""

Operation = Callable[[Backend[LayerKV], DeviceLinear], Activation]


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


@dataclass(frozen=True)
class Case:
    """What belongs together: a crash of one case leaves the others alone."""

    name: str
    compare: Callable[[], Iterator[Comparison]]


def compare_backends(
    definition: Backend[LayerKV], device: Backend[LayerKV], config: Qwen3Config
) -> Iterator[Comparison]:
    """Compares every operation of two backends in the shapes of a model."""
    for case in cases(definition, device, config):
        yield from case.compare()


def cases(
    definition: Backend[LayerKV], device: Backend[LayerKV], config: Qwen3Config
) -> Iterator[Case]:
    """Every operation of two backends in the shapes of a model; nothing is computed yet."""
    pair = _Pair(definition, device, config)
    for scheme in EXAMPLES:
        divided = () if isinstance(scheme, BF16) else (DIVIDED,)
        for shape in (*linear_shapes(config), *divided):
            if ASCEND_A2_A3.refusal(scheme, shape) is None:
                name = f"linear ({scheme}, {list(shape)})"
                yield Case(name, functools.partial(pair.linear, scheme, *shape))
    for scheme in {scheme.input: scheme for scheme in reversed(EXAMPLES)}.values():
        yield Case(f"what a linear is fed ({scheme})", functools.partial(pair.fed, scheme))
    yield Case("attention", pair.attention)
    if config.experts:
        count = min(config.experts.count, COMPARED_EXPERTS)
        per_token = min(config.experts.per_token, count)
        few = dataclasses.replace(config.experts, count=count, per_token=per_token)
        for scheme in EXAMPLES:
            shapes = expert_shapes(config.hidden_size, few)
            if all(ASCEND_A2_A3.refusal(scheme, shape) is None for shape in shapes):
                case = functools.partial(pair.mixture, scheme, few)
                yield Case(f"mixture of experts ({scheme})", case)


def expert_shapes(hidden: int, experts: ExpertsConfig) -> tuple[tuple[int, int, int], ...]:
    """(experts, outputs, inputs) of gate_up and of down."""
    count, inner = experts.count, experts.intermediate_size
    return (count, 2 * inner, hidden), (count, hidden, inner)


def _bound_of_mixtures(scheme: Scheme) -> float:
    if scheme.input is not Input.FLOAT:
        return CODES_OFF
    return WEIGHTS_KEPT if isinstance(scheme, W8A16) else 4 * BF16_UNIT


def linear_shapes(config: Qwen3Config) -> tuple[tuple[int, int], ...]:
    """(outputs, inputs) of the linears of a layer, each once."""
    layer = model_spec(config).layers[0]
    specs = (layer.qkv, layer.output, layer.mlp.gate_up, layer.mlp.down)
    return tuple(dict.fromkeys((spec.outputs, spec.inputs) for spec in specs))


class _Pair:
    """Two backends that are given the same inputs."""

    def __init__(
        self, definition: Backend[LayerKV], device: Backend[LayerKV], config: Qwen3Config
    ) -> None:
        self.backends, self.config = (definition, device), config
        self._random = torch.Generator().manual_seed(0)

    def linear(self, scheme: Scheme, outputs: int, inputs: int) -> Iterator[Comparison]:
        """One linear, fed the same by both."""
        linears = self._linears(scheme, outputs, inputs)
        ones = torch.ones(inputs).bfloat16()
        for rows in ROWS:
            x = self._normal(rows, inputs)
            fed, _ = self.backends[0].add_norm(x, None, ones, EPSILON, linears[0])
            name = f"linear ({scheme}, [{outputs}, {inputs}], {rows} tokens)"
            yield self._compare(name, linears, _product(fed))

    def fed(self, scheme: Scheme) -> Iterator[Comparison]:
        """What is fused into the input of a linear."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        consumers = self._linears(scheme, CONSUMER_OUTPUTS, hidden)
        weight = self._normal(hidden)
        for rows in ROWS:
            x, delta = self._normal(rows, hidden), self._normal(rows, hidden)
            gate_up = self._normal(rows, 2 * inner)
            case = f"{scheme}, {rows} tokens"
            yield self._compare(f"norm ({case})", consumers, _norm(weight, x, None))
            yield self._compare(f"add_norm ({case})", consumers, _norm(weight, x, delta))
            yield self._compare(f"gated ({case})", consumers, _gated(gate_up))

    def mixture(self, scheme: Scheme, experts: ExpertsConfig) -> Iterator[Comparison]:
        """A mixture of experts with random weights. Of tokens whose experts are the same on both
        sides, which a logit between two values may change."""
        hidden = self.config.hidden_size
        router = self._normal(experts.count, hidden) / hidden**0.5
        gate_up, down = (self._stored(scheme, *s) for s in expert_shapes(hidden, experts))
        sides = [
            Mixture.of(
                experts,
                backend.dense(backend.upload(router)),
                backend.experts(gate_up),
                backend.experts(down),
            )
            for backend in self.backends
        ]
        for rows in ROWS:
            x = self._normal(rows, hidden)
            with torch.inference_mode():
                expected, actual = (
                    backend.mixture(backend.upload(x), side)
                    for backend, side in zip(self.backends, sides, strict=True)
                )
            bound = _bound_of_mixtures(scheme)
            yield _difference(f"mixture ({scheme}, {rows} tokens)", expected, actual, bound)

    def _stored(self, scheme: Scheme, *shape: int) -> Linear:
        weight = self._normal(*shape) / shape[-1] ** 0.5
        return quantize(scheme, weight, None, ASCEND_A2_A3.layout(scheme, "", weight.shape))

    def attention(self) -> Iterator[Comparison]:
        """Prefill, chunked prefill and decode over one cache, written by the backend itself."""
        sides = [_AttentionSide(backend, self.config) for backend in self.backends]
        for index, length in enumerate(LENGTHS):
            chunk = self._qkv(length)
            first = length // 2 + 1
            for name, start, stop in (("prefill", 0, first), ("chunk", first, length)):
                piece = chunk[start:stop]
                outputs = [side.compute(piece, {index: len(piece)}) for side in sides]
                yield from self._both(f"{name} to {stop} tokens", outputs)
        steps = {"decode": [1] * len(LENGTHS), "a mixed step": [1, 7, MORE]}
        for seed, (name, counts) in enumerate(steps.items(), 1):
            qkv = self._qkv(sum(counts), seed)
            outputs = [side.compute(qkv, dict(enumerate(counts))) for side in sides]
            yield from self._both(f"{name} after {LENGTHS} tokens", outputs)

    def _both(self, name: str, sides: list[tuple[Tensor, Tensor]]) -> Iterator[Comparison]:
        (query, output), (device_query, device_output) = sides
        yield _difference(f"norm_rope_write ({name})", query, device_query, 2 * BF16_UNIT)
        yield _difference(f"attention ({name})", output, device_output, 4 * BF16_UNIT)

    def _compare(
        self, name: str, linears: tuple[DeviceLinear, ...], operation: Operation
    ) -> Comparison:
        with torch.inference_mode():
            expected, actual = map(operation, self.backends, linears)
        if isinstance(expected, QuantizedActivation):
            return _code_difference(name, expected, as_codes(actual))
        if isinstance(expected, StaticActivation):
            codes = (as_static(fed).cpu().int() for fed in (expected, actual))
            return Comparison(name, float(abs(operator.sub(*codes)).max()), 1.0)
        return _difference(name, expected, as_float(actual), 2 * BF16_UNIT)

    def _linears(self, scheme: Scheme, outputs: int, inputs: int) -> tuple[DeviceLinear, ...]:
        """A random linear on both backends."""
        weight = self._normal(outputs, inputs) / inputs**0.5
        linear = quantize(scheme, weight, None, ASCEND_A2_A3.layout(scheme, "", weight.shape))
        linear = linear.for_inputs(INPUTS)
        return tuple(backend.linear(linear) for backend in self.backends)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random).bfloat16()

    def _qkv(self, rows: int, seed: int = 0) -> Tensor:
        heads = self.config.num_heads + 2 * self.config.num_kv_heads
        random = torch.Generator().manual_seed(rows + 1000 * seed)
        return torch.randn(rows, heads * self.config.head_dim, generator=random).bfloat16()


class _AttentionSide:
    """One backend's cache, and requests whose keys it holds."""

    def __init__(self, backend: Backend[LayerKV], config: Qwen3Config) -> None:
        self.backend, self.config = backend, config
        per_request = -(-(max(LENGTHS) + 1 + MORE) // ASCEND_A2_A3.block_size)
        blocks = 1 + per_request * len(LENGTHS)
        bounds = StepBounds(len(LENGTHS), ASCEND_A2_A3.block_size, blocks)
        self.cache = backend.allocate_cache(bounds)[0]
        # Blocks in reverse, so that no request lies in neighbouring ones.
        self.tables = [
            [blocks - 1 - index - len(LENGTHS) * row for row in range(per_request)]
            for index in range(len(LENGTHS))
        ]
        self.computed = [0] * len(LENGTHS)

    def compute(self, qkv: Tensor, counts: Mapping[int, int]) -> tuple[Tensor, Tensor]:
        """The next tokens of some requests, in one step: (queries, attention output), on the
        CPU."""
        chunks = []
        for index, count in counts.items():
            done = self.computed[index]
            self.computed[index] = length = done + count
            request = Request(index, SamplingParams(), [0] * length, length, length, frozenset())
            request.computed, request.block_table = done, list(self.tables[index])
            chunks.append(Chunk.next_of(request, count))
        return self._run(qkv, Batch(tuple(chunks)))

    def _run(self, qkv: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        backend, head_dim = self.backend, self.config.head_dim
        ones = backend.upload(torch.ones(head_dim))
        consumer = backend.dense(ones[None])  # any that wants floats
        with torch.inference_mode():
            step = backend.open_step(step_inputs(batch, ASCEND_A2_A3.block_size))
            query = backend.norm_rope_write(backend.upload(qkv), ones, ones, 1e-6, step, self.cache)
            attended = backend.attention(query, step, self.cache, consumer)
            return query.cpu(), as_float(attended).cpu()


def _product(fed: Activation) -> Operation:
    def operation(backend: Backend[LayerKV], linear: DeviceLinear) -> Activation:
        if isinstance(fed, Tensor):
            return linear(fed.to(backend.device))
        if isinstance(fed, StaticActivation):
            return linear(StaticActivation(fed.codes.to(backend.device)))
        codes, scale = (tensor.to(backend.device) for tensor in (fed.codes, fed.scale))
        return linear(QuantizedActivation(codes, scale))

    return operation


def _norm(weight: Tensor, x: Tensor, delta: Tensor | None) -> Operation:
    def operation(backend: Backend[LayerKV], consumer: DeviceLinear) -> Activation:
        added = None if delta is None else backend.upload(delta)
        inputs = backend.upload(x), added, backend.upload(weight)
        return backend.add_norm(*inputs, EPSILON, consumer)[0]

    return operation


def _gated(gate_up: Tensor) -> Operation:
    return lambda backend, consumer: backend.gated(backend.upload(gate_up), consumer)


def _difference(name: str, expected: Tensor, actual: Tensor, bound: float) -> Comparison:
    """Largest difference relative to the size of the values around it."""
    left, right = expected.float().cpu(), actual.float().cpu()
    scale = left.abs().clamp(min=float(left.abs().mean()))
    return Comparison(name, float(((left - right).abs() / scale).max()), bound)


def _code_difference(
    name: str, expected: QuantizedActivation, actual: QuantizedActivation
) -> Comparison:
    """Codes may differ by one where the quotient lies between two; scales hardly at all."""
    codes = (expected.codes.int() - actual.codes.cpu().int()).abs().max()
    scales = _difference(name, expected.scale, actual.scale, 0).error
    return Comparison(name, float(codes) if scales < 1e-4 else float("inf"), 1.0)
