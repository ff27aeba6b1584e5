"""The NPU backend: the fewest launches that torch_npu offers for each operation."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.layout import Layout
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import DeviceError, OptionError
from qwen3_ascend.runtime.backends.base import (
    Activation,
    Backend,
    DeviceExperts,
    DeviceForward,
    DeviceLinear,
    Download,
    Forward,
    Mixture,
    Progress,
    SeeExpert,
    StepBounds,
)
from qwen3_ascend.runtime.backends.cache import LayerKV, bytes_per_token, cache_shape
from qwen3_ascend.runtime.backends.npu import formats
from qwen3_ascend.runtime.backends.npu.attention import open_attention
from qwen3_ascend.runtime.backends.npu.capabilities import Capabilities, probe
from qwen3_ascend.runtime.backends.npu.decoding import Decoding, choose_decoding
from qwen3_ascend.runtime.backends.npu.device import (
    free_bytes,
    in_one_line,
    open_device,
    require_capture,
)
from qwen3_ascend.runtime.backends.npu.downloads import download
from qwen3_ascend.runtime.backends.npu.experts import (
    FloatExperts,
    NpuExperts,
    WatchedExperts,
)
from qwen3_ascend.runtime.backends.npu.graph import (
    MAX_STREAMS,
    GraphRunner,
    decode_buckets,
    largest_padding,
)
from qwen3_ascend.runtime.backends.npu.graph_calls import (
    BoundCalls,
    CapturedCalls,
    DispatchedCalls,
)
from qwen3_ascend.runtime.backends.npu.graph_lengths import (
    MAX_MASKED_GRAPHS,
    GraphBounds,
    GraphLengths,
    MaskedLengths,
    UpdatedLengths,
    masked_lengths,
)
from qwen3_ascend.runtime.backends.npu.graph_updates import FUSED_LENGTHS, PAGED_LENGTHS
from qwen3_ascend.runtime.backends.npu.heads import FEW_ROWS, HeadDivider
from qwen3_ascend.runtime.backends.npu.linears import (
    DenseLinear,
    NpuLinear,
    Upload,
    load_linear,
    static_vectors,
)
from qwen3_ascend.runtime.backends.npu.mixtures import ExpertLoader, compute_mixture
from qwen3_ascend.runtime.backends.npu.operators import add_norm, dynamic_quant, static_quant
from qwen3_ascend.runtime.backends.npu.prefetch import Prefetcher, prefetch_budget
from qwen3_ascend.runtime.backends.npu.self_check import kernel_sees_weight
from qwen3_ascend.runtime.backends.npu.transfers import BUFFER_BYTES, Transfers
from qwen3_ascend.runtime.backends.npu.uploads import StepUploads
from qwen3_ascend.runtime.backends.rotary import rotary_tables
from qwen3_ascend.runtime.backends.step import DeviceStep, StepInputs
from qwen3_ascend.runtime.options import DeviceOptions

RESERVED_SHARE = 10
"""A tenth of the free memory stays free of the cache: for activations, workspaces and graphs."""


class NpuBackend(Backend[LayerKV]):
    """Computes in bfloat16."""

    name = "npu"

    def __init__(
        self,
        config: Qwen3Config,
        options: DeviceOptions,
        capabilities: Capabilities | None = None,
    ) -> None:
        """Opens the device.

        Args:
            config: of the model.
            options: how the device is used.
            capabilities: of the machine for this model, if they are known; else they are probed.

        Raises:
            DeviceError: if something this machine needs is missing.
            OptionError: for an option that does not exist.
        """
        if options.graph:
            require_capture()
        self.info = open_device()
        if not self.info.is_a2_or_a3:
            raise DeviceError(
                f"{self.info.name} is not supported: the checkpoint is laid out for "
                f"{ASCEND_A2_A3.chips}"
            )
        self.device, self.dtype = torch.device("npu"), torch.bfloat16
        self.config, self.options = config, options
        self.runs_ahead = options.run_ahead
        self._prefetcher = Prefetcher(prefetch_budget(options.prefetch, self.info.l2_bytes))
        self.capabilities = capabilities or probe(config)
        self.decoding = choose_decoding(options, self.capabilities)
        self._calls = _captured_calls(self.decoding)
        self._attention = open_attention(self.decoding, config, self.capabilities, self._calls)
        self._bring = StepUploads()
        self._divide = HeadDivider(self._attention.counts)
        self._captures = options.graph and self._can_capture()
        self._transfers = Transfers()
        self._upload: Upload = functools.partial(formats.upload_packed, copy=self._transfers.copy)
        self._checked: set[tuple[str, Layout]] = set()
        self._expert_loader = ExpertLoader()

    def _can_capture(self) -> bool:
        """Whether graphs can contain the attention that was chosen; warns if they cannot."""
        if self.decoding.lengths is None:
            warnings.warn(
                f"steps are not captured as graphs, which is slower: "
                f"{self.decoding.lengths_reason}; graph=off, or another attention, avoids this "
                f"warning",
                stacklevel=2,
            )
        return self.decoding.lengths is not None

    @override
    def upload(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != self.dtype or tensor.nbytes < BUFFER_BYTES:
            return tensor.to(device=self.device, dtype=self.dtype)
        uploaded = torch.empty(tensor.shape, dtype=self.dtype, device=self.device)
        self._transfers.copy(uploaded, tensor.contiguous())
        return uploaded

    @override
    def finish_loading(self) -> None:
        self._transfers.finish()

    @override
    def linear(self, linear: Linear) -> NpuLinear:
        """The first of each kind is checked through its own kernel (S3)."""
        kind = (str(linear.scheme), linear.layout)
        try:
            loaded = load_linear(linear, self._upload)
            sound = kind in self._checked or _kernel_sees_weight(linear, loaded)
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

    @override
    def experts(self, linear: Linear) -> NpuExperts:
        return self._expert_loader.load(linear, self._upload)

    @override
    def dense_experts(self, weights: Sequence[Tensor]) -> NpuExperts:
        """As one tensor, which is a copy."""
        return FloatExperts(torch.stack([*weights]))

    @override
    def watched_experts(self, experts: DeviceExperts, see: SeeExpert) -> NpuExperts:
        assert isinstance(experts, FloatExperts), "experts of other numbers than floats"
        return WatchedExperts(experts, see)

    @override
    def mixture(self, x: Tensor, mixture: Mixture) -> Tensor:
        return compute_mixture(x, mixture, self.capabilities.of_experts)

    @override
    def dense(self, weight: Tensor, bias: Tensor | None = None) -> DeviceLinear:
        return DenseLinear(weight, bias)

    @override
    def allocate_cache(self, bounds: StepBounds) -> tuple[LayerKV, ...]:
        """Zeroed: a kernel that reads whole blocks multiplies what lies behind the end of a context
        by zero, and zero times not-a-number is not a number."""
        shape = cache_shape(self.config, self._cache_blocks(bounds), bounds.block_size)

        def blocks() -> Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        return tuple(LayerKV(blocks(), blocks()) for _ in range(self.config.num_layers))

    def _cache_blocks(self, bounds: StepBounds) -> int:
        """Blocks of the cache: the kernel of attention counts one for each row that pads a batch,
        whichever it is. With the default buckets these are seven, which the reserve covers."""
        buckets = self._buckets(bounds)
        if not buckets or self.decoding.lengths == "masked":
            return bounds.num_blocks
        return max(bounds.num_blocks + largest_padding(buckets), buckets[-1] + 1)

    def _buckets(self, bounds: StepBounds) -> tuple[int, ...]:
        """Batch sizes to capture, none if nothing is."""
        if not self._captures:
            return ()
        layers, options = self.config.num_layers, self.options
        side_streams = layers if self._prefetcher.budget else 0
        if self.decoding.lengths != "masked":
            most = MAX_STREAMS // (layers + side_streams + 1)
            return decode_buckets(bounds.max_batch, options.buckets, most)
        lengths = len(masked_lengths(self._table_width(bounds), bounds.block_size))
        most = MAX_STREAMS // (side_streams + 1) // lengths
        if options.buckets is None:
            most = min(most, MAX_MASKED_GRAPHS // lengths)
        return decode_buckets(bounds.max_batch, options.buckets, most)

    def _table_width(self, bounds: StepBounds) -> int:
        """Blocks of a request at most."""
        return -(-self.config.context_length // bounds.block_size)

    @override
    def cache_bytes_per_token(self) -> int:
        return bytes_per_token(self.config, self.dtype)

    @override
    def open_step(self, step: StepInputs) -> DeviceStep:
        """The rows of the tables are picked on the device, so that a capture can contain it."""
        inputs = self._bring(step)
        cos, sin = (torch.index_select(each, 0, inputs.positions) for each in self._tables)
        return DeviceStep(inputs, cos, sin)

    @override
    def download(self, tensor: Tensor) -> Download:
        return download(tensor)

    @override
    def runner(self, forward: DeviceForward, bounds: StepBounds, progress: Progress) -> Forward:
        """Captured graphs for decode, unless they are turned off."""

        def run(step: StepInputs) -> Tensor:
            return forward(self.open_step(step))

        buckets = self._buckets(bounds)
        if not buckets:
            return run
        if buckets[-1] > bounds.block_size:
            raise OptionError(
                f"a graph bucket of {buckets[-1]} has more padding rows than the scratch block "
                f"has slots ({bounds.block_size})"
            )
        graphs = GraphBounds(
            buckets, self._table_width(bounds), self._cache_blocks(bounds), bounds.block_size
        )
        lengths = self._graph_lengths(graphs)

        def captured(step: StepInputs) -> Tensor:
            return forward(lengths.open(self.open_step(step)))

        runner = GraphRunner(run, captured, lengths, graphs)
        done = 0

        def advance(graphs: int) -> None:
            nonlocal done
            done += graphs
            progress("capturing graphs", done, len(lengths.first_sizes))

        runner.capture(advance)
        return runner

    def _graph_lengths(self, bounds: GraphBounds) -> GraphLengths:
        if self.decoding.lengths == "masked":
            counts = self._attention.counts
            return MaskedLengths(bounds, counts.kv_heads * counts.head_dim)
        return UpdatedLengths(self._attention, self._calls, bounds)

    @functools.cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_tables(self.config)
        return self.upload(cos.unsqueeze(1)), self.upload(sin.unsqueeze(1))

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
        """One launch where one kernel does both, with the quantization if it is wanted."""
        if consumer.input is Input.INT8_PER_TOKEN:
            added = self._zeros(hidden) if delta is None else delta
            return self.capabilities.norm_quant.call(hidden, added, weight, epsilon)
        if consumer.input is Input.INT8_STATIC:
            normed, total = add_norm(hidden, delta, weight, epsilon)
            return static_quant(normed, static_vectors(consumer)), total
        return add_norm(hidden, delta, weight, epsilon)

    def _zeros(self, like: Tensor) -> Tensor | None:
        """What the first norm of a step adds: kept, where making it costs a launch that counts."""
        rows, width = like.shape
        few = rows <= FEW_ROWS and width == self.config.hidden_size
        return self._no_delta[:rows] if few else None

    @functools.cached_property
    def _no_delta(self) -> Tensor:
        shape = (FEW_ROWS, self.config.hidden_size)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

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
        """Two norms, one rotation of both, one write."""
        query, key, value = self._divide(qkv)
        query = torch_npu.npu_rms_norm(query, query_norm, epsilon)[0]
        key = torch_npu.npu_rms_norm(key, key_norm, epsilon)[0]
        query, key = self.capabilities.rotate.call(query, key, step.cos, step.sin)
        self._attention.write(key, value, cache, step.inputs.slots)
        return query

    @override
    def attention(
        self, query: Tensor, step: DeviceStep, cache: LayerKV, consumer: DeviceLinear
    ) -> Activation:
        """One launch, and one more for the quantization if the consumer wants it."""
        inputs = step.inputs
        if step.hidden is not None:
            heads = self._attention.decode_masked(query, cache, inputs, step.hidden)
        elif inputs.is_decode:
            heads = self._attention.decode(query, cache, inputs)
        else:
            heads = self._attention.prefill(query, cache, inputs)
        attended = heads.flatten(1)
        if consumer.input is Input.INT8_PER_TOKEN:
            return dynamic_quant(attended)
        if consumer.input is Input.INT8_STATIC:
            return static_quant(attended, static_vectors(consumer))
        return attended

    @override
    def gated(self, gate_up: Tensor, consumer: DeviceLinear) -> Activation:
        """One launch where one kernel does both, with the quantization if it is wanted."""
        if consumer.input is Input.INT8_PER_TOKEN:
            return self.capabilities.gated_quant.call(gate_up)
        gated: Tensor = torch_npu.npu_swiglu(gate_up, dim=-1)
        if consumer.input is Input.INT8_STATIC:
            return static_quant(gated, static_vectors(consumer))
        return gated

    @override
    def prefetch(self, linears: tuple[DeviceLinear, ...], after: Activation) -> None:
        computed = after if isinstance(after, Tensor) else after.codes
        self._prefetcher.fork(tuple(linear.weight for linear in linears), computed)

    @override
    def join_prefetch(self) -> None:
        self._prefetcher.join()

    @override
    def memory_for_cache(self) -> int:
        free = free_bytes()
        return free - free // RESERVED_SHARE


def _kernel_sees_weight(linear: Linear, loaded: NpuLinear) -> bool:
    """S3; DeviceError if this machine lacks the operator, or refuses what it is asked."""
    try:
        return kernel_sees_weight(linear, loaded)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(
            f"this torch_npu and CANN do not compute with the scheme {linear.scheme} "
            f"({in_one_line(error)}); convert with another recipe"
        ) from error


def _captured_calls(decoding: Decoding) -> CapturedCalls:
    if decoding.lengths != "bound":
        return DispatchedCalls()
    return BoundCalls(FUSED_LENGTHS if decoding.attention == "fused" else PAGED_LENGTHS)
