"""Which method computes with a stored linear on which platform of vLLM.

The tables of the platforms stand in modules of their own, each imported where vLLM runs on it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.layout import ND
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.manifest import LinearEntry
from qwen3_ascend.checkpoint.schemes.base import Scheme
from qwen3_ascend.errors import CheckpointError, DeviceError

EXPERTS, GATE_UP, DOWN = ".mlp.experts", "gate_up_proj", "down_proj"
"""How vLLM names all experts of a layer, and what the manifest calls their two linears."""


class StoredMethod(Protocol):
    """A method of vLLM's that computes with stored bytes."""

    def take(self, layer: torch.nn.Module, linear: Linear, copy: Any) -> None:
        """Fills a layer.

        Args:
            layer: whose weights the method has made.
            linear: its rank's part of a stored linear.
            copy: what the platform's `copying` gives.

        Raises:
            CheckpointError: if the layer has another shape, or was filled before.
        """


def linear_method(entry: LinearEntry, name: str, platform: str) -> StoredMethod:
    """For a linear of a layer; CheckpointError if no operator of the platform takes its scheme."""
    return _made(_platform(platform).LINEARS, entry.scheme, name, platform)


def head_method(entry: LinearEntry, name: str, platform: str) -> StoredMethod | None:
    """For the output projection; None if it is plain, as the engine has its own."""
    if entry.layout == ND:
        return None
    return _made(_platform(platform).HEADS, entry.scheme, name, platform)


def experts_method(model: Qwen3Config, name: str, layer: torch.nn.Module, platform: str) -> Any:
    """For all experts of a layer, whose linears `take_linear` takes one by one."""
    return _platform(platform).EXPERTS(model, name, layer)


def plain_method(platform: str) -> Any:
    """The engine's own method, for a linear that a checkpoint has plain."""
    return _platform(platform).PLAIN()


def copying(platform: str) -> AbstractContextManager[Any]:
    """Within it bytes are copied to the platform's device; at its end they are there."""
    found: AbstractContextManager[Any] = _platform(platform).copying()
    return found


def check_platform(platform: str) -> None:
    """DeviceError unless checkpoints can be served on a platform of vLLM, and on this device."""
    _platform(platform).check_device()


def check_shape(name: str, linear: Linear, shape: tuple[int, ...]) -> None:
    """CheckpointError unless a rank's part has the ([experts,] outputs, inputs) of its layer."""
    if tuple(linear.shape) != shape:
        raise CheckpointError(
            f"linear {name}: this rank's part is {list(linear.shape)}, and its layer has "
            f"{list(shape)}; config.json and the manifest tell of different models"
        )


def fill_bias(layer: Any, linear: Linear, dtype: torch.dtype) -> None:
    """Gives a layer the bias of its rank's part as `stored_bias`, None if the rank adds none.

    It is added whatever the engine passes along: vLLM's Qwen3 has no place for one in o_proj, where
    transformers' has one. The engine's own parameter, if there is one, has the same values.
    """
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias.data.copy_(torch.zeros_like(bias) if linear.bias is None else linear.bias)
    stored = None if linear.bias is None else linear.bias.to(layer.weight.device, dtype)
    layer.register_buffer("stored_bias", stored, persistent=False)


def refuse_weights(*arguments: object) -> None:
    """Stands as the weight loader of parameters that hold packed bytes."""
    raise CheckpointError(
        "weights of a qwen3-ascend checkpoint cannot be replaced in a running engine; convert the "
        "new weights and start the engine with them"
    )


def _made(table: dict[type[Scheme], Any], scheme: Scheme, name: str, platform: str) -> StoredMethod:
    make = table.get(type(scheme))
    if make is None:
        raise CheckpointError(
            f"linear {name}: vLLM has no operator for the scheme {scheme.name} on {platform}; "
            f"convert with another recipe"
        )
    method: StoredMethod = make(name)
    return method


def _platform(name: str) -> Any:
    """The module of a platform, which is imported here since each needs libraries of its own."""
    if name == "npu":
        from qwen3_ascend.vllm import on_ascend

        return on_ascend
    if name == "cpu":
        from qwen3_ascend.vllm import on_cpu

        return on_cpu
    raise DeviceError(
        f"this vLLM runs on {name}, and a checkpoint of qwen3-ascend is served on npu (with "
        f"vllm-ascend) and on cpu; for others write it in a format of theirs: "
        f"qwen3-ascend export OUT DIR --format compressed-tensors"
    )
