"""npu_qkv_rms_norm_rope_cache: norm, rotation and cache write of a fused qkv row in one launch.

Documented for A2 and A3 with cache_mode PA_NZ and a head size of 128 only.  The cache it writes is
not one that the documented 16-bit attention operators read on those devices (see README).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ..doors.aclnn import aclnn
from ..limits import require, require_a2_or_a3, require_contiguous, require_dtype, require_shape
from ..nz import STRIP_BYTES
from ..tensors import DeviceTensor, Layout
from .kv_cache import HALF, check_slots, store_nz
from .norm import rms
from .rotary import rotate_half

FUSED = "npu_qkv_rms_norm_rope_cache"


@cache
def check_fused(
    qkv: Layout,
    vectors: tuple[Layout, ...],
    slots: Layout,
    q_out: Layout,
    sizes: tuple[int, ...],
    heads: tuple[int, ...],
    mode: str,
) -> None:
    require_a2_or_a3(FUSED)
    require(mode == "PA_NZ", FUSED, f"cache_mode {mode} is not PA_NZ, the only documented one")
    require_dtype(FUSED, "qkv", qkv, HALF)
    batch, length, head_count, width = sizes
    tokens = batch * length
    q_heads, k_heads, v_heads = heads
    require(k_heads == v_heads, FUSED, "k and v must have one head count")
    require(head_count == sum(heads), FUSED, "qkv_size must hold the sum of head_nums")
    require(width == 128, FUSED, f"the head size must be 128, not {width}")
    require_shape(FUSED, "qkv", qkv, (tokens, head_count * width))
    q_gamma, k_gamma, cos, sin = vectors
    for name, layout, shape in (
        ("q_gamma", q_gamma, (width,)),
        ("k_gamma", k_gamma, (width,)),
        ("cos", cos, (tokens, width)),
        ("sin", sin, (tokens, width)),
        ("q_out", q_out, (tokens, q_heads * width)),
    ):
        require_shape(FUSED, name, layout, shape)
        require(layout.dtype is qkv.dtype, FUSED, f"{name} must have the dtype of qkv")
    require_dtype(FUSED, "index", slots, (torch.int64,))
    require_shape(FUSED, "index", slots, (tokens,))
    require_contiguous(FUSED, qkv=qkv, cos=cos, sin=sin, index=slots, q_out=q_out)


@cache
def check_fused_cache(
    qkv: Layout,
    cache_layout: Layout,
    scale: Layout | None,
    offset: Layout | None,
    sizes: tuple[int, ...],
    heads: int,
) -> None:
    batch, length, _, width = sizes
    quantized = cache_layout.dtype is torch.int8
    require(
        quantized or cache_layout.dtype is qkv.dtype, FUSED, "a cache has the dtype of qkv or int8"
    )
    require(quantized == (scale is not None), FUSED, "an int8 cache, and no other, needs a scale")
    require(offset is None or scale is not None, FUSED, "an offset needs a scale")
    for layout in (scale, offset):
        if layout is not None:
            require_dtype(FUSED, "scale and offset", layout, (torch.float32,))
            require_shape(FUSED, "scale and offset", layout, (heads, width))
    strip = STRIP_BYTES // cache_layout.dtype.itemsize
    require(cache_layout.dims == 4, FUSED, "a cache must have 4 dims")
    blocks, strips, block_size, last = cache_layout.size
    fits = (strips, last) == (heads * width // strip, strip)
    wanted = f"[blocks, {heads * width // strip}, block_size, {strip}]"
    require(fits, FUSED, f"the cache must be {wanted}, not {cache_layout.size}")
    require(block_size % strip == 0, FUSED, "block_size must be a multiple of 32 bytes")
    require_contiguous(FUSED, cache=cache_layout)
    enough = blocks >= -(-length // block_size) * batch
    require(enough, FUSED, "the cache has fewer blocks than the batch needs")


@aclnn(
    "aclnnQkvRmsNormRopeCache",
    "qkv:T q_gamma:T k_gamma:T cos:T sin:T index:T q_out:T k_cache:T v_cache:T k_scale:T "
    "v_scale:T k_offset:T v_offset:T sizes:I heads:I epsilon:d mode:s q_raw:T k_raw:T v_raw:T",
)
def qkv_rms_norm_rope_cache(
    qkv: DeviceTensor,
    q_gamma: DeviceTensor,
    k_gamma: DeviceTensor,
    cos: DeviceTensor,
    sin: DeviceTensor,
    index: DeviceTensor,
    q_out: DeviceTensor,
    k_cache: DeviceTensor,
    v_cache: DeviceTensor,
    k_scale: DeviceTensor | None,
    v_scale: DeviceTensor | None,
    k_offset: DeviceTensor | None,
    v_offset: DeviceTensor | None,
    sizes: list[int],
    heads: list[int],
    epsilon: float,
    mode: str,
    q_raw: DeviceTensor | None,
    k_raw: DeviceTensor | None,
    v_raw: DeviceTensor | None,
) -> Callable[[], None]:
    vectors = tuple(t.layout for t in (q_gamma, k_gamma, cos, sin))
    check_fused(qkv.layout, vectors, index.layout, q_out.layout, tuple(sizes), tuple(heads), mode)
    for target, scale, offset in ((k_cache, k_scale, k_offset), (v_cache, v_scale, v_offset)):
        check_fused_cache(
            qkv.layout,
            target.layout,
            scale and scale.layout,
            offset and offset.layout,
            tuple(sizes),
            heads[1],
        )
    places = k_cache.layout.size[0] * k_cache.layout.size[2]

    def norm_rope(rows: torch.Tensor, gamma: DeviceTensor) -> torch.Tensor:
        normed = rows * rms(rows, 1, epsilon) * gamma.read().float()
        cosine, sine = (t.read().float().unsqueeze(1) for t in (cos, sin))
        return normed * cosine + rotate_half(normed) * sine

    def run() -> None:
        rows = qkv.read().float().view(qkv.layout.size[0], -1, sizes[3])
        q, k, v = rows.split(heads, 1)
        q, k = norm_rope(q, q_gamma), norm_rope(k, k_gamma)
        q_out.write(q)
        slots = index.read()
        used = slots >= 0  # -1 is documented: the token is not stored
        check_slots(FUSED, slots[used], places)
        _store_fused(k_cache, slots[used], k[used], k_scale, k_offset)
        _store_fused(v_cache, slots[used], v[used], v_scale, v_offset)
        for target, values in ((q_raw, q), (k_raw, k), (v_raw, v)):
            if target is not None and target.layout.elements == values.numel():
                target.write(values)

    return run


def _store_fused(
    target: DeviceTensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    scale: DeviceTensor | None,
    offset: DeviceTensor | None,
) -> None:
    if scale is not None:
        rows = rows / scale.read()
        rows = rows if offset is None else rows + offset.read()
        rows = torch.round(rows).clamp(-128, 127)
    store_nz(target, slots, rows)
