"""The devices, by name. Nothing else in the runtime names one."""

from __future__ import annotations

import torch

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.errors import RequestError
from qwen3_ascend.runtime.backends.base import Backend
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.options import DeviceOptions

DEVICES = ("auto", "cpu", "npu")
DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def get(device: str, dtype: str, config: Qwen3Config, options: DeviceOptions) -> Backend[LayerKV]:
    """The backend of a device.

    Args:
        device: "npu", "cpu", or "auto": an NPU if there is one, else the CPU.
        dtype: "auto" (bfloat16), "bfloat16" or "float32" (CPU only).
        config: of the model.
        options: see DeviceOptions.

    Raises:
        RequestError: for an unknown name or option, or float32 on an NPU.
        DeviceError: if "npu" is asked for and something is missing; says what and what to run.
    """
    if device not in DEVICES:
        raise RequestError(f"unknown device {device!r}; known devices: {', '.join(DEVICES)}")
    if dtype not in DTYPES:
        raise RequestError(f"unknown dtype {dtype!r}; known dtypes: {', '.join(DTYPES)}")
    if device == "auto":
        device = "npu" if _npu_is_available() and dtype != "float32" else "cpu"
    return _npu(dtype, config, options) if device == "npu" else _cpu(dtype, config)


def reference_backend(config: Qwen3Config, dtype: str = "auto") -> Backend[LayerKV]:
    """The definition that the devices are held against; too slow to generate with."""
    from qwen3_ascend.runtime.backends.reference import ReferenceBackend

    return ReferenceBackend(config, DTYPES[dtype])


def _cpu(dtype: str, config: Qwen3Config) -> Backend[LayerKV]:
    from qwen3_ascend.runtime.backends.cpu.backend import CpuBackend

    return CpuBackend(config, DTYPES[dtype])


def _npu(dtype: str, config: Qwen3Config, options: DeviceOptions) -> Backend[LayerKV]:
    from qwen3_ascend.runtime.backends.npu.device import import_torch_npu

    if dtype == "float32":
        raise RequestError("the npu backend computes in bfloat16; use device=cpu for float32")
    import_torch_npu()
    from qwen3_ascend.runtime.backends.npu.backend import NpuBackend

    return NpuBackend(config, options)


def _npu_is_available() -> bool:
    from qwen3_ascend.runtime.backends.npu.device import is_available

    return is_available()
