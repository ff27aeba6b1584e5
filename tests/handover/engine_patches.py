"""What vLLM 0.23.0 and vllm-ascend 0.23.0 lack where there is neither a CANN nor Triton.

These are properties of the engine and of how it was installed, not of the device, so the simulator
does not have them. vLLM calls `apply` in each of its processes: site/ has the entry point.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch


def apply() -> None:
    """Every patch; called again it changes nothing."""
    import vllm_ascend.utils
    import vllm_ascend.worker.block_table as block_table

    # Probes for vllm_ascend_C, which is linked to a CANN, and remembers that it is not there. The
    # engine would do that by itself, but in graph mode inside torch.compile, which cannot import.
    vllm_ascend.utils.enable_custom_op()
    block_table._compute_slot_mapping_kernel = SlotMapping()
    operators_of_experts()
    if os.environ.get("HANDOVER_LOADING"):
        from handover.device_work import record

        record(os.environ["HANDOVER_LOADING"])


SCHEMAS = (
    "moe_gating_top_k(Tensor x, *, int k, int k_group, int group_count, int group_select_mode, "
    "int renorm, int norm_type, bool out_flag, float routed_scaling_factor, float eps, "
    "Tensor? bias_opt) -> (Tensor, Tensor, Tensor)",
    "npu_moe_init_routing_custom(Tensor x, Tensor expert_idx, *, Tensor? scale, int active_num, "
    "int expert_num, int expert_tokens_num_type, bool expert_tokens_num_flag, "
    "int[] active_expert_range, int quant_mode) -> (Tensor, Tensor, Tensor, Tensor)",
    "grouped_matmul_swiglu_quant_weight_nz(*, Tensor x, Tensor weight, Tensor weight_scale, "
    "Tensor x_scale, Tensor group_list, Tensor? bias, float swiglu_limit) "
    "-> (Tensor, Tensor, Tensor)",
)
"""Operators of vllm_ascend_C for mixtures of experts, as device_op.py calls them."""


@functools.cache
def operators_of_experts() -> torch.library.Library:
    """Those of SCHEMAS by torch_npu's, once; a library that nobody keeps takes them with it."""
    import torch_npu

    library = torch.library.Library("_C_ascend", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)

    def choose(x: torch.Tensor, *, k: int, renorm: int, **others: Any) -> Any:
        if (others["norm_type"], others["bias_opt"], others["group_count"]) != (0, None, 1):
            raise NotImplementedError("only a softmax over one group has a replacement")
        return torch_npu.npu_moe_gating_top_k_softmax_v2(x, k=k, renorm=renorm)

    def route(x: torch.Tensor, chosen: torch.Tensor, **others: Any) -> Any:
        return torch_npu.npu_moe_init_routing_v2(x, chosen, **others, row_idx_type=0)

    def gate(*, bias: None, swiglu_limit: float, **others: torch.Tensor) -> Any:
        if bias is not None or swiglu_limit:
            raise NotImplementedError("neither a bias nor a limit has a replacement")
        return torch_npu.npu_grouped_matmul_swiglu_quant(**others)

    for schema, computed in zip(SCHEMAS, (choose, route, gate), strict=True):
        library.impl(schema.partition("(")[0], computed, "PrivateUse1")
    return library


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
