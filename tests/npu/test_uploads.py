"""Inputs of a step reach the device by one copy, and no step overwrites another."""

from __future__ import annotations

import dataclasses

import ascend_sim
import pytest
import torch
import torch_npu
from torch import Tensor

from qwen3_ascend.runtime.backends.npu.uploads import ALIGNMENT, LEAST_BYTES, StepUploads
from qwen3_ascend.runtime.backends.step import StepInputs

pytestmark = pytest.mark.every_mode

NAMES = ("tokens", "positions", "slots", "block_table", "logit_rows")


def step(rows: int, requests: int, seed: int = 0, wanted: int | None = None) -> StepInputs:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(0, 1 << 30, shape, generator=random).to(dtype)

    return StepInputs(
        draw(rows), draw(rows), draw(rows), draw(requests, 3), (1,) * requests, (0, rows),
        None if wanted is None else draw(wanted, dtype=torch.int64),
    )  # fmt: skip


def same(found: StepInputs, expected: StepInputs) -> bool:
    pairs = [(getattr(found, name), getattr(expected, name)) for name in NAMES]
    return all(
        (left is None) == (right is None)
        and (left is None or (left.dtype == right.dtype and torch.equal(left.cpu(), right)))
        for left, right in pairs
    )


@pytest.mark.parametrize(("rows", "requests", "wanted"), [(1, 1, None), (7, 3, 2), (5000, 9, 1)])
def test_one_asynchronous_copy(rows: int, requests: int, wanted: int | None) -> None:
    bring, given = StepUploads(), step(rows, requests, wanted=wanted)
    found = bring(given)
    torch_npu.npu.synchronize()
    copies = ascend_sim.trace.copies("host_to_device")
    nbytes = sum(getattr(given, name).nbytes for name in NAMES if getattr(given, name) is not None)
    assert len(copies) == 1 and copies[0].asynchronous
    assert nbytes <= copies[0].bytes < nbytes + ALIGNMENT * len(NAMES)
    assert ascend_sim.trace.launches() == [] and same(found, given)
    assert found.context_lens == given.context_lens and found.query_starts == given.query_starts


def test_steps_in_flight_do_not_overwrite_each_other() -> None:
    """Nothing is waited for in between, and the host's tensors change at once. Lazy streams copy
    when somebody waits: a buffer that was filled too early would show."""
    bring = StepUploads()
    given = [step(rows, 2, seed, wanted=1) for seed, rows in enumerate((9, 3, 4000, 17, 1, 20000))]
    kept = [dataclasses.replace(each, tokens=each.tokens.clone()) for each in given]
    found = []
    for each in given:
        found.append(bring(each))
        each.tokens.zero_()
    assert all(same(one, other) for one, other in zip(found, kept, strict=True))


def test_buffers_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    pin = Tensor.pin_memory

    def counting(tensor: Tensor) -> Tensor:
        pinned.append(tensor.nbytes)
        return pin(tensor)

    monkeypatch.setattr(Tensor, "pin_memory", counting)
    bring = StepUploads()
    for seed in range(8):
        bring(step(100, 2, seed))
    assert pinned == [LEAST_BYTES] * 2
    bring(step(LEAST_BYTES, 2))
    assert len(pinned) == 3 and pinned[-1] > LEAST_BYTES


def test_a_step_on_the_device_is_left_there() -> None:
    """As in a capture, which reads static buffers."""
    bring = StepUploads()
    there = bring(step(4, 2))
    ascend_sim.reset_trace()
    assert bring(there) is there
    assert ascend_sim.trace.copies("host_to_device") == []
