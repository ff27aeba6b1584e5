"""Planted lacks: what a torch_npu or CANN does not have, or computes wrongly.

Each is (a context manager that plants it, the field of Capabilities that notices, the number of the
form that is used then, what its reason says).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import ascend_sim
import pytest
import torch
import torch_npu

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


def without_cache_mode() -> contextlib.AbstractContextManager[None]:
    """Wheels for CANN 8.3 and 8.5, in torch's words."""
    right = torch_npu.npu_scatter_pa_kv_cache

    def refusing(*arguments: Any, **named: Any) -> None:
        if "cache_mode" in named:
            raise RuntimeError("npu::npu_scatter_pa_kv_cache() Unknown keyword argument")
        right(*arguments, **named)

    return replaced("npu_scatter_pa_kv_cache", refusing)


@contextlib.contextmanager
def without_cache_mode_and_atb() -> Iterator[None]:
    with without_cache_mode(), ascend_sim.faults.without_atb():
        yield


def refused_mask() -> contextlib.AbstractContextManager[None]:
    """Wheels for CANN 8.3 give a masked output the shape of the input."""
    right = torch_npu.npu_add_rms_norm_dynamic_quant

    def refusing(*arguments: Any, output_mask: list[bool], **named: Any) -> Any:
        if not all(output_mask):
            raise RuntimeError("EZ1001: Input tensor's shape[[1]] should be same with output's")
        return right(*arguments, output_mask=output_mask, **named)

    return replaced("npu_add_rms_norm_dynamic_quant", refusing)


def refused_rotary() -> contextlib.AbstractContextManager[None]:
    """More heads than fit into a core's buffer, or a layout that is not taken."""

    def refusing(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("EZ9999: layout is not one")

    return replaced("npu_apply_rotary_pos_emb", refusing)


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
    "no cache_mode": (without_cache_mode, "cache_write", 1, "Unknown keyword argument"),
    "no cache_mode, no ATB": (without_cache_mode_and_atb, "cache_write", 2, "OSError"),
    "no scatter": (without("npu_scatter_pa_kv_cache"), "cache_write", 1, "AttributeError"),
    "masked output": (refused_mask, "norm_quant", 1, "EZ1001"),
    "no fused norm": (without("npu_add_rms_norm_dynamic_quant"), "norm_quant", 2, "Attribute"),
    "rotary layout": (refused_rotary, "rotate", 1, "layout is not one"),
    "wrong tile": (wrong_tile, "gated_quant", 1, "codes are up to"),
    "no fused gate": (without("npu_dequant_swiglu_quant"), "gated_quant", 1, "AttributeError"),
}
