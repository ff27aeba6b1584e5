"""Planted faults.  Those that change the machine need a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch_npu

import ascend_sim
from ascend_sim import faults, nz, raw
from ascend_sim.conftest import HERE


def run_with(settings: dict[str, str], code: str) -> str:
    start = f"import sys; sys.path.insert(0, {str(HERE.parent)!r})\n"
    start += "import ascend_sim; ascend_sim.install()\nimport torch, torch_npu\n"
    result = subprocess.run(
        [sys.executable, "-c", start + code],
        env={**os.environ, **settings},
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_no_device() -> None:
    code = "print(torch.npu.device_count(), torch.npu.is_available())"
    out = run_with({"ASCEND_SIM_DEVICES": "0"}, code)
    assert out.split()[-2:] == ["0", "False"]


@pytest.mark.opposite_modes
def test_no_atb_raises_what_the_wheel_raises() -> None:
    code = """
try:
    torch_npu._npu_reshape_and_cache(*[torch.zeros(1).npu()] * 5)
except OSError as error:
    print("OSError", error.args)
print(torch_npu.npu_rms_norm(torch.ones(2, 8).npu(), torch.ones(8).npu())[0].cpu().sum().item())
"""
    out = run_with({"ASCEND_SIM_FAULTS": "no_atb"}, code)
    assert "OSError (None, '')" in out
    assert float(out.split()[-1]) == pytest.approx(16, rel=1e-3)  # the rest of the device works


@pytest.mark.opposite_modes
def test_no_atb_in_process() -> None:
    arguments = [torch.zeros(1).npu()] * 5
    with faults.without_atb(), pytest.raises(OSError) as caught:
        torch_npu._npu_reshape_and_cache(*arguments)
    assert caught.value.args == (None, "")


@pytest.mark.parametrize("soc", ["Ascend910_9392", "Ascend310P3", "Ascend950PR_9599"])
def test_other_chips(soc: str) -> None:
    code = """
print(torch.npu.get_device_name(0))
try:
    torch_npu.npu_dynamic_quant(torch.ones(2, 32).half().npu())
    torch.npu.synchronize()
    print("ran")
except RuntimeError as error:
    print("A2 and A3 only" if "A2 and A3 only" in str(error) else error)
"""
    out = run_with({"ASCEND_SIM_SOC": soc}, code)
    assert soc in out and ("ran" if "910" in soc else "A2 and A3 only") in out


def test_memory_and_cache_sizes() -> None:
    code = "p = torch.npu.get_device_properties(0)\n"
    code += "print(p.total_memory >> 30, p.L2_cache_size >> 20)"
    out = run_with({"ASCEND_SIM_HBM_GB": "32", "ASCEND_SIM_L2_MB": "96"}, code)
    assert out.split()[-2:] == ["32", "96"]


@pytest.mark.opposite_modes
def test_failing_copy() -> None:
    import ctypes

    library = ctypes.CDLL("libascendcl.so")
    device, host = torch.zeros(4).npu(), torch.ones(4)
    pointers = ctypes.c_void_p(device.data_ptr()), ctypes.c_void_p(host.data_ptr())
    size = ctypes.c_size_t(16)
    with faults.failing_copies(1):
        assert library.aclrtMemcpy(pointers[0], size, pointers[1], size, 1) != 0
        assert library.aclrtMemcpy(pointers[0], size, pointers[1], size, 1) == 0
    with faults.failing_copies(1), pytest.raises(RuntimeError, match="planted fault"):
        torch.ones(4).npu()


@pytest.mark.opposite_modes
def test_a_device_that_hands_out_nd() -> None:
    torch_npu.npu.config.allow_internal_format = True
    with faults.nd_instead_of_nz():
        empty = torch_npu.empty_with_format((32, 32), dtype=torch.int8, device="npu", acl_format=29)
        cast = torch_npu.npu_format_cast(torch.zeros(32, 32).half().npu(), 29)
    assert int(torch_npu.get_npu_format(empty)) == 2 and int(torch_npu.get_npu_format(cast)) == 2
    right = torch_npu.empty_with_format((32, 32), dtype=torch.int8, device="npu", acl_format=29)
    assert int(torch_npu.get_npu_format(right)) == nz.FORMAT


@pytest.mark.opposite_modes
def test_a_device_with_other_tiles() -> None:
    torch_npu.npu.config.allow_internal_format = True
    matrix = torch.randn(32, 48).half()
    with faults.transposed_nz_tiles():
        cast = torch_npu.npu_format_cast(matrix.npu(), 29)
        assert torch.equal(torch_npu.npu_format_cast(cast, 2).cpu(), matrix)
        found = raw.storage_bytes(cast).clone()
    assert not torch.equal(found, nz.pack(matrix, 16).view(torch.uint8).flatten())


def test_every_operator_is_listed() -> None:
    listed = ascend_sim.operators()
    for name in ("aclnnQuantMatmulWeightNz", "TransData", "_npu_paged_attention"):
        assert name in listed
