"""Results of the device to the host, while it goes on with what it was given next."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from qwen3_ascend.runtime.backends.base import Download


def download(tensor: Tensor) -> Download:
    """Begins to copy a tensor to pinned memory; whoever calls the result waits for this copy
    alone, and not for what was queued after it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()
    host.copy_(tensor, non_blocking=True)
    copied = torch_npu.npu.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait
