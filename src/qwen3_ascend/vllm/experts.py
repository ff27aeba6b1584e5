"""All experts of a layer of vLLM by this project's own mixture, whichever the platform."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.runtime.backends.base import Activation, DeviceExperts, Mixture
from qwen3_ascend.vllm.linears import DOWN, GATE_UP, check_shape, refuse_weights


class StoredExpertsMethod(FusedMoEMethodBase, ABC):
    """Computes with the two stored linears of a layer's experts, and chooses experts itself."""

    def __init__(self, model: Qwen3Config, name: str, layer: Any) -> None:
        super().__init__(layer.moe_config)
        self.name, self.model = name, model

    @override
    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Notes shapes and type only: what a linear is made of comes with its bytes."""
        inner = intermediate_size_per_partition
        layer.stored_shapes = {
            GATE_UP: (num_experts, 2 * inner, hidden_size),
            DOWN: (num_experts, hidden_size, inner),
        }
        layer.stored_linears, layer.stored_dtype = {}, params_dtype

    @override
    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Nothing is quantized by the engine."""

    def take_linear(self, layer: Any, place: str, linear: Linear, copy: Any) -> None:
        """Fills one of the two linears, GATE_UP or DOWN, with a rank's part; see StoredMethod."""
        check_shape(f"{self.name}.{place}", linear, layer.stored_shapes[place])
        if place in layer.stored_linears:
            refuse_weights()
        layer.stored_linears[place] = self.load(layer, place, linear, copy)

    @abstractmethod
    def load(self, layer: Any, place: str, linear: Linear, copy: Any) -> DeviceExperts:
        """Puts a linear of the right shape on the platform's device."""

    def mixture(self, layer: Any, logits: Tensor) -> Mixture:
        """Of a filled layer, for the tokens whose logits [T, experts] the engine has computed."""
        linears = layer.stored_linears
        return Mixture.of(self.model.experts, _Known(logits), linears[GATE_UP], linears[DOWN])


class _Known:
    """A router whose logits are known: the engine's own linear has computed them."""

    input = Input.FLOAT

    def __init__(self, logits: Tensor) -> None:
        self.weight = logits.contiguous()

    def __call__(self, x: Activation) -> Tensor:
        return self.weight
