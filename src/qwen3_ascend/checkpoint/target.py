"""Targets: everything that is a property of a chip family rather than of a model or a scheme."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.schemes import BF16, W4A16, bf16, w4a8, w4a16, w8a8, w8a16
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
        layouts: of the weights of linears, for each scheme that exists there. A bf16 output
            projection is plain instead: it is read once a step, by a kernel that takes any size.
            So is w4a16 in shapes that its kernel does not take in FRACTAL_NZ.
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

    def layout(self, scheme: Scheme, linear: str, shape: Sequence[int]) -> Layout:
        """The layout of the weight [*batch, N, K] of a linear; `refusal` has been asked."""
        if linear == LM_HEAD and isinstance(scheme, BF16):
            return ND
        if isinstance(scheme, W4A16) and not takes_int4_nz(scheme, shape):
            return w4a16.ROWS
        return self.layouts[scheme.name]

    def refusal(self, scheme: Scheme, shape: Sequence[int]) -> str | None:
        """Why a weight [*batch, N, K] cannot have a scheme here; None if it can."""
        if scheme.name not in self.layouts:
            known = ", ".join(self.layouts)
            return f"{self.name} has no kernel for the scheme {scheme.name}, only for {known}"
        if isinstance(scheme, BF16):
            return None
        floats = scheme.input is Input.FLOAT
        operator = "npu_weight_quant_batchmatmul" if floats else "npu_quant_matmul"
        limits, (outputs, inputs) = self.limits.get(scheme.name, Limits()), shape[-2:]
        for size, most, what in (
            (inputs, min(limits.inputs, self.largest_dimension), "inputs"),
            (outputs, limits.outputs, "outputs"),
        ):
            if size > most:
                return (
                    f"it is {list(shape)}, but {operator} refuses more {what} than {most}"
                    f"{limits.beside}; give it the scheme {limits.instead}"
                )
        for size, unit, what in (
            (inputs, limits.inputs_unit, "inputs"),
            (outputs, limits.outputs_unit, "outputs"),
        ):
            if size % unit:
                return (
                    f"it is {list(shape)}, but {operator} wants a multiple of {unit} {what}"
                    f"{limits.beside}; give it the scheme {limits.instead}"
                )
        if isinstance(scheme, W4A16) and inputs <= scheme.group:
            return (
                f"it is {list(shape)}, but {operator} wants more inputs than a group of "
                f"{scheme.group} has; give it a smaller group, or the scheme w8a16"
            )
        return None


def takes_int4_nz(scheme: W4A16, shape: Sequence[int]) -> bool:
    """Whether npu_weight_quant_batchmatmul takes a weight [*batch, N, K] in FRACTAL_NZ.

    Groups of 64 or 128 that divide K, and N a multiple of 64: op-plugin's documentation of it, and
    CheckValForWeightInt4Nz in ops-nn's aclnn_weight_quant_batch_matmul_v2.cpp.
    """
    *_, outputs, inputs = shape
    return scheme.group in (64, 128) and inputs % scheme.group == 0 and outputs % 64 == 0


ASCEND_A2_A3 = Target(
    name="ascend-a2-a3",
    chips="Atlas A2 (910B) and A3 (910_93)",
    layouts={
        "bf16": bf16.NZ,
        "w8a8": w8a8.NZ,
        "w8a8-static": w8a8.NZ,
        "w8a16": w8a16.NZ,
        "w4a8": w4a8.PLAIN,
        "w4a16": w4a16.NZ,
    },
    # npu_quant_matmul refuses a larger last dimension, npu_weight_quant_batchmatmul a larger N or K
    # (torch_npu's documentation of the operators).
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
        ),
        "w4a16": Limits(outputs_unit=8, beside=" for int4 weights", instead="w8a16"),
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
