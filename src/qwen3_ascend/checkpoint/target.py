"""Targets: everything that is a property of a chip family rather than of a model or a scheme."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.schemes import bf16, w4a8, w8a8
from qwen3_ascend.checkpoint.schemes.base import Input, Scheme
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.geometry import CACHE_BLOCK_TOKENS

UNLIMITED = sys.maxsize


@dataclass(frozen=True)
class Limits:
    """Sizes of a weight that the kernel of a scheme takes.

    Attributes:
        inputs, outputs: how many at most; what is above in outputs alone may be divided instead.
        inputs_unit, outputs_unit: what they have to be multiples of.
        beside: in which form, for a refusal.
        instead: the scheme that takes what this one does not.
    """

    inputs: int = UNLIMITED
    outputs: int = UNLIMITED
    inputs_unit: int = 1
    outputs_unit: int = 1
    beside: str = ""
    instead: str = "bf16"


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
        limits: of the weights of a scheme that has more of them than the largest dimension.
        head_sizes: that attention over the paged cache takes.
        block_size: tokens of a key/value block.
    """

    name: str
    chips: str
    layouts: Mapping[str, Layout]
    largest_dimension: int
    limits: Mapping[str, Limits]
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
        if scheme.input is Input.FLOAT:
            return None
        limits, (outputs, inputs) = self.limits.get(scheme.name, Limits()), shape[-2:]
        for size, most, what in (
            (inputs, min(limits.inputs, self.largest_dimension), "inputs"),
            (outputs, limits.outputs, "outputs"),
        ):
            if size > most:
                return (
                    f"it is {list(shape)}, but npu_quant_matmul refuses more {what} than {most}"
                    f"{limits.beside}; give it the scheme {limits.instead}"
                )
        for size, unit, what in (
            (inputs, limits.inputs_unit, "inputs"),
            (outputs, limits.outputs_unit, "outputs"),
        ):
            if size % unit:
                return (
                    f"it is {list(shape)}, but npu_quant_matmul wants a multiple of {unit} {what}"
                    f"{limits.beside}; give it the scheme {limits.instead}"
                )
        return None


ASCEND_A2_A3 = Target(
    name="ascend-a2-a3",
    chips="Atlas A2 (910B) and A3 (910_93)",
    layouts={
        "bf16": bf16.NZ,
        "w8a8": w8a8.NZ,
        "w8a8-static": w8a8.NZ,
        "w4a8": w4a8.PLAIN,
    },
    # npu_quant_matmul refuses a larger last dimension (torch_npu's documentation of the operator).
    largest_dimension=65535,
    # CANN's ops-nn at e5c3fa93, aclnn_quant_matmul_v5.cpp: CheckA8W4KDim, MAX_SHAPE_SIZE_A8W4_INT;
    # eight outputs to an int32.
    limits={
        "w4a8": Limits(
            inputs=29576,
            outputs=65535,
            inputs_unit=w4a8.GROUP,
            outputs_unit=w4a8.CODES_A_WORD,
            beside=" for 4-bit weights",
            instead="w8a8",
        )
    },
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
