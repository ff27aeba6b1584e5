"""npu_top_k_top_p: what stays, and what a card refuses (see test_refusals.py)."""

from __future__ import annotations

import pytest
import torch
import torch_npu

from ascend_sim.test_refusals import FP32, INT64, Cases, dev, make, refused

ROWS = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.1, 0.7, 0.1]]).log()


def kept(k: list[int] | None, p: list[float] | None) -> list[list[int]]:
    """The places that stay, which keep their values."""
    result = torch_npu.npu_top_k_top_p(
        ROWS.npu(),
        p=None if p is None else torch.tensor(p).npu(),
        k=None if k is None else torch.tensor(k, dtype=torch.int32).npu(),
    ).cpu()
    stays = result != -torch.inf
    assert torch.equal(result[stays], ROWS[stays])
    return [row.nonzero()[:, 0].tolist() for row in stays]


@pytest.mark.parametrize(
    ("k", "p", "expected"),
    [
        ([2, 1], None, [[0, 2], [2]]),
        ([1, 2], None, [[0], [0, 1, 2, 3]]),  # all that equal the second stay
        (None, [0.5, 0.6], [[0, 2], [2]]),
        (None, [0.0, 1.0], [[0], [0, 1, 2, 3]]),  # one stays in any case
        ([3, 4], [0.6, 0.75], [[0, 2], [2, 3]]),  # of equal ones the last stays
        ([2, 4], [0.5, 1.0], [[0], [0, 1, 2, 3]]),  # what k leaves is 0.57 and 0.43
    ],
)
def test_what_stays(k: list[int] | None, p: list[float] | None, expected: list[list[int]]) -> None:
    assert kept(k, p) == expected


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).npu()


REFUSED: Cases = {
    "dims": ("must be .rows, vocabulary", dict(logits=lambda: dev(2, 4, 4000, **FP32))),
    "p dtype": ("p must have the dtype of logits", dict(p=lambda: dev(2))),
    "p rows": ("p must have shape", dict(p=lambda: dev(3, **FP32))),
    "p range": ("p must be in .0, 1", dict(p=lambda: torch.tensor([0.5, 1.5]).npu())),
    "k dtype": ("k must be one of int32", dict(k=lambda: dev(2, **INT64))),
    "k of none": ("k must be in .1, 1024", dict(k=lambda: numbers(0, 1))),
    "k above the limit": ("k must be in .1, 1024", dict(k=lambda: numbers(1, 1025))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    rule, changes = REFUSED[case]
    base = dict(logits=dev(2, 4000, **FP32), p=dev(2, **FP32), k=numbers(1024, 4000))
    refused(rule, torch_npu.npu_top_k_top_p, base, **make(changes))
