"""Refusals, in the words a reader can act on: the operator, then the rule it breaks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .tensors import Layout


class Refused(RuntimeError):
    """What the documentation of an operator says the device does not accept."""


def require(condition: object, operator: str, rule: str) -> None:
    if not condition:
        raise Refused(f"{operator}: {rule}")


def require_dtype(operator: str, name: str, layout: Layout, allowed: Iterable[torch.dtype]) -> None:
    if layout.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        got = str(layout.dtype).removeprefix("torch.")
        raise Refused(f"{operator}: {name} must be one of {names}, not {got}")


def require_shape(operator: str, name: str, layout: Layout, shape: tuple[int, ...]) -> None:
    require(layout.size == shape, operator, f"{name} must have shape {shape}, not {layout.size}")


def require_contiguous(operator: str, **layouts: Layout | None) -> None:
    for name, layout in layouts.items():
        require(layout is None or layout.contiguous, operator, f"{name} must be contiguous")


def require_nd(operator: str, **layouts: Layout | None) -> None:
    for name, layout in layouts.items():
        require(layout is None or not layout.nz, operator, f"{name} must be in format ND, not NZ")


def soc() -> str:
    return os.environ.get("ASCEND_SIM_SOC") or "Ascend910B3"


def is_a2_or_a3() -> bool:
    return soc().startswith(("Ascend910B", "Ascend910_93"))


def is_310p() -> bool:
    return soc().startswith("Ascend310P")


def require_a2_or_a3(operator: str) -> None:
    require(
        is_a2_or_a3(), operator, f"is documented for Atlas A2 and A3 only, this device is {soc()}"
    )
