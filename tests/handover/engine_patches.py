"""What vLLM 0.23.0 and vllm-ascend 0.23.0 lack where there is neither a CANN nor Triton.

These are properties of the engine and of how it was installed, not of the device, so the simulator
does not have them. vLLM calls `apply` in each of its processes: site/ has the entry point.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch


def apply() -> None:
    """Every patch; called again it changes nothing."""
    import vllm_ascend.utils
    import vllm_ascend.worker.block_table as block_table

    # Probes for vllm_ascend_C, which is linked to a CANN, and remembers that it is not there. The
    # engine would do that by itself, but in graph mode inside torch.compile, which cannot import.
    vllm_ascend.utils.enable_custom_op()
    block_table._compute_slot_mapping_kernel = SlotMapping()
    if os.environ.get("HANDOVER_LOADING"):
        from handover.device_work import record

        record(os.environ["HANDOVER_LOADING"])


class SlotMapping:
    """vLLM's Triton kernel `_compute_slot_mapping_kernel` in torch: Triton for Ascend compiles with
    a CANN. Called as kernels are, `kernel[grid](...)`; the last program pads, the others have a row
    each."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._run, grid[0] - 1)

    def _run(
        self,
        rows: int,
        tokens: int,
        places: int,
        starts: torch.Tensor,
        positions: torch.Tensor,
        table: torch.Tensor,
        table_stride: int,
        block_size: int,
        slots: torch.Tensor,
        **constants: int,
    ) -> None:
        """starts [rows + 1], positions [tokens], table [rows, blocks], slots [places]."""
        if constants["TOTAL_CP_WORLD_SIZE"] != 1:
            raise NotImplementedError("context parallelism has no replacement of its Triton kernel")
        starts, positions, table = starts.cpu(), positions.cpu(), table.cpu()
        found = slots.cpu()
        for row in range(rows):
            here = slice(int(starts[row]), int(starts[row + 1]))
            blocks = table[row][positions[here] // block_size]
            found[here] = blocks * block_size + positions[here] % block_size
        found[tokens:places] = constants["PAD_ID"]
        slots.copy_(found)
