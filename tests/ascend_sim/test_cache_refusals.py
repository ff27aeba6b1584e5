"""What a card refuses of caches and attention calls (see test_refusals.py)."""

from __future__ import annotations

import pytest
import torch
import torch_npu

from ascend_sim.test_refusals import (
    FP32,
    HALF,
    INT32,
    INT64,
    Cases,
    as_nz,
    dev,
    make,
    refused,
    strided,
)

SCATTER: Cases = {
    "nz shape for Norm": (
        "cache_mode Norm needs a cache",
        dict(key_cache=lambda: dev(2, 16, 128, 16), value_cache=lambda: dev(2, 16, 128, 16)),
    ),
    "nd cache for the default mode": (
        "cache_mode PA_NZ .the default. needs a cache",
        dict(cache_mode="PA_NZ"),
    ),
    "slot dtype": ("slot_mapping must be one of", dict(slot_mapping=lambda: dev(4, **FP32))),
    "slot count": ("slot_mapping must have shape", dict(slot_mapping=lambda: dev(5, **INT32))),
    "slot range": (
        "slots must lie in",
        dict(slot_mapping=lambda: torch.tensor([0, 1, 2, 256], dtype=torch.int32).npu()),
    ),
    "negative slot": (
        "slots must lie in",
        dict(slot_mapping=lambda: torch.tensor([0, 1, -1, 2], dtype=torch.int32).npu()),
    ),
    "key strides": ("rows must be contiguous", dict(key=lambda: strided(4, 2, 128))),
    "dtype": ("one dtype", dict(key=lambda: dev(4, 2, 128, dtype=torch.float16))),
    "mode": ("is not Norm or PA_NZ", dict(cache_mode="PA")),
}


@pytest.mark.parametrize("case", SCATTER)
def test_scatter_pa_kv_cache(case: str) -> None:
    rule, changes = SCATTER[case]
    base = dict(
        key=dev(4, 2, 128),
        value=dev(4, 2, 128),
        key_cache=dev(2, 128, 2, 128),
        value_cache=dev(2, 128, 2, 128),
        slot_mapping=torch.arange(4, dtype=torch.int32).npu(),
        cache_mode="Norm",
    )
    refused(rule, torch_npu.npu_scatter_pa_kv_cache, base, **make(changes))


RESHAPE: Cases = {
    "slot dtype": ("slot_indices must be one of int32", dict(slot_indices=lambda: dev(4, **INT64))),
    "cache": (
        "must be .blocks, block_size, heads, head_size",
        dict(key_cache=lambda: dev(2, 128, 4, 64)),
    ),
}


@pytest.mark.parametrize("case", RESHAPE)
def test_reshape_and_cache(case: str) -> None:
    rule, changes = RESHAPE[case]
    base = dict(
        key=dev(4, 2, 128),
        value=dev(4, 2, 128),
        key_cache=dev(2, 128, 2, 128),
        value_cache=dev(2, 128, 2, 128),
        slot_indices=torch.arange(4, dtype=torch.int32).npu(),
    )
    refused(rule, torch_npu._npu_reshape_and_cache, base, **make(changes))


FUSED_WRITE: Cases = {
    "mode": ("is not PA_NZ, the only documented one", dict(cache_mode="PA_BNSD")),
    "head size": (
        "head size must be 128, not 64",
        dict(qkv_size=[4, 1, 16, 64], head_nums=[8, 4, 4]),
    ),
    "head sum": ("sum of head_nums", dict(qkv_size=[4, 1, 9, 128])),
    "nd cache": ("the cache must be", dict(k_cache=lambda: dev(4, 128, 2, 128))),
    "blocks": (
        "fewer blocks",
        dict(k_cache=lambda: dev(2, 16, 128, 16), v_cache=lambda: dev(2, 16, 128, 16)),
    ),
    "block size": ("block_size must be a multiple", dict(k_cache=lambda: dev(4, 16, 24, 16))),
    "index dtype": ("index must be one of int64", dict(index=lambda: dev(4, **INT32))),
    "cos": ("cos must have shape", dict(cos=lambda: dev(4, 1, 128))),
    "scale": ("needs a scale", dict(k_scale=lambda: dev(2, 128, **FP32))),
}


@pytest.mark.parametrize("case", FUSED_WRITE)
def test_qkv_rms_norm_rope_cache(case: str) -> None:
    rule, changes = FUSED_WRITE[case]
    base = dict(
        qkv=dev(4, 1024),
        q_gamma=dev(128),
        k_gamma=dev(128),
        cos=dev(4, 128),
        sin=dev(4, 128),
        index=torch.arange(4).npu(),
        q_out=dev(4, 512),
        k_cache=dev(4, 16, 128, 16),
        v_cache=dev(4, 16, 128, 16),
        qkv_size=[4, 1, 8, 128],
        head_nums=[4, 2, 2],
    )
    refused(rule, torch_npu.npu_qkv_rms_norm_rope_cache, base, **make(changes))


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


PAGED: Cases = {
    "device lengths": ("must be a CPU tensor", dict(context_lens=lambda: lengths(3, 4).npu())),
    "length dtype": ("context_lens must be int32", dict(context_lens=torch.tensor([3, 4]))),
    "too long": ("exceed the block table", dict(context_lens=lengths(3, 257))),
    "table rows": ("one row per token", dict(block_table=lambda: dev(3, 2, **INT32))),
    "table dtype": ("block_table must be one of", dict(block_table=lambda: dev(2, 2, **INT64))),
    "heads": ("num_heads % num_kv_heads", dict(num_kv_heads=3)),
    "cache shape": (
        "must be .blocks, block_size, 2, 128",
        dict(key_cache=lambda: dev(4, 128, 256, 1)),
    ),
    "out strides": ("out must be contiguous", dict(out=lambda: strided(2, 4, 128))),
    "nz cache": ("format ND, not NZ", dict(key_cache=lambda: as_nz(dev(4, 128, 2, 128)))),
    "workspace": ("smaller than get_workspace", dict(workspace=lambda: dev(16, dtype=torch.uint8))),
}


@pytest.mark.parametrize("case", PAGED)
def test_paged_attention(case: str) -> None:
    rule, changes = PAGED[case]
    base = dict(
        query=dev(2, 4, 128),
        key_cache=dev(4, 128, 2, 128),
        value_cache=dev(4, 128, 2, 128),
        num_kv_heads=2,
        num_heads=4,
        scale_value=0.1,
        block_table=dev(2, 2, **INT32),
        context_lens=lengths(3, 4),
        out=dev(2, 4, 128),
    )
    refused(rule, torch_npu._npu_paged_attention, base, **make(changes))


@pytest.mark.opposite_modes
def test_paged_attention_names_blocks_outside_the_cache() -> None:
    table = torch.tensor([[9]], dtype=torch.int32).npu()
    with pytest.raises(RuntimeError, match="blocks outside the cache"):
        torch_npu._npu_paged_attention(
            dev(1, 4, 128),
            dev(4, 128, 2, 128),
            dev(4, 128, 2, 128),
            2,
            4,
            0.1,
            table,
            lengths(3),
            dev(1, 4, 128),
        )
        torch.npu.synchronize()


def full_mask(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool).triu(1).npu()


FUSED: Cases = {
    "head size": (
        "TND needs a head size of 128",
        dict(
            query=lambda: dev(4, 4, 64),
            key=lambda: dev(4, 128, 128),
            value=lambda: dev(4, 128, 128),
        ),
    ),
    "rows": ("must be the number of rows", dict(actual_seq_lengths=[1, 3])),
    "not cumulative": ("must be cumulative", dict(actual_seq_lengths=[4, 1])),
    "length lists": ("561002: 2 query lengths", dict(actual_seq_lengths_kv=[5])),
    "table rows": ("561002: block_table has 3 rows", dict(block_table=lambda: dev(3, 2, **INT32))),
    "too long": ("exceed 256 places", dict(actual_seq_lengths_kv=[5, 257])),
    "no lengths": ("needs actual_seq_lengths", dict(actual_seq_lengths_kv=None)),
    "no mask": ("needs the 2048 x 2048 mask", dict(sparse_mode=3)),
    "mask shape": (
        "mask must be 2048 x 2048",
        dict(sparse_mode=3, atten_mask=lambda: full_mask(128, 128)),
    ),
    "mask values": (
        "1 above the diagonal",
        dict(sparse_mode=3, atten_mask=lambda: full_mask(2048, 2048).logical_not()),
    ),
    "mask dtype": (
        "atten_mask must be one of",
        dict(sparse_mode=3, atten_mask=lambda: dev(2048, 2048)),
    ),
    "block size": ("block_size 64 but the cache", dict(block_size=64)),
    "table dtype": ("block_table must be one of", dict(block_table=lambda: dev(2, 2, **INT64))),
    "cache layout": (
        "cache .* must be|kv heads|block_size 128 but",
        dict(key=lambda: dev(4, 128, 2, 128), value=lambda: dev(4, 128, 2, 128)),
    ),
    "query strides": ("query must be contiguous", dict(query=lambda: strided(4, 4, 128))),
    "heads": ("does not have 8 heads", dict(num_heads=8)),
    "key dtype": ("share one dtype", dict(key=lambda: dev(4, 128, 256, dtype=torch.float16))),
}


@pytest.mark.parametrize("case", FUSED)
def test_fused_attention(case: str) -> None:
    rule, changes = FUSED[case]
    base = dict(
        query=dev(4, 4, 128),
        key=dev(4, 128, 256),
        value=dev(4, 128, 256),
        input_layout="TND",
        num_heads=4,
        num_key_value_heads=2,
        scale=0.1,
        block_table=dev(2, 2, **INT32),
        block_size=128,
        actual_seq_lengths=[1, 4],
        actual_seq_lengths_kv=[5, 200],
    )
    refused(rule, torch_npu.npu_fused_infer_attention_score, base, **make(changes))


BATCHED: Cases = {
    "prefill block": (
        "prefill: block_size must be 128",
        dict(
            key=lambda: dev(4, 64, 256),
            value=lambda: dev(4, 64, 256),
            block_size=64,
            actual_seq_lengths_kv=[5, 20],
        ),
    ),
    "cache by head": (
        "must be .blocks, block_size, heads",
        dict(key=lambda: dev(4, 2, 128, 128), value=lambda: dev(4, 2, 128, 128)),
    ),
    "lengths": (
        "561002: actual_seq_lengths_kv has 3",
        dict(
            query=lambda: dev(4, 3, 512),
            block_table=lambda: dev(4, 2, **INT32),
            actual_seq_lengths_kv=[5, 20, 7],
        ),
    ),
}


@pytest.mark.parametrize("case", BATCHED)
def test_fused_attention_by_batch(case: str) -> None:
    rule, changes = BATCHED[case]
    base = dict(
        query=dev(2, 3, 512),
        key=dev(4, 128, 256),
        value=dev(4, 128, 256),
        input_layout="BSH",
        num_heads=4,
        num_key_value_heads=2,
        scale=0.1,
        block_table=dev(2, 2, **INT32),
        block_size=128,
        actual_seq_lengths_kv=[5, 200],
    )
    assert base["query"].dtype is HALF
    refused(rule, torch_npu.npu_fused_infer_attention_score, base, **make(changes))
