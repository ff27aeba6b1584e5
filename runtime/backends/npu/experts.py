"""Mixtures of experts on the device: which experts a token is given to, and their grouped products.

A routed row is a token at one of its experts; those of an expert are side by side, in the order of
the tokens. How many rows each expert has is known on the device only: every shape is fixed by the
tokens of the step, so that steps with mixtures are captured like others.

Sources: op-plugin's documentation of the operators, and aclnnGroupedMatmulWeightNz.md,
aclnnGroupedMatmulSwigluQuantWeightNzV2.md of CANN's ops-transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch_npu
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import BF16, W4A8, W4A16, W8A8, W8A16, Input, Scheme
from qwen3_ascend.checkpoint.schemes.w4a8 import SHIFT, shift_of
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.runtime.backends.base import (
    Activation,
    DeviceExperts,
    QuantizedActivation,
    SeeExpert,
    as_codes,
    as_float,
)
from qwen3_ascend.runtime.backends.npu.linears import Upload
from qwen3_ascend.runtime.backends.npu.operators import Form, dynamic_quant, fused_gated_quant

COUNTS = 1
"""Of group_list_type and expert_tokens_num_type: rows of each expert, not where they end."""


@dataclass(frozen=True)
class Routing:
    """Which experts the tokens of a step are given to.

    Attributes:
        weights: bfloat16 [T, per_token], descending.
        chosen: int32 [T, per_token], numbers of the experts.
        experts: how many there are.
    """

    weights: Tensor
    chosen: Tensor
    experts: int


@dataclass(frozen=True)
class RoutedRows:
    """What the experts of a step are fed.

    Attributes:
        values: of R = T * per_token rows, as the experts' linear wants them.
        places: int32 [R], where each token's rows are.
        counts: int64 [experts], rows of each.
    """

    values: Activation
    places: Tensor
    counts: Tensor


ChooseExperts = Callable[[Tensor, int, bool], Routing]
"""(logits, bfloat16 [T, experts]; experts of a token; whether the weights of a token are divided by
their sum) -> those of the greatest logits, equal ones in the order of the experts."""


def choose_at_once(logits: Tensor, per_token: int, normalize: bool) -> Routing:
    """One launch: softmax and then the greatest, or the greatest and then softmax, which is what
    dividing by their sum comes to. In float32; weights are rounded once."""
    weights, chosen, _ = torch_npu.npu_moe_gating_top_k_softmax_v2(
        logits, k=per_token, renorm=int(normalize)
    )
    return Routing(weights, chosen, logits.shape[1])


def choose_then_normalize(logits: Tensor, per_token: int, normalize: bool) -> Routing:
    """The older operator rounds weights to the type of the logits, which is too early if they are
    divided afterwards: five launches, or three."""
    weights, chosen, _ = torch_npu.npu_moe_gating_top_k_softmax(logits.float(), None, k=per_token)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(weights.to(torch.bfloat16), chosen, logits.shape[1])


def route_floats(x: Tensor, routing: Routing) -> RoutedRows:
    """The rows of x, bfloat16 [T, hidden], at every routed row."""
    rows, places, counts, _ = _route(x, routing)
    return RoutedRows(rows, places, counts)


def route_codes(x: Tensor, routing: Routing) -> RoutedRows:
    """The same quantized: each token once, as the definition has it."""
    codes, scale = torch_npu.npu_dynamic_quant(x)
    rows, places, counts, scales = _route(codes, routing, scale)
    return RoutedRows(QuantizedActivation(rows, scales), places, counts)


def route_then_quantize(x: Tensor, routing: Routing) -> RoutedRows:
    """The same numbers; every routed row is quantized. CANN before 8.5 drops the scales of rows for
    128 experts and a hidden size of 2048 (Qwen3-30B-A3B)."""
    routed = route_floats(x, routing)
    return RoutedRows(dynamic_quant(as_float(routed.values)), routed.places, routed.counts)


def _route(x: Tensor, routing: Routing, scale: Tensor | None = None) -> tuple[Tensor, ...]:
    """Without the range of experts the wheel reads its first number where there is none."""
    results: tuple[Tensor, ...] = torch_npu.npu_moe_init_routing_v2(
        x,
        routing.chosen,
        scale=scale,
        active_num=routing.chosen.numel(),
        expert_num=routing.experts,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        active_expert_range=[0, routing.experts],
        row_idx_type=0,
        quant_mode=-1,
    )
    return results


def sum_up(rows: Tensor, routed: RoutedRows, routing: Routing) -> Tensor:
    """The outputs of each token's experts, bfloat16 [R, hidden], times their weights, added up in
    float32 in descending order of these: bfloat16 [T, hidden]."""
    total: Tensor = torch_npu.npu_moe_token_unpermute(rows, routed.places, routing.weights)
    return total


class NpuExperts(Protocol):
    """A linear of every expert of a layer."""

    @property
    def input(self) -> Input: ...

    @property
    def weight(self) -> Tensor: ...

    def __call__(self, x: Activation, counts: Tensor) -> Tensor:
        """The product of routed rows [R, K] with the weights of their experts, bfloat16 [R, N]."""

    def probe(self, inputs: Tensor) -> Tensor:
        """The weights [experts, I, N] of some inputs [I], as the kernel itself reads them, on the
        CPU; see NpuLinear."""


class FloatExperts:
    """bf16: npu_grouped_matmul reads [experts, N, K], in FRACTAL_NZ, through a transposed view."""

    input = Input.FLOAT

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @classmethod
    def load(cls, linear: Linear, upload: Upload) -> FloatExperts:
        """Puts a stored linear on the device."""
        return cls(upload(linear.weight, linear.layout, *linear.shape[-2:]))

    def __call__(self, x: Activation, counts: Tensor) -> Tensor:
        """The product, bfloat16 [R, N]."""
        return _multiply(as_float(x), self.weight.transpose(-2, -1), counts)

    def probe(self, inputs: Tensor) -> Tensor:
        """See NpuExperts."""
        experts, outputs, count = self.weight.shape
        rows, counts = _one_hot(inputs, experts, count, torch.bfloat16)
        return self(rows, counts).cpu().view(experts, -1, outputs)


class WatchedExperts(FloatExperts):
    """The same, which show what each expert is fed: for calibration, which is not captured."""

    def __init__(self, experts: FloatExperts, see: SeeExpert) -> None:
        super().__init__(experts.weight)
        self._see = see

    @override
    def __call__(self, x: Activation, counts: Tensor) -> Tensor:
        """The product, bfloat16 [R, N]."""
        for number, rows in enumerate(as_float(x).split(counts.tolist())):
            if len(rows):
                self._see(number, rows)
        return super().__call__(x, counts)


class Int8Experts:
    """w8a8: npu_grouped_matmul reads [experts, K, N], in FRACTAL_NZ.

    Attributes:
        scale: bfloat16 [experts, N]: the kernel takes no other type beside results of bfloat16.
    """

    input = Input.INT8_PER_TOKEN

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.weight, self.scale = weight, scale

    @classmethod
    def load(cls, linear: Linear, upload: Upload) -> Int8Experts:
        """Puts a stored linear on the device.

        Raises:
            CheckpointError: if its scales, taken from a source, are none of bfloat16.
        """
        scale = linear.tensors["scale"].to(torch.bfloat16)
        if not torch.equal(scale.float(), linear.tensors["scale"]):
            raise CheckpointError(
                "the source's scales of experts are no numbers of bfloat16, which is all that "
                "npu_grouped_matmul reads: convert the original model, or use --device cpu"
            )
        weight = upload(linear.weight, linear.layout, *linear.shape[-2:])
        return cls(weight, scale.to("npu"))

    def __call__(self, x: Activation, counts: Tensor) -> Tensor:
        """The product, bfloat16 [R, N]."""
        fed = as_codes(x)
        return self._product(fed.codes, fed.scale, self.scale, counts)

    def _product(self, codes: Tensor, token: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
        return _multiply(
            codes, self.weight, counts, scale=[scale], per_token_scale=[token],
            output_dtype=torch.bfloat16,
        )  # fmt: skip

    def probe(self, inputs: Tensor) -> Tensor:
        """See NpuExperts; with scales of 1 the bf16 result is the code itself, which bf16 holds
        exactly."""
        experts, count, outputs = self.weight.shape
        rows, counts = _one_hot(inputs, experts, count, torch.int8)
        ones = torch.ones(len(rows)).to("npu")
        y = self._product(rows, ones, torch.ones_like(self.scale), counts)
        return y.cpu().to(torch.int8).view(experts, -1, outputs)


def _multiply(x: Tensor, weight: Tensor, counts: Tensor, **scales: object) -> Tensor:
    (y,) = torch_npu.npu_grouped_matmul(
        [x], [weight], group_list=counts, split_item=2, group_type=0, group_list_type=COUNTS,
        **scales,
    )  # fmt: skip
    found: Tensor = y
    return found


def _one_hot(inputs: Tensor, experts: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A row for each of some inputs and each expert, and the counts of rows; on the device."""
    rows = torch.zeros(experts, len(inputs), count, dtype=dtype)
    rows[:, torch.arange(len(inputs)), inputs] = 1
    counts = torch.full((experts,), len(inputs), dtype=torch.int64)
    return rows.flatten(0, 1).to("npu"), counts.to("npu")


Zeros = Callable[[tuple[int, ...]], Tensor]
"""bfloat16 zeros of a shape on the device, which nobody writes to."""


class WeightOnlyExperts:
    """w8a16 and w4a16: npu_grouped_matmul reads plain [experts, K, N], of words of eight codes if
    they are int4, and decodes them on the way.

    Attributes:
        scale: bfloat16 [experts, N], or [experts, K / group, N].
        offset: the same, what is added to codes; given even where it is zero, since CANN before 9.1
            demands it.
    """

    input = Input.FLOAT

    def __init__(self, weight: Tensor, scale: Tensor, offset: Tensor) -> None:
        self.weight, self.scale, self.offset = weight, scale, offset

    @classmethod
    def load(cls, linear: Linear, upload: Upload, zeros: Zeros) -> WeightOnlyExperts:
        """Puts a stored linear on the device; linears without offsets share those of zero."""
        weight = upload(linear.weight, linear.layout, *linear.shape[-2:])
        scale, offset = linear.tensors["scale"], linear.tensors.get("offset")
        added = zeros(tuple(scale.shape)) if offset is None else offset.to("npu")
        return cls(weight, scale.to("npu"), added)

    def __call__(self, x: Activation, counts: Tensor) -> Tensor:
        """The product, bfloat16 [R, N]."""
        return self._product(as_float(x), self.scale, self.offset, counts)

    def _product(self, x: Tensor, scale: Tensor, offset: Tensor, counts: Tensor) -> Tensor:
        return _multiply(x, self.weight, counts, antiquant_scale=[scale], antiquant_offset=[offset])

    def probe(self, inputs: Tensor) -> Tensor:
        """See NpuExperts; with scales of 1 and no offsets the bf16 result is the code itself."""
        experts, count, _ = self.weight.shape
        rows, counts = _one_hot(inputs, experts, count, torch.bfloat16)
        ones, zeros = torch.ones_like(self.scale), torch.zeros_like(self.offset)
        y = self._product(rows, ones, zeros, counts)
        return y.cpu().to(torch.int8).view(experts, len(inputs), -1)


class GroupInt4Experts:
    """w4a8: npu_grouped_matmul reads [experts, K, N / 8] words of eight codes, in FRACTAL_NZ. It
    splits the codes that it is fed where they lie: nobody else may read them afterwards
    (GMM_CV_SPLIT_IMP_A8W4_MSD of ops-transformer's grouped_matmul.cpp).

    Attributes:
        scale: int64 [experts, K / 256, N], with float32 in the low half.
        shift: float32 [experts, N], what the kernel leaves out of its products; its `bias`.
    """

    input = Input.INT8_PER_TOKEN

    def __init__(self, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
        self.weight, self.scale, self.shift = weight, scale, shift

    @classmethod
    def load(cls, linear: Linear, upload: Upload) -> GroupInt4Experts:
        """Puts a stored linear on the device."""
        weight = upload(linear.weight, linear.layout, *linear.shape[-2:])
        scale = linear.tensors["scale"].view(torch.int32).long()
        return cls(weight, scale.to("npu"), shift_of(linear.tensors).to("npu"))

    def __call__(self, x: Activation, counts: Tensor) -> Tensor:
        """The product, bfloat16 [R, N]."""
        fed = as_codes(x)
        return self._product(fed.codes, fed.scale, self.scale, self.shift, counts)

    def _product(
        self, codes: Tensor, token: Tensor, scale: Tensor, shift: Tensor, counts: Tensor
    ) -> Tensor:
        return _multiply(
            codes, self.weight, counts, scale=[scale], bias=[shift], per_token_scale=[token],
            output_dtype=torch.bfloat16,
        )  # fmt: skip

    def probe(self, inputs: Tensor) -> Tensor:
        """See NpuExperts; as GroupInt4Linear.probe has it."""
        experts, count, _ = self.weight.shape
        rows, counts = _one_hot(inputs, experts, count, torch.int8)
        ones = torch.ones(self.scale.shape).view(torch.int32).long().to("npu")
        token, shift = torch.ones(len(rows)).to("npu"), torch.zeros_like(self.shift)
        y = self._product(rows + SHIFT, token, ones, shift, counts)
        return y.cpu().to(torch.int8).view(experts, len(inputs), -1)


RouteCodes = Callable[[Tensor, Routing], RoutedRows]
"""(x, bfloat16 [T, hidden]; routing) -> quantized routed rows."""

GateExperts = Callable[[RoutedRows, Int8Experts], QuantizedActivation]
"""Routed rows of codes times the gate_up of their experts, silu(gate) * up, quantized."""


def fused_gate(routed: RoutedRows, experts: Int8Experts) -> QuantizedActivation:
    """One launch, nothing of it rounded to bfloat16. Codes go through float16, so that some of them
    differ by one from the definition's."""
    fed = as_codes(routed.values)
    codes, scale = torch_npu.npu_grouped_matmul_swiglu_quant_v2(
        fed.codes, [experts.weight], [experts.scale], fed.scale, routed.counts,
        group_list_type=COUNTS,
    )  # fmt: skip
    return QuantizedActivation(codes, scale)


def fused_gate_by_ends(routed: RoutedRows, experts: Int8Experts) -> QuantizedActivation:
    """The operator of CANN 8.3, which is told where the rows of each expert end."""
    fed = as_codes(routed.values)
    codes, scale, _ = torch_npu.npu_grouped_matmul_swiglu_quant(
        fed.codes, experts.weight, routed.counts.cumsum(0), experts.scale, fed.scale
    )
    return QuantizedActivation(codes, scale)


def multiply_then_fused_gate(routed: RoutedRows, experts: Int8Experts) -> QuantizedActivation:
    """Two launches; the product is rounded to bfloat16 before the gate, as it is defined."""
    return fused_gated_quant(experts(routed.values, routed.counts))


def multiply_then_gate(routed: RoutedRows, experts: Int8Experts) -> QuantizedActivation:
    """Three launches; the product is rounded to bfloat16 before the gate, and what the gate gives
    before it is quantized."""
    gate_up = experts(routed.values, routed.counts)
    return dynamic_quant(torch_npu.npu_swiglu(gate_up, dim=-1))


CHOICES: tuple[Form[ChooseExperts], ...] = (
    Form("npu_moe_gating_top_k_softmax_v2", choose_at_once),
    Form("npu_moe_gating_top_k_softmax", choose_then_normalize),
)
ROUTES: tuple[Form[RouteCodes], ...] = (
    Form("npu_moe_init_routing_v2 of codes", route_codes),
    Form("npu_moe_init_routing_v2, npu_dynamic_quant", route_then_quantize),
)
EXPERT_GATES: tuple[Form[GateExperts], ...] = (
    Form("npu_grouped_matmul_swiglu_quant_v2", fused_gate),
    Form("npu_grouped_matmul_swiglu_quant", fused_gate_by_ends),
    Form("npu_grouped_matmul, npu_dequant_swiglu_quant", multiply_then_fused_gate),
    Form("npu_grouped_matmul, npu_swiglu, npu_dynamic_quant", multiply_then_gate),
)

LOADS: dict[type[Scheme], Callable[[Linear, Upload], NpuExperts]] = {
    BF16: FloatExperts.load,
    W8A8: Int8Experts.load,
    W4A8: GroupInt4Experts.load,
}

LOADED = (FloatExperts, Int8Experts, WeightOnlyExperts, GroupInt4Experts)


def npu_experts(experts: DeviceExperts) -> NpuExperts:
    """The linears of experts that this backend has loaded."""
    assert isinstance(experts, LOADED), "experts of another backend"
    return experts


def load_experts(linear: Linear, upload: Upload, zeros: Zeros) -> NpuExperts:
    """Puts a stored linear of all experts on the device; CheckpointError if none of their schemes
    has a kernel."""
    if isinstance(linear.scheme, W8A16 | W4A16):
        return WeightOnlyExperts.load(linear, upload, zeros)
    load = LOADS.get(type(linear.scheme))
    if load is None:
        raise CheckpointError(f"the npu backend has no kernel for experts of {linear.scheme}")
    return load(linear, upload)
