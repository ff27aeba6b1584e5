"""A stream beside the current one."""

from __future__ import annotations

from typing import Any

import torch_npu


class SideStream:
    """Two streams, of which one is never the current one: torch_npu gives out 32 in turn, so that
    the caller's own, or that of a capture, may come up again, but not twice in succession."""

    def __init__(self) -> None:
        self._streams = torch_npu.npu.Stream(), torch_npu.npu.Stream()

    def beside_current(self) -> Any:
        """The first that is not current."""
        first, second = self._streams
        return second if first == torch_npu.npu.current_stream() else first
