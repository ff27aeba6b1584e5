"""The definition of every operation, to be read; other backends are held against it.

Each operation computes in float32 and rounds once to the compute type. Where a result goes into an
integer linear it is quantized from float32, as the fused kernels of a device do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import (
    BF16,
    W4A8,
    W4A16,
    W8A8,
    W8A16,
    Input,
    Scheme,
    W8A8Static,
)
from qwen3_ascend.checkpoint.schemes.w4a8 import GROUP, halves_of, rescale_groups, shift_of
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens, rescale
from qwen3_ascend.checkpoint.schemes.w8a8_static import folded_bias, static_input
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.memory import available_memory
from qwen3_ascend.runtime.backends.base import (
    Activation,
    Backend,
    DeviceExperts,
    DeviceForward,
    DeviceLinear,
    Forward,
    Mixture,
    Progress,
    QuantizedActivation,
    SeeExpert,
    StaticActivation,
    StepBounds,
    as_codes,
    as_float,
    as_static,
    static_input_of,
)
from qwen3_ascend.runtime.backends.cache import SCALE, LayerKV, bytes_per_token, cache_shape
from qwen3_ascend.runtime.backends.rotary import inverse_frequencies, rotary_rows
from qwen3_ascend.runtime.backends.step import DeviceStep, StepInputs
from qwen3_ascend.runtime.backends.watched import WatchedLinear

CACHE_SHARE = 4
"""The cache may take a quarter of the memory that is available when the model is loaded."""

UNKNOWN_MEMORY = 4 << 30
"""Bytes taken for available where the system does not say."""


class FloatLinear:
    """Any scheme whose weights are multiplied as floats: the decoded weight in the compute type."""

    input = Input.FLOAT

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """A weight [N, K] in plain order, and an optional bias [N]."""
        self.weight, self.bias = weight, bias

    @classmethod
    def load(cls, linear: Linear, dtype: torch.dtype) -> FloatLinear:
        """Decodes a stored linear."""
        bias = None if linear.bias is None else linear.bias.to(dtype)
        return cls(linear.dequantize().to(dtype), bias)

    def __call__(self, x: Activation) -> Tensor:
        """The product, [T, N]."""
        return F.linear(as_float(x), self.weight, self.bias)


class Int8Linear:
    """w8a8: exact integer product, epilogue in float32, one rounding to the compute type."""

    input = Input.INT8_PER_TOKEN

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        codes = linear.codes()
        self.weight, self.scale = codes["weight"], codes["scale"]
        self.bias, self.dtype = linear.bias, dtype

    def __call__(self, x: Activation) -> Tensor:
        """The product, [T, N]."""
        quantized = as_codes(x)
        y = rescale(self.product(quantized.codes), quantized.scale, self.scale)
        return (y if self.bias is None else y + self.bias.float()).to(self.dtype)

    def product(self, codes: Tensor) -> Tensor:
        """The integer product of codes [T, K], [T, N]: float64 holds every sum of it exactly."""
        return codes.double() @ self.weight.double().t()


class StaticInt8Linear:
    """w8a8-static: exact integer sum, one float32 scale, one rounding to the compute type."""

    input = Input.INT8_STATIC

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        codes = linear.codes()
        self.static_input = static_input(codes)
        self.weight, self.scale = codes["weight"], codes["deq_scale"]
        self.bias, self.dtype = folded_bias(linear), dtype

    def __call__(self, x: Activation) -> Tensor:
        """The product, [T, N]."""
        return (self.sums(as_static(x)).float() * self.scale).to(self.dtype)

    def sums(self, codes: Tensor) -> Tensor:
        """The integer product of codes [T, K] with quant_bias and bias added, [T, N]: float64
        holds every sum of it exactly."""
        return codes.double() @ self.weight.double().t() + self.bias.double()


class GroupInt4Linear:
    """w4a8: exact integer products of each group and each half of the codes, summed up in order in
    float16, as the only kernel for it does."""

    input = Input.INT8_PER_TOKEN

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        codes = linear.codes()
        self.weight, self.scale, self.shift = codes["weight"], codes["scale"], shift_of(codes)
        self.bias, self.dtype = linear.bias, dtype

    def __call__(self, x: Activation) -> Tensor:
        """The product, [T, N]."""
        quantized = as_codes(x)
        products = self.products(quantized.codes)
        y = rescale_groups(products, self.scale, self.shift, quantized.scale)
        return (y if self.bias is None else y + self.bias.float()).to(self.dtype)

    def products(self, codes: Tensor) -> Iterator[Tensor]:
        """The integer products of both halves of codes [T, K] within each group, [2 T, N]."""
        groups = zip(halves_of(codes).split(GROUP, 1), self.weight.split(GROUP, 1), strict=True)
        return (x.double() @ weight.double().t() for x, weight in groups)


class ExpertLinears:
    """The linears of all experts, each by itself."""

    def __init__(self, linears: Sequence[DeviceLinear], weight: Tensor) -> None:
        """The linears [N, K] in the order of the experts, and the weight that stores them."""
        self.linears, self.input, self.weight = tuple(linears), linears[0].input, weight


LINEARS: dict[type[Scheme], Callable[[Linear, torch.dtype], DeviceLinear]] = {
    BF16: FloatLinear.load,
    W8A8: Int8Linear,
    W8A8Static: StaticInt8Linear,
    W4A8: GroupInt4Linear,
    W8A16: FloatLinear.load,
    W4A16: FloatLinear.load,
}


class ReferenceBackend(Backend[LayerKV]):
    """See Backend; `dtype` is bfloat16 or float32, and `cache_dtype` may be int8 instead."""

    name = "reference"
    in_place = True

    def __init__(
        self, config: Qwen3Config, dtype: torch.dtype, cache_dtype: torch.dtype | None = None
    ) -> None:
        self.device, self.dtype, self.config = torch.device("cpu"), dtype, config
        self.cache_dtype = cache_dtype or dtype

    @override
    def upload(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)

    @override
    def linear(self, linear: Linear) -> DeviceLinear:
        return make_linear(LINEARS, linear, self)

    @override
    def experts(self, linear: Linear) -> DeviceExperts:
        experts, *_ = linear.shape
        return ExpertLinears([self.linear(linear.matrix(e)) for e in range(experts)], linear.weight)

    @override
    def dense_experts(self, weights: Sequence[Tensor]) -> DeviceExperts:
        return ExpertLinears([self.dense(weight) for weight in weights], weights[0])

    @override
    def watched_experts(self, experts: DeviceExperts, see: SeeExpert) -> DeviceExperts:
        assert isinstance(experts, ExpertLinears), "experts that are not computed one by one"
        watched = [
            WatchedLinear(linear, functools.partial(see, number))
            for number, linear in enumerate(experts.linears)
        ]
        return ExpertLinears(watched, experts.weight)

    @override
    def dense(self, weight: Tensor, bias: Tensor | None = None) -> DeviceLinear:
        return FloatLinear(weight, bias)

    @override
    def allocate_cache(self, bounds: StepBounds) -> tuple[LayerKV, ...]:
        """Uninitialised, since a slot is written before it is read: what is not used yet takes no
        memory."""
        shape = cache_shape(self.config, bounds.num_blocks, bounds.block_size)

        def layer() -> LayerKV:
            keys, values = (torch.empty(shape, dtype=self.cache_dtype) for _ in range(2))
            if self.cache_dtype != torch.int8:
                return LayerKV(keys, values)
            return LayerKV(keys, values, *(torch.empty(shape[:-1], dtype=SCALE) for _ in range(2)))

        return tuple(layer() for _ in range(self.config.num_layers))

    @override
    def cache_bytes_per_token(self) -> int:
        return bytes_per_token(self.config, self.cache_dtype)

    @override
    def memory_for_cache(self) -> int:
        available = available_memory()
        return (UNKNOWN_MEMORY if available is None else available) // CACHE_SHARE

    @override
    def open_step(self, step: StepInputs) -> DeviceStep:
        cos, sin = self.rotary(step)
        if step.carried is not None:
            step = dataclasses.replace(step, tokens=step.tokens.clone())
            step.fill_in(step.tokens)
        return DeviceStep(step, cos.unsqueeze(1), sin.unsqueeze(1))

    def rotary(self, step: StepInputs) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a step's positions, float32 [T, head_dim]. There is no table: a
        step needs few positions, and the context has many."""
        return self.rotary_rows(step.positions)

    def rotary_rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Those of some positions, rounded to the compute type as a device's tables are."""
        factor = self.config.rope.attention_factor
        cos, sin = rotary_rows(positions, self._frequencies, factor)
        return cos.to(self.dtype).float(), sin.to(self.dtype).float()

    @functools.cached_property
    def _frequencies(self) -> Tensor:
        return inverse_frequencies(self.config.rope, self.config.head_dim)

    @override
    def runner(self, forward: DeviceForward, bounds: StepBounds, progress: Progress) -> Forward:
        """Nothing is captured on a CPU."""
        return lambda step: forward(self.open_step(step))

    @override
    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        return F.embedding(tokens, table)

    @override
    def add_norm(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        epsilon: float,
        consumer: DeviceLinear,
    ) -> tuple[Activation, Tensor]:
        """The sum is rounded to the compute type before it is normed."""
        total = hidden if delta is None else hidden + delta
        return self.feed(rms_norm(total.float(), weight, epsilon), consumer), total

    @override
    def norm_rope_write(
        self,
        qkv: Tensor,
        query_norm: Tensor,
        key_norm: Tensor,
        epsilon: float,
        step: DeviceStep,
        cache: LayerKV,
    ) -> Tensor:
        kv_heads, head_dim = cache.keys.shape[-2:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        counts = [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads]
        query, key, value = torch.split(heads, counts, dim=1)
        query = self._norm_rotate(query, query_norm, epsilon, step)
        key = self._norm_rotate(key, key_norm, epsilon, step)
        write_rows(cache.keys, cache.key_scales, step.inputs.slots, key)
        write_rows(cache.values, cache.value_scales, step.inputs.slots, value)
        return query

    def _norm_rotate(self, x: Tensor, weight: Tensor, epsilon: float, step: DeviceStep) -> Tensor:
        """Two operations, each rounded to the compute type."""
        normed = rms_norm(x.float(), weight, epsilon).to(self.dtype)
        return rotate(normed.float(), step).to(self.dtype)

    @override
    def attention(
        self, query: Tensor, step: DeviceStep, cache: LayerKV, consumer: DeviceLinear
    ) -> Activation:
        """The result is rounded to the compute type before it is quantized, if it is: on no device
        does attention itself quantize."""
        inputs = step.inputs
        outputs = []
        tables: list[list[int]] = inputs.block_table.tolist()
        for index, length in enumerate(inputs.context_lens):
            rows = query[inputs.query_starts[index] : inputs.query_starts[index + 1]]
            keys = self.read(cache.keys, cache.key_scales, tables[index], length)
            values = self.read(cache.values, cache.value_scales, tables[index], length)
            outputs.append(self.attend(rows.float(), keys, values))
        return self.feed(torch.cat(outputs).flatten(1).to(self.dtype), consumer)

    def read(self, blocks: Tensor, scales: Tensor | None, table: list[int], length: int) -> Tensor:
        """The first `length` keys or values of a request, float32 [length, kv_heads, head_dim]."""
        rows = self.gather(blocks, table, length).float()
        return rows if scales is None else rows * self.gather(scales, table, length)[..., None]

    def gather(self, blocks: Tensor, table: list[int], length: int) -> Tensor:
        """The first `length` rows of a request: [length, ...] of [blocks, block_size, ...]."""
        return blocks[table].flatten(0, 1)[:length]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """softmax(q k' / sqrt(head_dim)) v of one request whose queries are its last tokens.

        Args:
            query: float32 [T, heads, head_dim].
            keys, values: float32 [length, kv_heads, head_dim], length >= T.

        Returns:
            float32 [T, heads, head_dim].
        """
        new, length = query.shape[0], keys.shape[0]
        group = query.shape[1] // keys.shape[1]
        keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))
        scores = torch.einsum("thd,lhd->htl", query, keys) / query.shape[2] ** 0.5
        future = torch.ones(new, length, dtype=torch.bool).triu(length - new + 1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        return torch.einsum("htl,lhd->thd", weights, values)

    @override
    def gated(self, gate_up: Tensor, consumer: DeviceLinear) -> Activation:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return self.feed(F.silu(gate) * up, consumer)

    @override
    def mixture(self, x: Tensor, mixture: Mixture) -> Tensor:
        """Each expert's output is rounded to the compute type; a token's outputs are summed up in
        float32, in descending order of the experts' weights."""
        gate_up, down = mixture.gate_up, mixture.down
        assert isinstance(gate_up, ExpertLinears) and isinstance(down, ExpertLinears)
        weights, chosen = self.route(mixture.router(x), mixture)
        outputs = x.new_empty(*chosen.shape, x.shape[1])
        for expert in chosen.unique().tolist():
            places = (chosen == expert).nonzero(as_tuple=True)
            first, second = gate_up.linears[expert], down.linears[expert]
            fed = self.feed(x[places[0]].float(), first)
            outputs[places] = second(self.gated(first(fed), second))
        total = torch.zeros(x.shape, dtype=torch.float32)
        for rank in range(mixture.per_token):
            total += outputs[:, rank].float() * weights[:, rank, None]
        return total.to(self.dtype)

    def route(self, logits: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
        """Which experts each token is given to.

        Args:
            logits: [T, experts] of the router, in the compute type.
            mixture: says how many.

        Returns:
            (weights, float32 [T, per_token], rounded to the compute type; numbers of the experts,
            int64 [T, per_token]), by descending weight, equal ones by ascending number.
        """
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        chosen = order[:, : mixture.per_token]
        values = logits.float()
        if mixture.normalize:  # shares of the chosen ones alone: the others cancel out
            weights = values.gather(-1, chosen).softmax(-1)
        else:
            weights = values.softmax(-1).gather(-1, chosen)
        return weights.to(self.dtype).float(), chosen

    @override
    def prefetch(self, linears: tuple[DeviceLinear, ...], after: Activation) -> None:
        """A CPU prefetches by itself."""

    @override
    def join_prefetch(self) -> None:
        """Nothing was begun."""

    def feed(self, x: Tensor, consumer: DeviceLinear) -> Activation:
        """A float result [T, K] as its consumer wants it. For a static input it is rounded to the
        compute type first, as devices have an operator of its own for this quantization."""
        if consumer.input is Input.FLOAT:
            return x.to(self.dtype)
        if consumer.input is Input.INT8_STATIC:
            return StaticActivation(static_input_of(consumer).quantize(x.to(self.dtype)))
        return QuantizedActivation(*quantize_tokens(x))


Loader = Callable[[Linear, torch.dtype], DeviceLinear]


def make_linear(
    table: dict[type[Scheme], Loader], linear: Linear, backend: ReferenceBackend
) -> DeviceLinear:
    """The device linear of a stored one; CheckpointError if the table has none for its scheme."""
    loader = table.get(type(linear.scheme))
    if loader is None:
        raise CheckpointError(
            f"the {backend.name} backend has no kernel for the scheme {linear.scheme}"
        )
    return loader(linear, backend.dtype)


def write_rows(blocks: Tensor, scales: Tensor | None, slots: Tensor, rows: Tensor) -> None:
    """Puts keys or values [T, kv_heads, head_dim] into a cache; as codes if it has scales."""
    if scales is not None:
        rows, scales.flatten(0, 1)[slots] = quantize_tokens(rows)
    blocks.flatten(0, 1)[slots] = rows


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in float32."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return x * scale * weight.float()


def rotate(x: Tensor, step: DeviceStep) -> Tensor:
    """Rotary embedding of [T, heads, head_dim] in float32."""
    return x * step.cos + rotate_half(x) * step.sin


def rotate_half(x: Tensor) -> Tensor:
    """Each pair turned by a right angle; pairs are (i, i + head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
