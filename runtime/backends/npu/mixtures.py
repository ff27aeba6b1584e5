"""Whole mixtures of experts on the device, of the operators that this machine has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch_npu
from torch import Tensor

from qwen3_ascend.checkpoint.layout import Layout
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.errors import DeviceError
from qwen3_ascend.runtime.backends.base import Activation, Mixture
from qwen3_ascend.runtime.backends.npu.experts import (
    ChooseExperts,
    GateExperts,
    Int8Experts,
    NpuExperts,
    RouteCodes,
    RoutedRows,
    Routing,
    load_experts,
    npu_experts,
    route_floats,
    sum_up,
)
from qwen3_ascend.runtime.backends.npu.linears import Upload
from qwen3_ascend.runtime.backends.npu.operators import GatedQuant
from qwen3_ascend.runtime.backends.npu.self_check import kernel_sees_experts


@dataclass(frozen=True)
class ExpertForms:
    """The forms of those operations of a mixture that have more than one.

    Attributes:
        choose: says which experts a token is given to.
        route: quantizes rows for the experts that their tokens are given to.
        gate: multiplies rows with gate and up of their experts, gates and quantizes.
        gated_quant: gates and quantizes rows that were multiplied before.
    """

    choose: ChooseExperts
    route: RouteCodes
    gate: GateExperts
    gated_quant: GatedQuant


class ExpertLoader:
    """Brings linears of experts to the device; the first of each kind is checked through its own
    kernel (S3)."""

    def __init__(self) -> None:
        self._checked: set[tuple[str, Layout]] = set()
        self._offsets: dict[tuple[int, ...], Tensor] = {}

    def load(self, linear: Linear, upload: Upload) -> NpuExperts:
        """Puts a stored linear on the device.

        Raises:
            CheckpointError: if no kernel takes it.
            DeviceError: if the kernels read other weights than the file holds.
        """
        loaded = load_experts(linear, upload, self._zero_offsets)
        kind = str(linear.scheme), linear.layout
        if kind not in self._checked and not kernel_sees_experts(linear, loaded):
            raise DeviceError("the kernels read other weights of experts than the file holds")
        self._checked.add(kind)
        return loaded

    def _zero_offsets(self, shape: tuple[int, ...]) -> Tensor:
        """Offsets of zero, which all linears of a shape share."""
        if shape not in self._offsets:
            self._offsets[shape] = torch.zeros(shape, dtype=torch.bfloat16, device="npu")
        return self._offsets[shape]


def compute_mixture(x: Tensor, mixture: Mixture, forms: ExpertForms) -> Tensor:
    """See Backend.mixture: bfloat16 [T, hidden] of x, bfloat16 [T, hidden]."""
    gate_up, down = npu_experts(mixture.gate_up), npu_experts(mixture.down)
    routing = forms.choose(mixture.router(x), mixture.per_token, mixture.normalize)
    routed = _route(x, routing, gate_up, forms)
    rows = down(_gate(routed, gate_up, down, forms), routed.counts)
    return sum_up(rows, routed, routing)


def _route(x: Tensor, routing: Routing, experts: NpuExperts, forms: ExpertForms) -> RoutedRows:
    if experts.input is Input.FLOAT:
        return route_floats(x, routing)
    return forms.route(x, routing)


def _gate(
    routed: RoutedRows, gate_up: NpuExperts, down: NpuExperts, forms: ExpertForms
) -> Activation:
    """silu(gate) * up of routed rows, as the next linear of their experts wants it."""
    if isinstance(gate_up, Int8Experts) and isinstance(down, Int8Experts):
        return forms.gate(routed, gate_up)
    rows = gate_up(routed.values, routed.counts)
    if down.input is Input.INT8_PER_TOKEN:
        return forms.gated_quant(rows)
    gated: Tensor = torch_npu.npu_swiglu(rows, dim=-1)
    return gated
