"""Finding the device: what must be installed, which switches must be set, and what is missing."""

from __future__ import annotations

import atexit
import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from qwen3_ascend.errors import DeviceError
from qwen3_ascend.runtime.backends.npu.versions import advice, base_version, installed_cann

# SoC generations by torch_npu's own enumeration (csrc/core/npu/NpuVariables.h).
A2_SOCS = range(220, 226)
A3_SOCS = range(250, 257)

ATB_LIBRARY = "libatb.so"

CALL_FAILED = "NPU function error: "
CANN_NUMBER = r"\bE[A-Z\d]\d{4}\b"
"""Parts of torch_npu's exceptions; see in_one_line."""

LINE = 300
"""Characters of an exception that we quote."""


@dataclass(frozen=True)
class DeviceInfo:
    """The card as torch_npu describes it.

    Attributes:
        name: such as "Ascend910B3".
        soc: torch_npu's number of the generation.
        l2_bytes: size of the L2 cache; 0 if the driver does not say.
        total_bytes: device memory.
    """

    name: str
    soc: int
    l2_bytes: int
    total_bytes: int

    @property
    def is_a2_or_a3(self) -> bool:
        """Whether the checkpoint's layouts are the ones this chip's kernels read."""
        return self.soc in A2_SOCS or self.soc in A3_SOCS


def is_available() -> bool:
    """Whether torch_npu is installed and sees a card; warns if it is installed but unusable."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        return bool(import_torch_npu().npu.device_count() > 0)
    except DeviceError as error:
        warnings.warn(f"using the CPU, because {error}", stacklevel=2)
        return False


def import_torch_npu() -> Any:
    """Imports torch_npu.

    Raises:
        DeviceError: if it is missing, belongs to another torch, or cannot load CANN; says which
            wheel fits.
    """
    try:
        npu_version = importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        raise DeviceError(
            f"torch_npu is not installed; {advice(torch.__version__, installed_cann())}"
        ) from None
    if base_version(npu_version) != base_version(torch.__version__):
        raise DeviceError(
            f"torch_npu {npu_version} does not fit torch {torch.__version__}; "
            f"{advice(torch.__version__, installed_cann())}"
        )
    try:
        import torch_npu
    except (ImportError, OSError, RuntimeError) as error:
        raise DeviceError(
            f"torch_npu does not load ({in_one_line(error)}): CANN is missing or not set up; "
            f"install the CANN toolkit and kernels and run: source .../ascend-toolkit/set_env.sh"
        ) from error
    return torch_npu


def open_device(index: int = 0) -> DeviceInfo:
    """Claims a card and sets the switches that everything else relies on.

    allow_internal_format: off by default on A2/A3, and then a cast to FRACTAL_NZ silently stays
    ND. jit_compile off: the aclnn kernels are used, nothing is compiled at run time.

    Raises:
        DeviceError: if there is no card, or the driver does not answer.
    """
    npu = import_torch_npu().npu
    try:
        count = npu.device_count()
        if not count:
            raise DeviceError(
                "no NPU is visible; check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES"
            )
        npu.set_device(index)
        npu.config.allow_internal_format = True
        npu.set_compile_mode(jit_compile=False)
        return _describe(npu, index)
    except RuntimeError as error:
        raise DeviceError(
            f"the NPU driver does not answer ({in_one_line(error)}); check `npu-smi info`"
        ) from error


def require_capture() -> None:
    """Refuses settings with which torch_npu captures no graph. Without graphs they are welcome:
    ASCEND_LAUNCH_BLOCKING=1 is the first thing to try when a kernel fails.

    Raises:
        DeviceError: naming the setting.
    """
    refused = {"TASK_QUEUE_ENABLE": "2", "ASCEND_LAUNCH_BLOCKING": "1"}
    for name, value in refused.items():
        if os.environ.get(name) == value:
            raise DeviceError(
                f"graphs cannot be captured with {name}={value}; unset it, or use graph=off"
            )


def require_atb() -> None:
    """Loads the Ascend Transformer Boost library, which paged attention lives in.

    Raises:
        DeviceError: if it is not there.
    """
    import ctypes

    try:
        ctypes.CDLL(ATB_LIBRARY)
    except OSError as error:
        raise DeviceError(
            f"{ATB_LIBRARY} is missing ({in_one_line(error)}): attention=paged needs NNAL/ATB; "
            f"install Ascend-cann-nnal and run: source .../nnal/atb/set_env.sh, "
            f"or use attention=fused"
        ) from error


def running_cann() -> str | None:
    """The version of CANN by what torch_npu goes by, else by its files; None if neither tells."""
    try:
        told = str(import_torch_npu().npu.utils.get_cann_version())
    except Exception:  # wheels differ in where it is and what it raises; files tell as well
        told = ""
    return told or installed_cann()


def free_bytes() -> int:
    """Device memory that is not allocated."""
    free: int = import_torch_npu().npu.mem_get_info()[0]
    return free


def leave_without_waiting() -> None:
    """Ends the interpreter, when its time comes, with 1 and without torch_npu's own exit, which
    waits for the device: for a device that will never be done."""
    atexit.register(_leave)  # what is registered last runs first


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _describe(npu: Any, index: int) -> DeviceInfo:
    properties = npu.get_device_properties(index)
    return DeviceInfo(
        name=properties.name,
        soc=int(npu.get_soc_version()),
        l2_bytes=int(getattr(properties, "L2_cache_size", 0)),
        total_bytes=int(properties.total_memory),
    )


def in_one_line(error: BaseException) -> str:
    """What an exception says, as far as it fits into a line of ours.

    torch_npu's exceptions begin with a path and end with what CANN said, mostly behind a number
    such as EZ1001; in between they repeat themselves.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    first = lines[0].split(CALL_FAILED)[-1]
    if len(lines) == 1 or first == lines[0]:
        return first[:LINE]
    cause = next((line for line in lines[1:] if re.search(CANN_NUMBER, line)), lines[-1])
    return f"{first}: {cause}"[:LINE]
