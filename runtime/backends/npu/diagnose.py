"""What only this machine can tell: versions, the card, and how it lays out and casts weights."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.linear import Linear, quantize
from qwen3_ascend.checkpoint.schemes import BF16, EXAMPLES, W4A16, Input, Scheme
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import DeviceError
from qwen3_ascend.runtime.backends.npu.device import (
    ATB_LIBRARY,
    import_torch_npu,
    open_device,
    running_cann,
)
from qwen3_ascend.runtime.backends.npu.versions import installed_cann
from qwen3_ascend.runtime.options import DeviceOptions

if TYPE_CHECKING:  # they import torch_npu, which may not be there
    from qwen3_ascend.runtime.backends.npu.backend import NpuBackend
    from qwen3_ascend.runtime.backends.npu.capabilities import Capabilities

COPIED = (8192, 8192)
"""A matrix of 64 MiB, the size of a large weight: to measure copies with."""

COPIES = 4


def environment() -> dict[str, str]:
    """Versions and settings that a report should carry; never raises."""
    facts = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch_npu": _version("torch_npu"),
        "CANN": installed_cann() or "not found (source .../ascend-toolkit/set_env.sh)",
        "ATB": _library(ATB_LIBRARY),
    }
    settings = ("TASK_QUEUE_ENABLE", "ASCEND_RT_VISIBLE_DEVICES", "PYTORCH_NPU_ALLOC_CONF")
    return facts | {name: os.environ.get(name, "not set") for name in settings}


def card() -> dict[str, str]:
    """The card; DeviceError, saying what is missing, if there is none."""
    info = open_device()
    told = running_cann()
    return {
        **({"CANN": told} if told else {}),
        "card": info.name,
        "generation": "A2 or A3" if info.is_a2_or_a3 else f"not supported (SoC {info.soc})",
        "L2 cache": f"{info.l2_bytes >> 20} MiB",
        "memory": f"{info.total_bytes / 2**30:.1f} GiB",
    }


def layout_checks() -> Iterator[tuple[str, bool | None]]:
    """Self-checks S1, and S0 with S2 to S4 of linears: (name, whether it holds; None if it does not
    apply)."""
    from qwen3_ascend.runtime.backends.npu import self_check

    for dtype in (torch.int8, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield (
            f"S1 the device's own NZ cast of {name} has our layout",
            self_check.layouts_agree(dtype),
        )
    for shape in ((1024, 512), (1000, 200)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for scheme in EXAMPLES:
            if ASCEND_A2_A3.refusal(scheme, shape):
                continue
            layout = ASCEND_A2_A3.layout(scheme, "", shape)
            yield from _linear_checks(quantize(scheme, weight, None, layout))


def _linear_checks(linear: Linear) -> Iterator[tuple[str, bool]]:
    """Those of one linear."""
    from qwen3_ascend.runtime.backends.npu import formats, self_check
    from qwen3_ascend.runtime.backends.npu.linears import load_linear

    case = f"{linear.scheme} {list(linear.shape)}"
    try:
        loaded = load_linear(linear, formats.upload_packed)
    except DeviceError:
        yield f"S0 raw load of {case}", False
        return
    yield f"S0 raw load of {case}", True
    yield f"S2 cast back to ND, {case}", self_check.reads_back(linear, loaded)
    yield f"S3 one-hot through the kernel, {case}", self_check.kernel_sees_weight(linear, loaded)
    if linear.scheme.input is Input.FLOAT and not isinstance(linear.scheme, BF16):
        holds = self_check.kernel_decodes_weight(linear, loaded)
        yield f"S4 decoded by the kernel, {_decoded_with(linear.scheme)}, {case}", holds


def _decoded_with(scheme: Scheme) -> str:
    """What S4 sees of a scheme, beside the codes."""
    if not isinstance(scheme, W4A16):
        return "with its scales"
    return "with its offsets" if scheme.zero_points else "negative scales too"


def wait_for_device() -> None:
    """Returns when everything that was issued is done."""
    import_torch_npu().npu.synchronize()


def open_backend(
    config: Qwen3Config, options: DeviceOptions, capabilities: Capabilities | None = None
) -> NpuBackend:
    """The backend of the NPU, for a machine that is known already or as it is found."""
    from qwen3_ascend.runtime.backends.npu.backend import NpuBackend

    return NpuBackend(config, options, capabilities)


def missing(options: DeviceOptions, capabilities: Capabilities) -> str:
    """What a machine lacks to run with some options; empty if nothing."""
    from qwen3_ascend.runtime.backends.npu.decoding import choose_decoding

    chosen = choose_decoding(options, capabilities)
    unusable = chosen.attention == "paged" and not capabilities.paged.usable
    details = [capabilities.paged.detail] if unusable else []
    if options.graph and chosen.lengths is None:
        details.append(chosen.lengths_reason)
    return "; ".join(details)


def without_bound_updates(capabilities: Capabilities) -> Capabilities:
    """The same machine, as if graphs could be updated by `NPUGraph.update` alone."""
    support = dataclasses.replace(
        capabilities.bound_update, usable=False, detail="it was not asked for"
    )
    return dataclasses.replace(capabilities, bound_update=support)


def of_oldest_forms(capabilities: Capabilities) -> Capabilities:
    """The same machine with the last form of each operation."""
    from qwen3_ascend.runtime.backends.npu.capabilities import last_forms

    return last_forms(capabilities)


def copy_speed() -> float:
    """Bytes a second into FRACTAL_NZ, as loading copies them."""
    from qwen3_ascend.runtime.backends.npu.formats import upload_packed
    from qwen3_ascend.runtime.backends.npu.transfers import Transfers

    layout = ASCEND_A2_A3.layouts["w8a8"]
    stored = layout.pack(torch.ones(COPIED, dtype=torch.int8))
    transfers, seconds = Transfers(), []
    for _ in range(COPIES):
        started = time.perf_counter()
        upload_packed(stored, layout, *COPIED, transfers.copy)
        wait_for_device()
        seconds.append(time.perf_counter() - started)
    transfers.finish()
    return stored.nbytes / min(seconds)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _library(name: str) -> str:
    try:
        ctypes.CDLL(name)
    except OSError:
        return "not found"
    return "found"
