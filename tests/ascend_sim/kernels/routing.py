"""A mixture of experts around its products: npu_moe_gating_top_k_softmax, npu_moe_init_routing_v2,
npu_moe_token_unpermute.

Demands: the pages and sources named at each check, of ops-transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ..doors.aclnn import aclnn
from ..limits import require, require_a2_or_a3, require_dtype, require_nd, require_shape
from ..tensors import DeviceTensor, Layout

Run = Callable[[], None]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# -------------------------------------------------------------------- npu_moe_gating_top_k_softmax
GATING = "npu_moe_gating_top_k_softmax"
MAX_CHOSEN = 1024


@cache
def check_gating(x: Layout, k: int) -> None:
    """aclnnMoeGatingTopKSoftmax.md; the wheel itself checks dims and that k fits."""
    require_a2_or_a3(GATING)
    require_dtype(GATING, "x", x, FLOATS)
    require_nd(GATING, x=x)
    require(k <= MAX_CHOSEN, GATING, f"k may be {MAX_CHOSEN} at most, not {k}")


@aclnn("aclnnMoeGatingTopKSoftmax", "x:T finished:T k:i weights:T experts:T rows:T")
def gating_top_k_softmax(
    x: DeviceTensor,
    finished: DeviceTensor | None,
    k: int,
    weights: DeviceTensor,
    experts: DeviceTensor,
    rows: DeviceTensor,
) -> Run:
    """The softmax is float32 and what is sorted (moe_gating_top_k_softmax_perf.h), so experts are
    equal where it is, though their logits may not be. Of equal ones the first comes first (Ascend C
    API, Sort32 and MrgSort: "if score[i] equals score[j] and i > j, score[j] is chosen first")."""
    check_gating(x.layout, k)
    require(finished is None, GATING, "finished is not simulated")

    def run() -> None:
        probabilities = x.read().float().softmax(-1)
        ordered, numbers = probabilities.sort(dim=-1, descending=True, stable=True)
        weights.write(ordered[..., :k])
        experts.write(numbers[..., :k])
        tokens = rows.layout.elements // k
        rows.write(torch.arange(tokens * k).reshape(k, tokens).T)

    return run


# ----------------------------------------------------------------- npu_moe_gating_top_k_softmax_v2
GATING_V2 = "npu_moe_gating_top_k_softmax_v2"


@aclnn(
    "aclnnMoeGatingTopKSoftmaxV2",
    "x:T finished:T k:i renorm:i softmax:b weights:T experts:T probabilities:T",
)
def gating_top_k_softmax_v2(
    x: DeviceTensor,
    finished: DeviceTensor | None,
    k: int,
    renorm: int,
    softmax: bool,
    weights: DeviceTensor,
    experts: DeviceTensor,
    probabilities: DeviceTensor | None,
) -> Run:
    """Like the first; if renorm is 1 the logits are what is sorted, and the softmax is that of the
    chosen ones. Both are float32, and rounded to the nearest, halves to even, in the end
    (moe_gating_top_k_softmax_v2_perf.h). The first of equal ones comes first where that kernel is
    taken: up to 1024 experts, a multiple of eight, and k of eight at most, or fewer than eight
    experts (MoeGatingTopKSoftmaxV2PerfTiling); of the others it is not said."""
    check_gating(x.layout, k)
    require(finished is None, GATING_V2, "finished is not simulated")
    require(not softmax, GATING_V2, "the result of the softmax is not simulated")

    def run() -> None:
        values = x.read().float()
        sorted_by = values if renorm else values.softmax(-1)
        ordered, numbers = sorted_by.sort(dim=-1, descending=True, stable=True)
        weights.write(ordered[..., :k].softmax(-1) if renorm else ordered[..., :k])
        experts.write(numbers[..., :k])

    return run


# ------------------------------------------------------------------------- npu_moe_init_routing_v2
ROUTING = "npu_moe_init_routing_v2"
NOT_QUANTIZED, DYNAMIC = -1, 1
GATHER, SCATTER = 0, 1
COUNTS = 1
MAX_EXPERTS = 10240


@cache
def check_init_routing(
    x: Layout, chosen: Layout, active: int, experts: int, start: int, end: int, index_type: int
) -> None:
    """aclnnMoeInitRoutingV3.md; aclnn_moe_init_routing_v3.cpp, CheckDtypeValid and CheckShape;
    moe_init_routing_v3_tiling.cpp. What releases differ in is refused as the oldest does it."""
    require_a2_or_a3(ROUTING)
    require_nd(ROUTING, x=x, expert_idx=chosen)
    require_dtype(ROUTING, "x", x, (*FLOATS, torch.int8))
    require_dtype(ROUTING, "expert_idx", chosen, (torch.int32,))
    rule = f"x {x.size} and expert_idx {chosen.size} must have 2 dims and equal rows"
    require(x.dims == chosen.dims == 2 and x.size[0] == chosen.size[0], ROUTING, rule)
    rule = f"active_num must be {chosen.elements}, all elements of expert_idx, not {active}"
    require(active == chosen.elements, ROUTING, rule)
    rule = f"active_expert_range {[start, end]} must lie within the {experts} experts"
    require(0 <= start < end <= experts, ROUTING, rule)
    require(end <= MAX_EXPERTS, ROUTING, f"there may be {MAX_EXPERTS} experts at most")
    require(index_type in (GATHER, SCATTER), ROUTING, "row_idx_type must be 0 or 1")


@cache
def check_routed_quantization(x: Layout, scale: Layout | None, quant: int) -> None:
    """aclnn_moe_init_routing_v3.cpp, CheckShape; of an int8 x only the scales can be passed on."""
    simulated = quant in (NOT_QUANTIZED, DYNAMIC)
    require(simulated, ROUTING, f"quant_mode must be -1 or 1, not {quant}")
    if quant == DYNAMIC:
        require_dtype(ROUTING, "x to be quantized", x, FLOATS)
        require(scale is None, ROUTING, "smooth scales (scale with quant_mode=1) are not simulated")
    if scale is not None:
        require_dtype(ROUTING, "scale", scale, (torch.float32,))
        require_shape(ROUTING, "scale", scale, x.size[:1])


def quantized_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """moe_v3_gather_dynamic_quant.h: scale = max|row| / 127, and x / scale in float32 goes through
    float16 by truncation (CAST_TRUNC), then to int8 by CAST_ROUND: halves away from zero, as
    float16 holds every half below 1024, so that truncation stops at it. npu_dynamic_quant rounds
    halves to even."""
    scale = x.abs().amax(-1) / 127
    quotient = x / scale.masked_fill(scale == 0, 1.0).unsqueeze(-1)
    whole = quotient.abs().floor()
    return (whole + (quotient.abs() - whole >= 0.5)).copysign(quotient), scale


@aclnn(
    "aclnnMoeInitRoutingV3",
    "x:T chosen:T scale:T offset:T active:i capacity:i experts:i drop_pad:i count_type:i counted:b "
    "quant:i limits:I index_type:i expanded:T places:T counts:T expanded_scale:T",
)
def init_routing(
    x: DeviceTensor,
    chosen: DeviceTensor,
    scale: DeviceTensor | None,
    offset: DeviceTensor | None,
    active: int,
    capacity: int,
    experts: int,
    drop_pad: int,
    count_type: int,
    counted: bool,
    quant: int,
    limits: list[int] | None,
    index_type: int,
    expanded: DeviceTensor,
    places: DeviceTensor,
    counts: DeviceTensor,
    expanded_scale: DeviceTensor,
) -> Run:
    """Rows of tokens in the order of their experts, a token's ones in the order of the tokens.

    Rows, scales and scattered places past those of experts in the range are left as they are.
    """
    plain = counted and count_type == COUNTS and drop_pad == 0
    rule = "only counts (expert_tokens_num_flag=True, expert_tokens_num_type=1) are simulated"
    require(plain, ROUTING, rule + ", without dropping")
    require(offset is None, ROUTING, "static quantization (offset) is not simulated")
    start, end = limits or (0, experts)
    check_init_routing(x.layout, chosen.layout, active, experts, start, end, index_type)
    check_routed_quantization(x.layout, scale and scale.layout, quant)

    def run() -> None:
        numbers = chosen.read().flatten()
        require(bool((numbers < experts).all()), ROUTING, f"an expert is none of {experts}")
        inside = (numbers >= start) & (numbers < end)
        total = int(inside.sum())
        order = torch.where(inside, numbers, experts).sort(stable=True).indices[:total]
        rows, scales = x.read(), None if scale is None else scale.read()
        if quant == DYNAMIC:
            rows, scales = quantized_rows(rows.float())
        tokens = order // chosen.layout.size[1]
        expanded.view()[:total] = rows[tokens].to(expanded.layout.dtype)
        if scales is not None:
            expanded_scale.view()[:total] = scales[tokens]
        counts.write(torch.bincount(numbers[inside] - start, minlength=end - start))
        if index_type == SCATTER:
            places.view()[:total] = order.int()
        else:
            gathered = torch.full_like(numbers, -1)
            gathered[order] = torch.arange(total, dtype=torch.int32)
            places.write(gathered)

    return run


@aclnn(
    "aclnnMoeInitRoutingV2",
    "x:T chosen:T active:i capacity:i experts:i drop_pad:i count_flag:i before_flag:b "
    "expanded:T places:T counts:T before:T",
)
def init_routing_of_older_releases(
    x: DeviceTensor,
    chosen: DeviceTensor,
    active: int,
    capacity: int,
    experts: int,
    drop_pad: int,
    count_flag: int,
    before_flag: bool,
    expanded: DeviceTensor,
    places: DeviceTensor,
    counts: DeviceTensor,
    before: DeviceTensor,
) -> Run:
    """What the wheel asks for before CANN 8.5 if 128 experts and 2048 inputs meet quant_mode=-1
    (MoeInitRoutingV2KernelNpuOpApi.cpp, CheckV2Case): a `scale` is not passed on, and int8 is
    none of the types of the operator (moe_init_routing_v2_def.cpp)."""
    require_dtype(ROUTING, "x before CANN 8.5", x.layout, FLOATS)
    options = (active, capacity, experts, drop_pad, COUNTS, True, NOT_QUANTIZED, None, GATHER)
    outputs = (expanded, places, counts, before)
    return init_routing(x, chosen, None, None, *options, *outputs)


# ------------------------------------------------------------------------- npu_moe_token_unpermute
UNPERMUTE = "npu_moe_token_unpermute"
MAX_SUMMED = 512


@cache
def check_unpermute(rows: Layout, places: Layout, weights: Layout | None) -> None:
    """aclnnMoeTokenUnpermute.md; moe_token_unpermute_def.cpp takes each type of probs beside each
    type of rows."""
    require_a2_or_a3(UNPERMUTE)
    require_nd(UNPERMUTE, permuted_tokens=rows)
    require_dtype(UNPERMUTE, "permuted_tokens", rows, FLOATS)
    require(rows.dims == 2, UNPERMUTE, "permuted_tokens must have 2 dims")
    require_dtype(UNPERMUTE, "sorted_indices", places, (torch.int32,))
    require_shape(UNPERMUTE, "sorted_indices", places, rows.size[:1])
    if weights is not None:
        require_dtype(UNPERMUTE, "probs", weights, FLOATS)
        fits = weights.dims == 2 and weights.elements == places.elements
        rule = f"probs {weights.size} must have 2 dims and an element for each of {places.elements}"
        require(fits, UNPERMUTE, rule + " sorted_indices")
        rule = f"a sum may have {MAX_SUMMED} rows at most, not {weights.size[1]}"
        require(weights.size[1] <= MAX_SUMMED, UNPERMUTE, rule)


@aclnn("aclnnMoeTokenUnpermute", "rows:T places:T weights:T padded:b shape:I out:T")
def token_unpermute(
    rows: DeviceTensor,
    places: DeviceTensor,
    weights: DeviceTensor | None,
    padded: bool,
    shape: list[int] | None,
    out: DeviceTensor,
) -> Run:
    """moe_token_unpermute.h: products and their sum in float32, in the order of sorted_indices; one
    rounding, halves to even. A weight of 0 leaves its row out."""
    require(not padded, UNPERMUTE, "padded_mode must be False")
    check_unpermute(rows.layout, places.layout, weights and weights.layout)

    def run() -> None:
        order = places.read().long()
        inside = bool(((order >= 0) & (order < rows.layout.size[0])).all())
        require(inside, UNPERMUTE, f"an index lies outside of {rows.layout.size[0]}")
        require(len(order.unique()) == len(order), UNPERMUTE, "an index occurs twice")
        found = rows.read()[order].float()
        if weights is None:
            out.write(found)
            return
        factors = weights.read().float()
        terms = found.reshape(*factors.shape, -1) * factors.unsqueeze(-1)
        terms.masked_fill_((factors == 0).unsqueeze(-1), 0)
        total = terms[:, 0].clone()
        for rank in range(1, factors.shape[1]):
            total += terms[:, rank]
        out.write(total)

    return run
