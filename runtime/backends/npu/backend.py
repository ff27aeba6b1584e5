"""The NPU backend: the fewest launches that torch_npu offers for each operation."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.layout import Layout
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.errors import DeviceError, OptionError
from qwen3_ascend.runtime.backends.base import (
    Activation,
    CacheShape,
    DeviceLinear,
    Forward,
    Progress,
)
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.npu import formats
from qwen3_ascend.runtime.backends.npu.attention import choose_attention
from qwen3_ascend.runtime.backends.npu.device import free_bytes, open_device
from qwen3_ascend.runtime.backends.npu.graph import GraphRunner, decode_buckets
from qwen3_ascend.runtime.backends.npu.linears import (
    DenseLinear,
    Int8Linear,
    NpuLinear,
    QuantizedActivation,
    load_linear,
)
from qwen3_ascend.runtime.backends.npu.prefetch import Prefetcher, prefetch_budget
from qwen3_ascend.runtime.backends.npu.self_check import kernel_sees_weight
from qwen3_ascend.runtime.backends.rotary import rotary_tables
from qwen3_ascend.runtime.backends.step import StepInputs
from qwen3_ascend.runtime.options import DeviceOptions

RESERVED_SHARE = 10
"""A tenth of the free memory stays free of the cache: for activations, workspaces and graphs."""


@dataclass(frozen=True)
class NpuRotary:
    """cos, sin: bfloat16 [T, 1, head_dim]."""

    cos: Tensor
    sin: Tensor


class NpuBackend:
    """See Backend. Computes in bfloat16."""

    name = "npu"

    def __init__(self, config: Qwen3Config, options: DeviceOptions) -> None:
        """Opens the device.

        Raises:
            DeviceError: if something this machine needs is missing.
            OptionError: for an option that does not exist.
        """
        self.info = open_device()
        if not self.info.is_a2_or_a3:
            raise DeviceError(
                f"{self.info.name} is not supported: the checkpoint is laid out for Atlas A2 "
                f"(910B) and A3 (910_93)"
            )
        self.device, self.dtype = torch.device("npu"), torch.bfloat16
        self.config, self.options = config, options
        self._prefetcher = Prefetcher(prefetch_budget(options.prefetch, self.info.l2_bytes))
        self._attention = choose_attention(options.attention, config)
        self._upload = formats.upload_packed
        self._checked: set[tuple[str, Layout]] = set()

    def upload(self, tensor: Tensor) -> Tensor:
        """See Backend."""
        return tensor.to(device=self.device, dtype=self.dtype)

    def linear(self, linear: Linear) -> DeviceLinear:
        """See Backend. The first of each kind is checked through its own kernel (S3)."""
        kind = (str(linear.scheme), linear.layout)
        try:
            loaded = load_linear(linear, self._upload)
            sound = kind in self._checked or kernel_sees_weight(linear, loaded)
            reason = "the kernel reads other rows than the file holds"
        except formats.FormatError as error:
            sound, reason = False, str(error)
        if not sound:
            loaded = self._fall_back(linear, reason)
        self._checked.add(kind)
        return loaded

    def _fall_back(self, linear: Linear, reason: str) -> NpuLinear:
        """Goes over to recipe R5 for all weights; DeviceError if that does not help either."""
        if self._upload is formats.upload_by_cast:
            raise DeviceError(f"weights cannot be laid out on this device: {reason}")
        warnings.warn(
            f"loading pre-cast weights does not work here ({reason}); casting each weight on the "
            f"device instead, which takes longer and more memory",
            stacklevel=2,
        )
        self._upload = formats.upload_by_cast
        loaded = load_linear(linear, self._upload)
        if not kernel_sees_weight(linear, loaded):
            raise DeviceError("the kernels do not read the weights as the file holds them")
        return loaded

    def tied_head(self, embedding: Tensor) -> DeviceLinear:
        """See Backend."""
        return DenseLinear(embedding, None)

    def to_device(self, step: StepInputs) -> StepInputs:
        """The step with its tensors on the device."""
        rows = None if step.logit_rows is None else step.logit_rows.to(self.device)
        return dataclasses.replace(
            step,
            tokens=step.tokens.to(self.device),
            positions=step.positions.to(self.device),
            slots=step.slots.to(self.device),
            block_table=step.block_table.to(self.device),
            logit_rows=rows,
        )

    def runner(self, forward: Forward, shape: CacheShape, progress: Progress) -> Forward:
        """See Backend: captured graphs for decode, unless they are turned off."""
        if not self.options.graph:
            return lambda step: forward(self.to_device(step))
        buckets = decode_buckets(shape.max_batch, self.options.buckets)
        if buckets[-1] > shape.block_size:
            raise OptionError(
                f"a graph bucket of {buckets[-1]} has more padding rows than the scratch block "
                f"has slots ({shape.block_size})"
            )
        width = -(-self.config.context_length // shape.block_size)
        runner = GraphRunner(forward, self.to_device, self._attention, buckets, width)
        done = 0

        def advance(graphs: int) -> None:
            nonlocal done
            done += graphs
            progress("capturing graphs", done, len(buckets))

        runner.capture(advance)
        return runner

    def rotary(self, config: Qwen3Config, step: StepInputs) -> NpuRotary:
        """See Backend."""
        cos, sin = self._tables
        return NpuRotary(
            torch.index_select(cos, 0, step.positions), torch.index_select(sin, 0, step.positions)
        )

    @functools.cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_tables(self.config)
        return self.upload(cos.unsqueeze(1)), self.upload(sin.unsqueeze(1))

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
        """See Backend: one launch, with the quantization if the consumer wants it.

        The first layer has nothing to add. There the fused kernel adds zeros: as many launches as
        a norm and a quantization, and no rounding between the two.
        """
        if isinstance(consumer, Int8Linear):
            delta = torch.zeros_like(hidden) if delta is None else delta
            codes, _, total, scale, _ = torch_npu.npu_add_rms_norm_dynamic_quant(
                hidden, delta, weight, epsilon=epsilon, output_mask=[True, False]
            )
            return QuantizedActivation(codes, scale), total
        if delta is None:
            return torch_npu.npu_rms_norm(hidden, weight, epsilon)[0], hidden
        normed, _, total = torch_npu.npu_add_rms_norm(hidden, delta, weight, epsilon)
        return normed, total

    def norm_rope_write(
        self,
        qkv: Tensor,
        query_norm: Tensor,
        key_norm: Tensor,
        epsilon: float,
        rotary: NpuRotary,
        cache: LayerKV,
        step: StepInputs,
    ) -> Tensor:
        """See Backend: two norms, one rotation of both in place, one write.

        The write wants contiguous tensors: values are copied out of q|k|v unless there is but one
        token.
        """
        counts = self._attention.counts
        heads = qkv.view(qkv.shape[0], -1, counts.head_dim)
        sizes = [counts.heads, counts.kv_heads, counts.kv_heads]
        query, key, value = torch.split(heads, sizes, dim=1)
        query = torch_npu.npu_rms_norm(query, query_norm, epsilon)[0]
        key = torch_npu.npu_rms_norm(key, key_norm, epsilon)[0]
        query, key = torch_npu.npu_apply_rotary_pos_emb(
            query, key, rotary.cos, rotary.sin, layout="TND"
        )
        self._attention.write(key, value.contiguous(), cache, step.slots)
        return query

    def attention(self, query: Tensor, cache: LayerKV, step: StepInputs) -> Tensor:
        """See Backend."""
        attend = self._attention.decode if step.is_decode else self._attention.prefill
        return attend(query, cache, step).flatten(1)

    def gated(self, gate_up: Tensor, consumer: DeviceLinear) -> Activation:
        """See Backend: one launch, with the quantization if the consumer wants it."""
        if isinstance(consumer, Int8Linear):
            codes, scale = torch_npu.npu_dequant_swiglu_quant(
                gate_up, activate_left=True, quant_mode=1
            )
            return QuantizedActivation(codes, scale)
        return torch_npu.npu_swiglu(gate_up, dim=-1)

    def prefetch(self, linears: tuple[DeviceLinear, ...], after: Tensor) -> None:
        """See Backend."""
        weights = tuple(
            linear.weight for linear in linears if isinstance(linear, DenseLinear | Int8Linear)
        )
        self._prefetcher.fork(weights, after)

    def join_prefetch(self) -> None:
        """See Backend."""
        self._prefetcher.join()

    def memory_for_cache(self) -> int:
        """See Backend."""
        free = free_bytes()
        return free - free // RESERVED_SHARE
