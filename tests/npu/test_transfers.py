"""Bytes through pinned buffers: all of them, once, in stream order, whatever their number."""

from __future__ import annotations

import ascend_sim
import pytest
import torch
import torch_npu

from qwen3_ascend.errors import DeviceError
from qwen3_ascend.runtime.backends.npu import transfers
from qwen3_ascend.runtime.backends.npu.device import open_device
from qwen3_ascend.runtime.backends.npu.formats import raw_bytes

pytestmark = pytest.mark.every_mode


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    open_device()
    monkeypatch.setattr(transfers, "BUFFER_BYTES", 1000)


def random_bytes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2000, 4000, 10_007])
def test_every_byte_arrives_once(count: int) -> None:
    mover = transfers.Transfers()
    sources = [random_bytes(count, seed) for seed in range(5)]
    targets = [torch.empty(count, dtype=torch.uint8, device="npu") for _ in sources]
    ascend_sim.reset_trace()
    for target, source in zip(targets, sources, strict=True):
        mover.copy(target, source)
    sent = ascend_sim.trace.copies("host_to_device")
    assert sum(copy.bytes for copy in sent) == 5 * count
    mover.finish()
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target.cpu(), source)
        assert torch.equal(raw_bytes(target)[:count], source)


def test_the_source_may_change_at_once() -> None:
    """Pages of a mapped file may be given back as soon as a copy returns."""
    mover, source = transfers.Transfers(), random_bytes(10_007, 1)
    expected = source.clone()
    target = torch.empty(10_007, dtype=torch.uint8, device="npu")
    mover.copy(target, source)
    source.zero_()
    mover.finish()
    assert torch.equal(target.cpu(), expected)


def test_a_kernel_that_is_queued_afterwards_sees_the_bytes() -> None:
    mover, source = transfers.Transfers(), torch.randn(64, 64)
    target = torch.empty(64, 64, device="npu")
    mover.copy(target, source)
    assert torch.equal((target * 2).cpu(), source * 2)
    mover.finish()


def test_what_is_queued_before_is_not_overtaken() -> None:
    mover, target = transfers.Transfers(), torch.zeros(500, device="npu")
    before = target + 1
    mover.copy(target, torch.full((500,), 7.0))
    assert torch.equal(before.cpu(), torch.ones(500))
    mover.finish()


def test_a_refused_copy_is_an_error_and_the_next_one_works() -> None:
    mover, source = transfers.Transfers(), random_bytes(3000, 2)
    target = torch.empty(3000, dtype=torch.uint8, device="npu")
    with (
        ascend_sim.faults.failing_copies(),
        pytest.raises(DeviceError, match="aclrtMemcpyAsync of 1000 bytes failed"),
    ):
        mover.copy(target, source)
    mover.copy(target, source)
    mover.finish()
    torch_npu.npu.synchronize()
    assert torch.equal(target.cpu(), source)
