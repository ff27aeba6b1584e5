"""The CPU backend: the readable definition of every operation, on torch's fast paths.

Each operation computes in float32 and rounds once to the compute type. Where a result goes into a
w8a8 linear it is quantized from float32, as the fused kernels of a device do.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import BF16, W8A8
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens, rescale
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.memory import available_memory
from qwen3_ascend.runtime.backends.base import (
    Activation,
    CacheShape,
    DeviceLinear,
    Forward,
    Progress,
)
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.int8_matmul import Product, pick_int8_matmul
from qwen3_ascend.runtime.backends.rotary import rotary_tables
from qwen3_ascend.runtime.backends.step import StepInputs

CACHE_SHARE = 4
"""The cache may take a quarter of the memory that is available when the model is loaded."""

UNKNOWN_MEMORY = 4 << 30
"""Bytes that are taken to be available where the system does not say."""


@dataclass(frozen=True)
class QuantizedActivation:
    """codes: int8 [T, K]; scale: float32 [T]."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class CpuRotary:
    """cos, sin: [T, 1, head_dim], both halves filled; rounded to the compute type, as a device's
    tables are, and computed with in float32."""

    cos: Tensor
    sin: Tensor


class DenseLinear:
    """A weight [N, K] in plain order and the compute type, and an optional bias [N]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def prepare(self, x: Tensor) -> Tensor:
        """What this linear wants of a float32 input: the compute type."""
        return x.to(self.weight.dtype)

    def __call__(self, x: Activation) -> Tensor:
        """See DeviceLinear."""
        return F.linear(x, self.weight, self.bias)


class Int8Linear:
    """w8a8: exact integer product, epilogue in float32, one rounding to the compute type."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        self.scale, self.bias, self.dtype = linear.tensors["scale"], linear.bias, dtype
        self._product: Product = pick_int8_matmul()(linear.codes()["weight"])

    def prepare(self, x: Tensor) -> QuantizedActivation:
        """What this linear wants of a float input: codes and a scale for each token."""
        return QuantizedActivation(*quantize_tokens(x))

    def __call__(self, x: Activation) -> Tensor:
        """See DeviceLinear."""
        quantized = x if isinstance(x, QuantizedActivation) else self.prepare(x)
        y = rescale(self._product(quantized.codes), quantized.scale, self.scale)
        return (y if self.bias is None else y + self.bias.float()).to(self.dtype)


class CpuBackend:
    """See Backend; `dtype` is bfloat16 or float32."""

    name = "cpu"

    def __init__(self, dtype: torch.dtype) -> None:
        self.device = torch.device("cpu")
        self.dtype = dtype
        self._tables = functools.lru_cache(maxsize=1)(self._make_tables)

    def upload(self, tensor: Tensor) -> Tensor:
        """See Backend."""
        return tensor.to(self.dtype)

    def linear(self, linear: Linear) -> DeviceLinear:
        """See Backend."""
        if isinstance(linear.scheme, BF16):
            bias = None if linear.bias is None else linear.bias.to(self.dtype)
            return DenseLinear(linear.codes()["weight"].to(self.dtype), bias)
        if isinstance(linear.scheme, W8A8):
            return Int8Linear(linear, self.dtype)
        raise CheckpointError(f"the cpu backend has no kernel for the scheme {linear.scheme}")

    def tied_head(self, embedding: Tensor) -> DeviceLinear:
        """See Backend."""
        return DenseLinear(embedding, None)

    def to_device(self, step: StepInputs) -> StepInputs:
        """See Backend."""
        return step

    def runner(self, forward: Forward, shape: CacheShape, progress: Progress) -> Forward:
        """See Backend. Nothing is captured on a CPU."""
        return forward

    def rotary(self, config: Qwen3Config, step: StepInputs) -> CpuRotary:
        """See Backend."""
        cos, sin = self._tables(config)
        return CpuRotary(
            cos[step.positions].unsqueeze(1).float(), sin[step.positions].unsqueeze(1).float()
        )

    def _make_tables(self, config: Qwen3Config) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_tables(config)
        return cos.to(self.dtype), sin.to(self.dtype)

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """See Backend."""
        return F.embedding(tokens, table)

    def add_norm(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        epsilon: float,
        consumer: DeviceLinear,
    ) -> tuple[Activation, Tensor]:
        """See Backend. The sum is rounded to the compute type before it is normed."""
        total = hidden if delta is None else hidden + delta
        return consumer.prepare(rms_norm(total.float(), weight, epsilon)), total

    def norm_rope_write(
        self,
        qkv: Tensor,
        query_norm: Tensor,
        key_norm: Tensor,
        epsilon: float,
        rotary: CpuRotary,
        cache: LayerKV,
        step: StepInputs,
    ) -> Tensor:
        """See Backend."""
        kv_heads, head_dim = cache.keys.shape[-2:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        counts = [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads]
        query, key, value = torch.split(heads, counts, dim=1)
        query = self._norm_rotate(query, query_norm, epsilon, rotary)
        key = self._norm_rotate(key, key_norm, epsilon, rotary)
        cache.keys.flatten(0, 1)[step.slots] = key
        cache.values.flatten(0, 1)[step.slots] = value
        return query

    def _norm_rotate(self, x: Tensor, weight: Tensor, epsilon: float, rotary: CpuRotary) -> Tensor:
        """Two operations, each rounded to the compute type."""
        normed = rms_norm(x.float(), weight, epsilon).to(self.dtype)
        return rotate(normed.float(), rotary).to(self.dtype)

    def attention(self, query: Tensor, cache: LayerKV, step: StepInputs) -> Tensor:
        """See Backend."""
        outputs = []
        tables: list[list[int]] = step.block_table.tolist()
        for index, length in enumerate(step.context_lens):
            rows = query[step.query_starts[index] : step.query_starts[index + 1]]
            keys = gather_blocks(cache.keys, tables[index], length)
            values = gather_blocks(cache.values, tables[index], length)
            outputs.append(causal_attention(rows.float(), keys.float(), values.float()))
        return torch.cat(outputs).flatten(1).to(self.dtype)

    def gated(self, gate_up: Tensor, consumer: DeviceLinear) -> Activation:
        """See Backend."""
        gate, up = gate_up.float().chunk(2, dim=-1)
        return consumer.prepare(F.silu(gate) * up)

    def prefetch(self, linears: tuple[DeviceLinear, ...], after: Tensor) -> None:
        """See Backend. A CPU prefetches by itself."""

    def join_prefetch(self) -> None:
        """See Backend."""

    def memory_for_cache(self) -> int:
        """See Backend."""
        available = available_memory()
        return (UNKNOWN_MEMORY if available is None else available) // CACHE_SHARE


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in float32."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return x * scale * weight.float()


def rotate(x: Tensor, rotary: CpuRotary) -> Tensor:
    """Rotary embedding of [T, heads, head_dim] in float32; pairs are (i, i + head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    return x * rotary.cos + torch.cat((-second, first), dim=-1) * rotary.sin


def gather_blocks(blocks: Tensor, table: list[int], length: int) -> Tensor:
    """The first `length` rows of a sequence, [length, kv_heads, head_dim]."""
    used = table[: math.ceil(length / blocks.shape[1])]
    first, last = used[0], used[-1]
    if used == list(range(first, last + 1)):  # neighbours need no copy
        return blocks[first : last + 1].flatten(0, 1)[:length]
    return blocks[used].flatten(0, 1)[:length]


def causal_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q k' / sqrt(head_dim)) v of one sequence whose queries are its last tokens.

    Args:
        query: [T, heads, head_dim].
        keys, values: [length, kv_heads, head_dim], length >= T.

    Returns:
        [T, heads, head_dim].
    """
    new, length = query.shape[0], keys.shape[0]
    mask = None
    if 1 < new < length:
        mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=new == length and new > 1,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)
