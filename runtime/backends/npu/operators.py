"""Operations for which torch_npu and CANN have had more than one form, the fastest form first.

Which of them a machine offers is found out once, by trying (capabilities.py). The last form of each
is made of operators that every torch_npu from 2.6 on has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch_npu
from torch import Tensor

from qwen3_ascend.checkpoint.schemes.w8a8_static import StaticInput
from qwen3_ascend.runtime.backends.base import QuantizedActivation, StaticActivation
from qwen3_ascend.runtime.backends.cache import LayerKV

CacheWrite = Callable[[Tensor, Tensor, LayerKV, Tensor], None]
"""(keys, values, cache, slots): stores contiguous [T, kv_heads, head_dim] at the slots [T]."""

NormQuant = Callable[[Tensor, Tensor | None, Tensor, float], tuple[QuantizedActivation, Tensor]]
"""(hidden, delta, weight, epsilon) -> (the quantized norm of hidden + delta, hidden + delta)."""


@dataclass(frozen=True)
class StaticVectors:
    """How a linear's inputs are quantized, in the forms that operators ask for; on the device.

    Attributes:
        reciprocal, offset: bfloat16 [1], what npu_quantize multiplies by and adds.
    """

    reciprocal: Tensor
    offset: Tensor

    @classmethod
    def upload(cls, static_input: StaticInput) -> StaticVectors:
        """Of a linear."""
        reciprocal, offset = static_input.reciprocal, static_input.offset
        return cls(
            torch.tensor([reciprocal], dtype=torch.bfloat16).to("npu"),
            torch.tensor([offset], dtype=torch.bfloat16).to("npu"),
        )


GatedQuant = Callable[[Tensor], QuantizedActivation]
"""[T, 2 * inner] -> the quantized silu(gate) * up."""

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(query, key, cos, sin) -> both rotated; [T, heads, head_dim], and [T, 1, head_dim] of the tables.
Query and key may be overwritten."""

MaskedAttention = Callable[[Tensor, LayerKV, Tensor, Tensor], Tensor]
"""(query, cache, block table, hidden) -> attention [B, heads, head_dim] of one query token of each
request over the blocks of its row, without the places that `hidden` [B, 1, places] says."""

Call = TypeVar("Call")


@dataclass(frozen=True)
class Form(Generic[Call]):
    """One way to compute an operation: the torch_npu operators that it launches, and the call."""

    name: str
    call: Call


def scatter(key: Tensor, value: Tensor, cache: LayerKV, slots: Tensor) -> None:
    """The operator's default mode is PA_NZ: always say Norm. Wheels for CANN 8.3 and 8.5 have no
    such argument, and write PA_NZ only."""
    torch_npu.npu_scatter_pa_kv_cache(
        key, value, cache.keys, cache.values, slots, cache_mode="Norm"
    )


def reshape_and_cache(key: Tensor, value: Tensor, cache: LayerKV, slots: Tensor) -> None:
    """Of ATB, which paged attention needs as well."""
    torch_npu._npu_reshape_and_cache(key, value, cache.keys, cache.values, slots)


def scatter_rows(key: Tensor, value: Tensor, cache: LayerKV, slots: Tensor) -> None:
    """One launch for keys and one for values, into the cache as a list of slots."""
    rows = slots.view(-1, 1)
    torch_npu.npu_scatter_nd_update_(cache.keys.flatten(0, 1), rows, key)
    torch_npu.npu_scatter_nd_update_(cache.values.flatten(0, 1), rows, value)


def fused_norm_quant(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[QuantizedActivation, Tensor]:
    """One launch. The first layer adds zeros: as many launches as a norm and a quantization, and
    no rounding between the two.

    Masking the second output makes wheels for CANN 8.3 fail, which allocate it in the size of the
    input while the operator returns one element.
    """
    return _norm_quant(hidden, delta, weight, epsilon, second_output=False)


def unmasked_norm_quant(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[QuantizedActivation, Tensor]:
    """One launch too, and the same numbers; the second output is written for nobody. vllm-ascend
    calls it so with CANN 8.3."""
    return _norm_quant(hidden, delta, weight, epsilon, second_output=True)


def _norm_quant(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, second_output: bool
) -> tuple[QuantizedActivation, Tensor]:
    delta = torch.zeros_like(hidden) if delta is None else delta
    codes, _, total, scale, _ = torch_npu.npu_add_rms_norm_dynamic_quant(
        hidden, delta, weight, epsilon=epsilon, output_mask=[True, second_output]
    )
    return QuantizedActivation(codes, scale), total


def add_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(RMS norm of hidden + delta, hidden + delta), bfloat16 [T, hidden]; one launch."""
    if delta is None:
        return torch_npu.npu_rms_norm(hidden, weight, epsilon)[0], hidden
    normed, _, total = torch_npu.npu_add_rms_norm(hidden, delta, weight, epsilon)
    return normed, total


def norm_then_quant(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[QuantizedActivation, Tensor]:
    """Two launches; the norm is rounded to bfloat16 before it is quantized."""
    normed, total = add_norm(hidden, delta, weight, epsilon)
    return dynamic_quant(normed), total


def fused_gated_quant(gate_up: Tensor) -> QuantizedActivation:
    """One launch. Rows that do not fit into a core's buffer are computed in tiles, on a path that
    nobody is known to use (more than 7840 wide: Qwen3-4B and larger)."""
    codes, scale = torch_npu.npu_dequant_swiglu_quant(gate_up, activate_left=True, quant_mode=1)
    return QuantizedActivation(codes, scale)


def gated_then_quant(gate_up: Tensor) -> QuantizedActivation:
    """Two launches; the product is rounded to bfloat16 before it is quantized."""
    return dynamic_quant(torch_npu.npu_swiglu(gate_up, dim=-1))


def rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """One launch, in place, on views [1, T, heads, head_dim].

    CANN 8 takes four dimensions only. Their layout is the operator's default in every wheel, but
    its name is not: it was BSH and is BSND.
    """
    views = (tensor.unsqueeze(0) for tensor in (query, key, cos, sin))
    query, key = torch_npu.npu_apply_rotary_pos_emb(*views)
    return query.squeeze(0), key.squeeze(0)


def rotate_each(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Two launches."""
    tables = cos.unsqueeze(0), sin.unsqueeze(0)
    query, key = (
        torch_npu.npu_rotary_mul(tensor.unsqueeze(0), *tables).squeeze(0) for tensor in (query, key)
    )
    return query, key


def dynamic_quant(x: Tensor) -> QuantizedActivation:
    """Codes and scale of each row."""
    return QuantizedActivation(*torch_npu.npu_dynamic_quant(x))


def static_quant(x: Tensor, static: StaticVectors) -> StaticActivation:
    """Codes under a scale and offset that are fixed. Axis -1, and multiplied."""
    return StaticActivation(
        torch_npu.npu_quantize(x, static.reciprocal, static.offset, torch.qint8, -1, False)
    )


CACHE_WRITES: tuple[Form[CacheWrite], ...] = (
    Form("npu_scatter_pa_kv_cache", scatter),
    Form("_npu_reshape_and_cache", reshape_and_cache),
    Form("npu_scatter_nd_update_", scatter_rows),
)
NORM_QUANTS: tuple[Form[NormQuant], ...] = (
    Form("npu_add_rms_norm_dynamic_quant", fused_norm_quant),
    Form("npu_add_rms_norm_dynamic_quant with both outputs", unmasked_norm_quant),
    Form("npu_add_rms_norm, npu_dynamic_quant", norm_then_quant),
)
GATED_QUANTS: tuple[Form[GatedQuant], ...] = (
    Form("npu_dequant_swiglu_quant", fused_gated_quant),
    Form("npu_swiglu, npu_dynamic_quant", gated_then_quant),
)
ROTATIONS: tuple[Form[Rotate], ...] = (
    Form("npu_apply_rotary_pos_emb", rotate_both),
    Form("npu_rotary_mul", rotate_each),
)


def masked_attention(query: Tensor, cache: LayerKV, table: Tensor, hidden: Tensor) -> Tensor:
    """npu_fused_infer_attention_score for one query token of each request. Of the shapes that it
    takes for masks, (B, 1, KV_S) has batch and rows where every release looks for them.

    The mask has to cover all places of the block table (incre_flash_attention_tiling.cpp), and the
    blocks behind a context only have to be some of the cache's, with finite values.
    """
    _, block_size, kv_heads, head_dim = cache.keys.shape
    attended = torch_npu.npu_fused_infer_attention_score(
        query.flatten(1).unsqueeze(1),
        cache.keys.flatten(2),
        cache.values.flatten(2),
        input_layout="BSH",
        num_heads=query.shape[1],
        num_key_value_heads=kv_heads,
        scale=head_dim**-0.5,
        atten_mask=hidden,
        block_table=table,
        block_size=block_size,
        actual_seq_lengths_kv=[hidden.shape[-1]] * query.shape[0],
    )
    return attended[0].view(query.shape)
