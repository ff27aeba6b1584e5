"""The device itself: properties, memory, copies, formats, streams, strictness."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
import torch_npu

import ascend_sim
from ascend_sim import nz, raw, trace

pytestmark = pytest.mark.every_mode

LAZY = os.environ.get("ASCEND_SIM_STREAMS") == "lazy"
NZ = nz.FORMAT


@pytest.fixture
def internal_formats() -> None:
    torch_npu.npu.config.allow_internal_format = True


def runtime_library() -> ctypes.CDLL:
    """What a loader without pyACL does: the library is already mapped, under its own name."""
    library = ctypes.CDLL("libascendcl.so")
    library.aclrtMemcpy.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
    )
    return library


def raw_alias(tensor: torch.Tensor) -> torch.Tensor:
    """Recipe R2: the bytes of a tensor's storage as an ND uint8 tensor on the device."""
    storage = tensor.untyped_storage()
    pointer, count = storage.data_ptr(), storage.nbytes()
    alias = torch_npu._C._construct_storage_from_data_pointer(pointer, tensor.device, count)
    metadata = {
        "dtype": torch.uint8,
        "size": [count],
        "stride": [1],
        "storage_offset": 0,
        "data_ptr": pointer,
        "device": tensor.device,
        "nbytes": count,
    }
    return torch_npu._C._construct_NPU_Tensor_From_Storage_And_Metadata(metadata, alias)


def test_properties() -> None:
    assert torch.npu.is_available() and torch.npu.device_count() == 1
    properties = torch.npu.get_device_properties(0)
    assert properties.name == "Ascend910B3"
    assert properties.total_memory == 64 << 30
    assert properties.L2_cache_size == 192 << 20


def test_copies_are_logged_with_their_bytes() -> None:
    host = torch.randn(5, 7)
    device = host.npu()
    assert torch.equal(device.t().contiguous().cpu(), host.t())
    uploads = trace.copies("host_to_device")
    assert [copy.bytes for copy in uploads] == [5 * 7 * 4]
    assert uploads[0].source == host.data_ptr() and uploads[0].destination == device.data_ptr()
    assert [copy.bytes for copy in trace.copies("device_to_host")] == [5 * 7 * 4]


def test_memory_is_accounted() -> None:
    torch.npu.empty_cache()
    ascend_sim.reset_peak()
    before = ascend_sim.memory_statistics()
    big = torch.empty(100 << 20, dtype=torch.uint8, device="npu")
    held = ascend_sim.memory_statistics()
    del big
    torch.npu.empty_cache()
    after = ascend_sim.memory_statistics()
    assert 100 << 20 <= held.current - before.current <= 102 << 20  # whole 2 MiB pages
    assert after.current == before.current and after.peak == held.current


def test_out_of_memory_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(65 << 30, dtype=torch.uint8, device="npu")


def test_fresh_memory_is_poisoned() -> None:
    torch.npu.empty_cache()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        torch.npu.empty_cache()
        fresh = torch.empty(15 << 20, dtype=dtype, device="npu").cpu()
        assert fresh.isnan().all()


@pytest.mark.parametrize("shape", [(64, 128), (15, 33), (2, 32, 64)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.usefixtures("internal_formats")
def test_nz_follows_the_index_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = torch.randint(-9, 9, shape).to(dtype)
    cast = torch_npu.npu_format_cast(matrix.npu(), NZ)
    torch.npu.synchronize()
    assert int(torch_npu.get_npu_format(cast)) == NZ
    width = 32 // dtype.itemsize
    blocks = raw.storage_bytes(cast).view(dtype)
    rows, columns = shape[-2:]
    padded_rows, strips = -(-rows // 16) * 16, -(-columns // width)
    expected = torch.zeros(blocks.numel(), dtype=dtype)
    for flat, value in enumerate(matrix.flatten().tolist()):
        batch, place = divmod(flat, rows * columns)
        i, j = divmod(place, columns)
        offset = (j // width) * padded_rows * width + i * width + j % width
        expected[batch * strips * padded_rows * width + offset] = value
    assert torch.equal(blocks, expected)
    assert torch.equal(torch_npu.npu_format_cast(cast, 2).cpu(), matrix)
    assert len(trace.format_casts()) >= 2


def test_format_cast_is_silently_nd_by_default() -> None:
    cast = torch_npu.npu_format_cast(torch.randn(64, 64).half().npu(), NZ)
    assert int(torch_npu.get_npu_format(cast)) == 2


@pytest.mark.usefixtures("internal_formats")
def test_raw_load_makes_one_copy_and_no_cast() -> None:
    matrix = torch.randint(-128, 128, (64, 96), dtype=torch.int8)
    stored = nz.pack(matrix, 32)
    weight = torch_npu.empty_with_format(
        matrix.shape, dtype=torch.int8, device="npu", acl_format=NZ
    )
    assert weight.untyped_storage().nbytes() == stored.numel() and weight.storage_offset() == 0
    torch.npu.synchronize()
    ascend_sim.reset_trace()
    pointer = weight.untyped_storage().data_ptr()
    error = runtime_library().aclrtMemcpy(
        pointer, stored.numel(), stored.data_ptr(), stored.numel(), 1
    )
    assert error == 0
    assert [copy.bytes for copy in trace.copies("host_to_device")] == [stored.numel()]
    assert trace.format_casts() == [] and trace.launches() == []
    assert torch.equal(torch_npu.npu_format_cast(weight, 2).cpu(), matrix)


@pytest.mark.usefixtures("internal_formats")
def test_raw_load_through_an_alias() -> None:
    matrix = torch.randn(32, 48).bfloat16()
    stored = nz.pack(matrix, 16)
    weight = torch_npu.empty_with_format(
        matrix.shape, dtype=torch.bfloat16, device="npu", acl_format=NZ
    )
    ascend_sim.reset_trace()
    raw_alias(weight).copy_(stored.view(torch.uint8).flatten())
    assert trace.format_casts() == []
    assert sum(copy.bytes for copy in trace.copies("host_to_device")) == stored.nbytes
    assert torch.equal(raw_alias(weight).cpu(), stored.view(torch.uint8).flatten())
    assert torch.equal(torch_npu.npu_format_cast(weight, 2).cpu(), matrix)


def test_a_copy_past_a_block_is_refused() -> None:
    host = torch.zeros(1 << 22, dtype=torch.uint8)
    block = torch.empty(16, dtype=torch.uint8, device="npu")
    pointer = block.untyped_storage().data_ptr()
    assert runtime_library().aclrtMemcpy(pointer, 1 << 30, host.data_ptr(), 1 << 30, 1) != 0


def test_missing_wait_shows_in_lazy_mode() -> None:
    side = torch.npu.Stream()
    counter = torch.zeros(4).npu()
    torch.npu.synchronize()
    counter.add_(5)
    with torch.npu.stream(side):
        copy = counter + 0
        side.synchronize()
        assert copy.cpu()[0] == (0 if LAZY else 5)
    side.wait_stream(torch.npu.current_stream())
    counter.add_(1)
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        assert (counter + 0).cpu()[0] == 6


def test_events_and_non_blocking_copies() -> None:
    host = torch.zeros(4).pin_memory()
    device = torch.ones(4).npu()
    host.copy_(device + 1, non_blocking=True)
    event = torch.npu.Event()
    event.record()
    event.synchronize()
    assert host.tolist() == [2.0] * 4
    assert trace.copies("device_to_host")[-1].asynchronous


def test_strict_mode_names_the_operator() -> None:
    with pytest.raises(RuntimeError, match="aclnnErfinv has no stand-in"):
        torch.erfinv(torch.tensor([0.5]).npu())


def test_strict_mode_refuses_the_wheels_own_fallback() -> None:
    x = torch.ones(3).npu()
    with pytest.raises(RuntimeError, match="torch_npu has no kernel for aten.igamma.out"):
        torch.igamma(x, x)
    ascend_sim.set_strict(False)
    assert torch.allclose(torch.igamma(x, x).cpu(), torch.igamma(torch.ones(3), torch.ones(3)))
    assert [entry.name for entry in trace.fallbacks()] == ["aten.igamma.out"]


def test_fallbacks_are_recorded() -> None:
    ascend_sim.set_strict(False)
    values = torch.tensor([0.5, -0.25])
    assert torch.allclose(torch.erfinv(values.npu()).cpu(), torch.erfinv(values))
    assert [entry.name for entry in trace.fallbacks()] == ["aten.erfinv.default"]
    assert trace.launches()[0].door == "fallback"


def test_prefetch_is_visible() -> None:
    weight = torch.zeros(1 << 20, dtype=torch.int8).npu()
    torch_npu.npu_prefetch(weight, None, 1 << 30)
    torch_npu.npu_prefetch(weight, None, 4096, offset=64)
    torch.npu.synchronize()
    first, second = trace.prefetches()
    assert (first.bytes, first.source) == (1 << 20, weight.data_ptr())
    assert (second.bytes, second.source) == (4096, weight.data_ptr() + 64)
    assert not first.captured
    with pytest.raises(RuntimeError, match="max_size should be greater than zero"):
        torch_npu.npu_prefetch(weight, None, 0)
    with pytest.raises(RuntimeError, match="offset out of range"):
        torch_npu.npu_prefetch(weight, None, 1, offset=1 << 20)
