"""The CPU backend where the kernels were not compiled: torch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.runtime.backends.base import DeviceLinear
from qwen3_ascend.runtime.backends.cpu.linears import TORCH_LINEARS
from qwen3_ascend.runtime.backends.reference import ReferenceBackend, make_linear


class TorchCpuBackend(ReferenceBackend):
    """Computes what the reference defines, with torch's own products of floats and attention."""

    name = "cpu"

    @override
    def linear(self, linear: Linear) -> DeviceLinear:
        return make_linear(TORCH_LINEARS, linear, self)

    @override
    def gather(self, blocks: Tensor, table: list[int], length: int) -> Tensor:
        used = table[: -(-length // blocks.shape[1])]
        first, last = used[0], used[-1]
        if used == list(range(first, last + 1)):  # neighbours need no copy
            return blocks[first : last + 1].flatten(0, 1)[:length]
        return blocks[used].flatten(0, 1)[:length]

    @override
    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        new, length = query.shape[0], keys.shape[0]
        mask = None
        if 1 < new < length:
            mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        output = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=new == length and new > 1,
            enable_gqa=True,
        )
        return output[0].transpose(0, 1)
