"""Planted lacks: what a torch_npu or CANN does not have, or computes wrongly.

Each is (a context manager that plants it, the field of Capabilities that notices, the number of the
form that is used then, what its reason says).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_npu
from ascend_sim import faults

Plant = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def replaced(name: str, operator: Callable[..., Any]) -> Iterator[None]:
    """A torch_npu with another operator of this name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_npu, name, operator)
        yield


def without(name: str) -> Plant:
    """A torch_npu that lacks an operator."""

    @contextlib.contextmanager
    def plant() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(torch_npu, name)
            yield

    return plant


@contextlib.contextmanager
def without_cache_mode_and_atb() -> Iterator[None]:
    with faults.without_cache_mode(), faults.without_atb():
        yield


def refused_rotary() -> contextlib.AbstractContextManager[None]:
    """More heads than fit into a core's buffer, or a layout that is not taken."""
    return faults.refusing("aclnnApplyRotaryPosEmbV2", "layout is not one")


def wrong_tile() -> contextlib.AbstractContextManager[None]:
    """The second half of each row is quantized with the scale of the first: what a row of tiles
    would be if a kernel did not wait for the maximum of all."""
    right = torch_npu.npu_dequant_swiglu_quant

    def wrong(gate_up: torch.Tensor, **named: Any) -> Any:
        gate, up = gate_up.chunk(2, dim=-1)
        half = gate.shape[-1] // 2
        first, scale = right(torch.cat((gate[:, :half], up[:, :half]), -1).contiguous(), **named)
        second, _ = right(torch.cat((gate[:, half:], up[:, half:]), -1).contiguous(), **named)
        return torch.cat((first, second), -1), scale

    return replaced("npu_dequant_swiglu_quant", wrong)


LACKS: dict[str, tuple[Plant, str, int, str]] = {
    "no cache_mode": (faults.without_cache_mode, "cache_write", 1, "Unknown keyword argument"),
    "no cache_mode, no ATB": (without_cache_mode_and_atb, "cache_write", 2, "OSError"),
    "no scatter": (without("npu_scatter_pa_kv_cache"), "cache_write", 1, "AttributeError"),
    "masked output": (faults.whole_masked_output, "norm_quant", 1, "EZ1001"),
    "no fused norm": (without("npu_add_rms_norm_dynamic_quant"), "norm_quant", 2, "Attribute"),
    "rotary layout": (refused_rotary, "rotate", 1, "layout is not one"),
    "wrong tile": (wrong_tile, "gated_quant", 1, "codes are up to"),
    "no fused gate": (without("npu_dequant_swiglu_quant"), "gated_quant", 1, "AttributeError"),
}
