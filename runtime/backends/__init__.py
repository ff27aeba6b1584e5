"""The devices, by name. Nothing else in the runtime names one."""

from __future__ import annotations

import torch

from qwen3_ascend import native
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.errors import OptionError
from qwen3_ascend.runtime.backends.base import Backend
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.options import DeviceOptions

CACHE_DTYPES = {"auto": None, "int8": torch.int8}

DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def get(config: Qwen3Config, options: DeviceOptions) -> Backend[LayerKV]:
    """The backend of a device.

    Args:
        config: that of the model.
        options: the device, and how it is used.

    Raises:
        OptionError: for float32 or an int8 cache on an NPU, or options that do not fit the model.
        DeviceError: if "npu" is asked for and something is missing; says what and what to run. Or
            if the model has experts.
    """
    device = options.device
    if device == "auto":
        device = "npu" if options.dtype != "float32" and _npu_is_available() else "cpu"
    return _npu(config, options) if device == "npu" else _cpu(config, options)


def reference_backend(
    config: Qwen3Config, dtype: str = "auto", kv_cache_dtype: str = "auto"
) -> Backend[LayerKV]:
    """The definition that the devices are held against; too slow to generate with."""
    from qwen3_ascend.runtime.backends.reference import ReferenceBackend

    return ReferenceBackend(config, DTYPES[dtype], CACHE_DTYPES[kv_cache_dtype])


def _cpu(config: Qwen3Config, options: DeviceOptions) -> Backend[LayerKV]:
    from qwen3_ascend.runtime.backends.cpu.backend import CpuBackend
    from qwen3_ascend.runtime.backends.cpu.by_torch import TorchCpuBackend

    dtype, cache_dtype = DTYPES[options.dtype], CACHE_DTYPES[options.kv_cache_dtype]
    kernels = native.layer_kernels()
    if kernels is None:
        return TorchCpuBackend(config, dtype, cache_dtype)
    return CpuBackend(config, dtype, cache_dtype, kernels)


def _npu(config: Qwen3Config, options: DeviceOptions) -> Backend[LayerKV]:
    from qwen3_ascend.runtime.backends.npu.device import import_torch_npu

    if options.dtype == "float32":
        raise OptionError("dtype: the npu backend computes in bfloat16; use device=cpu for float32")
    if options.kv_cache_dtype == "int8":
        raise OptionError(
            "kv_cache_dtype: the npu backend keeps keys and values in bfloat16: its fused "
            "attention reads an int8 cache not in the layout of prompts (TND), and in FRACTAL_NZ "
            "only for a few numbers of heads; leave it at auto, or use device=cpu"
        )
    import_torch_npu()
    from qwen3_ascend.runtime.backends.npu.backend import NpuBackend

    return NpuBackend(config, options)


def _npu_is_available() -> bool:
    from qwen3_ascend.runtime.backends.npu.device import is_available

    return is_available()
