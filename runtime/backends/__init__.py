"""The devices, by name. Nothing else in the runtime names one."""

from __future__ import annotations

import torch

from qwen3_ascend.checkpoint.errors import RequestError
from qwen3_ascend.runtime.backends.base import Backend

DEVICES = ("auto", "cpu")
DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def get(device: str, dtype: str) -> Backend:
    """The backend of a device.

    Args:
        device: "cpu", or "auto" for the best there is.
        dtype: "auto" (bfloat16), "bfloat16" or "float32".

    Raises:
        RequestError: for an unknown name.
    """
    if device not in DEVICES:
        raise RequestError(f"unknown device {device!r}; known devices: {', '.join(DEVICES)}")
    if dtype not in DTYPES:
        raise RequestError(f"unknown dtype {dtype!r}; known dtypes: {', '.join(DTYPES)}")
    from qwen3_ascend.runtime.backends.cpu import CpuBackend

    return CpuBackend(DTYPES[dtype])
