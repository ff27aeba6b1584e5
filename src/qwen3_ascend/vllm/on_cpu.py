"""Stored linears on vLLM's CPU backend: exact integer products, and the engine's own for floats."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod

from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import BF16, W4A16, W8A8, W8A16, Input, Scheme, W8A8Static
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.base import (
    Activation,
    DeviceExperts,
    DeviceLinear,
    QuantizedActivation,
    StaticActivation,
    static_input_of,
)
from qwen3_ascend.runtime.backends.cpu.linears import LINEARS as PRODUCTS
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.vllm.experts import StoredExpertsMethod
from qwen3_ascend.vllm.linears import check_shape, fill_bias, refuse_weights


class ExactMethod(LinearMethodBase):
    """A linear by this project's own product, which is exact for integers.

    vLLM's int8 kernel saturates on processors without VNNI: it is off by 20 % for extreme codes.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @override
    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Notes shape and type only: the product keeps the codes in a form of its own."""
        layer.stored_shape = (sum(output_partition_sizes), input_size_per_partition)
        layer.stored_dtype, layer.stored_product = params_dtype, None
        # As attention layers do: so the operator below finds its layer within a compiled graph.
        get_current_vllm_config().compilation_config.static_forward_context[self.name] = layer

    def take(self, layer: Any, linear: Linear, copy: None) -> None:
        """See StoredMethod."""
        check_shape(self.name, linear, layer.stored_shape)
        if layer.stored_product is not None:
            refuse_weights()
        layer.stored_product = PRODUCTS[type(linear.scheme)](linear, layer.stored_dtype)

    @override
    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product [*, N] of x [*, K]; the stored linear has its bias, if this rank adds it."""
        if torch.compiler.is_compiling():
            return stored_linear(x, self.name, layer.stored_shape[0])
        return product_of(layer, x)


def product_of(layer: Any, x: Tensor) -> Tensor:
    """The product of a filled layer."""
    rows, product = x.reshape(-1, x.shape[-1]), layer.stored_product
    y: Tensor = product(_fed(rows, product))
    return y.view(*x.shape[:-1], -1)


def _fed(rows: Tensor, product: DeviceLinear) -> Activation:
    """Rows [T, K] as a linear wants them."""
    if product.input is Input.FLOAT:
        return rows
    if product.input is Input.INT8_STATIC:
        return StaticActivation(static_input_of(product).quantize(rows))
    return QuantizedActivation(*quantize_tokens(rows))


@torch.library.custom_op("qwen3_ascend::stored_linear", mutates_args=())
def stored_linear(x: Tensor, name: str, outputs: int) -> Tensor:
    """What a compiled graph calls, as its compiler cannot see into the exact product."""
    return product_of(get_forward_context().no_compile_layers[name], x)


@stored_linear.register_fake
def _(x: Tensor, name: str, outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


class FloatMethod(UnquantizedLinearMethod):
    """A linear of floats, decoded into the engine's plain weight, which it packs as it likes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @override
    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        super().create_weights(layer, *sizes, **{**attributes, "weight_loader": refuse_weights})
        layer.stored_is_there = False

    def take(self, layer: Any, linear: Linear, copy: None) -> None:
        """See StoredMethod."""
        check_shape(self.name, linear, tuple(layer.weight.shape))
        if layer.stored_is_there:
            refuse_weights()
        fill_bias(layer, linear, layer.weight.dtype)
        layer.weight.data.copy_(linear.dequantize())
        layer.stored_is_there = True

    @override
    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product [*, N] of x [*, K]; the bias is the stored one."""
        product: Tensor = super().apply(layer, x, layer.stored_bias)
        return product


class ExpertsMethod(StoredExpertsMethod):
    """vLLM's CPU backend has no experts of int8, and its int4 is another."""

    @property
    @override
    def is_monolithic(self) -> bool:
        """It is given logits, and chooses experts itself."""
        return True

    @override
    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """As ExactMethod does."""
        super().create_weights(layer, *sizes, **attributes)
        dtype = "float32" if layer.stored_dtype == torch.float32 else "bfloat16"
        layer.stored_backend = backends.get(self.model, DeviceOptions("cpu", dtype))
        get_current_vllm_config().compilation_config.static_forward_context[self._place] = layer

    @property
    def _place(self) -> str:
        """By which the operator below finds its layer; its own name is that of the runner."""
        return f"{self.name}.stored"

    @override
    def load(self, layer: Any, place: str, linear: Linear, copy: None) -> DeviceExperts:
        experts: DeviceExperts = layer.stored_backend.experts(linear)
        return experts

    @override
    def apply_monolithic(
        self, layer: Any, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None
    ) -> Tensor:
        """The sum of each token's experts [T, hidden], of x [T, hidden] and logits [T, experts]."""
        if torch.compiler.is_compiling():
            return stored_mixture(x, router_logits, self._place)
        return mixture_of(layer, x, router_logits)


def mixture_of(layer: Any, x: Tensor, logits: Tensor) -> Tensor:
    """The mixture of a filled layer."""
    mixture = layer.quant_method.mixture(layer, logits)
    found: Tensor = layer.stored_backend.mixture(x.contiguous(), mixture)
    return found


@torch.library.custom_op("qwen3_ascend::stored_mixture", mutates_args=())
def stored_mixture(x: Tensor, logits: Tensor, place: str) -> Tensor:
    """What a compiled graph calls; see `stored_linear`."""
    return mixture_of(get_forward_context().no_compile_layers[place], x, logits)


@stored_mixture.register_fake
def _(x: Tensor, logits: Tensor, place: str) -> Tensor:
    return torch.empty_like(x)


PLAIN = UnquantizedLinearMethod
EXPERTS = ExpertsMethod

LINEARS: dict[type[Scheme], Any] = {
    BF16: FloatMethod,
    W8A8: ExactMethod,
    W8A16: FloatMethod,
    W4A16: FloatMethod,
    W8A8Static: ExactMethod,
}
HEADS: dict[type[Scheme], Any] = {
    W8A8: ExactMethod,
    W8A8Static: ExactMethod,
    W8A16: ExactMethod,
    W4A16: ExactMethod,
}


def check_device() -> None:
    """Every processor will do."""


def copying() -> AbstractContextManager[None]:
    """Nothing: memory is where it is."""
    return nullcontext()
