"""npu_scatter_nd_update_: what it writes, and what a card refuses (see test_refusals.py)."""

from __future__ import annotations

import pytest
import torch
import torch_npu

from ascend_sim.test_refusals import FP32, Cases, dev, make, refused


def test_rows_are_replaced() -> None:
    target = torch.zeros(6, 2, 4, dtype=torch.bfloat16)
    rows = torch.arange(16).view(2, 2, 4).bfloat16()
    on_device = target.npu()
    indices = torch.tensor([[4], [1]], dtype=torch.int32)
    torch_npu.npu_scatter_nd_update_(on_device, indices.npu(), rows.npu())
    target[[4, 1]] = rows
    assert torch.equal(on_device.cpu(), target)


REFUSED: Cases = {
    "index dtype": ("indices must be one of int32, int64", dict(indices=lambda: dev(2, 1, **FP32))),
    "one dtype": ("one dtype", dict(updates=lambda: dev(2, 2, 4, **FP32))),
    "index dims": ("2 dims or more", dict(indices=lambda: torch.zeros(2).int().npu())),
    "long index": (
        "longer than input has dims",
        dict(indices=lambda: torch.zeros(2, 4).int().npu()),
    ),
    "rows": ("updates must have shape", dict(updates=lambda: dev(2, 4))),
    "range": ("lies outside", dict(indices=lambda: torch.full((2, 1), 6).int().npu())),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    rule, changes = REFUSED[case]
    base = dict(
        input=dev(6, 2, 4), indices=torch.tensor([[0], [1]]).int().npu(), updates=dev(2, 2, 4)
    )
    refused(rule, torch_npu.npu_scatter_nd_update_, base, **make(changes))
