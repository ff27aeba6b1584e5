"""Targets: everything that is a property of a chip family rather than of a model or a scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.schemes import bf16, w8a8
from qwen3_ascend.checkpoint.schemes.base import Input, Scheme
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.geometry import CACHE_BLOCK_TOKENS


@dataclass(frozen=True)
class Target:
    """A chip family, and what its kernels read.

    Attributes:
        name: as the manifest states it.
        chips: for people.
        layouts: of the weights of linears, for each scheme that exists there. An output projection
            of floats is plain instead: it is read once a step, by a kernel that takes any size.
        largest_dimension: of a quantized weight that one kernel takes. More outputs are divided by
            the runtime; more inputs are refused.
        head_sizes: that attention over the paged cache takes.
        block_size: tokens of a key/value block.
    """

    name: str
    chips: str
    layouts: Mapping[str, Layout]
    largest_dimension: int
    head_sizes: tuple[int, ...]
    block_size: int

    def layout(self, scheme: Scheme, linear: str) -> Layout:
        """The layout of a linear's weight; `refusal` has been asked."""
        is_plain = linear == LM_HEAD and scheme.input is Input.FLOAT
        return ND if is_plain else self.layouts[scheme.name]

    def refusal(self, scheme: Scheme, shape: Sequence[int]) -> str | None:
        """Why a weight [*batch, N, K] cannot have a scheme here; None if it can."""
        if scheme.name not in self.layouts:
            known = ", ".join(self.layouts)
            return f"{self.name} has no kernel for the scheme {scheme.name}, only for {known}"
        if scheme.input is not Input.FLOAT and shape[-1] > self.largest_dimension:
            return (
                f"it is {list(shape)}, but npu_quant_matmul refuses more inputs than "
                f"{self.largest_dimension}; give it the scheme bf16"
            )
        return None


ASCEND_A2_A3 = Target(
    name="ascend-a2-a3",
    chips="Atlas A2 (910B) and A3 (910_93)",
    layouts={"bf16": bf16.NZ, "w8a8": w8a8.NZ},
    # npu_quant_matmul refuses a larger last dimension (torch_npu's documentation of the operator).
    largest_dimension=65535,
    # The TND layout of npu_fused_infer_attention_score (192/128 aside, which is no Qwen3).
    head_sizes=(128,),
    block_size=CACHE_BLOCK_TOKENS,
)

TARGETS: Mapping[str, Target] = {ASCEND_A2_A3.name: ASCEND_A2_A3}


def target_named(name: str) -> Target:
    """The target that a manifest states; CheckpointError if this version does not know it."""
    if name not in TARGETS:
        known = ", ".join(TARGETS)
        raise CheckpointError(
            f"the checkpoint is laid out for {name!r}; this version reads {known}: convert again"
        )
    return TARGETS[name]
