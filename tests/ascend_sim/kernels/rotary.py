"""npu_rotary_mul, npu_apply_rotary_pos_emb and _npu_rotary_embedding (ATB)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from .. import cann
from ..doors.aclnn import aclnn
from ..doors.atb import atb
from ..limits import (
    is_310p,
    is_a2_or_a3,
    require,
    require_contiguous,
    require_dtype,
    require_nd,
    require_shape,
)
from ..tensors import DeviceTensor, Layout

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MODES = {0: "half", 1: "interleave"}
LAYOUTS = {1: "BSND", 2: "SBND", 3: "BNSD", 4: "TND"}


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotate_interleaved(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


@cache
def check_rotary_mul(x: Layout, cos: Layout, sin: Layout, mode: int) -> None:
    operator = "npu_rotary_mul"
    for name, layout in (("input", x), ("r1", cos), ("r2", sin)):
        require_dtype(operator, name, layout, FLOATS)
        require(layout.dims in (3, 4), operator, f"{name} must have 3 or 4 dims")
    require_nd(operator, input=x, r1=cos, r2=sin)
    require(cos.size == sin.size, operator, "r1 and r2 must have one shape")
    require(cos.dims == x.dims, operator, "r1 must have as many dims as the input")
    require(cos.size[-1] == x.size[-1], operator, "r1 must have the last dim of the input")
    fits = all(c in (1, n) for c, n in zip(cos.size, x.size, strict=True))
    require(fits, operator, f"r1 {cos.size} does not broadcast to the input {x.size}")
    require(x.size[-1] % 2 == 0, operator, "the last dim must be even")
    require(mode in MODES, operator, f"mode {mode} is not half or interleave")


@aclnn("aclnnRotaryPositionEmbedding", "x:T cos:T sin:T mode:i out:T")
def rotary_mul(
    x: DeviceTensor, cos: DeviceTensor, sin: DeviceTensor, mode: int, out: DeviceTensor
) -> Callable[[], None]:
    return plan_rotary_mul(x, cos, sin, mode, out)


@aclnn("aclnnRotaryPositionEmbeddingV2", "x:T cos:T sin:T mode:i rotate:T out:T")
def rotary_mul_v2(
    x: DeviceTensor,
    cos: DeviceTensor,
    sin: DeviceTensor,
    mode: int,
    rotate: DeviceTensor | None,
    out: DeviceTensor,
) -> Callable[[], None]:
    require(rotate is None, "npu_rotary_mul", "a rotate matrix is not simulated")
    return plan_rotary_mul(x, cos, sin, mode, out)


def plan_rotary_mul(
    x: DeviceTensor, cos: DeviceTensor, sin: DeviceTensor, mode: int, out: DeviceTensor
) -> Callable[[], None]:
    check_rotary_mul(x.layout, cos.layout, sin.layout, mode)
    rotate = rotate_half if mode == 0 else rotate_interleaved

    def run() -> None:
        values = x.read().float()
        out.write(values * cos.read().float() + rotate(values) * sin.read().float())

    return run


MAX_HEADS = 255
UNIFIED_BUFFER = 196608
BYTES_PER_ELEMENT = 20
"""Of the unified buffer, for a 16-bit element of a token's query and key heads: the tiling keeps
them, their float32 copies and the products at once, so that 76 heads of 128 fit, and 77 do not."""


def check_generation(query: Layout, layout: int) -> None:
    """What the releases of CANN take; not cached, because the release can change."""
    operator, release = "npu_apply_rotary_pos_emb", cann.current()
    taken = layout == 1 or release.rotary_tnd
    rule = f"CANN {release.name}: q shape dims is not four, layout is not one (BSND)"
    require(taken, operator, rule)
    width, sizes = query.size[-1], release.rotary_head_sizes
    require(width in sizes, operator, f"the head size must be one of {sizes}, not {width}")


def check_heads(operator: str, query: Layout, key: Layout) -> None:
    """All heads of one token have to fit the unified buffer."""
    heads, width = query.size[-2] + key.size[-2], query.size[-1]
    rule = f"query and key have {heads} heads of {width}, more than"
    require(heads <= MAX_HEADS, operator, f"{rule} {MAX_HEADS}")
    fits = heads * width * BYTES_PER_ELEMENT <= UNIFIED_BUFFER
    require(fits, operator, f"{rule} fit the unified buffer")


@cache
def check_apply(
    query: Layout, key: Layout, cos: Layout, sin: Layout, layout: int, mode: str
) -> None:
    operator = "npu_apply_rotary_pos_emb"
    require(
        is_a2_or_a3() or is_310p(), operator, "other devices than A2, A3, 310P are not simulated"
    )
    name = LAYOUTS.get(layout)
    require(name in ("BSND", "TND"), operator, f"layout {name} is not BSND or TND")
    require(mode == "half", operator, f"rotary_mode {mode} is not half")
    dims = 3 if name == "TND" else 4
    for tensor_name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        require_dtype(operator, tensor_name, tensor, FLOATS)
        require(tensor.dtype is query.dtype, operator, "all four tensors must have one dtype")
        require(tensor.dims == dims, operator, f"{tensor_name} must have {dims} dims for {name}")
        require(tensor.elements, operator, f"{tensor_name} must not be empty")
    require_nd(operator, query=query, key=key, cos=cos, sin=sin)
    bfloat = query.dtype is torch.bfloat16
    require(not (is_310p() and bfloat), operator, "has no bfloat16 on 310P")
    leading, width = query.size[:-2], query.size[-1]
    require(key.size[:-2] == leading, operator, "query and key must agree in their leading dims")
    require(key.size[-1] == width, operator, "query and key must have one head size")
    for tensor_name, tensor in (("cos", cos), ("sin", sin)):
        require_shape(operator, tensor_name, tensor, (*leading, 1, width))
    check_heads(operator, query, key)


@aclnn("aclnnApplyRotaryPosEmbV2", "query:T key:T cos:T sin:T layout:i mode:s")
def apply_rotary_pos_emb(
    query: DeviceTensor,
    key: DeviceTensor,
    cos: DeviceTensor,
    sin: DeviceTensor,
    layout: int,
    mode: str,
) -> Callable[[], None]:
    check_apply(query.layout, key.layout, cos.layout, sin.layout, layout, mode)
    check_generation(query.layout, layout)

    def run() -> None:
        cosine, sine = cos.read().float(), sin.read().float()
        for target in (query, key):  # in place, as on A2 and A3
            values = target.read().float()
            target.write(values * cosine + rotate_half(values) * sine)

    return run


# ------------------------------------------------------------------------ _npu_rotary_embedding
@cache
def check_embedding(
    positions: Layout, query: Layout, key: Layout, head_size: int, table: Layout
) -> None:
    operator = "_npu_rotary_embedding"
    require(is_a2_or_a3() or is_310p(), operator, "ATB is simulated for A2, A3 and 310P only")
    require_dtype(operator, "positions", positions, (torch.int32, torch.int64))
    for name, rows in (("query", query), ("key", key)):
        require_dtype(operator, name, rows, (torch.float16, torch.bfloat16))
        require(rows.dims == 2, operator, f"{name} must be [tokens, heads * head_size]")
        whole = rows.size[0] == positions.elements and rows.size[1] % head_size == 0
        rule = f"{name} {rows.size} must be ({positions.elements}, heads * {head_size})"
        require(whole, operator, rule)
    require_dtype(operator, "cos_sin_cache", table, (query.dtype, torch.float32))
    fits = table.dims == 2 and table.size[1] == head_size
    require(fits, operator, f"cos_sin_cache {table.size} must be [positions, {head_size}]")
    require_contiguous(operator, query=query, key=key)  # what it writes is not copied back
    require_nd(operator, query=query, key=key, cos_sin_cache=table)


class FirstTable:
    """op-plugin takes cosines and sines from the table of the first call and never looks at a later
    one (InitializeCosSinCache in RopeAtb.cpp).  So rows that differ from the first are refused."""

    def __init__(self) -> None:
        self.values: torch.Tensor | None = None

    def rows(self, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.values is None:
            self.values = table.clone()
        kept = self.values[positions] if len(self.values) == len(table) else None
        rule = "cos_sin_cache differs from that of the first call, which stays in use"
        same = kept is not None and torch.equal(kept, table[positions])
        require(same, "_npu_rotary_embedding", rule)
        return table[positions]


FIRST_TABLE = FirstTable()


def spread(table: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [tokens, 1, head_size] of rows whose halves are those of half a head."""
    cos, sin = table.float()[:, None].chunk(2, -1)
    if interleaved:
        return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


@atb("_npu_rotary_embedding")
def rotary_embedding(
    positions: DeviceTensor,
    query: DeviceTensor,
    key: DeviceTensor,
    head_size: int,
    table: DeviceTensor,
    neox: bool,
) -> Callable[[], None]:
    """In place.  One launch here; op-plugin gathers the rows of both tables with two more."""
    check_embedding(positions.layout, query.layout, key.layout, head_size, table.layout)
    rotate = rotate_half if neox else rotate_interleaved

    def run() -> None:
        rows = FIRST_TABLE.rows(table.read(), positions.read().long().flatten())
        cos, sin = spread(rows, interleaved=not neox)
        for target in (query, key):
            values = target.read().float().view(len(rows), -1, head_size)
            target.write((values * cos + rotate(values) * sin).flatten(1))

    return run
