"""Targets: everything that is a property of a chip family rather than of a model or a scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.schemes import BF16, W4A8, W4A16, bf16, w4a8, w4a16, w8a8, w8a16
from qwen3_ascend.checkpoint.schemes.base import Input, Scheme
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.geometry import CACHE_BLOCK_TOKENS

MOST_GROUPED_INPUTS = 29576
"""See _grouped_refusal."""

MOST_GROUPED_EXPERT_INPUTS = 18432
"""Beside int4 weights; see Target._refusal_of_experts."""


@dataclass(frozen=True)
class Target:
    """A chip family, and what its kernels read.

    Attributes:
        name: as the manifest states it.
        chips: for people.
        layouts: of the weights of linears, for each scheme that exists there. A bf16 output
            projection is plain instead: it is read once a step, by a kernel that takes any size.
            So is w4a16 in shapes that its kernel does not take in FRACTAL_NZ.
        expert_layouts: the same of all experts of a layer, which another operator multiplies.
        largest_dimension: of a quantized weight that one kernel takes. More outputs are divided by
            the runtime; more inputs are refused.
        head_sizes: that attention over the paged cache takes.
        block_size: tokens of a key/value block.
        card_memory: bytes that cards of the family have, by the size of the card.
    """

    name: str
    chips: str
    layouts: Mapping[str, Layout]
    expert_layouts: Mapping[str, Layout]
    largest_dimension: int
    head_sizes: tuple[int, ...]
    block_size: int
    card_memory: tuple[int, ...]

    def cards(self, nbytes: int) -> dict[int, int]:
        """How many cards hold so many bytes of weights, by the memory of a card; a fifth of it is
        left for the cache and what a step needs."""
        return {memory: -(-nbytes // (memory * 4 // 5)) for memory in self.card_memory}

    def layout(self, scheme: Scheme, linear: str, shape: Sequence[int]) -> Layout:
        """The layout of the weight [*batch, N, K] of a linear; `refusal` has been asked."""
        if len(shape) > 2:
            whole = not isinstance(scheme, W4A8) or are_whole_int4_tiles(shape)
            return self.expert_layouts[scheme.name] if whole else w4a8.ROWS
        if linear == LM_HEAD and isinstance(scheme, BF16):
            return ND
        if isinstance(scheme, W4A16) and not takes_int4_nz(scheme, shape):
            return w4a16.ROWS
        return self.layouts[scheme.name]

    def refusal(self, scheme: Scheme, shape: Sequence[int]) -> str | None:
        """Why a weight [*batch, N, K] cannot have a scheme here; None if it can."""
        if len(shape) > 2:
            return self._refusal_of_experts(scheme, shape)
        if scheme.name not in self.layouts:
            known = ", ".join(self.layouts)
            return f"{self.name} has no kernel for the scheme {scheme.name}, only for {known}"
        if isinstance(scheme, BF16):
            return None
        if shape[-1] > self.largest_dimension:
            floats = scheme.input is Input.FLOAT
            operator = "npu_weight_quant_batchmatmul" if floats else "npu_quant_matmul"
            return (
                f"it is {list(shape)}, but {operator} refuses more inputs than "
                f"{self.largest_dimension}; give it the scheme bf16"
            )
        if isinstance(scheme, W4A8):
            return _grouped_refusal(shape)
        return _int4_refusal(scheme, shape) if isinstance(scheme, W4A16) else None

    def _refusal_of_experts(self, scheme: Scheme, shape: Sequence[int]) -> str | None:
        """The same of a weight [experts, N, K].

        aclnn_grouped_matmul.cpp of ops-transformer (SplitMSingleXSingleWeightSingleY,
        CheckDimNumAndPerGroupNum), and A8W4Tiling of grouped_matmul_tiling.cpp.
        """
        if scheme.name not in self.expert_layouts:
            known = ", ".join(self.expert_layouts)
            return f"experts can only have the schemes {known}"
        if isinstance(scheme, BF16):
            return None
        *_, outputs, inputs = shape
        rules = [(max(outputs, inputs) > self.largest_dimension, "at most 65535 inputs or outputs")]
        if isinstance(scheme, W4A8):
            rules += [
                (inputs % w4a8.GROUP != 0, f"a multiple of {w4a8.GROUP} inputs"),
                (inputs > MOST_GROUPED_EXPERT_INPUTS, f"at most {MOST_GROUPED_EXPERT_INPUTS}"),
            ]
        if isinstance(scheme, W4A16):
            rules.append((inputs % scheme.group != 0, f"a multiple of {scheme.group} inputs"))
        if isinstance(scheme, W4A8 | W4A16):
            rules.append((outputs % 8 != 0, "a multiple of eight outputs"))
        wrong = [rule for broken, rule in rules if broken]
        if not wrong:
            return None
        return (
            f"it is {list(shape)}, but npu_grouped_matmul wants {wrong[0]} of {scheme.name}; give "
            f"it another scheme, such as w8a8"
        )


def are_whole_int4_tiles(shape: Sequence[int]) -> bool:
    """Whether int4 experts [experts, N, K] fill the tiles of FRACTAL_NZ, as npu_grouped_matmul
    demands (TransWeightToNz)."""
    *_, outputs, inputs = shape
    return inputs % 16 == 0 and outputs % 64 == 0


def takes_int4_nz(scheme: W4A16, shape: Sequence[int]) -> bool:
    """Whether npu_weight_quant_batchmatmul takes a weight [*batch, N, K] in FRACTAL_NZ.

    Groups of 64 or 128 that divide K, and N a multiple of 64: op-plugin's documentation of it, and
    CheckValForWeightInt4Nz in ops-nn's aclnn_weight_quant_batch_matmul_v2.cpp.
    """
    *_, outputs, inputs = shape
    return scheme.group in (64, 128) and inputs % scheme.group == 0 and outputs % 64 == 0


def _int4_refusal(scheme: W4A16, shape: Sequence[int]) -> str | None:
    """Why the operator takes a weight in no layout: it wants whole words of eight outputs, and
    groups that are smaller than a row."""
    *_, outputs, inputs = shape
    if outputs % 8:
        return (
            f"it is {list(shape)}, but npu_weight_quant_batchmatmul takes int4 eight outputs to a "
            f"word, and {outputs} is no multiple of eight; give it the scheme w8a16"
        )
    if inputs <= scheme.group:
        return (
            f"it is {list(shape)}, but npu_weight_quant_batchmatmul wants more inputs than a group "
            f"of {scheme.group} has; give it a smaller group, or the scheme w8a16"
        )
    return None


def _grouped_refusal(shape: Sequence[int]) -> str | None:
    """Why npu_quant_matmul does not take int4 weights with groups beside int8 activations.

    CANN's ops-nn at e5c3fa93, aclnn_quant_matmul_v5.cpp: CheckA8W4KDim, MAX_SHAPE_SIZE_A8W4_INT; N
    in whole words. More outputs than a dimension may have are not divided for it.
    """
    *_, outputs, inputs = shape
    for wrong, rule in (
        (inputs % w4a8.GROUP, f"a multiple of {w4a8.GROUP} inputs"),
        (inputs > MOST_GROUPED_INPUTS, f"at most {MOST_GROUPED_INPUTS} inputs"),
        (outputs % 8, "a multiple of eight outputs"),
        (outputs > ASCEND_A2_A3.largest_dimension, "at most 65535 outputs"),
    ):
        if wrong:
            return (
                f"it is {list(shape)}, but npu_quant_matmul wants {rule} beside 4-bit weights; "
                f"give it the scheme w8a8"
            )
    return None


ASCEND_A2_A3 = Target(
    name="ascend-a2-a3",
    chips="Atlas A2 (910B) and A3 (910_93)",
    layouts={
        "bf16": bf16.NZ,
        "w8a8": w8a8.NZ,
        "w8a8-static": w8a8.NZ,
        "w8a16": w8a16.NZ,
        "w4a8": w4a8.ROWS,
        "w4a16": w4a16.NZ,
    },
    # npu_grouped_matmul beside bfloat16 takes codes in plain order only, beside int8 in both.
    expert_layouts={
        "bf16": bf16.NZ,
        "w8a8": w8a8.NZ,
        "w8a16": w8a16.ROWS,
        "w4a8": w4a16.NZ,
        "w4a16": w4a16.ROWS,
    },
    # npu_quant_matmul refuses a larger last dimension, npu_weight_quant_batchmatmul a larger N or K
    # (torch_npu's documentation of the operators).
    largest_dimension=65535,
    # The TND layout of npu_fused_infer_attention_score (192/128 aside, which is no Qwen3).
    head_sizes=(128,),
    block_size=CACHE_BLOCK_TOKENS,
    # Atlas A2 cards have 32 or 64 GB, each of the two dies of an A3 has 64.
    card_memory=(32 << 30, 64 << 30),
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
