"""What a user may choose about a device. Options a device has no use for have no effect there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceOptions:
    """Options of the NPU backend.

    Attributes:
        attention: "auto", "fused" or "paged".
        graph: whether decode steps are captured once and replayed.
        buckets: batch sizes to capture; None for 1, 2, 4, 8 and every 8th up to max_batch.
        prefetch: MLP weights to fetch ahead into L2: "off", "auto", or bytes (50000000, "64M").
    """

    attention: str = "auto"
    graph: bool = True
    buckets: tuple[int, ...] | None = None
    prefetch: str | int = "auto"
