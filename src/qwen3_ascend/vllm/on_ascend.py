"""Stored linears on vllm-ascend: its own schemes, whose weights are the checkpoint's bytes.

Everything that vllm-ascend does with a linear of its own, such as fusing a norm with the
quantization that follows, capturing and replaying graphs or dividing it among groups of its own, it
does with these as well: only where the weight comes from, and that nothing is cast, is different.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm_ascend.ops.fused_moe.moe_comm_method import FusedExpertsResult
from vllm_ascend.ops.linear import AscendUnquantizedLinearMethod
from vllm_ascend.quantization.method_adapters import AscendLinearMethod
from vllm_ascend.quantization.methods import (
    AscendW8A8DynamicLinearMethod,
    AscendW8A8LinearMethod,
)
from vllm_ascend.utils import AscendDeviceType, get_ascend_device_type

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import BF16, W4A16, W8A8, W8A16, Input, Scheme, W8A8Static
from qwen3_ascend.checkpoint.schemes.w8a8_static import folded_bias
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import DeviceError
from qwen3_ascend.runtime.backends.base import DeviceExperts
from qwen3_ascend.runtime.backends.npu.capabilities import probe_experts
from qwen3_ascend.runtime.backends.npu.experts import NpuExperts
from qwen3_ascend.runtime.backends.npu.formats import empty_packed, fill_packed, upload_packed
from qwen3_ascend.runtime.backends.npu.linears import (
    Upload,
    WeightOnlyLinear,
    load_linear,
    multiply,
)
from qwen3_ascend.runtime.backends.npu.mixtures import (
    ExpertForms,
    ExpertLoader,
    compute_mixture,
)
from qwen3_ascend.runtime.backends.npu.operators import dynamic_quant
from qwen3_ascend.runtime.backends.npu.transfers import Transfers
from qwen3_ascend.vllm.experts import StoredExpertsMethod
from qwen3_ascend.vllm.linears import check_shape, fill_bias, refuse_weights

Copy = Callable[[Tensor, Tensor], None]
"""Takes a device tensor and the bytes for its storage; see transfers.Transfers."""


class StoredInt8Scheme(AscendW8A8DynamicLinearMethod):
    """vllm-ascend's dynamic w8a8, with the weight in FRACTAL_NZ from the beginning."""

    @override
    def get_weight(
        self, input_size: int, output_size: int, params_dtype: torch.dtype
    ) -> dict[str, Any]:
        layout = ASCEND_A2_A3.layouts[W8A8.name]
        return {"weight": empty_packed(torch.int8, layout, output_size, input_size)}

    @override
    def get_perchannel_param(self, output_size: int, params_dtype: torch.dtype) -> dict[str, Any]:
        """In the form that vllm-ascend gives them after loading."""
        names = ("weight_scale", "weight_offset")
        return {name: torch.zeros(output_size, dtype=params_dtype) for name in names}

    def beside(self, linear: Linear) -> dict[str, Tensor]:
        """What is stored beside the weight. Scales are bf16 on vllm-ascend, whatever made a
        checkpoint; those that the converter chooses are exact in it."""
        return {"weight_scale": linear.tensors["scale"]}

    @override
    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing is transposed and nothing cast; fused operators want the scale in float32."""
        layer.weight_scale_fp32 = layer.weight_scale.data.float()

    @override
    def apply(self, layer: Any, x: Tensor, *bias_and_rank: Any) -> Tensor:
        """The product [T, N] of x [T, K]; the bias is the stored one."""
        product: Tensor = super().apply(layer, x, layer.stored_bias)
        return product


class StoredStaticScheme(AscendW8A8LinearMethod):
    """vllm-ascend's static w8a8, with the weight in FRACTAL_NZ from the beginning."""

    @override
    def get_weight(
        self, input_size: int, output_size: int, params_dtype: torch.dtype = torch.bfloat16
    ) -> dict[str, Any]:
        layout = ASCEND_A2_A3.layouts[W8A8Static.name]
        return {"weight": empty_packed(torch.int8, layout, output_size, input_size)}

    @override
    def get_perchannel_param(self, output_size: int, params_dtype: torch.dtype) -> dict[str, Any]:
        """What the product needs; the scales of the weight are in deq_scale."""
        return {
            "quant_bias": torch.zeros(output_size, dtype=torch.int32),
            "deq_scale": torch.zeros(output_size, dtype=torch.float32),
        }

    def beside(self, linear: Linear) -> dict[str, Tensor]:
        """What is stored beside the weight; quant_bias is what this rank adds, with its bias."""
        names = ("deq_scale", "input_scale", "input_offset")
        return {name: linear.tensors[name] for name in names} | {"quant_bias": folded_bias(linear)}

    @override
    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing is transposed and nothing cast. vllm-ascend multiplies by the reciprocal, or
        divides by the scale where it fuses a norm with the quantization behind it."""
        inputs, _ = layer.weight.shape
        scale = layer.input_scale.data.expand(inputs).contiguous()
        reciprocal = (1 / scale.float()).to(scale.dtype)
        offset = layer.input_offset.data.to(scale.dtype).expand(inputs).contiguous()
        for name, tensor in (
            ("aclnn_input_scale", scale),
            ("aclnn_input_scale_reciprocal", reciprocal),
            ("aclnn_input_offset", offset),
        ):
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))

    @override
    def apply(self, layer: Any, x: Tensor, *bias_and_rank: Any) -> Tensor:
        """The product [T, N] of x [T, K]. vllm-ascend lets rank 0 alone add quant_bias, which of
        its own is the whole linear's; here each rank has what belongs to its inputs."""
        product: Tensor = super().apply(layer, x, None, 0)
        return product


class IntegerMethod(AscendLinearMethod):
    """An integer linear of a layer, by a scheme of vllm-ascend's."""

    def __init__(self, scheme: type[StoredInt8Scheme | StoredStaticScheme], name: str) -> None:
        super().__init__(scheme())
        self.name = name

    @override
    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        super().create_weights(layer, *sizes, **{**attributes, "weight_loader": refuse_weights})
        layer.stored_is_there = False

    def take(self, layer: Any, linear: Linear, copy: Copy) -> None:
        """See StoredMethod."""
        inputs, outputs = layer.weight.shape
        check_shape(self.name, linear, (outputs, inputs))
        _fill(layer, linear, copy)
        for name, tensor in self.quant_method.beside(linear).items():
            parameter = getattr(layer, name)
            parameter.data.copy_(tensor.to(parameter.dtype))


class FloatMethod(AscendUnquantizedLinearMethod):
    """A bf16 linear of a layer, in FRACTAL_NZ as with VLLM_ASCEND_ENABLE_NZ=2."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @override
    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *others: Any,
        **attributes: Any,
    ) -> None:
        layout, outputs = ASCEND_A2_A3.layouts[BF16.name], sum(output_partition_sizes)
        weight = empty_packed(torch.bfloat16, layout, outputs, input_size_per_partition)
        layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
        layer.weight.weight_loader = refuse_weights
        layer.stored_is_there = False

    def take(self, layer: Any, linear: Linear, copy: Copy) -> None:
        """See StoredMethod."""
        check_shape(self.name, linear, tuple(layer.weight.shape))
        _fill(layer, linear, copy)

    @override
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing is cast."""

    @override
    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product [T, N] of x [T, K]; the bias is the stored one."""
        product: Tensor = super().apply(layer, x, layer.stored_bias)
        return product


class LateMethod(LinearMethodBase, ABC):
    """What a linear is made of comes with its bytes."""

    def __init__(self, name: str) -> None:
        self.name = name

    @override
    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *others: Any,
        **attributes: Any,
    ) -> None:
        """Notes the shape only."""
        layer.stored_shape = (sum(output_partition_sizes), input_size_per_partition)
        layer.stored_is_there = False

    def take(self, layer: Any, linear: Linear, copy: Copy) -> None:
        """See StoredMethod."""
        check_shape(self.name, linear, layer.stored_shape)
        if layer.stored_is_there:
            refuse_weights()
        self.fill(layer, linear, functools.partial(upload_packed, copy=copy))
        layer.stored_is_there = True

    @abstractmethod
    def fill(self, layer: Any, linear: Linear, upload: Upload) -> None:
        """Puts a linear of the right shape on the device."""


class WeightOnlyMethod(LateMethod):
    """A w8a16 or w4a16 linear of a layer, by the operator that vllm-ascend's own W8A16 calls; it
    has no W4A16 but for experts."""

    @override
    def fill(self, layer: Any, linear: Linear, upload: Upload) -> None:
        product = WeightOnlyLinear.load(linear, upload)
        for name in ("weight", "scale", "offset"):
            stored = getattr(product, name)
            made = None if stored is None else torch.nn.Parameter(stored, requires_grad=False)
            layer.register_parameter(name if name == "weight" else f"weight_{name}", made)
        layer.register_buffer("stored_bias", product.bias, persistent=False)
        layer.stored_group = product.group

    @override
    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product [*, N] of x [*, K]; the bias is the stored one."""
        stored = layer.weight, layer.weight_scale, layer.stored_group, layer.stored_bias
        rows = x.reshape(-1, x.shape[-1])
        return multiply(rows, *stored, layer.weight_offset).view(*x.shape[:-1], -1)


class HeadMethod(LateMethod):
    """A quantized output projection: in parts, as one kernel does not take a whole vocabulary."""

    @override
    def fill(self, layer: Any, linear: Linear, upload: Upload) -> None:
        layer.stored_product = load_linear(linear, upload)

    @override
    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits bfloat16 [T, N]."""
        product = layer.stored_product
        logits: Tensor = product(x if product.input is Input.FLOAT else dynamic_quant(x))
        return logits


def _fill(layer: Any, linear: Linear, copy: Copy) -> None:
    """Weight and bias of a layer, once."""
    if layer.stored_is_there:
        refuse_weights()
    fill_packed(layer.weight.data, linear.weight, copy)
    fill_bias(layer, linear, torch.bfloat16)
    layer.stored_is_there = True


class ExpertsMethod(StoredExpertsMethod):
    """By the operators that this project's runtime calls, which are torch_npu's: vllm-ascend has
    some of its own package, for w8a8 and for w4a8 of another form. It divides tokens among ranks
    and adds up what they answer; what is between the two is computed here."""

    @override
    def load(self, layer: Any, place: str, linear: Linear, copy: Uploads) -> DeviceExperts:
        """Beside the product, the layer gets its weight under its stored name."""
        layer.stored_forms = copy.expert_forms(self.model)
        experts = copy.load_experts(linear)
        named = torch.nn.Module()
        named.weight = torch.nn.Parameter(experts.weight, requires_grad=False)
        layer.add_module(place, named)
        return experts

    @override
    def apply(self, layer: Any, x: Tensor, router_logits: Tensor, **asked: Any) -> Any:
        """The sum of each token's experts [T, hidden], of x [T, hidden] and logits [T, experts]."""
        mixture = self.mixture(layer, router_logits)
        return FusedExpertsResult(compute_mixture(x, mixture, layer.stored_forms))


PLAIN = AscendUnquantizedLinearMethod
EXPERTS = ExpertsMethod

LINEARS: dict[type[Scheme], Any] = {
    BF16: FloatMethod,
    W8A8: functools.partial(IntegerMethod, StoredInt8Scheme),
    W8A16: WeightOnlyMethod,
    W4A16: WeightOnlyMethod,
    W8A8Static: functools.partial(IntegerMethod, StoredStaticScheme),
}
HEADS: dict[type[Scheme], Any] = {W8A8: HeadMethod, W8A16: HeadMethod, W4A16: HeadMethod}


def check_device() -> None:
    """DeviceError if vllm-ascend was built for another chip than checkpoints are laid out for."""
    device = get_ascend_device_type()
    if device not in (AscendDeviceType.A2, AscendDeviceType.A3):
        raise DeviceError(
            f"this vllm-ascend is for {device.name.strip('_')}, and the checkpoint is laid out for "
            f"{ASCEND_A2_A3.chips}"
        )


class Uploads:
    """Brings one model to the device: copies through pinned memory, and what its layers share."""

    def __init__(self) -> None:
        self._transfers, self._experts = Transfers(), ExpertLoader()
        self._forms: ExpertForms | None = None

    def __call__(self, destination: Tensor, stored: Tensor) -> None:
        self._transfers.copy(destination, stored)

    def load_experts(self, linear: Linear) -> NpuExperts:
        """See ExpertLoader.load."""
        return self._experts.load(linear, functools.partial(upload_packed, copy=self))

    def expert_forms(self, model: Qwen3Config) -> ExpertForms:
        """Of a model's mixtures, found out once."""
        if self._forms is None:
            self._forms = probe_experts(model)
        return self._forms

    def finish(self) -> None:
        """Waits until all is there."""
        self._transfers.finish()


@contextmanager
def copying() -> Iterator[Uploads]:
    """Waits for the copies at the end."""
    uploads = Uploads()
    try:
        yield uploads
    finally:
        uploads.finish()
